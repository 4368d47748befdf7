"""Reads and appends the results: a row a run in results/STUDY.csv, its curves beside it."""

import csv
import fcntl
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
MADE_BY = ["commit", "python", "torch", "gymnasium", "cpu"]
COLUMNS = [
    "study",
    "task",
    "arm",
    "seed",
    "script",
    "variation",
    "flags",
    *MADE_BY,
    "threads",
]
COLUMNS += ["steps", "minutes", "episodes", "score", "last_quarter", "mean_return"]
COLUMNS += ["sampled", "greedy", "played", "note"]
CURVE_COLUMNS = ["task", "arm", "seed", "metric", "points"]


@cache
def load(*studies):
    """One table with the runs of these studies; empty where nothing has been run yet."""
    paths = [RESULTS / f"{study}.csv" for study in studies]
    tables = [pd.read_csv(path) for path in paths if path.exists()]
    table = pd.concat(tables) if tables else pd.DataFrame(columns=COLUMNS)
    return table.fillna({"note": "", "variation": "", "flags": ""}).sort_values("seed")


@cache
def load_curves(*studies):
    """{(task, arm, seed, metric): array of points over the run}."""
    found = {}
    for study in studies:
        path = RESULTS / f"{study}.curves.csv"
        table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=CURVE_COLUMNS)
        for *key, points in table.itertuples(index=False):
            found[tuple(key)] = np.fromstring(points, sep=" ")
    return found


def select(table, task, arm, seeds=None):
    """The runs of an arm on a task, by seed."""
    chosen = table[(table.task == task) & (table.arm == arm)]
    return chosen if seeds is None else chosen[chosen.seed.isin(seeds)]


def append(name, columns, rows):
    """Appends rows to results/NAME. Several processes may do so at once."""
    with open(RESULTS / name, "a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        file.seek(0, 2)
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(columns)
        writer.writerows(rows)


def made_by(script):
    """The commit that last changed the script, + if it has changed since; versions; the CPU."""
    git = lambda *words: subprocess.run(["git", "-C", ROOT, *words], capture_output=True)
    commit = git("log", "-1", "--format=%h", "--", script).stdout.decode().strip()
    changed = git("diff", "--quiet", "HEAD", "--", script).returncode == 1
    versions = [version("torch"), version("gymnasium")]
    return [commit + "+" * changed, platform.python_version(), *versions, cpu()]


def cpu():
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return models[0] if models else platform.processor()
