"""Tells whether a PPO makes one of the mistakes that do not crash.

    python benchmark/probes.py adapters:ours                    # a few minutes
    python benchmark/probes.py my_module:adapter --seeds 3 --actions discrete --only limit

Trains on each environment of probe_environments.py for seconds, and compares values or
actions with the right ones, which stand there with the arithmetic. An adapter is a function

    def adapter(env_id, gamma, num_envs, steps, seed, continuous):
        ...  # train; if possible, save and load what was trained
        return value_function, action_function

Both take observations (B, D), an array, and return arrays, not tensors with a gradient.
The first returns their values (B,), in units of the environment's reward, the second the
best action for each, as the environment gets it. None takes the place of one that the
implementation does not have; an adapter may raise NotImplementedError for a kind of actions
or for an environment, as for Scale without normalisation. adapters.py has examples; short
rollouts and a learning rate of 1e-3 suit the probes. If it is slow: OMP_NUM_THREADS=1.
The exit status is 1 if a probe failed.
"""

import argparse
import contextlib
import csv
import importlib
import io
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [os.getcwd(), str(HERE), str(HERE.parent)]

import probe_environments  # noqa: E402, as the path was not known before

RESULTS = HERE / "results" / "probes.csv"
COLUMNS = "implementation version actions probe seed quantity expected found tolerance"
COLUMNS = [*COLUMNS.split(), "passed", "seconds"]
NUM_ENVS = 4
# Six and almost five times the largest error of our scripts; README.md says more.
TOLERANCES = {"value": 0.1, "action": 0.5}
BOTH = ("discrete", "continuous")


class Probe(NamedTuple):
    environment: str
    reads: str  # "value" or "action"
    expected: dict  # {state: right answer}
    meaning: str  # of a failure
    gamma: float = 0.5
    steps: int = 10_000
    kinds: tuple = BOTH


PROBES = {
    "termination": Probe(
        "Termination",
        "value",
        {0: 4, 1: 2},
        "a future counts after termination (about 4 in state 1), or done is off by a step, "
        "or gamma is not passed on",
    ),
    "limit": Probe(
        "Limit",
        "value",
        {0: 4, 2: 2},
        "state 2: about 1, a time limit counts as termination; about 3, as the next "
        "episode's first state",
    ),
    "both ends": Probe(
        "Ends",
        "value",
        {0: 4, 1: 2, 2: 2, 3: 2},
        "state 3 above 2: what is both terminated and truncated counts as a time limit; "
        "else see the probes before",
    ),
    "last state": Probe(
        "Ring",
        "value",
        {0: 2, 1: 4, 2: 1},
        "at a time limit V(s_t) or that of the next episode counts in place of V(s_t+1); "
        "or see the probes before",
    ),
    "rollout end": Probe(
        "Endless",
        "value",
        {0: 2},
        "no future counts after the last step of a rollout",
        gamma=0.9,
    ),
    "reset row": Probe(
        "Reset",
        "value",
        {0: 1, 1: 0},
        "the step that only resets is learned from, or observations are off by a step",
        gamma=0.9,
    ),
    "leak": Probe(
        "Leak",
        "value",
        {0: 0, 2: 0},
        "the next episode's advantages leak into the one before: state 0, after a "
        "termination; state 2, after a time limit",
        gamma=0.9,
    ),
    "shift": Probe(
        "Shift",
        "value",
        {0: -1, 1: 1},
        "rewards are stored with the step before or after theirs",
    ),
    "bounds": Probe(
        "Bounds",
        "action",
        {0: 2.5},
        "actions are cut to [-1, 1] and not mapped to the environment's bounds",
        steps=40_000,
        kinds=("continuous",),
    ),
    "scale": Probe(
        "Scale",
        "action",
        {-1: -1, 1: 1},
        "observations are not normalised, or their statistics are not saved with the agent",
    ),
    "far": Probe(
        "Far",
        "action",
        {0: 0.5},  # or any other action from 0 to 1
        "the discount factor does not reach the advantages or the rewards' normalisation",
        gamma=0.99,
        steps=20_000,
    ),
    "stale": Probe(
        "Stale",
        "action",
        {0: -0.5, 1: -0.5, 2: -0.5, 3: 0.5, 4: 0.5, 5: 0.5},
        "actions are chosen by or learned with another step's observation",
    ),
    "seed": Probe(
        "Shift",
        "value",
        {"same": 1, "other": 0},
        "same: two runs with one seed differ; other: runs with two seeds do not",
        steps=2_000,
    ),
}


