"""Statistics of runs: means with their intervals, effects of a change, differences."""

import numpy as np
from scipy import stats


def iqm(scores, axis=-1):
    """The interquartile mean: without the lowest and the highest quarter of the
    seeds, rounded down (Agarwal et al. 2021)."""
    return stats.trim_mean(scores, 0.25, axis=axis)


def draw(samples, statistic, rng, paired=False):
    """Values of the statistic on 10,000 resamples of the seeds."""
    options = {"n_resamples": 10_000, "method": "percentile", "vectorized": True}
    found = stats.bootstrap(samples, statistic, paired=paired, rng=rng, **options)
    return found.bootstrap_distribution


def interval(scores, statistic=iqm):
    """95 % percentile bootstrap interval of a statistic of the seeds."""
    return np.percentile(draw((scores,), statistic, np.random.default_rng(0)), [2.5, 97.5])


def summary(scores):
    """Mean, standard deviation and number of seeds; a single one counts as exact."""
    if len(scores) == 1:
        return np.mean(scores), 0.0, 2
    return np.mean(scores), np.std(scores, ddof=1), len(scores)


def welch(x, y):
    """95 % interval of the difference of two means, from their summaries."""
    difference, parts = x[0] - y[0], np.array([x[1] ** 2 / x[2], y[1] ** 2 / y[2]])
    if parts.sum() == 0:
        return difference, difference
    freedom = parts.sum() ** 2 / (parts**2 / [x[2] - 1, y[2] - 1]).sum()
    return t_interval(difference, parts.sum(), freedom, 0.95)


def t_interval(mean, variance, freedom, level):
    """Interval of a mean, from an estimate of its variance."""
    half = stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(variance)
    return mean - half, mean + half


def drawn_effects(scores, random, paired=False):
    """(mean of the arm − of the base) / (mean of the reference − random policy's return).

    scores: {task: (names of arm, base, reference, {name: scores})}, random: {task: return}
    → {task: (effect, low, high)} with 95 % bootstrap intervals, and "all": the plain mean
    over tasks. A name that comes twice is resampled once; paired: the same seeds of all."""
    effects, draws, rng = {}, [], np.random.default_rng(0)
    for task, (*names, arms) in scores.items():

        def effect(*samples, axis=-1, task=task, names=names, arms=arms):
            means = dict(zip(arms, (sample.mean(axis) for sample in samples)))
            arm, base, reference = (means[name] for name in names)
            return (arm - base) / (reference - random[task])

        samples = tuple(arms.values())
        draws.append(draw(samples, effect, rng, paired))
        effects[task] = (effect(*samples), *np.percentile(draws[-1], [2.5, 97.5]))
    mean = np.mean([effect for effect, _, _ in effects.values()])
    effects["all"] = (mean, *np.percentile(np.mean(draws, 0), [2.5, 97.5]))
    return effects


def paired_effects(scores, random, level=0.95):
    """Mean difference of arm and base with the same seed, over the base's gain over a
    random policy, with t intervals. scores: {task: (arm, base)} → like drawn_effects."""
    means, variances, freedoms = [], [], []
    for task, (arm, base) in scores.items():
        differences = (arm - base) / (base.mean() - random[task])
        means.append(differences.mean())
        variances.append(differences.var(ddof=1) / len(differences))
        freedoms.append(len(differences) - 1)
    of_tasks = zip(means, variances, freedoms)
    effects = {task: (x[0], *t_interval(*x, level)) for task, x in zip(scores, of_tasks)}
    shares = np.array(variances) / len(scores) ** 2  # in that of the mean over tasks
    freedom = shares.sum() ** 2 / (shares**2 / freedoms).sum() if shares.any() else 1
    mean = np.mean(means)
    return effects | {"all": (mean, *t_interval(mean, shares.sum(), freedom, level))}
