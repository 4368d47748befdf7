"""Tables, verdicts and single numbers for claims.md and for the prose of both READMEs."""

import ast
import re

import claims
import numpy as np
import pandas as pd
from estimates import iqm, paired_effects, summary, welch
from results import ROOT, load
from studies import CHEETAH
from tables import CI, curve, final_runs, number, rounds_of_speed

SECOND = ", second round"


def percent(x):
    """With one decimal below 1 %, so that it shows on which side of 0 a bound lies."""
    text = f"{100 * x:+.{1 if abs(x) < 0.01 else 0}f}"
    return ("0" if float(text) == 0 else text.replace("-", "−")) + "\u00a0%"


def interval(mean, low, high):
    return f"{percent(mean)} [{percent(low)}, {percent(high)}]"


def each_task(effects):
    return "; ".join(f"{t}: {interval(*e)}" for t, e in effects.items() if t != "all")


def count_seeds(pairs):
    """How many arm and base have, task by task if that differs."""
    return "; ".join(dict.fromkeys(f"{len(arm)}, {len(base)}" for arm, base in pairs))


# ---------- Claims ----------
def effects(claim):
    """The comparisons of a claim, round by round."""
    rows = []
    for label, found in claims.first_effects(claim).items():
        paired = each_task(claims.first_effects(claim, same_seeds=True)[label])
        scores = claims.first_scores(claim, label).values()
        seeds = count_seeds((arms[arm], arms[base]) for arm, base, _, arms in scores)
        rows.append([label, seeds, each_task(found), paired, interval(*found["all"])])
    for label, tasks in claims.comparisons(claim).items():
        scores, missing = claims.second_scores(claim, label)
        if scores and any(predicted for *_, predicted in tasks.values()):
            row = [f"{label}{SECOND}", f"missing pairs: {missing}", "", "", ""]
            if not missing:
                found = paired_effects(scores, claims.random_returns())
                of_all = interval(*found["all"])
                row[1:] = [count_seeds(scores.values()), "", each_task(found), of_all]
            rows.append(row)
    columns = ["comparison", "seeds", "each task", "same seeds", "all tasks"]
    return pd.DataFrame(rows, columns=columns)


def ladder():
    """Claim 15: each step, and its change with the Welch interval."""
    rows = []
    for label, tasks in claims.comparisons("ladder").items():
        after, before = [summary(claims.values(CHEETAH, arm)) for arm in tasks[CHEETAH][:2]]
        change = [number(x, 0) for x in (after[0] - before[0], *welch(after, before))]
        rows = rows or [["CleanRL's flags", number(before[0]), ""]]
        rows.append([f"+ {label}", number(after[0]), "{} [{}, {}]".format(*change)])
    first, last = summary(claims.values(CHEETAH, "ladder-0")), after
    change = [number(x, 0) for x in (last[0] - first[0], *welch(last, first))]
    rows.append(["from the first to the last", "", "{} [{}, {}]".format(*change)])
    return pd.DataFrame(rows, columns=["agent", "mean return", f"change {CI}"])


def verdict(claim):
    words = {}
    for label, (found, (word, tasks, bound), holds) in claims.judge(claim).items():
        if holds is not None:
            word = "holds" if holds else "does not hold"
            if 0 < len(tasks) < len(found) - 1 or len(tasks) == 1:
                word += f" on {', '.join(tasks)}"
        elif bound is not None:
            word += f" (effects beyond {100 * bound:.0f}\u00a0% are excluded)"
        elif word == "not settled":
            word += " ({} to {})".format(*map(percent, found["all"][1:]))
        words[label] = word
    if len(set(words.values())) == 1:
        return words.popitem()[1]
    return "; ".join(f"{label}: {word}" for label, word in words.items()) or "not run yet"


def verdicts():
    """Statement and verdict of each claim, as claims.md has them."""
    text, rows = (ROOT / "benchmark/claims.md").read_text(), []
    text = re.sub("<!-- .*? -->", "", text)
    for section in text.split("\n### ")[1:]:
        words = re.search(r"\*\*Verdict: (.*?)\.?\*\*", section, re.S)[1]
        rows.append([*section.splitlines()[0].split(". ", 1), re.sub("[ \n]+", " ", words)])
    return pd.DataFrame(rows, columns=["#", "claim", "verdict"])


# ---------- Numbers in the prose ----------
def effect(claim, label, task="all", column=None):
    """An effect that `effects` shows, by the comparison's name there; in the second round
    also of another column than the one that decides."""
    if label.endswith(SECOND):
        scores, _ = claims.second_scores(claim, label.removesuffix(SECOND), column)
        return interval(*paired_effects(scores, claims.random_returns())[task])
    return interval(*claims.first_effects(claim)[label][task])


def kl_range(task, percent=100):
    ratios = claims.kl_ratios(task, int(percent)).values()
    return f"{min(ratios):.2f} to {max(ratios):.2f} ({task})"


def scores(task, arm):
    """The scores of the first round, in order."""
    return ", ".join(number(x, 0) for x in sorted(claims.values(task, arm)))


def mean_score(task, arm, first, last):
    return number(claims.values(task, arm, range(int(first), int(last) + 1)).mean(), 0)


def mean_metric(arm, name):
    return f"{np.nanmean(claims.metric(arm, name)):.2g}"


def last_metric(task, arm, name):
    return f"{np.nanmean(claims.metric(arm, name, task)[:, -1]):.2g}"


def final(task, column, arm="default"):
    found = final_runs(task, arm)[column]
    return number(iqm(found) if column == "score" else found.median())


def tried(arm, metric="last_quarter"):
    """Of README's section "Try it": mean over seeds, in the last quarter of the run."""
    runs = load("tried").query("arm == @arm")
    if metric == "last_quarter":
        return number(runs.last_quarter.mean(), 0)
    return f"{np.mean([curve(run, metric)[75:] for run in runs.itertuples()]):.2g}"


def lines(variation):
    """How many lines its patches add."""
    patches = (ROOT / "benchmark/variations").glob(f"{variation}.*.patch")
    added = [re.findall(r"^\+(?!\+\+)", x.read_text(), re.M) for x in sorted(patches)]
    return " and ".join(str(len(found)) for found in added)


def speedup(script, program, machine=""):
    found = rounds_of_speed(script)
    rounds = next(found[name] for name in found if name.startswith(machine))
    return f"{(rounds[program] / rounds['stable-baselines3']).median():.1f}"


def code(script, name):
    """A definition of a script, word for word."""
    text = (ROOT / script).read_text()
    node = next(x for x in ast.parse(text).body if getattr(x, "name", "") == name)
    return f"\n```python\n{ast.get_source_segment(text, node)}\n```\n"


def rlhf_verdict(part=None):
    """Applies the rule of the study, for one of its three parts or for all."""
    table, betas = load("rlhf"), ("reference", "0", "0.1", "0.3", "1", "3")
    reference, none, *others = [table[table.beta == beta] for beta in betas]

    def sign(x, y):
        """Of the difference of means; 0 if its 95 % interval holds 0."""
        return int(np.sign(welch(summary(x), summary(y))).sum() / 2)

    falls = [sign(a.kl, b.kl) for a, b in zip([none, *others], others)]
    games = [sign(none.proxy, reference.proxy), sign(reference.true, none.true)]
    helps = [sign(arm.true, none.true) for arm in others]
    parts = [min(falls), min(games), max(helps)]
    found = parts[int(part) - 1] if part else min(parts)
    return {1: "holds", 0: "is not settled by this data", -1: "does not hold"}[found]