def functions(probe, adapter, seed, continuous):
    """Trains silently → {"value": function, "action": function}."""
    env_id = f"{probe.environment}{'Box' if continuous else ''}-v0"
    env_id = f"probe_environments:Probe{env_id}"
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            made = adapter(env_id, probe.gamma, NUM_ENVS, probe.steps, seed, continuous)
        except NotImplementedError:
            raise
        except Exception:
            print(output.getvalue(), file=sys.__stderr__)
            raise
    return dict(zip(("value", "action"), made))


def observe(probe, state, continuous):
    environment = getattr(probe_environments, probe.environment)(continuous)
    environment.state = state
    return environment, environment.observe()[None]


def read(probe, made, continuous):
    """{state: what was found}."""
    found = {}
    for state in probe.expected:
        environment, obs = observe(probe, state, continuous)
        number = float(np.asarray(made[probe.reads](obs)).item())
        if probe.reads == "action":
            high = environment.high
            number = environment.number(np.clip(number, -high, high))
        found[state] = number
    return found


def alike(probe, made, adapter, seed, continuous):
    """Whether runs with the same and with another seed give the same values."""
    _, obs = observe(probe, 0, continuous)
    value = lambda made: np.asarray(made["value"](obs))
    again = functions(probe, adapter, seed, continuous)
    other = functions(probe, adapter, seed + 1, continuous)
    equal = lambda other: float(np.array_equal(value(made), value(other)))
    return {"same": equal(again), "other": equal(other)}


def run(name, adapter, seed, continuous):
    """Trains once, or three times for "seed" → rows [quantity, expected, found, …]."""
    probe, began = PROBES[name], time.perf_counter()
    tolerance = TOLERANCES[probe.reads]
    found = dict.fromkeys(probe.expected)  # nothing yet
    with contextlib.suppress(NotImplementedError):
        made = functions(probe, adapter, seed, continuous)
        if name == "seed" and made["value"] is not None:
            found = alike(probe, made, adapter, seed, continuous)
        elif name != "seed" and made[probe.reads] is not None:
            found = read(probe, made, continuous)
    rows, seconds = [], round(time.perf_counter() - began, 1)
    for key, expected in probe.expected.items():
        quantity, number = f"{probe.reads}({key})", found[key]
        if name == "seed":
            quantity = f"{key} seed, same values"
        passed = None if number is None else int(abs(number - expected) <= tolerance)
        number = None if number is None else round(number, 4)
        rows.append([quantity, expected, number, tolerance, passed, seconds])
    return rows


def show(name, kind, runs):
    """Prints the rows of one probe and one kind of actions, all seeds side by side.
    Returns whether one failed."""
    failed = False
    for rows in zip(*runs):
        quantity, expected = rows[0][:2]
        if rows[0][2] is None:
            verdict, found = "", "not probed"
        else:
            verdict = "pass" if all(row[4] for row in rows) else "FAIL"
            found = " ".join(f"{row[2]:.2f}" for row in rows)
        row = f"{name:12} {kind:11} {quantity:25} {expected:6g}  {verdict:5} {found}"
        print(row, flush=True)  # at once, as the rest may take minutes
        failed |= verdict == "FAIL"
    if failed:
        print(f"{'':12} → {PROBES[name].meaning}")
    return failed


def main():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter)
    parser.description = __doc__
    parser.add_argument("adapter", help="module:function")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 1")
    parser.add_argument("--actions", choices=BOTH, help="only this kind")
    parser.add_argument("--only", choices=PROBES, help="only this probe")
    parser.add_argument("--save", metavar="NAME,VERSION", help="in results/probes.csv")
    args = parser.parse_args()
    module, colon, function = args.adapter.partition(":")
    if not colon:
        parser.error(f"{args.adapter} is not module:function")
    adapter = getattr(importlib.import_module(module), function)

    names = [args.only] if args.only else PROBES
    kinds = [args.actions] if args.actions else BOTH
    todo = [(name, kind) for name in names for kind in kinds if kind in PROBES[name].kinds]
    if not todo:
        parser.error(f"{args.only} has no {args.actions} actions")
    failed, seeds = False, range(1, args.seeds + 1)
    print(f"{'probe':12} {'actions':11} {'quantity':25}  right  {'':5} found")
    for name, kind in todo:
        runs = [run(name, adapter, seed, kind == "continuous") for seed in seeds]
        failed |= show(name, kind, runs)
        if args.save:
            save(args.save.split(","), name, kind, zip(seeds, runs))
    sys.exit(failed)


def save(source, name, kind, runs):
    is_new = not RESULTS.exists()
    with open(RESULTS, "a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(COLUMNS)
        for seed, rows in runs:
            writer.writerows([*source, kind, name, seed, *row] for row in rows)


if __name__ == "__main__":
    main()
