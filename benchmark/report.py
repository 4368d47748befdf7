"""Makes the tables and figures of the README from the raw data in benchmark/results/.

    python benchmark/report.py             # rewrites README.md between its table markers, and the figures
    python benchmark/report.py --check     # only says whether the tables are up to date (exit status 1 if not)

Scores are the mean return of the last 100 training episodes of a run. Over seeds: the interquartile mean with a 95 %
percentile bootstrap interval (Agarwal et al. 2021), and mean ± standard deviation, which is what others publish.
"""

import csv
import gzip
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
from scipy import stats

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
PUBLISHED = {  # label: CleanRL, openai/baselines (both docs.cleanrl.dev), rl-zoo3 (its benchmark.md)
    "CartPole-v1": ("490.0 ± 6.1", "497.5 ± 4.0", "500 (100k steps)"),
    "Acrobot-v1": ("−86.4 ± 1.3", "−81.8 ± 5.6", "−73.5 (1M steps)"),
    "MountainCar-v0": ("−200", "−200", "−110.4 (1M steps)"),
    "LunarLander-v3": ("", "", "242 (v2, 1M steps)"),
}


def read(path):
    return list(csv.DictReader(io.StringIO(gzip.decompress(path.read_bytes()).decode())))


def runs(study):
    """{label: {seed: path without the ending}} of a study's runs."""
    found = {}
    for path in sorted((RESULTS / study).glob("*.args.json")):
        label, seed = path.name.removesuffix(".args.json").rsplit("-", 1)
        found.setdefault(label, {})[int(seed)] = path.with_name(f"{label}-{seed}")
    return found


def last_100(run):
    returns = [float(row["episodic_return"]) for row in read(run.with_name(f"{run.name}.episodes.csv.gz"))]
    return np.mean(returns[-100:])


def iqm(scores, axis=-1):
    return stats.trim_mean(scores, 0.25, axis=axis)


def interval(scores):
    result = stats.bootstrap((scores,), iqm, method="percentile", n_resamples=10_000, rng=np.random.default_rng(0))
    return result.confidence_interval


def number(x, digits=1):
    return f"{x:,.{digits}f}".replace("-", "−")


def ppo_scores():
    head = ["environment", "steps", "seeds", "interquartile mean [95 %]", "mean ± std", "worst seed"]
    head += ["CleanRL", "baselines", "rl-zoo3"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label, published in PUBLISHED.items():
        seeds = runs("ppo").get(label)
        if not seeds:
            continue
        scores = np.array([last_100(run) for run in seeds.values()])
        args = json.loads(next(iter(seeds.values())).with_name(f"{label}-1.args.json").read_text())
        low, high = interval(scores)
        cells = [label, f"{args['total_timesteps']:,}", len(scores)]
        cells += [f"**{number(iqm(scores))}** [{number(low)}, {number(high)}]"]
        cells += [f"{number(scores.mean())} ± {number(scores.std(ddof=1))}", number(scores.min()), *published]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def ppo_speed():
    data = json.loads((RESULTS / "speed_ppo.json").read_text())
    peers = [name for name in ("stable-baselines3", "CleanRL") if name in data["rounds"][0]]
    lines = ["| program | steps per second, median | " + " | ".join(f"× {peer}" for peer in peers) + " |"]
    lines.append("|---|---|" + "---|" * len(peers))
    for name in data["rounds"][0]:
        cells = [f"`{name}`", number(np.median([turn[name] for turn in data["rounds"]]), 0)]
        for peer in peers:
            ratios = [turn[name] / turn[peer] for turn in data["rounds"]]
            ratio = f"**{np.median(ratios):.2f}** ({min(ratios):.2f}–{max(ratios):.2f})"
            cells.append("" if name == peer or "num-envs" in name else ratio)  # only where all else is equal
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"{data['machine']}; {len(data['rounds'])} rounds of all programs in turn, one thread each."]
    return lines


def continuous_defaults():
    found = runs("continuous-defaults")
    variants = sorted({label.split("-", 2)[2] for label in found})
    environments = sorted({"-".join(label.split("-")[:2]) for label in found})
    lines = ["| environment | " + " | ".join(f"`{variant}`" for variant in variants) + " |"]
    lines.append("|---" * (len(variants) + 1) + "|")
    for environment in environments:
        cells = [environment]
        for variant in variants:
            scores = np.array([last_100(run) for run in found.get(f"{environment}-{variant}", {}).values()])
            each = ", ".join(number(score, 0) for score in scores)
            cells.append(f"**{number(scores.mean(), 0)}** ({each})" if len(scores) else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


TABLES = {"ppo-scores": ppo_scores, "ppo-speed": ppo_speed, "continuous-defaults": continuous_defaults}


def render(text):
    """The README with every table made anew between its markers."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        assert re.search(pattern, text, re.S), f"README.md has no markers for {name}"
        block = "\n".join(table())
        text = re.sub(pattern, lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text, flags=re.S)
    return text


def figures():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = runs("ppo")
    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3), constrained_layout=True)
    for axis, (label, seeds) in zip(axes, found.items()):
        curves = []
        for run in seeds.values():
            rows = read(run.with_name(f"{run.name}.episodes.csv.gz"))
            steps, returns = np.array([[float(r["global_step"]), float(r["episodic_return"])] for r in rows]).T
            total = json.loads(run.with_name(f"{run.name}.args.json").read_text())["total_timesteps"]
            grid = np.linspace(0, total, 101)[1:]
            counts = np.searchsorted(steps, grid, side="right")
            sums = np.concatenate([[0], np.cumsum(returns)])
            starts = np.maximum(counts - 100, 0)  # the last 100 episodes at each point
            with np.errstate(invalid="ignore"):
                curves.append((sums[counts] - sums[starts]) / (counts - starts))
        curves = np.array(curves)
        axis.plot(grid, iqm(curves, axis=0), color="C0")
        axis.fill_between(grid, curves.min(0), curves.max(0), color="C0", alpha=0.2)
        axis.set_title(f"{label}, {len(curves)} seeds")
        axis.set_xlabel("environment steps")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    axes[0].set_ylabel("return, last 100 episodes")
    figure.savefig(RESULTS / "ppo.png", dpi=100, metadata={"Software": None})


def main():
    text = README.read_text()
    if "--check" in sys.argv:
        sys.exit(render(text) != text and "README.md differs from benchmark/results: run benchmark/report.py")
    README.write_text(render(text))
    figures()


if __name__ == "__main__":
    main()
