"""Which comparisons decide the claims of claims.md, and the rules that turn them into verdicts.

FIRST_RULE judged the first round of runs, seeds 1 to 20. It could hardly settle a small effect,
so SECOND_RULE judges fresh seeds of the claims that it left open, and new claims. Both were
committed before the runs that they judge.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from estimates import drawn_effects, paired_effects
from results import RESULTS, load, load_curves, pd, select
from studies import HALF_CHEETAH, LUNAR, SHORT, SWIMMER

FIRST_RULE = """
The effect of a comparison on a task is (mean of the arm - mean of the base), divided by (mean of
the reference - return of a uniformly random policy). The reference is the arm that a claim's
comparisons start from, "base" or "plain". The score of a run is the mean return of its last 100
training episodes, for claims about speed of learning the mean return over the whole run. The
effect on all tasks is their plain mean. Intervals (95 %) come from a bootstrap that resamples
seeds. References have 20 seeds, the other arms five, or ten if the first five did not settle the
claim. Verdicts, the first that applies:

depends on the task   the intervals of two tasks exclude 0 with opposite signs
matters               the interval of all tasks excludes 0, the effect is at least 5 %, and the
                      interval of some task excludes 0, too: the verdict is about such tasks
does not matter       the interval of all tasks lies within -10 % and +10 %
not settled           otherwise, with half the interval's width

The claim holds if the comparisons that decide it are as it predicts. Later, and stricter: the
last condition of "matters"; and claims about MuJoCo are judged by MuJoCo's tasks alone.
"""
SECOND_RULE = """
The score is the mean return of all episodes that end in the last quarter of the steps, for
claims 4 and 11, about speed of learning, in all of them. The effect on a task is the mean
difference between the arm and its base with the same seed, over the base's gain over a random
policy, with a 95 % t interval; on all tasks it is their plain mean. Verdicts, the first that
applies:

depends on the task   two tasks have effects of at least 5 % in opposite directions, whose
                      intervals exclude 0
matters               the interval of some task, widened for the number of tasks (Bonferroni),
                      lies outside of -2.5 % to +2.5 %, on either side: the verdict names the
                      tasks; against the predicted direction the claim does not hold
does not matter       every task's interval lies within -15 % and +15 %, that of all tasks
                      within -10 % and +10 %
not settled           otherwise: larger effects than the intervals reach are excluded

