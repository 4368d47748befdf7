"""Tables of the results, as report.py fills them in: each function returns a DataFrame."""

from functools import cache
from itertools import product

import numpy as np
import pandas as pd
from estimates import interval, iqm, summary, welch
from results import load, load_curves, select
from scipy import stats
from studies import CHEETAH, CHOSEN, LUNAR, MUJOCO, SWIMMER, runs

TASKS = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", LUNAR, *MUJOCO, "Ant-v4"]
TASKS += ["BipedalWalker-v3", "Pendulum-v1", "Pong", "Breakout", "BeamRider"]
PROTOCOLS = ["training", "sampled", "greedy", "best"]
CI = "[95\u00a0%]"  # with a space that does not break
RATIOS = [(arm, "default") for arm in ("random-start-ages", "no-recompute", "both")]
RATIOS += [("both", "no-recompute"), ("both", "random-start-ages")]


# ---------- Numbers ----------
def number(x, digits=None):
    """With thousands separated; one decimal below 500."""
    text = f"{x:,.{(1 if abs(x) < 500 else 0) if digits is None else digits}f}"
    return text.replace("-", "−")


def spread(scores):
    """Mean ± standard deviation over seeds."""
    scores = np.array(scores)[np.isfinite(scores)]
    if len(scores) == 0:
        return ""
    digits = 1 if abs(scores.mean()) < 500 else 0
    deviation = f" ± {number(scores.std(ddof=1), digits)}" if len(scores) > 1 else ""
    return number(scores.mean(), digits) + deviation


def with_count(scores):
    return f"{spread(scores)} ({len(scores)})"


def middle(scores):
    """Interquartile mean and its interval; each seed's score where they are few."""
    if len(scores) == 0:
        return ""
    digits = 1 if abs(scores.mean()) < 500 else 0
    text = f"**{number(iqm(scores), digits)}**"
    if len(scores) > 3:
        text += " [{}, {}]".format(*(number(x, digits) for x in interval(scores)))
    if len(scores) in (2, 3):
        text += f" ({', '.join(number(x, digits) for x in scores)})"
    return text


# ---------- Results ----------
def final_runs(task, arm="default"):
    """The runs that count for a task with default or tuned flags: those of the study
    "results", once it has five, else older ones."""
    found, chosen = select(task, arm, "results"), CHOSEN.get(task)
    if len(found) < 5:
        found = found.head(0)
    if found.empty and arm == "default":
        found = select(task, arm, "ppo", "continuous", "atari")
    if found.empty and chosen and (chosen == "default") == (arm == "default"):
        found = select(task, chosen, "tuned", seeds=range(6, 11))
    if (found.variation == "short_episodes").any():  # their training returns are of parts
        found = found.assign(score=np.nan)
    return found


def all_final_runs():
    """(name, runs) of all rows; a star where the former scripts made some of the runs."""
    for task, arm in product(TASKS, ("default", "tuned")):
        if len(found := final_runs(task, arm)):
            star = " \\*" if (found.note == "former script").any() else ""
            yield task + star + (", tuned" if arm == "tuned" else ""), found


def curve(run, name):
    """Of a row: the curve of a metric, or None."""
    return load_curves(run.study).get((run.task, run.arm, run.seed, name))


def scores(found, protocol):
    """One score a seed; best: at the evaluation with the highest mean over seeds."""
    if protocol != "best":
        return found["score" if protocol == "training" else protocol].dropna().to_numpy()
    curves = [curve(run, "evaluations") for run in found.itertuples()]
    curves = np.array([points for points in curves if points is not None])
    return curves[:, curves.mean(0).argmax()] if len(curves) else curves


def results(*tasks):
    """A row a task and flags, or for the tasks named only."""
    rows = []
    for name, found in all_final_runs():
        if not tasks or name.removesuffix(" \\*") in tasks:
            of = {protocol: scores(found, protocol) for protocol in PROTOCOLS}
            row = {"task": name, "steps": f"{found.steps.max() / 1e6:.1f}M"}
            row["seeds"] = len(found)
            row |= {f"training: interquartile mean {CI}": middle(of["training"])}
            row |= {"mean ± std": spread(of["training"]), "sampled": spread(of["sampled"])}
            row |= {"greedy": spread(of["greedy"]), "best evaluation": spread(of["best"])}
            rows.append(row | {"minutes": number(found.minutes.median(), 1)})
    return pd.DataFrame(rows)


