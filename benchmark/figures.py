"""Draws the figures of the texts: FIGURES has a function for each picture in results/."""

from functools import partial

import claims
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from estimates import iqm
from results import load, select
from studies import CHEETAH, LUNAR, MUJOCO
from tables import PROTOCOLS, best_published, curve, final_runs

matplotlib.use("Agg")
GREY = "#808080"  # reads well on white and on black
COLORS = "text.color axes.edgecolor axes.labelcolor xtick.color ytick.color"
STYLE = dict.fromkeys(COLORS.split(), GREY) | {"font.size": 11, "legend.frameon": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "ppo"}
plt.rcParams.update(STYLE)


def panels(count, size, columns=3):
    """A figure of `count` axes, `size` each."""
    columns = min(count, columns)
    rows = -(-count // columns)
    options = {"figsize": (size[0] * columns, size[1] * rows), "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, axes.flat[:count]


def legend(figure, axes, columns):
    found = {}
    for axis in axes:
        found |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    figure.legend(found.values(), found, loc="outside upper center", ncols=columns)


def curves_of(runs, name="return"):
    """Shares of the training, and a metric there: an array (seeds, points)."""
    found = np.array([curve(run, name) for run in runs.itertuples()])
    return np.linspace(0, 1, found.shape[-1] + 1)[1:], found


# ---------- Learning ----------
def learning(tasks):
    """Thin: seeds; thick: interquartile mean; orange: the best published scores."""
    figure, axes = panels(len(tasks), (2.84, 2.6))
    for axis, task in zip(axes, tasks):
        runs = final_runs(task)
        share, curves = curves_of(runs)
        steps = share * runs.steps.max() / 1e6
        axis.plot(steps, curves.T, color="C0", linewidth=0.9, alpha=0.6)
        axis.plot(steps, iqm(curves, axis=0), color="C0", linewidth=2.5, label="here")
        best = [best_published(task, runs.steps.max(), protocol) for protocol in PROTOCOLS]
        training, *others = [np.nan if row is None else row["mean"] for row in best]
        axis.axhline(training, color="C1", linestyle="--", label="best published: training")
        others = max((mean for mean in others if np.isfinite(mean)), default=np.nan)
        axis.axhline(others, color="C1", linestyle=":", label="best published: evaluation")
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("million steps")
    legend(figure, axes, 3)
    return figure


def diagnostics():
    """Metrics of healthy runs beside those with a hundred times the learning rate."""
    names = "return approx_kl clipfrac entropy explained_variance grad_norm".split()
    limits = {"return": (-450, 320), "approx_kl": (1e-4, 10)}
    limits["explained_variance"] = (0, 1.05)
    figure, axes = panels(6, (2.84, 2.5))
    for axis, name in zip(axes, names):
        for color, arm in (("C0", "healthy"), ("C1", "learning-rate-x100")):
            share, curves = curves_of(select(LUNAR, arm, "diagnostics"), name)
            axis.plot(share, curves.T, color=color, linewidth=0.9, alpha=0.6)
            axis.plot(share, np.nanmean(curves, 0), color=color, linewidth=2.5, label=arm)
        axis.set(title=name, xlabel="million steps", ylim=limits.get(name))
    axes[1].set_yscale("log")
    legend(figure, axes, 2)
    return figure


def rlhf():
    """Returns against the KL to the reference: the frontier of RLHF papers."""
    figure, axes = panels(2, (4.3, 3.4))
    table = load("rlhf")
    reference, runs = table[table.beta == "reference"], table[table.beta != "reference"]
    means = runs.groupby(runs.beta.astype(float))[["kl", "proxy", "true"]].mean()
    for axis, measure, color, side in zip(axes, ("proxy", "true"), ("C1", "C0"), (-1, 1)):
        axis.plot(runs.kl, runs[measure], "o", color=color, alpha=0.4, markersize=4)
        axis.plot(means.kl, means[measure], color=color, linewidth=2)
        for beta, mean in means.iterrows():
            place = {"xytext": (8 * side, 4), "ha": "left" if side > 0 else "right"}
            place["textcoords"] = "offset points"
            axis.annotate(f"β = {beta:g}", (mean.kl, mean[measure]), **place)
        axis.axhline(reference[measure].item(), color=GREY, linestyle=":")
        title = f"{measure} return (dotted: reference)"
        axis.set(xscale="log", xlabel="KL(π ‖ π_ref) per episode", title=title)
        axis.margins(x=0.15, y=0.15)
    return figure


# ---------- Claims ----------
def all_claims():
    """The comparisons that decide the claims: effects and intervals, all tasks on top."""
    rows = []
    for number, claim in claims.NAMES.items():
        for label, (effects, _, _) in claims.judge(claim).items():
            rows.append((f"{number}. {label}", effects))
    figure, (axis,) = panels(1, (8, 1.2 + 0.45 * len(rows)))
    colors = {"all": "C0", CHEETAH: "C1", LUNAR: "C2"}
    for y, (_, effects) in enumerate(rows):
        for i, (task, (effect, low, high)) in enumerate(reversed(effects.items())):
            place = y + 0.12 * i + (0.1 if i else 0)
            width, size = (3, 7) if task == "all" else (1, 4)
            look = {"color": colors.get(task, GREY), "markersize": size}
            axis.plot([100 * low, 100 * high], [place, place], linewidth=width, **look)
            look["label"] = task if task in colors else "another task"
            axis.plot(100 * effect, place, "o", **look)
    axis.axvline(0, color=GREY, linestyle=":")
    axis.set_yticks(range(len(rows)), [label for label, _ in rows])
    axis.set(ylim=(len(rows) - 0.2, -0.4), xlabel="effect, %")  # the first claim on top
    legend(figure, [axis], 4)
    return figure


# ---------- The tutorial ----------
def clip():
    """The clipped objective against the ratio, for both signs of the advantage; ε = 0.2."""
    figure, axes = panels(2, (4.3, 3.4))
    ratio = np.linspace(0, 2.6, 300)
    sides = (1, "315", (1.2, 2.6)), (-1, "426", (0, 0.8))
    for axis, (sign, cases, flat) in zip(axes, sides):
        clipped = np.minimum(sign * ratio, sign * ratio.clip(0.8, 1.2))
        axis.axvspan(*flat, color="C1", alpha=0.2, label="gradient 0")
        axis.plot(ratio, sign * ratio, color=GREY, linestyle=":", label="ρ Â")
        axis.plot(ratio, clipped, color="C0", linewidth=2.5, label="objective")
        for edge in (0.8, 1.2):
            axis.axvline(edge, color=GREY, linewidth=0.8)
        for place, case in zip((0.4, 1.0, 1.9), cases):
            height = np.interp(place, ratio, clipped) + (-0.3 if case in "154" else 0.3)
            circle = {"boxstyle": "circle", "edgecolor": GREY, "facecolor": "none"}
            axis.text(place, height, case, ha="center", va="center", bbox=circle)
        title = f"Â = {'+1' if sign > 0 else '−1'}; circles: cases"
        axis.set(xlabel="ratio ρ", ylabel="objective", title=title)
        axis.set_ylim((-0.05, 2.9) if sign > 0 else (-2.9, 0.05))
    axes[0].plot([2.5], [1.2], "o", color="C3", label="example")
    legend(figure, axes, 4)
    return figure


def gae():
    """Weights (1 − λ) λ^(k−1) of the k-step advantages."""
    figure, axes = panels(1, (5.4, 3))
    k = np.arange(1, 31)
    for x in (0.5, 0.8, 0.9, 0.95):
        axes[0].plot(k, (1 - x) * x ** (k - 1), ".-", label=f"λ = {x}")
    axes[0].set(xlabel="steps k", ylabel="weight")
    legend(figure, axes, 4)
    return figure


HEADLINE = ["CartPole-v1", LUNAR, CHEETAH, "Hopper-v5", "Walker2d-v5", "Breakout"]
FIGURES = {
    "headline": partial(learning, HEADLINE),
    "curves-ppo": partial(learning, ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", LUNAR]),
    "curves-continuous": partial(learning, [*MUJOCO, "Ant-v4"]),
    "curves-atari": partial(learning, ["Pong", "Breakout", "BeamRider"]),
    "diagnostics": diagnostics,
    "rlhf": rlhf,
    "claims": all_claims,
    "clip": clip,
    "gae": gae,
}