A task without fresh seeds counts with its runs of the first round.
"""


class Verdict(NamedTuple):
    word: str
    tasks: tuple = ()  # on which it matters
    bound: float = 0.0  # of what is excluded, if it is not settled


TWO, SLOW = (HALF_CHEETAH, LUNAR), (*SHORT, LUNAR)
CHEETAH, PENDULUM = (HALF_CHEETAH,), ("Pendulum-v1", HALF_CHEETAH)
OLD = range(1, 21)  # seeds of the first round, as far as there are any


def pair(arm, base="base", tasks=TWO):
    return dict.fromkeys(tasks, (arm, base))


def on(task, arm, base="base", last=None):
    """A comparison on one task; with seeds 21 to last, or those of the first round."""
    return {task: (arm, base, range(21, last + 1) if last else OLD)}


def bonus(coef):  # LunarLander's default has one, HalfCheetah's has none
    return {LUNAR: (f"ent-{coef}", "ent-0"), HALF_CHEETAH: (f"ent-{coef}", "base")}


# In the order of claims.md: verdict and sign if the claim is right, comparisons that decide it.
PREDICTED = {
    "clip": ("matters", -1, "no details, against no clip"),
    "value-clip": ("does not matter", 0, "value clip"),
    "norm-adv": ("matters", -1, "advantages not normalised"),
    "epochs": ("matters", -1, "1 epoch"),
    "hundred-epochs": ("does not matter", 0, "100 epochs"),
    "overfit": ("matters", -1, "20 epochs, no clip"),
    "clip-kl": ("", 0),  # no comparison: the mean KL is within a factor of 2 of ½ε²
    "entropy": ("matters", 1, "bonus of 0.01"),
    "lambda": ("matters", -1, "λ = 0", "λ = 1"),
    "time-limit": ("matters", -1, "time limit as termination"),
    "reset-rows": ("matters", -1, "reset rows kept"),
    "recompute": ("matters", -1, "advantages not recomputed"),
    "normalisation": (
        "matters",
        -1,
        "observations not normalised",
        "rewards not normalised",
    ),
    "start": ("matters", -1, "gain of 1", "no annealing", "log σ = 0"),
    "ladder": ("", 0),  # no prediction: changes are added one at a time
    "kl-penalty": ("does not matter", 0, "best KL penalty"),
    "ages": ("matters", 1, "random ages at the start"),
    "adaptive-kl": ("matters", 1, "learning rate follows the KL"),
    "adam-betas": ("matters", 1, "β₁ = β₂ = 0.9"),
    "spo": ("matters", 1, "SPO for the clip"),
}
NUMBERS = {name: number for number, name in enumerate(PREDICTED, 1)}
ON_MUJOCO = ("recompute", "normalisation")  # claims about MuJoCo
SPEED = ("epochs", "reset-rows")  # claims about speed of learning
FIRST = {  # {comparison: {task: (arm, base)}}
    "clip": {
        "no details, against no clip": pair("plain-no-details", "plain-no-clip"),
        "no clip": pair("plain-no-clip", "plain"),
        "no details": pair("plain-no-details", "plain"),
        "no details: no clip": pair("plain-no-clip-no-details", "plain-no-details"),
        "KL limit: no clip": pair("plain-no-clip-kl-limit", "plain-kl-limit"),
    },
    "value-clip": {  # LunarLander's default has it
        "value clip": {
            LUNAR: ("base", "no-clip-vloss"),
            HALF_CHEETAH: ("clip-vloss", "base"),
        }
    },
    "norm-adv": {"advantages not normalised": pair("no-norm-adv")},
    "epochs": {
        "1 epoch": pair("plain-epochs-1", "plain"),
        "2 epochs": pair("plain-epochs-2", "plain"),
        "4 epochs": pair("plain-epochs-4", "plain"),
        "20 epochs": pair("plain-epochs-20", "plain"),
    },
    "hundred-epochs": {"100 epochs": pair("plain-epochs-100", "plain", CHEETAH)},
    "overfit": {
        "20 epochs, no clip": pair("plain-epochs-20-no-clip", "plain-epochs-20"),
        "20 epochs, KL limit for clip": pair(
            "plain-epochs-20-no-clip-kl-limit", "plain-epochs-20"
        ),
        "10 epochs, no clip": pair("plain-no-clip", "plain"),
    },
    "clip-kl": {f"ε = {e}": pair(f"plain-clip-{e}", "plain") for e in (0.05, 0.1, 0.3)},
    "entropy": {f"bonus of {coef}": bonus(coef) for coef in (0.01, 0.05)},
    "lambda": {f"λ = {x}": pair(f"lambda-{x}") for x in (0, 0.5, 0.9, 0.99, 1)},
    "time-limit": {"time limit as termination": pair("no-bootstrap", tasks=PENDULUM)},
    "reset-rows": {"reset rows kept": pair("reset-rows", tasks=SLOW)},
    "recompute": {"advantages not recomputed": pair("no-recompute", tasks=CHEETAH)},
    "normalisation": {
        "observations not normalised": pair("no-norm-obs"),
        "rewards not normalised": pair("no-norm-reward"),
    },
    "start": {
        "gain of 1": pair("head-gain-1"),
        "no annealing": pair("no-anneal"),
        "log σ = 0": pair("log-std-0", tasks=CHEETAH),
    },
    "kl-penalty": {
        "β = 0.3": pair("plain-kl-penalty-0.3", "plain"),
        "β = 1": pair("plain-kl-penalty-1", "plain"),
        "β = 3": pair("plain-kl-penalty-3", "plain"),
        "best KL penalty": {  # chosen on these very runs
            HALF_CHEETAH: ("plain-kl-penalty-1", "plain"),
            LUNAR: ("plain-kl-penalty-0.3", "plain"),
        },
    },
}
SECOND = {  # {comparison: {task: (arm, base, seeds)}}
    "value-clip": {
        "value clip": on(LUNAR, "base", "no-clip-vloss")
        | on(HALF_CHEETAH, "clip-vloss", last=80)
    },
    "norm-adv": {
        "advantages not normalised": on(HALF_CHEETAH, "no-norm-adv", last=80)
        | on(LUNAR, "no-norm-adv", last=60)
    },
    "entropy": {
        "bonus of 0.01": on(LUNAR, "ent-0.01", "ent-0")
        | on(HALF_CHEETAH, "ent-0.01", last=80)
    },
    "reset-rows": {
        "reset rows kept": {task: ("reset-rows", "base", range(21, 81)) for task in SHORT}
        | on(LUNAR, "reset-rows")
    },
    "recompute": {"advantages not recomputed": on(HALF_CHEETAH, "no-recompute", last=140)},
    "start": {
        "gain of 1": on(HALF_CHEETAH, "head-gain-1", last=80) | on(LUNAR, "head-gain-1"),
        "no annealing": on(HALF_CHEETAH, "no-anneal", last=80) | on(LUNAR, "no-anneal"),
        "log σ = 0": on(HALF_CHEETAH, "log-std-0"),
    },
    "kl-penalty": {
        "best KL penalty": on(HALF_CHEETAH, "plain-kl-penalty-1", "plain", last=80)
        | on(LUNAR, "plain-kl-penalty-0.3", "plain", last=60)
    },
    "ages": {
        "random ages at the start": on(HALF_CHEETAH, "random-start-ages", last=60)
        | on(SWIMMER, "random-start-ages", last=30)
    },
    "adaptive-kl": {
        "learning rate follows the KL": on(HALF_CHEETAH, "adaptive-kl", last=60)
        | on(LUNAR, "adaptive-kl", last=40)
    },
    "adam-betas": {
        "β₁ = β₂ = 0.9": on(HALF_CHEETAH, "adam-betas", last=60)
        | on(LUNAR, "adam-betas", last=40)
    },
    "spo": {
        "SPO for the clip": on(HALF_CHEETAH, "spo", last=60) | on(LUNAR, "spo", last=40)
    },
}


def random_returns():
    return dict(pd.read_csv(RESULTS / "random.csv")[["task", "mean"]].to_numpy())


def runs():
    return load("claims", "claims-2")


def values(task, arm, seeds, column):
    """{seed: value} of the runs that there are."""
    found = select(runs(), task, arm, seeds)
    return dict(zip(found.seed, found[column]))


@cache
def first_effects(claim, paired=False):
    """{comparison: effects} of the first round; paired: only the same seeds."""
    column = "mean_return" if claim in SPEED else "score"
    found = {}
    for label, tasks in FIRST.get(claim, {}).items():
        scores = {}
        for task, arms in tasks.items():
            reference = "plain" if arms[1].startswith("plain") else "base"
            of_seeds = [values(task, arm, OLD, column) for arm in (*arms, reference)]
            if paired:
                common = sorted(of_seeds[0].keys() & of_seeds[1].keys())
                of_seeds = [{seed: x[seed] for seed in common} for x in of_seeds]
            arm, base, reference_scores = (np.array(list(x.values())) for x in of_seeds)
            scores[task] = (arm, base, base if arms[1] == reference else reference_scores)
        found[label] = drawn_effects(scores, random_returns(), paired)
    return found


@cache
def second_scores(claim):
    """{comparison: {task: (arm, base)}} of the second round, by seed, and how many runs miss."""
    column = "mean_return" if claim in SPEED else "last_quarter"
    found, missing = {}, 0
    for label, tasks in SECOND.get(claim, {}).items():
        found[label] = {}
        for task, (arm, base, seeds) in tasks.items():
            arms = [values(task, name, seeds, column) for name in (arm, base)]
            common = sorted(arms[0].keys() & arms[1].keys())
            found[label][task] = [np.array([x[seed] for seed in common]) for x in arms]
            missing += 0 if seeds == OLD else len(seeds) - len(common)
    return found, missing


def first_verdict(effects):
    tasks = {task: effect for task, effect in effects.items() if task != "all"}
    clear = tuple(task for task, (_, low, high) in tasks.items() if low > 0 or high < 0)
    effect, low, high = effects["all"]
    if len({tasks[task][0] > 0 for task in clear}) == 2:
        return Verdict("depends on the task", clear)
    if (low > 0 or high < 0) and abs(effect) >= 0.05 and clear:
        return Verdict("matters", clear)
    if -0.1 <= low and high <= 0.1:
        return Verdict("does not matter")
    return Verdict("not settled", bound=(high - low) / 2)


def second_verdict(scores, random):
    effects = paired_effects(scores, random)
    widened = paired_effects(scores, random, 1 - 0.05 / len(scores))
    tasks = {task: effect for task, effect in effects.items() if task != "all"}
    clear = [
        x for x, low, high in tasks.values() if abs(x) >= 0.05 and (low > 0 or high < 0)
    ]
    if len({effect > 0 for effect in clear}) == 2:
        return Verdict("depends on the task", tuple(tasks))
    outside = lambda low, high: low > 0.025 or high < -0.025
    matters = tuple(task for task in tasks if outside(*widened[task][1:]))
    if matters:
        return Verdict("matters", matters)
    bounds = {task: max(-low, high) for task, (_, low, high) in effects.items()}
    if bounds.pop("all") <= 0.1 and max(bounds.values()) <= 0.15:
        return Verdict("does not matter")
    return Verdict("not settled", bound=max(bounds.values()))


def judge(claim):
    """{comparison that decides the claim: (effects, verdict, whether it holds)}; the second
    round's where it is complete. Whether: True, False, or None where it is open."""
    predicted, sign, *labels = PREDICTED[claim]
    (scores, missing), judged = second_scores(claim), {}
    for label in labels:
        if claim in SECOND and missing == 0:
            effects = paired_effects(scores[label], random_returns())
            verdict = second_verdict(scores[label], random_returns())
        elif claim in FIRST:
            effects = first_effects(claim)[label]
            if claim in ON_MUJOCO:
                effects = {name: effects[HALF_CHEETAH] for name in (HALF_CHEETAH, "all")}
            verdict = first_verdict(effects)
        else:
            continue
        holds = None
        if verdict.word in ("matters", "does not matter"):
            signs = [sign * effects[task][0] >= 0 for task in verdict.tasks or ["all"]]
            holds = verdict.word == predicted and all(signs) and more(claim)
        judged[label] = effects, verdict, holds
    return judged