def best_published(task, steps, protocol):
    """The row with the highest mean of this protocol, at up to the same number of steps."""
    table = load("published")
    table = table[(table.task == task) & (table.protocol == protocol)]
    table = table[table.steps <= 1.01 * steps]
    return None if table.empty else table.loc[table["mean"].idxmax()]


@cache
def compared():
    """Ours beside the best published score of each protocol: like with like."""
    rows = []
    for name, found in all_final_runs():
        for protocol in PROTOCOLS:
            best = best_published(found.task.iloc[0], found.steps.max(), protocol)
            ours = scores(found, protocol)
            if best is None or len(ours) == 0:
                continue
            theirs, difference = number(best["mean"]), ours.mean() - best["mean"]
            text, word, low, high = number(difference), ", by point", difference, difference
            known = best.seeds > 1 and best.spread >= 0
            if known:
                theirs += f" ± {number(best.spread)} ({best.seeds:.0f})"
            if known and len(ours) > 1:
                low, high = welch(summary(ours), (best["mean"], best.spread, best.seeds))
                text, word = f"{text} [{number(low)}, {number(high)}]", ""
            low, high = np.round([low, high], 1 if abs(best["mean"]) < 500 else 0)
            word = ("ahead" if low > 0 else "behind" if high < 0 else "level") + word
            source = f"[{best.source}]({best.address}), {best.env_version}"
            steps = f"{best.steps / 1e6:g}M"
            row = [name, protocol, with_count(ours), theirs, steps, source, text, word]
            rows.append(row)
    columns = ["task", "protocol", "ours (seeds)", "best published (seeds)", "steps", "by"]
    return pd.DataFrame(rows, columns=[*columns, f"difference {CI}", "ours is"])


def counts(arm):
    """On which tasks ours is ahead, level or behind, by protocol; °: by point."""
    table = compared()
    table = table[table.task.str.contains(", tuned") == (arm == "tuned")]
    words = table["ours is"].str.split(",").str[0]
    names = table.task.str.replace(r" \\\*|, tuned", "", regex=True)
    names += np.where(table["ours is"].str.contains("point"), "°", "")
    text = lambda found: f"{len(found)}: {', '.join(found)}"
    counted = names.groupby([table.protocol, words], sort=False).agg(text).unstack()
    order = [word for word in ("ahead", "level", "behind") if word in counted]
    return counted.reindex(PROTOCOLS)[order].dropna(how="all").fillna("0").reset_index()


def hyperparameters():
    """The flags of each row of the results that are not the defaults of its script."""
    table = pd.DataFrame(runs("results") + runs("atari")).drop_duplicates(["task", "arm"])
    table["flags"] = "`" + table["flags"].str.replace(" ?--compile", "", regex=True) + "`"
    return table[["task", "arm", "script", "flags", "variation"]].replace("``", "defaults")


def flags(task, arm="default"):
    """Those of a row of the results."""
    table = hyperparameters().set_index(["task", "arm"])
    return table.loc[(task, arm), "flags"]


# ---------- Studies ----------
def arms(study, column="score"):
    """Mean ± standard deviation of each arm, with the number of seeds."""
    groups = load(study).groupby(["task", "arm"], sort=False)[column]
    return groups.agg(with_count).unstack().reset_index()


def with_t_interval(values):
    return [values.mean(), *stats.ttest_1samp(values, 0).confidence_interval()]


def defaults():
    """Ratios of arms, seed by seed: geometric means over the tasks, which decide, and plain
    means, which were declared first; geometric means without Swimmer and of each task. The
    first three rows decide."""
    rows, keys = [], {"index": "seed", "columns": ["arm", "task"], "values": "score"}
    table = load("defaults").pivot(**keys)
    text = lambda numbers: "{:.3f} [{:.3f}, {:.3f}]".format(*numbers)
    geometric = lambda logs: text(np.exp(with_t_interval(logs)))
    for arm, base in RATIOS:
        ratios = (table[arm] / table[base]).dropna()
        logs, plain = np.log(ratios), text(with_t_interval(ratios.mean(axis=1)))
        row = {"ratio": f"{arm} / {base}", "seeds": len(ratios)}
        row |= {f"four tasks {CI}": geometric(logs.mean(axis=1)), "plain mean": plain}
        row["without Swimmer"] = geometric(logs.drop(columns=SWIMMER).mean(axis=1))
        rows.append(row | {task: geometric(logs[task]) for task in logs})
    return pd.DataFrame(rows)


