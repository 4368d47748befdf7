"""Makes tables, figures and links to lines of code, from the raw data in benchmark/results/.

    python benchmark/report.py           # rewrites README.md, benchmark/README.md and the figures
    python benchmark/report.py --check   # only says whether the two texts are up to date

Tables stand between markers like <!-- results --> and <!-- end -->. A link from the name of a
function or class to a script, like [`Agent`](ppo.py#L1-L2), gets the lines of that definition, and
[rollout], [advantages] and [update] those of the parts of `train`.

Scores are the mean return of the last 100 training episodes of a run. Over seeds: the interquartile
mean with a 95 % percentile bootstrap interval (Agarwal et al. 2021), and mean ± standard deviation,
which is what others publish. For continuous control also what Tianshou reports: each run is
evaluated on the way, ten episodes each time, and of the means over seeds the best is taken, with
the standard deviation over seeds at that step.
"""

import ast
import csv
import gzip
import io
import json
import re
import sys
from pathlib import Path

import drawing
import numpy as np
from claim_figures import CAPTIONS, CLIPS, FIGURES, STEPS, complete, mean_kl
from claims import (
    BASE_SEEDS,
    CLAIMS,
    DECIDING,
    FINDINGS,
    HALF_CHEETAH,
    LUNAR,
    MUJOCO,
    SOURCES,
    TASKS,
    TWO,
    bootstrap,
    outcome,
    same_seeds,
    seeds_of,
    verdict,
)
from drawing import GREY, new_figure
from scipy import stats
from studies import (
    CANDIDATES,
    DOUBLE_PENDULUM,
    GIVEN_UP,
    SELECTION_TASKS,
    TUNED,
    TUNED_CHOSEN,
)

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
# Label: CleanRL, openai/baselines (both docs.cleanrl.dev), rl-zoo3 (its benchmark.md).
PUBLISHED = {
    "CartPole-v1": ("490.0 ± 6.1", "497.5 ± 4.0", "500 (100k steps)"),
    "Acrobot-v1": ("−86.4 ± 1.3", "−81.8 ± 5.6", "−73.5 (1M steps)"),
    "MountainCar-v0": ("−200", "−200", "−110.4 (1M steps)"),
    "LunarLander-v3": ("", "", "242 (v2, 1M steps)"),
}
# Environment: CleanRL (last episodes of training), Tianshou (best evaluation), rl-zoo3 (one trained
# agent, evaluated with its most probable actions; on v3 of the environments).
PUBLISHED_CONTINUOUS = {
    "HalfCheetah-v5": ("1,443 ± 46", "5,784 ± 1,244", "5,819 ± 664"),
    "Hopper-v5": ("2,383 ± 272", "2,609 ± 701", "2,410 ± 10"),
    "Walker2d-v5": ("2,288 ± 572", "3,589 ± 757", "3,479 ± 822"),
    "Ant-v4": ("", "3,258 ± 1,079", "1,327 ± 452"),
    "Ant-v5": ("", "", ""),
    "Swimmer-v5": ("", "67 ± 99", "281.6 ± 9.7"),
    "Humanoid-v5": ("716 ± 49", "787 ± 194", ""),
    "Reacher-v5": ("", "−4.1 ± 0.3", ""),
    "InvertedPendulum-v5": ("963 ± 22", "1,000 ± 0", ""),
    "InvertedDoublePendulum-v5": ("", "9,231 ± 270", ""),
}
# Game: CleanRL, openai/baselines, rl-zoo3, all after 10,000,000 steps.
PUBLISHED_ATARI = {
    "Pong": ("20.4 ± 0.2", "20.5 ± 0.5", "21.0 ± 0.1"),
    "Breakout": ("414.7 ± 28.1", "406.6 ± 31.6", "398 ± 33"),
    "BeamRider": ("1,916 ± 484", "2,643 ± 670", "3,397 ± 1,662"),
}


PUBLISHED_TUNED = {
    "Swimmer-v5": "281.6 ± 9.7 (rl-zoo3)",
    "InvertedDoublePendulum-v5": "9,231 ± 270 (Tianshou)",
    "Pendulum-v1": "−172.2 ± 104.2 (rl-zoo3)",
    "BipedalWalker-v3": "213.3 ± 129.5 (rl-zoo3, 5M steps)",
}
DOUBLE_PENDULUM_TASK = "InvertedDoublePendulum-v5"
BEST_PUBLISHED = {  # the highest of the published PPO scores at about the same number of steps
    "CartPole-v1": "500 (rl-zoo3)",
    "Acrobot-v1": "−73.5 (rl-zoo3, 1M)",
    "MountainCar-v0": "−110.4 (rl-zoo3)",
    "LunarLander-v3": "242 (rl-zoo3, v2)",
    "HalfCheetah-v5": "5,819 (rl-zoo3)",
    "Hopper-v5": "2,609 (Tianshou)",
    "Walker2d-v5": "3,589 (Tianshou)",
    "Ant-v4": "3,258 (Tianshou)",
    "Ant-v5": "",
    "Swimmer-v5": "282 (rl-zoo3)",
    "Humanoid-v5": "787 (Tianshou)",
    "Reacher-v5": "−4.1 (Tianshou)",
    "InvertedPendulum-v5": "1,000 (Tianshou)",
    "InvertedDoublePendulum-v5": "9,231 (Tianshou)",
    "Breakout": "414.7 (CleanRL)",
    "Pong": "21.0 (rl-zoo3)",
    "BeamRider": "3,397 (rl-zoo3)",
}


def read(path):
    return list(csv.DictReader(io.StringIO(gzip.decompress(path.read_bytes()).decode())))


def runs(study):
    """{label: {seed: path without the ending}} of a study's runs."""
    found = {}
    three_digits = lambda digits: digits[0].zfill(3)
    by_number = lambda path: re.sub(r"\d+", three_digits, path.name)  # 6M before 10M
    for path in sorted((RESULTS / study).glob("*.args.json"), key=by_number):
        label, seed = path.name.removesuffix(".args.json").rsplit("-", 1)
        found.setdefault(label, {})[int(seed)] = path.with_name(f"{label}-{seed}")
    return found


def flags(run):
    return json.loads(run.with_name(f"{run.name}.args.json").read_text())


def is_former(run):
    """Whether the former, longer scripts made this run: only they had this flag."""
    return "norm_adv_over" in flags(run)


def marked(task, seeds):
    """The task, with a star if the former, longer scripts made one of these runs."""
    return task + " *" * any(is_former(run) for run in seeds.values())


def total_steps(run):
    """The flag --total-timesteps of a run."""
    return flags(run)["total_timesteps"]


def last_100(run):
    return column_of(run, "episodes")[-100:].mean()


def column_of(run, table, column="episodic_return"):
    rows = read(run.with_name(f"{run.name}.{table}.csv.gz"))
    return np.array([float(row[column]) for row in rows])


def best_evaluation(seeds):
    """Mean and standard deviation over the seeds, at the evaluation with the best mean."""
    scores = np.array(
        [column_of(run, "evaluations").reshape(10, 10).mean(1) for run in seeds]
    )
    best = scores[:, scores.mean(0).argmax()]
    return best.mean(), best.std(ddof=1) if len(best) > 1 else 0.0