def more(claim):
    """What else a claim of the first round predicts."""
    effects = first_effects(claim)
    if claim == "epochs":  # one epoch reaches less than half of what ten reach
        return effects["1 epoch"]["all"][0] < -0.5
    if claim == "lambda":  # no other value is shown to be better
        others = [effects[f"λ = {x}"] for x in (0.5, 0.9, 0.99)]
        return not any(
            first_verdict(x).word == "matters" and x["all"][0] > 0 for x in others
        )
    if claim == "hundred-epochs":  # the clip saturates
        before, after = (
            np.mean(metric("plain-epochs-100", f"clipfrac_in_epoch_{n}")) for n in (20, 100)
        )
        return abs(after / before - 1) <= 0.1
    return True


def metric(arm, name, task=HALF_CHEETAH):
    """The mean of a metric over the run, for each seed of the first round."""
    found = load_curves("claims").items()
    return [np.nanmean(x) for key, x in found if (*key[:2], key[3]) == (task, arm, name)]


def kl_ratios(task, clips=(0.05, 0.1, 0.2, 0.3)):
    """{ε: mean approx_kl over ½ε²}."""
    arms = {clip: "plain" if clip == 0.2 else f"plain-clip-{clip}" for clip in clips}
    return {
        c: np.mean(metric(arm, "approx_kl", task)) / (c**2 / 2) for c, arm in arms.items()
    }
