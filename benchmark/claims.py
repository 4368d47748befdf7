"""Effects and verdicts for the claims of claims.md, which states the rules.

claims.csv has the comparisons: those that predict something decide a claim. The first round
of runs, no longer in studies.py, has seeds 1 to 20; the second one, claims-2, from 21 on.
"""

from collections import namedtuple
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from estimates import drawn_effects, paired_effects
from results import load, load_curves, select
from studies import CHEETAH, runs

FIRST = range(1, 21)
TABLE = pd.read_csv(Path(__file__).with_suffix(".csv")).fillna("")
NAMES = dict(zip(TABLE.number, TABLE.claim))  # {number: claim}


# tasks: those on which it matters; bound: what the second round excludes if not settled
Verdict = namedtuple("Verdict", "word tasks bound", defaults=[(), None])


@cache
def comparisons(claim):
    """{comparison: {task: (arm, base, what it predicts)}}."""
    found = {}
    for row in TABLE[TABLE.claim == claim].itertuples():
        of_task = dict.fromkeys(row.tasks.split(), (row.arm, row.base, row.predicts))
        found[row.comparison] = found.get(row.comparison, {}) | of_task
    return found


@cache
def random_returns():
    return dict(load("random")[["task", "mean"]].to_numpy())


def values(task, arm, seeds=FIRST, column="score"):
    """A column of the runs that there are, by seed."""
    found = select(task, arm, "claims", "claims-2", seeds=seeds)
    return found.set_index("seed")[column]


def paired(arms):
    """One array an arm, of the seeds that all have."""
    return list(pd.concat(arms, axis=1).dropna().to_numpy().T)


def metric(arm, name, task=CHEETAH):
    """A metric over the run, for each seed of the first round."""
    found = load_curves("claims").items()
    return np.array([x for key, x in found if (*key[:2], key[3]) == (task, arm, name)])


def first_scores(claim, label, same_seeds=False):
    """{task: (names of arm, base, reference, {name: scores})} of the first round, or of its
    runs with the same seeds; empty until all arms have runs."""
    column, scores = "mean_return" if claim == "epochs" else "score", {}
    for task, (arm, base, _) in comparisons(claim)[label].items():
        reference = "plain" if base.startswith("plain") else "base"
        names = dict.fromkeys([arm, base, reference])
        arms = [values(task, name, FIRST, column) for name in names]
        arms = paired(arms) if same_seeds else [x.to_numpy() for x in arms]
        scores[task] = arm, base, reference, dict(zip(names, arms))
    return scores if all(len(arms[arm]) for arm, *_, arms in scores.values()) else {}


@cache
def first_effects(claim, same_seeds=False):
    """{comparison: effects} of the first round, or of its runs with the same seeds."""
    scores = {label: first_scores(claim, label, same_seeds) for label in comparisons(claim)}
    random = random_returns()
    drawn = lambda found: drawn_effects(found, random, same_seeds)
    return {label: drawn(found) for label, found in scores.items() if found}


@cache
def fresh_seeds(task, *arms):
    """The seeds of the second round that all these arms have."""
    of_task = [run for run in runs("claims-2") if run.task == task]
    return set.intersection(*({x.seed for x in of_task if x.arm == arm} for arm in arms))


@cache
def second_scores(claim, label, column=None):
    """{task: (arm, base)} by seed, and the number of missing pairs; ({}, 0) if there is no
    second round. Tasks without fresh seeds count with those of the first round."""
    if column is None:
        column = "mean_return" if claim in ("epochs", "reset-rows") else "last_quarter"
    scores, missing, any_fresh = {}, 0, False
    for task, (*names, _) in comparisons(claim)[label].items():
        fresh = fresh_seeds(task, *names)
        scores[task] = paired([values(task, x, fresh or FIRST, column) for x in names])
        any_fresh |= bool(fresh)
        missing += max(len(fresh) - len(scores[task][0]), 0)
    return (scores, missing) if any_fresh else ({}, 0)


def opposite(effects, least=0):
    """Whether two tasks have effects of opposite signs, whose intervals exclude 0."""
    clear = [x for x, low, high in effects.values() if abs(x) >= least and low * high > 0]
    return min(clear, default=0) < 0 < max(clear, default=0)


def first_verdict(effects):
    tasks = {task: found for task, found in effects.items() if task != "all"}
    effect, low, high = effects["all"]
    clear = tuple(task for task, (_, low, high) in tasks.items() if low * high > 0)
    if opposite(tasks):
        return Verdict("depends on the task", clear)
    if low * high > 0 and abs(effect) >= 0.05 and clear:
        return Verdict("matters", clear)
    if -0.1 <= low and high <= 0.1:
        return Verdict("does not matter")
    return Verdict("not settled")


def second_verdict(scores, random):
    effects = paired_effects(scores, random)
    widened = paired_effects(scores, random, 1 - 0.05 / len(scores))
    (_, low, high), tasks = effects["all"], {task: effects[task] for task in scores}
    matters = tuple(t for t in tasks if widened[t][1] > 0.025 or widened[t][2] < -0.025)
    bound = max(max(-low, high) for _, low, high in tasks.values())
    if opposite(tasks, 0.05):
        return Verdict("depends on the task", tuple(tasks))
    if matters:
        return Verdict("matters", matters)
    if bound <= 0.15 and -0.1 <= low and high <= 0.1:
        return Verdict("does not matter")
    return Verdict("not settled", bound=bound)


@cache
def judge(claim):
    """{comparison that decides the claim: (effects, verdict, whether as predicted)}, by the
    second round where that is complete. Whether: None if it is open."""
    judged = {}
    for label, tasks in comparisons(claim).items():
        predicts = {task: predicted for task, (*_, predicted) in tasks.items() if predicted}
        scores, missing = second_scores(claim, label)
        if predicts and scores and not missing:
            effects = paired_effects(scores, random_returns())
            verdict = second_verdict(scores, random_returns())
        elif predicts and label in first_effects(claim):
            effects = first_effects(claim)[label]
            if len(predicts) == 1:
                (task,) = predicts
                effects = {task: effects[task], "all": effects[task]}
            verdict = first_verdict(effects)
        else:
            continue
        found = {"better" if effects[task][0] > 0 else "worse" for task in verdict.tasks}
        holds = (found or {"the same"}) == set(predicts.values())
        settled = verdict.word in ("matters", "does not matter")
        judged[label] = effects, verdict, holds if settled else None
    if "advantages recomputed" in judged:  # claim 12's second round turns it round
        del judged["advantages not recomputed"]
    return judged


def kl_ratios(task, percent=100):
    """{ε: mean approx_kl over ½ε²}, in the first so many hundredths of the runs."""
    arms = {e: "plain" if e == 0.2 else f"plain-clip-{e}" for e in (0.05, 0.1, 0.2, 0.3)}
    curves = {e: metric(arm, "approx_kl", task)[:, :percent] for e, arm in arms.items()}
    return {e: np.nanmean(points) / e**2 * 2 for e, points in curves.items()}