def tuned():
    """The candidates on seeds 1 to 5, and the chosen one on other seeds."""
    table = load("tuned")
    played = table.score.where(table.arm != "short-episodes", table.sampled)
    part = np.where(table.seed <= 5, "seeds 1 to 5", "seeds 6 to 10")
    table = played.groupby([table.task, table.arm, part], sort=False).agg(spread).unstack()
    flags = {(run.task, run.arm): f"`{run.flags}`" for run in runs("tuned")}
    table.insert(0, "flags", table.index.map(flags).str.replace("``", ""))
    return table.sort_index().reset_index().rename(columns={"arm": "candidate"})


def diagnostics():
    """Metrics in the first and in the last tenth of a run of each script, and of one that
    fails."""
    tasks = ("CartPole-v1", LUNAR, CHEETAH, "Breakout")
    found = {task.split("-")[0]: final_runs(task) for task in tasks}
    found["LunarLander, failing"] = select(LUNAR, "learning-rate-x100", "diagnostics")
    metrics = "return approx_kl clipfrac entropy explained_variance grad_norm".split()
    rows = []
    for name, table in found.items():
        for run in table[table.note == ""].head(1).itertuples():
            row = {"run": name}
            for metric in metrics:
                points = curve(run, metric)
                ends = [np.nanmean(part) for part in (points[:10], points[-10:])]
                ends = [number(x, 0) if metric == "return" else f"{x:.2g}" for x in ends]
                row[f"`{metric}`"] = " → ".join(ends).replace("-", "−")
            rows.append(row)
    return pd.DataFrame(rows)


def rounds_of_speed(script):
    """{machine: table of rounds × programs}, of the last day on each machine."""
    table, found = load("speed"), {}
    for machine, turns in table[table.script == script].groupby(["cpu", "cores", "torch"]):
        turns = turns[turns.date == turns.date.max()]
        wide = turns.pivot_table("steps_per_second", "round", "program", aggfunc="last")
        name = "{}, {} cores, torch {}, {}".format(*machine, turns.date.max())
        found[name] = wide[turns.program.unique()]
    return found


def speed(script):
    """Medians of the rounds, and ratios to the peers, taken round by round."""
    tables = []
    for machine, rounds in rounds_of_speed(script).items():
        table = pd.DataFrame({"steps per second": rounds.median().map("{:,.0f}".format)})
        table.insert(0, "machine", machine)
        other = rounds.columns.str.contains("num-envs")  # not the same flags
        for peer in rounds.columns.intersection(["stable-baselines3", "CleanRL", "SBX"]):
            ratios = rounds.loc[:, ~other].drop(columns=peer).div(rounds[peer], axis=0)
            text = lambda x: f"**{x.median():.2f}** ({x.min():.2f}–{x.max():.2f})"
            table[f"× {peer}"] = ratios.agg(text)
        tables.append(table.reset_index())
    return pd.concat(tables)


def rlhf():
    columns = {"kl": "KL to the reference", "proxy": "proxy return", "true": "true return"}
    table = load("rlhf").groupby("beta")[list(columns)].agg(spread)
    return table.rename(columns=columns).reset_index(names="β")


def probes():
    """What each implementation made of each probe; where it failed, the worst answer."""

    def cell(rows):
        if rows.found.isna().all():
            return "–"
        if (failed := rows[rows.passed == 0]).empty:
            return "✓"
        worst = failed.loc[(failed.found - failed.expected).abs().idxmax()]
        return f"✗ {worst.quantity} = {number(worst.found, 2)}, not {worst.expected:g}"

    table = load("probes")
    table["name"] = table.implementation + " (" + table.version + ")"
    cells = table.groupby(["probe", "name"], sort=False).apply(cell)
    return cells.unstack(sort=False).reset_index()