def iqm(scores, axis=-1):
    return stats.trim_mean(scores, 0.25, axis=axis)


def interval(scores):
    options = {
        "method": "percentile",
        "n_resamples": 10_000,
        "rng": np.random.default_rng(0),
    }
    return stats.bootstrap((scores,), iqm, **options).confidence_interval


def number(x, digits=1):
    return f"{x:,.{digits}f}".replace("-", "−")


def mean_of(published):
    """The number before the ± in a published result."""
    return float(published.split()[0].replace("−", "-").replace(",", ""))


def ppo_scores():
    head = ["environment", "steps", "seeds", "interquartile mean [95 %]", "mean ± std"]
    head += ["worst seed", "CleanRL", "baselines", "rl-zoo3"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label, published in PUBLISHED.items():
        seeds = runs("ppo").get(label)
        if not seeds:
            continue
        scores = np.array([last_100(run) for run in seeds.values()])
        low, high = interval(scores)
        cells = [marked(label, seeds), f"{total_steps(seeds[1]):,}", len(scores)]
        cells += [f"**{number(iqm(scores))}** [{number(low)}, {number(high)}]"]
        cells += [f"{number(scores.mean())} ± {number(scores.std(ddof=1))}"]
        cells += [number(scores.min()), *published]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def continuous_scores():
    head = [
        "environment",
        "seeds",
        "last 100: interquartile mean [95 %]",
        "mean ± std",
        "CleanRL",
    ]
    head += ["best evaluation: mean ± std", "Tianshou", "rl-zoo3", "reloaded / last 100"]
    lines, losses = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"], []
    above, tied, below = [], [], []
    for label, (cleanrl, tianshou, rl_zoo3) in PUBLISHED_CONTINUOUS.items():
        found = runs("continuous").get(label, {})
        if len(found) < 2:
            continue
        seeds = found.values()
        last, (best, deviation) = (
            np.array([last_100(run) for run in seeds]),
            best_evaluation(seeds),
        )
        reloaded = np.array([column_of(run, "reloaded").mean() for run in seeds])
        losses += list((last - reloaded) / abs(last))
        digits = 1 if abs(last.mean()) < 500 else 0
        if tianshou:
            difference = round(best, digits) - mean_of(tianshou)
            (tied if difference == 0 else above if difference > 0 else below).append(label)
        low, high = interval(last)
        interval_text = f"[{number(low, digits)}, {number(high, digits)}]"
        cells = [
            marked(label, found),
            len(last),
            f"**{number(iqm(last), digits)}** {interval_text}",
        ]
        cells += [
            f"{number(last.mean(), digits)} ± {number(last.std(ddof=1), digits)}",
            cleanrl,
        ]
        cells += [
            f"**{number(best, digits)}** ± {number(deviation, digits)}",
            tianshou,
            rl_zoo3,
        ]
        cells.append(number(reloaded.mean() / last.mean(), 2))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    reached = f"By the mean, our best evaluation is above Tianshou's on {len(above)} tasks "
    reached += f"({', '.join(above)}), "
    reached += f"tied with it on {len(tied)} ({', '.join(tied)}), "
    reached += f"and below it on {len(below)} ({', '.join(below)})."
    worst = (
        f"The worst of the {len(losses)} reloaded agents scored {max(losses):.0%}".replace(
            "%", " %"
        )
    )
    return [*lines, "", reached, f"{worst} below its last 100 episodes."]


def continuous_sb3():
    ours, theirs = runs("continuous"), runs("continuous-sb3")
    programs = [
        "ppo_continuous.py",
        "stable-baselines3",
        "stable-baselines3, rl-zoo3's flags",
    ]
    measures = ["last 100", "best evaluation"]
    heads = [f"{name}: {measure}" for name in programs for measure in measures]
    lines = [f"| environment | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for environment in ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5"):
        cells = [marked(environment, ours[environment])]
        for seeds in (
            ours[environment],
            theirs[f"{environment}-default"],
            theirs[f"{environment}-tuned"],
        ):
            cells.append(
                f"{spread([last_100(run) for run in seeds.values()])} ({len(seeds)} seeds)"
            )
            cells.append(" ± ".join(number(x, 0) for x in best_evaluation(seeds.values())))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def each(scores, stars=("", ""), digits=1):
    """The score of each seed in brackets, where there are several."""
    marked_scores = [number(score, digits) + star for score, star in zip(scores, stars)]
    return f" ({', '.join(marked_scores)})" if len(scores) > 1 else ""


def atari_scores():
    head = ["game", "seeds", "last 100 games: mean score", "trained agent, 100 games"]
    head += ["games played", "CleanRL", "baselines", "rl-zoo3"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label, found in runs("atari").items():
        game, seeds = label.split("-")[0], found.values()
        played = np.mean([len(column_of(run, "episodes")) for run in seeds])
        trained = [last_100(run) for run in seeds]
        reloaded = [column_of(run, "reloaded").mean() for run in seeds]
        stars = ["\\*" * is_former(run) for run in seeds]
        cells = [marked(game, found), str(len(seeds))]
        cells += [f"**{number(np.mean(trained))}**{each(trained, stars)}"]
        cells += [f"{number(np.mean(reloaded))}{each(reloaded, stars)}"]
        cells += [f"{played:,.0f}", *PUBLISHED_ATARI[game]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def atari_bf16():
    head = ["`--bf16`", "seeds", "last 100 games: mean ± std", "all games: mean ± std"]
    head += ["each seed's last 100"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for bf16 in ("on", "off"):
        seeds = runs("atari-bf16").get(f"Breakout-{bf16}", {}).values()
        if len(seeds) < 2:
            continue
        last = [last_100(run) for run in seeds]
        overall = [column_of(run, "episodes").mean() for run in seeds]
        means = [
            f"**{number(np.mean(x))}** ± {number(np.std(x, ddof=1))}"
            for x in (last, overall)
        ]
        cells = [bf16, str(len(seeds)), *means, ", ".join(map(number, last))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def speed(script):
    path = RESULTS / f"speed_{script}.json"
    if not path.exists():
        return []
    data = json.loads(path.read_text())
    peers = [name for name in ("stable-baselines3", "CleanRL") if name in data["rounds"][0]]
    head = ["program", "steps per second, median", *(f"× {peer}" for peer in peers)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in data["rounds"][0]:
        cells = [f"`{name}`", number(np.median([turn[name] for turn in data["rounds"]]), 0)]
        for peer in peers:
            ratios = [turn[name] / turn[peer] for turn in data["rounds"]]
            ratio = f"**{np.median(ratios):.2f}** ({min(ratios):.2f}–{max(ratios):.2f})"
            alike = name != peer and "num-envs" not in name and "own defaults" not in name
            cells.append(ratio if alike else "")
        lines.append("| " + " | ".join(cells) + " |")
    threads = "all cores each" if "atari" in script else "one thread each"
    rounds = f"{len(data['rounds'])} rounds of all programs in turn"
    return [*lines, "", f"{data['machine']}; {rounds}, {threads}."]


def summaries(study):
    """{label: {seed: summary}} of a study that keeps no episodes."""
    found = {}
    for path in sorted((RESULTS / study).glob("*.json")):
        label, seed = path.name.removesuffix(".json").rsplit("-", 1)
        found.setdefault(label, {})[int(seed)] = json.loads(path.read_text())
    return found


def selection():
    """Applies SELECTION_RULE of studies.py."""
    found = summaries("selection")
    scores = {  # of seeds 1 to 5; the defaults of that day come first
        candidate: {
            task: [run["score"] for run in found.get(f"{task}-{candidate}", {}).values()]
            for task in SELECTION_TASKS
        }
        for candidate in CANDIDATES
    }
    today = next(iter(scores))
    ratios = {}
    lines = [f"| task | {' | '.join(f'`{name}`' for name in scores)} |"]
    lines.append("|---" * (len(scores) + 1) + "|")
    for task in SELECTION_TASKS:
        best, cells = mean_of(BEST_PUBLISHED[task]), [task]
        for candidate, of_task in scores.items():
            seeds = of_task[task]
            if not seeds:
                cells.append("")
                continue
            mean = np.mean(seeds)
            ratio = mean / best if best > 0 else best / mean
            ratios.setdefault(candidate, {})[task] = ratio
            digits = 1 if abs(mean) < 500 else 0
            cells.append(f"{number(mean, digits)} ({len(seeds)}): {ratio:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    verdicts = []
    for candidate, of_task in ratios.items():
        bad = [task for task in of_task if of_task[task] < 0.85 * ratios[today][task]]
        if candidate in GIVEN_UP:
            verdicts.append("given up")
        elif bad:
            verdicts.append(f"excluded ({', '.join(bad)})")
        elif (
            len(of_task) < len(SELECTION_TASKS)
            or min(map(len, scores[candidate].values())) < 4
        ):
            verdicts.append("unfinished")
        else:
            verdicts.append(f"**{np.mean(list(of_task.values())):.5f}**")
    verdicts += [""] * (len(scores) - len(verdicts))
    return [*lines, f"| mean ratio | {' | '.join(verdicts)} |"]


def candidates_of(task):
    """{candidate: (flags, {seed: summary})} of those compared by TUNED_RULE, the default first."""
    if task == DOUBLE_PENDULUM_TASK:
        study, given = (
            "double-pendulum",
            {name: flags for name, (flags, _) in DOUBLE_PENDULUM.items()},
        )
    else:
        study, given = "tuned", TUNED[task]
    found = summaries(study)
    candidates = {
        name: (flags, found.get(f"{task}-{name}", {})) for name, flags in given.items()
    }
    for run in candidates.get("short-episodes", ("", {}))[1].values():
        run["score"] = run["evaluation"]  # (TUNED_RULE)
    if "default" not in candidates:
        seeds = summaries("selection").get(f"{task}-critic-256-32x64", {})
        candidates = {"default": ("", seeds)} | candidates
    return candidates


def spread(scores):
    """Mean ± standard deviation."""
    digits = 1 if abs(np.mean(scores)) < 500 else 0
    return f"{number(np.mean(scores), digits)} ± {number(np.std(scores, ddof=1), digits)}"


def tuned():
    """Candidates on seeds 1 to 5, and the chosen one on seeds 6 to 10."""
    head = ["task", "candidate", "flags", "seeds 1 to 5", "seeds 6 to 10", "published"]
    lines, unfinished = [], []
    for task, published in PUBLISHED_TUNED.items():
        candidates = candidates_of(task)
        if any(
            seed not in found for _, found in candidates.values() for seed in range(1, 6)
        ):
            unfinished.append(task)
            continue
        for name, (flags, found) in candidates.items():
            choosing = [run["score"] for seed, run in found.items() if seed <= 5]
            fresh = [run["score"] for seed, run in found.items() if seed > 5]
            cells = [task, f"`{name}`", f"`{flags}`" if flags else "", spread(choosing)]
            chosen = TUNED_CHOSEN.get(task) == name and len(fresh) == 5
            cells += [f"**{spread(fresh)}**" if chosen else "", published if chosen else ""]
            lines.append(f"| {' | '.join(cells)} |")
    if lines:
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines, ""]
    if unfinished:
        lines += [f"Missing runs: {', '.join(unfinished)}."]
    return lines


def double_pendulum():
    """What each candidate does to InvertedDoublePendulum, on seeds 1 to 5."""
    head = ["candidate", "flags", "score", "finished agent", "peak of the curve"]
    head += ["last 100 episodes under 30 steps", "σ at the end"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, (flags, found) in candidates_of(DOUBLE_PENDULUM_TASK).items():
        seeds = [run for seed, run in found.items() if seed <= 5]
        if len(seeds) < 5:
            return ["The runs are not finished yet."]
        peaks = [max(point for point in run["curve"] if point is not None) for run in seeds]
        falls = np.mean([np.array(run["last_lengths"]) < 30 for run in seeds])
        entropy = np.mean([run["metrics"]["entropy"][-1] for run in seeds])
        sigma = np.exp(entropy - 0.5 * np.log(2 * np.pi * np.e))  # (entropy), one action
        cells = [
            f"`{name}`",
            f"`{flags}`" if flags else "",
            spread([r["score"] for r in seeds]),
        ]
        evaluations = [run["evaluation"] for run in seeds if run.get("evaluation")]
        cells.append(spread(evaluations) if len(evaluations) == 5 else "")
        cells += [number(np.mean(peaks), 0), f"{100 * falls:.0f} %", f"{sigma:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def minutes(runs_of_task):
    """Median minutes that a run took, all of it."""
    seconds = [column_of(run, "metrics", "seconds").max() for run in runs_of_task]
    return f"{np.median(seconds) / 60:,.1f}"


def results(only=None):
    """One row per task, or per task in only."""
    head = ["task", "steps", "seeds", "score: interquartile mean [95 %]"]
    head += ["mean ± std", "best published PPO", "minutes"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    rows = [("ppo", label, label, BEST_PUBLISHED[label]) for label in PUBLISHED]
    rows += [
        ("continuous", label, label, BEST_PUBLISHED[label])
        for label in PUBLISHED_CONTINUOUS
    ]
    rows += [
        ("atari", f"{game}-10M", game, BEST_PUBLISHED[game]) for game in PUBLISHED_ATARI
    ]
    for study, label, task, published in rows:
        if only and task not in only:
            continue
        seeds = runs(study)[label]
        found = list(seeds.values())
        steps = column_of(found[0], "metrics", "global_step").max()
        scores = [last_100(run) for run in found]
        cells = [
            marked(task, seeds),
            *score_cells(steps, scores),
            published,
            minutes(found),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        fresh = tuned_runs(task)
        if fresh and not only:
            cells = [f"{task}, [tuned](#tuned-flags)"]
            cells += score_cells(fresh[0]["steps"], [run["score"] for run in fresh])
            cells += [published, f"{np.median([run['minutes'] for run in fresh]):,.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def score_cells(steps, scores):
    """Millions of steps, number of seeds, interquartile mean [95 %], mean ± standard deviation."""
    scores = np.array(scores)
    digits = 0 if abs(scores.mean()) >= 500 else 1
    mean, score = number(scores.mean(), digits), number(iqm(scores), digits)
    if len(scores) > 2:
        low, high = interval(scores)
        score = f"**{score}** [{number(low, digits)}, {number(high, digits)}]"
    else:
        score = f"**{score}**{each(scores, digits=digits)}"
    deviation = f" ± {number(scores.std(ddof=1), digits)}" if len(scores) > 1 else ""
    return [f"{steps / 1e6:.1f}M", str(len(scores)), score, f"{mean}{deviation}"]


def tuned_runs(task):
    """The five runs on seeds 6 to 10 of the candidate chosen for `task`, once they are finished."""
    chosen = TUNED_CHOSEN.get(task, "default")
    if chosen == "default":
        return []
    fresh = [run for seed, run in candidates_of(task)[chosen][1].items() if seed > 5]
    return fresh if len(fresh) == 5 else []


def below():
    """The tasks on which the best published score was not reached, by either mean."""
    both, one = [], []
    tasks = [("ppo", task, task) for task in PUBLISHED]
    tasks += [
        ("continuous", task, task) for task in PUBLISHED_CONTINUOUS if BEST_PUBLISHED[task]
    ]
    tasks += [("atari", f"{game}-10M", game) for game in PUBLISHED_ATARI]
    for study, label, task in tasks:
        published = mean_of(BEST_PUBLISHED[task])
        scores = np.array([last_100(run) for run in runs(study)[label].values()])
        digits = 0 if abs(published) >= 500 else 1
        means = {"interquartile mean": iqm(scores), "mean": scores.mean()}
        short = [name for name, mean in means.items() if round(mean, digits) < published]
        if len(short) == 2:
            both.append(task)
        elif short:
            one.append(f"{task} (by the {short[0]} only)")
    behind = both + one
    line = f"The best published mean is higher on {len(behind)} of {len(tasks)} tasks: "
    line += f"{', '.join(behind)}."
    reached = []
    for _, _, task in tasks:
        fresh = tuned_runs(task)
        if fresh and np.mean([run["score"] for run in fresh]) >= mean_of(
            BEST_PUBLISHED[task]
        ):
            short = TUNED_CHOSEN[task] == "short-episodes"
            link = "[trained in short episodes](benchmark/README.md#inverteddoublependulum)"
            reached.append(task + f" ({link})" * short)
    if reached:
        link = "[tuning](benchmark/README.md#tuned-flags)"
        line += f" With {link}, ours is level or ahead on {' and '.join(reached)}."
    return [line]


def claim_effects(claim, estimate=bootstrap):
    """{label of a comparison: (effects, number of missing runs)}, on tasks that have all runs.

    Effects are what `estimate` returns: {task or "pooled": (effect, low, high)}.
    """
    found, tasks_of = summaries("claims"), {}
    needed = lambda name: seeds_of(claim, name.split("--")[1])
    random_returns = json.loads((RESULTS / "claims-random.json").read_text())
    arm_scores = {  # one array of an arm, wherever it is used: then it is resampled once
        name: np.array([seeds[seed][claim.score] for seed in sorted(seeds)])
        for name, seeds in found.items()
    }
    for comparison in claim.comparisons:
        arms = comparison.arm, comparison.base, comparison.reference
        for task in comparison.tasks:
            names = [f"{task}--{arm}" for arm in arms]
            tasks_of.setdefault(comparison.label, {})[task] = names
    if claim.name == "kl-penalty":  # of each task the best β

        def score_of(
            names,
        ):  # an unfinished arm counts as best: then its task stays unfinished
            scores = arm_scores.get(names[0], [])
            return np.mean(scores) if len(scores) >= needed(names[0]) else np.inf

        tasks_of["best KL penalty"] = {
            task: max([tasks[task] for tasks in tasks_of.values()], key=score_of)
            for task in TWO
        }
    effects = {}
    for label, tasks in tasks_of.items():
        scores = {
            task: [arm_scores[name] for name in names]
            for task, names in tasks.items()
            if all(len(arm_scores.get(name, [])) >= needed(name) for name in names)
        }
        if scores:
            missing = sum(
                max(needed(name) - len(arm_scores.get(name, [])), 0)
                for name in {name for names in tasks.values() for name in names}
            )
            rng = np.random.default_rng(0)
            effects[label] = estimate(scores, random_returns, rng), missing
    return effects


def each_task(effects):
    return "; ".join(f"{t}: {percent(*e)}" for t, e in effects.items() if t != "pooled")


def percent(effect, low, high):
    text = f"{effect:+.0%} [{low:+.0%}, {high:+.0%}]"
    return re.sub(r"[+-]0%", "0%", text).replace("-", "−").replace("%", " %")


def ratio_of_kls():
    """{(task, ε): mean approx_kl, divided by ½ε²}."""
    data = complete(summaries("claims"), TWO, CLIPS.values(), mean_kl)
    return {
        (task, clip): values[arm].mean() / (clip**2 / 2)
        for task, values in data.items()
        for clip, arm in CLIPS.items()
    }


def clipfrac_stays():
    """Whether clipfrac of epoch 100 is within 10 % of that of epoch 20."""
    seeds = summaries("claims")["HalfCheetah-v5--plain-epochs-100"].values()
    means = [
        np.nanmean(
            [np.array(run["metrics"][f"clipfrac_in_epoch_{n}"], float) for run in seeds]
        )
        for n in (20, 100)
    ]
    return abs(means[1] / means[0] - 1) <= 0.1


def ladder():
    """Claim 15: {step: mean return}, and {step: (change from the step before, low, high)}."""
    data = complete(summaries("claims"), [HALF_CHEETAH], STEPS.values())
    if not data:
        return {}, {}
    steps = [step.replace("\n", " ") for step in STEPS]
    scores = list(data[HALF_CHEETAH].values())
    rng = np.random.default_rng(0)
    draws = [rng.choice(x, (10_000, len(x))).mean(1) for x in scores]
    means = {step: x.mean() for step, x in zip(steps, scores)}
    changes = {}
    for i in range(1, len(steps)):
        low, high = np.percentile(draws[i] - draws[i - 1], [2.5, 97.5])
        changes[steps[i]] = (means[steps[i]] - means[steps[i - 1]], low, high)
    return means, changes


def signed(*change_low_high):
    change, low, high = [("+" if x > 0 else "") + number(x, 0) for x in change_low_high]
    return f"{change} [{low}, {high}]"


def ladder_table():
    means, changes = ladder()
    lines = ["Each row adds one change to the row above it."]
    lines += [
        "",
        "| agent | mean return | change from the row above [95 %] |",
        "|---|---|---|",
    ]
    for step, mean in means.items():
        plus = "+ " if step in changes else ""
        change = signed(*changes[step]) if step in changes else ""
        lines.append(f"| {plus}{step} | {number(mean, 0)} | {change} |")
    return lines if means else []


def decision(claim):
    """What decides the claim, in figures, and the outcome; None without a task with all runs."""
    found = claim_effects(claim)
    effects = {label: of_tasks for label, (of_tasks, _) in found.items()}
    if claim.name == "clip-kl":
        ratios = ratio_of_kls()
        if not ratios:
            return None
        low, high = min(ratios.values()), max(ratios.values())
        near = low >= 0.5 and high <= 2
        measured = {task for task, _ in ratios}
        where = only_on(measured, missing=len(TWO) - len(measured))
        return (
            f"mean KL: {low:.2f} to {high:.2f} times ½ε²{where}",
            "holds" if near else "does not hold",
        )
    if claim.name == "ladder":
        means, changes = ladder()
        if not means:
            return None
        first, last = (
            number(list(means.values())[0], 0),
            number(list(means.values())[-1], 0),
        )
        figures = (
            f"CleanRL's flags in our script → our defaults: mean return {first} → {last} "
        )
        largest = max(changes, key=changes.get)
        text = f"largest measured step: {largest}, {signed(*changes[largest])}"
        return f"{figures}({HALF_CHEETAH}, 1,000,000 steps)", text
    labels = DECIDING[claim.name][2]
    if not all(label in effects for label in labels):
        return None
    more = True
    if claim.name == "epochs":
        more = effects["1 epoch"]["pooled"][0] < -0.5
    if claim.name == "hundred-epochs":
        more = clipfrac_stays()
    if claim.name == "lambda":
        others = [effects.get(label) for label in ("λ = 0.5", "λ = 0.9", "λ = 0.99")]
        if None in others:
            return None
        more = not any(verdict(e) == "matters" and e["pooled"][0] > 0 for e in others)
    parts = []
    for label in labels:
        differs = (
            verdict(effects[label]) == "depends on the task"
        )  # then their mean says nothing
        effect = (
            each_task(effects[label]) if differs else percent(*effects[label]["pooled"])
        )
        parts.append(f"{label}: {effect}{rests_on(effects[label])}")
    measured = [effects[label].keys() - {"pooled"} for label in labels]
    if "MuJoCo" in claim.text and not all(tasks & set(MUJOCO) for tasks in measured):
        return None
    missing = sum(found[label][1] for label in labels)
    where = only_on(set.union(*measured), missing)
    word = outcome(claim, effects, more)
    shown = [
        label for label in labels if not clear_tasks(effects[label]).isdisjoint(MUJOCO)
    ]
    if word == "holds" and "MuJoCo" in claim.text and shown != labels:
        word += f"; on MuJoCo shown only for: {', '.join(shown)}"
    return "; ".join(parts) + where, word


def in_words(claim, word):
    """The finding in words, if it is about this verdict."""
    verdict_then, sentence = FINDINGS.get(claim.name, ("", ""))
    return sentence if verdict_then and word.startswith(verdict_then) else ""


def only_on(measured, missing):
    """Names the tasks if they are not the usual two, or not yet all that the claim asks for."""
    names = ", ".join(sorted(measured))
    if missing:
        return f" (only {names})"
    return "" if measured == set(TWO) else f" ({names})"


def clear_tasks(effects):
    """The tasks whose own interval excludes 0."""
    tasks = effects.keys() - {"pooled"}
    return {task for task in tasks if effects[task][1] > 0 or effects[task][2] < 0}


def rests_on(effects):
    """Names the tasks that a verdict of "matters" comes from, if they are not all."""
    tasks, clear = effects.keys() - {"pooled"}, clear_tasks(effects)
    if verdict(effects) != "matters" or len(clear) in (0, len(tasks)):
        return ""
    return f", shown on {', '.join(sorted(clear))} only"


def same_seeds_lines():
    """What changes if only the same seeds are compared, which RULE does not."""
    base = summaries("claims").get(f"{HALF_CHEETAH}--base", {})
    scores = np.array([base[seed]["score"] for seed in sorted(base)])
    if len(scores) < BASE_SEEDS:
        return []
    first, others = number(scores[:5].mean(), 0), number(scores[5:].mean(), 0)
    text = f"On {HALF_CHEETAH} the default agent reaches {first} with seeds 1 to 5, "
    text += f"{others} with seeds 6 to {BASE_SEEDS}."
    differing = []
    for claim in CLAIMS:
        paired, deciding = claim_effects(claim, same_seeds), DECIDING.get(claim.name)
        for label, (effects, missing) in claim_effects(claim).items():
            if deciding is None or label not in deciding[2]:
                continue
            words = [verdict(effects), verdict(paired[label][0])]
            if not missing and words[0].split(" (")[0] != words[1].split(" (")[0]:
                differing.append(
                    f"- {claim.number}. {label}: {words[1]} instead of {words[0]}"
                )
    if differing:
        text += (
            " Of the comparisons that decide a claim, these would get another verdict from "
        )
        text += "the same seeds alone:"
    return [text, *differing, ""]


def effects_table(claim, effects):
    paired = claim_effects(claim, same_seeds)
    lines = ["| comparison | each task | same seeds | all tasks | verdict |"]
    lines += ["|---|---|---|---|---|"]
    for label, (of_tasks, missing) in effects.items():
        word = f"unfinished, missing runs: {missing}" if missing > 0 else verdict(of_tasks)
        cells = [label, each_task(of_tasks), each_task(paired[label][0])]
        cells += [f"**{percent(*of_tasks['pooled'])}**", word]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def claims():
    """For each claim: who says so, the effects measured here and the verdict of RULE."""
    lines = ["The comparisons that decide the claims:"]
    lines += ["![Effects and their intervals](results/claims.svg)", ""]
    lines += same_seeds_lines()
    if not any(map(claim_effects, CLAIMS)):
        lines = []
    for claim in CLAIMS:
        lines += [f"**{claim.number}. {claim.text}.** Others: {SOURCES[claim.name]}."]
        lines += [f"If it is right, we expect: {claim.prediction}."]
        if claim.score == "mean_return":
            lines += ["The score is the mean return over the whole run."]
        lines += [f"`python benchmark/run.py claims-{claim.name}` makes the data.", ""]
        effects = claim_effects(claim)
        if not effects:
            lines += ["No task has all its runs yet.", ""]
            continue
        lines += ladder_table() if claim.name == "ladder" else effects_table(claim, effects)
        lines.append("")
        if claim.name in FIGURES and (figure := FIGURES[claim.name](summaries("claims"))):
            drawing.close(figure)
            lines += [f"![Claim {claim.number}](results/claim-{claim.name}.svg)"]
            lines += [CAPTIONS[claim.name], ""]
        if decided := decision(claim):
            figures, word = decided
            lines += [
                f"**{word[0].upper()}{word[1:]}**: {figures}. {in_words(claim, word)}".strip(),
                "",
            ]
    return lines[:-1]


def claim_figures():
    for claim in CLAIMS:
        if claim.name in FIGURES and (figure := FIGURES[claim.name](summaries("claims"))):
            save(figure, f"claim-{claim.name}.svg")


def claims_figure():
    """The comparisons that decide the claims: effect and interval of all tasks and of each."""
    rows = []
    for claim in CLAIMS:
        effects = claim_effects(claim)
        for label in DECIDING[claim.name][2] if claim.name in DECIDING else ():
            if label in effects:
                rows.append((f"{claim.number}. {label}", effects[label][0]))
    if not rows:
        return
    figure, axes = new_figure(1, 1, (8, 1.2 + 0.45 * len(rows)))
    axis = axes[0, 0]
    colors = dict.fromkeys(TASKS, GREY) | {HALF_CHEETAH: "C1", LUNAR: "C2"}
    names = {"pooled": "all tasks", HALF_CHEETAH: HALF_CHEETAH, LUNAR: LUNAR}
    for y, (_, effects) in enumerate(rows):
        for i, (task, (effect, low, high)) in enumerate(effects.items()):
            pooled = task == "pooled"
            look = {"color": colors.get(task, "C0"), "linewidth": 3 if pooled else 1}
            place = y if pooled else y + 0.2 + 0.12 * i  # tasks stand below
            axis.plot([100 * low, 100 * high], [place, place], **look)
            look |= {"linewidth": 0, "markersize": 7 if pooled else 4}
            axis.plot(
                100 * effect, place, "o", label=names.get(task, "another task"), **look
            )
    axis.axvline(0, color=GREY, linestyle=":")
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set_ylim(len(rows) - 0.2, -0.4)  # the first claim on top
    axis.set_xlabel("effect, %")
    handles = dict(zip(*reversed(axis.get_legend_handles_labels())))
    options = {"loc": "outside upper center", "ncols": 4, "frameon": False}
    figure.legend(handles.values(), handles, labelcolor=GREY, **options)
    save(figure, "claims.svg")


def does_it_matter():
    """The claims that have been decided."""
    lines = ["| claim | effect [95 %] | verdict |", "|---|---|---|"]
    for claim in CLAIMS:
        if found := decision(claim):
            lines.append(f"| {claim.text} | {found[0]} | {found[1]} |")
    return lines


def kl_limit():
    """Scores with and without the limit on the KL of an update, and the KL without it."""
    limited, free = summaries("selection"), summaries("kl-limit")
    lines = [
        "| task | with the limit | without | without / with | mean `approx_kl` without |"
    ]
    lines.append("|---" * 5 + "|")
    for task in SELECTION_TASKS:
        runs_with, runs_without = (
            limited[f"{task}-16x128"].values(),
            free[f"{task}-none"].values(),
        )
        means, cells = [], [task]
        for seeds in (runs_with, runs_without):
            scores = np.array([run["score"] for run in seeds])
            means.append(scores.mean())
            digits = 1 if abs(scores.mean()) < 500 else 0
            deviation = number(scores.std(ddof=1), digits)
            cells.append(f"**{number(scores.mean(), digits)}** ± {deviation}")
        kl = np.mean([mean_kl(run) for run in runs_without])
        lines.append(
            f"| {' | '.join(cells)} | {means[1] / means[0]:.2f} | {number(kl, 3)} |"
        )
    return lines


def overview():
    """What each script is for, and what one example of it costs and reaches."""
    lines = ["| file | actions | example | steps | minutes | score | published |"]
    lines.append("|---" * 7 + "|")
    for script, actions, study, label, task in (
        ("ppo.py", "discrete", "ppo", "CartPole-v1", "CartPole-v1"),
        (
            "ppo_continuous.py",
            "continuous",
            "continuous",
            "HalfCheetah-v5",
            "HalfCheetah-v5",
        ),
        ("ppo_atari.py", "Atari games", "atari", "Breakout-10M", "Breakout"),
    ):
        found = list(runs(study)[label].values())
        steps = f"{column_of(found[0], 'metrics', 'global_step').max() / 1e6:.1f}M"
        score = np.mean([last_100(run) for run in found])
        cells = [f"[`{script}`]({script})", actions, marked(task, runs(study)[label])]
        cells += [steps, minutes(found)]
        cells += [number(score, 0), BEST_PUBLISHED[task]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def diagnostics():
    """What the columns of metrics.csv look like in the first run of today's scripts."""
    columns = ["clipfrac", "approx_kl", "entropy", "explained_variance", "grad_norm"]
    heads = [f"`{column}`" for column in columns]
    lines = [f"| run | {' | '.join(heads)} |", "|---" * 6 + "|"]
    for study, label in (
        ("ppo", "CartPole-v1"),
        ("ppo", "LunarLander-v3"),
        ("continuous", "HalfCheetah-v5"),
        ("atari", "Breakout-10M"),
    ):
        run = next(run for run in runs(study)[label].values() if not is_former(run))
        table = read(run.with_name(f"{run.name}.metrics.csv.gz"))
        cells = [label.split("-")[0]]
        tenth = len(table) // 10
        for column in columns:
            means = []
            for part in (table[:tenth], table[-tenth:]):
                means.append(np.mean([float(row[column]) for row in part if row[column]]))
            cells.append(" → ".join(f"{mean:.2g}".replace("-", "−") for mean in means))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def rlhf_scores():
    """The reference's {measure: number} and {β: {measure: numbers of all seeds}}."""
    folder, found = RESULTS / "rlhf", {}
    for path in sorted(folder.glob("beta-*.json")):
        beta = float(path.name.split("-")[1])
        for measure, value in json.loads(path.read_text()).items():
            found.setdefault(beta, {}).setdefault(measure, []).append(value)
    arms = {
        beta: {m: np.array(v) for m, v in found[beta].items()} for beta in sorted(found)
    }
    return json.loads((folder / "reference.json").read_text()), arms


def rlhf():
    reference, arms = rlhf_scores()
    lines = ["| β | seeds | KL to the reference per episode | proxy return | true return |"]
    lines.append("|---" * 5 + "|")
    for beta, arm in arms.items():
        cells = [f"{beta:g}", str(len(arm["kl"]))]
        for measure in ("kl", "proxy", "true"):
            mean, deviation = arm[measure].mean(), arm[measure].std(ddof=1)
            cells.append(f"{number(mean)} ± {number(deviation)}")
        lines.append(f"| {' | '.join(cells)} |")
    cells = [number(reference[measure]) for measure in ("kl", "proxy", "true")]
    return [*lines, f"| reference | | {' | '.join(cells)} |", "", rlhf_verdict()]


def rlhf_verdict():
    """Applies the rule that rlhf.py states: -1 reversed, 0 not settled, 1 holds, for each part."""
    reference, arms = rlhf_scores()
    betas = list(arms)

    def sign(samples, others=None):
        """Sign of mean(samples) − mean(others), 0 if the 95 % bootstrap interval holds 0."""
        rng = np.random.default_rng(0)
        draw = lambda x: rng.choice(x, (10_000, len(x))).mean(1)
        low, high = np.percentile(
            draw(samples) - (0 if others is None else draw(others)), [2.5, 97.5]
        )
        return int(low > 0) - int(high < 0)

    none = arms[betas[0]]
    falls = [sign(arms[a]["kl"], arms[b]["kl"]) for a, b in zip(betas, betas[1:])]
    games = [
        sign(none["proxy"] - reference["proxy"]),
        sign(reference["true"] - none["true"]),
    ]
    helps = [sign(arms[beta]["true"], none["true"]) for beta in betas[1:]]
    parts = [min(falls), min(games), max(helps)]
    words = {1: "holds", 0: "is not settled by this data", -1: "does not hold"}
    verdict = "The KL penalty keeps the policy from drifting and from gaming the reward"
    details = [f"({i}) {words[part]}" for i, part in enumerate(parts, 1)]
    return f"*{verdict}*: **{words[min(parts)]}** in this experiment; by part, {', '.join(details)}."


def rlhf_line():
    return [rlhf_verdict().split("; by part")[0] + "."]


def rlhf_figure():
    """Proxy and true return against the KL to the reference: the frontier of RLHF papers."""
    reference, arms = rlhf_scores()
    for measure, color in (("proxy", "C1"), ("true", "C0")):
        figure, axes = new_figure(1, 1, (4.3, 3.4))
        axis = axes[0, 0]
        for beta, arm in arms.items():
            axis.plot(arm["kl"], arm[measure], "o", color=color, alpha=0.4, markersize=4)
            place = {"xytext": (-9, 5), "textcoords": "offset points", "ha": "right"}
            if measure == "true":
                below = {"xytext": (-12, -12), "ha": "right"} if beta == 0.1 else {}
                place |= {"xytext": (9, 5), "ha": "left"} | below
            axis.annotate(f"β = {beta:g}", (arm["kl"].mean(), arm[measure].mean()), **place)
        kls = [arm["kl"].mean() for arm in arms.values()]
        axis.plot(
            kls, [arm[measure].mean() for arm in arms.values()], color=color, linewidth=2
        )
        axis.axhline(reference[measure], color=GREY, linestyle=":")
        axis.set_xscale("log")
        axis.set_xlim(3 if measure == "proxy" else 7, 7000)
        axis.set_xlabel("KL(π ‖ π_ref) per episode")
        axis.set_title(f"{measure} return (dotted: reference)", color=GREY)
        axis.margins(y=0.15)
        save(figure, f"rlhf-{measure}.svg")


def speed_line():
    """The headline of the speed tables."""

    def ratio(study, name):
        rounds = json.loads((RESULTS / f"speed_{study}.json").read_text())["rounds"]
        return (
            f"{np.median([turn[name] / turn['stable-baselines3'] for turn in rounds]):.1f}"
        )

    def cpu(study):
        machine = json.loads((RESULTS / f"speed_{study}.json").read_text())["machine"]
        return machine.split(",")[0].replace("(R)", "")

    bf16, float32 = "ppo_atari.py", "ppo_atari.py --bf16 off"
    text = "Steps per second against stable-baselines3: "
    text += f"{ratio('ppo', 'ppo.py --compile')} times (`ppo.py --compile`), "
    text += f"{ratio('ppo_continuous', 'ppo_continuous.py --compile')} times "
    text += "(`ppo_continuous.py --compile`), "
    text += f"{ratio('ppo_atari', bf16)} times (`ppo_atari.py` in bfloat16, {cpu('ppo_atari')}; "
    text += f"with `--bf16 off` {ratio('ppo_atari', float32)}; {cpu('ppo_atari_xeon')}: "
    text += f"{ratio('ppo_atari_xeon', bf16)}, with `--bf16 off` "
    text += f"{ratio('ppo_atari_xeon', float32)})."
    return [text]


TABLES = {
    "README.md": {
        "overview": overview,
        "diagnostics": diagnostics,
        "results": lambda: results([title for *_, title in HEADLINE]),
        "does it matter": does_it_matter,
        "result-lines": lambda: [*below(), *speed_line()],
        "rlhf": rlhf_line,
    },
    "benchmark/README.md": {
        "results": results,
        "ppo-scores": ppo_scores,
        "continuous-scores": continuous_scores,
        "continuous-sb3": continuous_sb3,
        "selection": selection,
        "kl-limit": kl_limit,
        "tuned": tuned,
        "double-pendulum": double_pendulum,
        "atari-scores": atari_scores,
        "atari-bf16": atari_bf16,
        "ppo-speed": lambda: speed("ppo"),
        "continuous-speed": lambda: speed("ppo_continuous"),
        "atari-speed": lambda: speed("ppo_atari"),
        "atari-speed-xeon": lambda: speed("ppo_atari_xeon"),
        "rlhf": rlhf,
        "claims": claims,
    },
}
PARTS = {  # of train: first line, the line after
    "rollout": ("# 1. Rollout", "# 2. Advantages"),
    "advantages": ("# 2. Advantages", "# 3. Update"),
    "update": ("# 3. Update", "if not all(value.isfinite()"),
}


def lines_of(name, script):
    """First and last line of a definition or part of a script."""
    source = (ROOT / script).read_text()
    if name in PARTS:
        lines = source.splitlines()
        start, end = (
            next(i for i, line in enumerate(lines, 1) if mark in line)
            for mark in PARTS[name]
        )
        return start, end - 1
    nodes = [n for n in ast.walk(ast.parse(source)) if getattr(n, "name", None) == name]
    assert nodes, f"{script} has no {name}"
    return nodes[0].lineno, nodes[0].end_lineno


def render(file):
    """The text of README.md or benchmark/README.md with its tables and line numbers made anew."""
    text = (ROOT / file).read_text()
    for name, table in TABLES[file].items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        assert re.search(pattern, text, re.S), f"{file} has no markers for {name}"
        block = "\n".join(table())
        replace = lambda found, block=block: f"{found[1]}{block}\n{found[2]}"
        text = re.sub(pattern, replace, text, flags=re.S)

    def link(found):
        first, last = lines_of(found[2], found[4])
        return f"[{found[1]}{found[2]}{found[3]}]({found[4]}#L{first}-L{last})"

    length = len((ROOT / "ppo.py").read_text().splitlines())
    text = re.sub(r"\[\d+ lines\]", f"[{length} lines]", text)
    return re.sub(r"\[(`?)(\w+)(`?)\]\((ppo\w*\.py)(?:#[L\d-]+)?\)", link, text)


def explain_clip():
    """The clipped objective against the ratio, for both signs of the advantage; ε = 0.2."""
    for name, sign in (("positive", 1), ("negative", -1)):
        figure, axes = new_figure(1, 1, (4.3, 3.4))
        axis, ratio = axes[0, 0], np.linspace(0, 2.6, 300)
        clipped = np.minimum(sign * ratio, sign * ratio.clip(0.8, 1.2))
        flat = (1.2, 2.6) if sign > 0 else (0, 0.8)
        axis.axvspan(*flat, color="C1", alpha=0.2, label="gradient 0")
        axis.plot(ratio, sign * ratio, color=GREY, linestyle=":", label="ρ Â")
        axis.plot(ratio, clipped, color="C0", linewidth=2.5, label="objective")
        for edge in (0.8, 1.2):
            axis.axvline(edge, color=GREY, linewidth=0.8)
        for place, case in zip(
            (0.4, 1.0, 1.9), ("3", "1", "5") if sign > 0 else ("4", "2", "6")
        ):
            height = np.interp(place, ratio, clipped) + (-0.3 if case in "154" else 0.3)
            circle = {"boxstyle": "circle", "edgecolor": GREY, "facecolor": "none"}
            axis.text(place, height, case, ha="center", va="center", bbox=circle)
        axis.set_xlabel("ratio ρ")
        axis.set_title(f"Â = {'+' if sign > 0 else '−'}1; circles: cases", color=GREY)
        axis.set_ylim((-0.05, 2.9) if sign > 0 else (-2.9, 0.05))
        if sign > 0:
            axis.plot([2.5], [1.2], "o", color="C3", label="example")
            axis.legend(
                loc="upper left", labelcolor=GREY, frameon=False, fontsize=10, borderpad=0
            )
        save(figure, f"clip-{name}.svg")


def explain_gae():
    """Weights (1 − λ) λ^(k−1) of the k-step advantages."""
    figure, axes = new_figure(1, 1, (4.6, 3))
    steps = np.arange(1, 31)
    for color, lam in zip(("C0", "C1", "C2", "C3"), (0.5, 0.8, 0.9, 0.95)):
        weights = (1 - lam) * lam ** (steps - 1)
        axes[0, 0].plot(steps, weights, ".-", color=color, label=f"λ = {lam}")
    axes[0, 0].set_xlabel("steps k")
    axes[0, 0].set_ylabel("weight")
    axes[0, 0].legend(labelcolor=GREY, frameon=False)
    save(figure, "gae_weights.svg")


def diagnostics_figure():
    """Columns of metrics.csv of healthy runs beside runs with ten times the learning rate."""
    found = summaries("diagnostics")
    limits = {"return": (-250, 320), "explained_variance": (0, 1.05)}
    for name in (
        "return",
        "approx_kl",
        "clipfrac",
        "entropy",
        "explained_variance",
        "grad_norm",
    ):
        figure, axes = new_figure(1, 1, (2.84, 2.5))
        axis = axes[0, 0]
        for color, label in (("C0", "healthy"), ("C1", "learning-rate-x10")):
            seeds = found[label].values()
            curves = [
                run["curve"] if name == "return" else run["metrics"][name] for run in seeds
            ]
            curves = np.array(curves, float)
            steps = (np.arange(curves.shape[1]) + 1) / curves.shape[1]  # of 1 million
            axis.plot(steps, curves.T, color=color, linewidth=0.9, alpha=0.6)
            axis.plot(steps, np.nanmean(curves, 0), color=color, linewidth=2.5)
        axis.set_title(name, color=GREY)
        axis.set_xlabel("million steps")
        axis.set_xticks([0, 0.5, 1])
        if name == "approx_kl":
            axis.set_yscale("log")
        if name in limits:
            axis.set_ylim(limits[name])
        save(figure, f"diagnostics-{name}.svg")


HEADLINE = [  # study, label, title
    ("ppo", "CartPole-v1", "CartPole-v1"),
    ("ppo", "LunarLander-v3", "LunarLander-v3"),
    ("continuous", "HalfCheetah-v5", "HalfCheetah-v5"),
    ("continuous", "Hopper-v5", "Hopper-v5"),
    ("continuous", "Walker2d-v5", "Walker2d-v5"),
    ("atari", "Breakout-10M", "Breakout"),
]


def draw_curves(axis, study, label, title):
    """Thin: seeds; thick: interquartile mean; orange: the best published score."""
    grid, curves = learning_curves(runs(study)[label])
    axis.plot(grid / 1e6, curves.T, color="C0", linewidth=0.9, alpha=0.6)
    axis.plot(grid / 1e6, iqm(curves, axis=0), color="C0", linewidth=2.5, label="here")
    if BEST_PUBLISHED[title]:
        look = {
            "color": "C1",
            "linestyle": "--",
            "linewidth": 1.5,
            "label": "best published PPO",
        }
        axis.axhline(mean_of(BEST_PUBLISHED[title]), **look)
    axis.set_title(title, color=GREY)
    axis.set_xlabel("million steps")


def headline():
    for study, label, title in HEADLINE:
        figure, axes = new_figure(1, 1, (2.84, 2.5))
        draw_curves(axes[0, 0], study, label, title)
        save(figure, f"headline-{title}.svg")


def all_curves(study, tasks):
    """The learning curves of all tasks of a study, with those of stable-baselines3 if it was run.

    tasks: {title: label}.
    """
    rows = -(-len(tasks) // 3)
    figure, axes = new_figure(rows, 3, (8.5, 2.5 * rows + 0.4))
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    peers, handles = runs(f"{study}-sb3"), {}
    names = {"default": "stable-baselines3", "tuned": "stable-baselines3, rl-zoo3's flags"}
    for axis, (title, label) in zip(axes.flat, tasks.items()):
        draw_curves(axis, study, label, title)
        for color, (kind, name) in zip(("C2", "C3"), names.items()):
            if seeds := peers.get(f"{label}-{kind}"):
                grid, curves = learning_curves(seeds)
                mean = iqm(curves, axis=0)
                axis.plot(grid / 1e6, mean, color=color, linewidth=1.5, label=name)
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    options = {"loc": "outside upper center", "ncols": 4, "frameon": False}
    figure.legend(handles.values(), handles, labelcolor=GREY, **options)
    save(figure, f"curves-{study}.svg")


def save(figure, name):
    drawing.save(figure, RESULTS / name)


def learning_curves(seeds):
    """Steps (100,) and the mean return of the last 100 episodes at each of them, per seed."""
    curves = []
    for run in seeds.values():
        table = read(run.with_name(f"{run.name}.episodes.csv.gz"))
        pairs = [
            [float(row["global_step"]), float(row["episodic_return"])] for row in table
        ]
        steps, returns = np.array(pairs).T
        total = total_steps(run)
        grid = np.linspace(0, total, 101)[1:]
        counts = np.searchsorted(steps, grid, side="right")
        sums = np.concatenate([[0], np.cumsum(returns)])
        starts = np.maximum(counts - 100, 0)
        with np.errstate(invalid="ignore"):
            curves.append((sums[counts] - sums[starts]) / (counts - starts))
    return grid, np.array(curves)


def main():
    texts = {file: render(file) for file in TABLES}
    if "--check" in sys.argv:
        old = [file for file, text in texts.items() if (ROOT / file).read_text() != text]
        sys.exit(f"{old} are out of date: run benchmark/report.py" if old else 0)
    for file, text in texts.items():
        (ROOT / file).write_text(text)
    all_curves("ppo", {task: task for task in PUBLISHED})
    all_curves("continuous", {task: task for task in PUBLISHED_CONTINUOUS})
    all_curves("atari", {game: f"{game}-10M" for game in PUBLISHED_ATARI})
    explain_clip()
    explain_gae()
    diagnostics_figure()
    headline()
    rlhf_figure()
    claims_figure()
    claim_figures()


if __name__ == "__main__":
    main()
