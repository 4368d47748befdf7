"""Statistics of runs: means with their intervals, effects of a change, comparisons."""

import numpy as np
from scipy import stats

DRAWS = 10_000


def iqm(scores, axis=-1):
    """The interquartile mean: the mean of the middle half (Agarwal et al. 2021)."""
    return stats.trim_mean(scores, 0.25, axis=axis)


def draw(samples, statistic, rng, paired=False):
    """Values of the statistic on resampled seeds."""
    options = {"n_resamples": DRAWS, "method": "percentile", "vectorized": True}
    options |= {"paired": paired, "rng": rng}
    return stats.bootstrap(samples, statistic, **options).bootstrap_distribution


def interval(scores, statistic=iqm):
    """95 % percentile bootstrap interval of a statistic of the seeds."""
    return tuple(
        np.percentile(draw((scores,), statistic, np.random.default_rng(0)), [2.5, 97.5])
    )


def welch(mean, std, seeds, other_mean, other_std, other_seeds):
    """95 % interval of mean − other_mean; the variances may differ."""
    parts = np.array([std**2 / seeds, other_std**2 / other_seeds])
    if parts.sum() == 0:
        return mean - other_mean, mean - other_mean
    freedom = parts.sum() ** 2 / (parts**2 / [seeds - 1, other_seeds - 1]).sum()
    return stats.t.interval(0.95, freedom, mean - other_mean, np.sqrt(parts.sum()))


def drawn_effects(scores, random, paired=False):
    """(mean of the arm − mean of the base) / (mean of the reference − random policy's return).

    scores: {task: (arm, base, reference)}, one array each; random: {task: return}.
    → {task or "all": (effect, low, high)}, 95 % bootstrap intervals. "all" is the plain mean over
    tasks. Where the reference is the base, it is resampled once; paired: the same seeds of all."""
    effects, draws, rng = {}, [], np.random.default_rng(0)
    for task, (arm, base, reference) in scores.items():

        def effect(arm, base, reference=None, axis=-1, task=task):
            scale = (base if reference is None else reference).mean(axis) - random[task]
            return (arm.mean(axis) - base.mean(axis)) / scale

        samples = (arm, base) if reference is base else (arm, base, reference)
        draws.append(draw(samples, effect, rng, paired))
        effects[task] = (effect(*samples), *np.percentile(draws[-1], [2.5, 97.5]))
    mean = np.mean([effect for effect, _, _ in effects.values()])
    effects["all"] = (mean, *np.percentile(np.mean(draws, 0), [2.5, 97.5]))
    return effects


def paired_effects(scores, random, level=0.95):
    """Mean of paired differences over the base's gain over a random policy, with t intervals.

    scores: {task: (arm, base)}, sorted by the same seeds → as `drawn_effects`."""
    effects, variances, freedoms = {}, [], []
    for task, (arm, base) in scores.items():
        differences = (arm - base) / (base.mean() - random[task])
        variances.append(differences.var(ddof=1) / len(differences))
        freedoms.append(len(differences) - 1)
        bounds = t_interval(differences.mean(), variances[-1], freedoms[-1], level)
        effects[task] = (differences.mean(), *bounds)
    variances = np.array(variances) / len(scores) ** 2  # of the mean over tasks
    total = variances.sum()
    freedom = total**2 / (variances**2 / freedoms).sum() if total > 0 else 1
    mean = np.mean([effect for effect, _, _ in effects.values()])
    effects["all"] = (mean, *t_interval(mean, total, freedom, level))
    return effects


def t_interval(mean, variance, freedom, level):
    """Interval of a mean whose variance was estimated."""
    half = stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(variance)
    return mean - half, mean + half
