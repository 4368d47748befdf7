"""Plots of the claims where a curve tells more than a number.

FIGURES has a function for each of these claims. It takes {"<task>--<arm>": {seed: summary}}, and
returns a figure, or None as long as no task has five seeds of every arm in it.
"""

from textwrap import fill

import numpy as np
from claims import HALF_CHEETAH, LADDER_STEPS, MUJOCO, SEEDS, TWO
from drawing import GREY, new_figure

EPOCH_COUNTS = {n: f"plain-epochs-{n}" for n in (1, 2, 4)} | {10: "plain", 20: "plain-epochs-20"}
CLIPS = {0.05: "plain-clip-0.05", 0.1: "plain-clip-0.1", 0.2: "plain", 0.3: "plain-clip-0.3"}
LAMBDAS = {x: "base" if x == 0.95 else f"lambda-{x}" for x in (0, 0.5, 0.9, 0.95, 0.99, 1)}
ENTROPIES = {x: f"ent-{x}" for x in (0, 0.01, 0.05)}
LIMITS = {
    "10 epochs,\nclip": "plain",
    "10 epochs,\nneither": "plain-no-clip",
    "20 epochs,\nclip": "plain-epochs-20",
    "20 epochs,\nneither": "plain-epochs-20-no-clip",
    "20 epochs,\nKL limit": "plain-epochs-20-no-clip-kl-limit",
}
PENALTIES = {"clip": "plain"} | {f"β = {b}": f"plain-kl-penalty-{b}" for b in (0.3, 1, 3)}
STEPS = {fill(name, 12): arm for name, arm in LADDER_STEPS.items()} | {
    "KL limit:\ndefaults": "long"
}


def score(run):
    return run["score"]


def mean_return(run):
    return run["mean_return"]


def mean_kl(run):
    return np.nanmean(np.array(run["metrics"]["approx_kl"], float))


def values_of(found, task, arms, value):
    """{arm: value of each seed}, or None if an arm has too few seeds."""
    seeds = {arm: found.get(f"{task}--{arm}", {}) for arm in arms}
    if any(len(runs) < SEEDS for runs in seeds.values()):
        return None
    return {arm: np.array([value(run) for run in runs.values()]) for arm, runs in seeds.items()}


def complete(found, tasks, arms, value=score):
    """{task: {arm: value of each seed}} of the tasks that have all arms."""
    all_tasks = {task: values_of(found, task, arms, value) for task in tasks}
    return {task: values for task, values in all_tasks.items() if values is not None}


def panels(tasks, width=3.6):
    columns = min(len(tasks), 2)
    rows = -(-len(tasks) // columns)
    figure, axes = new_figure(rows, columns, (width * columns, 2.8 * rows))
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    for axis, task in zip(axes.flat, tasks):
        axis.set_title(task, color=GREY)
    return figure, axes.flat


def legend_on_the_right(figure, axis):
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", labelcolor=GREY, frameon=False)


def over_settings(found, tasks, settings, value, label, name, width=3.6):
    """Grey: each seed; blue: the mean. Settings, {name: arm}, stand at equal distances, and those
    of a number, which has a name, are connected."""
    data = complete(found, tasks, settings.values(), value)
    if not data:
        return None
    figure, axes = panels(data, width)
    for axis, values in zip(axes, data.values()):
        for place, arm in enumerate(settings.values()):
            axis.plot([place] * len(values[arm]), values[arm], "o", color=GREY, markersize=3)
        means = [values[arm].mean() for arm in settings.values()]
        axis.plot(means, "o-" if name else "o", color="C0", linewidth=2)
        axis.set_xticks(range(len(settings)), settings)
        axis.set_xlabel(name)
    axes[0].set_ylabel(label)
    return figure


def hundred_epochs(found):
    """What the epochs of an update do, over the first, second and last third of the training."""
    arm, epochs = "plain-epochs-100", (1, 2, 5, 10, 20, 50, 100)
    seeds = found.get(f"{HALF_CHEETAH}--{arm}", {}).values()
    if len(seeds) < SEEDS:
        return None
    figure, axes = new_figure(1, 3, (8.4, 2.8))
    for axis, name in zip(axes.flat, ("approx_kl", "clipfrac", "max_ratio_dev")):
        columns = [[run["metrics"][f"{name}_in_epoch_{n}"] for run in seeds] for n in epochs]
        thirds = np.array_split(np.nanmean(np.array(columns, float), 1), 3, axis=1)
        for color, part, third in zip(("C0", "C1", "C2"), ("first", "second", "last"), thirds):
            axis.plot(epochs, np.nanmean(third, 1), "o-", color=color, label=f"{part} third")
        axis.set_xscale("log")
        axis.set_xticks((1, 10, 100), (1, 10, 100))
        axis.set_xlabel("epoch")
        axis.set_title(name, color=GREY)
    legend_on_the_right(figure, axes[0, 0])
    return figure


def clip_kl(found):
    """Blue: the measured KL; grey: ½ε²."""
    data = complete(found, TWO, CLIPS.values(), mean_kl)
    if not data:
        return None
    figure, axes = panels(data)
    clips = np.array(list(CLIPS))
    for axis, values in zip(axes, data.values()):
        axis.loglog(clips, clips**2 / 2, "--", color=GREY, label="½ε²")
        means = [values[arm].mean() for arm in CLIPS.values()]
        axis.loglog(clips, means, "o-", color="C0", label="measured")
        axis.set_xticks(clips, clips)
        axis.minorticks_off()
        axis.set_xlabel("ε")
    axes[0].set_ylabel("mean approx_kl")
    legend_on_the_right(figure, axes[0])
    return figure


def entropy(found):
    """Entropy of the policy over the training; the mean over seeds."""
    curve = lambda run: run["metrics"]["entropy"]
    data = {}
    for task in TWO:  # where 0 is the default, its arm is "base"
        arms = ENTROPIES | ({0: "base"} if task in MUJOCO else {})
        values = values_of(found, task, arms.values(), curve)
        if values is not None:
            data[task] = {coef: values[arm] for coef, arm in arms.items()}
    if not data:
        return None
    figure, axes = panels(data)
    for axis, values in zip(axes, data.values()):
        for color, (coef, curves) in zip(("C0", "C1", "C2"), values.items()):
            curves = np.array(curves, float)
            share = (np.arange(curves.shape[1]) + 1) / curves.shape[1]
            axis.plot(share, np.nanmean(curves, 0), color=color, label=f"c_e = {coef}")
        axis.set_xlabel("share of the training")
    axes[0].set_ylabel("entropy")
    legend_on_the_right(figure, axes[0])
    return figure


FIGURES = {
    "epochs": lambda found: over_settings(
        found, TWO, EPOCH_COUNTS, mean_return, "mean return of the run", "epochs"
    ),
    "hundred-epochs": hundred_epochs,
    "overfit": lambda found: over_settings(found, TWO, LIMITS, score, "return", "", 5),
    "clip-kl": clip_kl,
    "entropy": entropy,
    "lambda": lambda found: over_settings(found, TWO, LAMBDAS, score, "return", "λ"),
    "ladder": lambda found: over_settings(found, MUJOCO, STEPS, score, "return", "", 7.5),
    "kl-penalty": lambda found: over_settings(found, TWO, PENALTIES, score, "return", "", 4),
}
CAPTIONS = dict.fromkeys(FIGURES, "Grey: each seed. Blue: their mean.") | {
    "hundred-epochs": "Means over the seeds in epochs 1, 2, 5, … 100 of an update, in the first, "
    "second and last third of the training.",
    "clip-kl": "Blue: the measured KL. Grey: ½ε².",
    "entropy": "Mean over the seeds.",
}
