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
COLUMNS = ["study", "task", "arm", "seed", "script", "variation", "flags", *MADE_BY]
COLUMNS += ["threads", "steps", "minutes", "episodes", "score", "last_quarter"]
COLUMNS += ["mean_return", "sampled", "greedy", "played", "note"]
CURVE_COLUMNS = ["task", "arm", "seed", "metric", "points"]


def read(name, columns):
    """results/NAME, or an empty table."""
    path = RESULTS / name
    if not path.exists():
        return pd.DataFrame(columns=columns)
    return pd.read_csv(path, dtype=dict.fromkeys(["variation", "note", "flags"], str))


@cache
def load(*studies):
    """One table of all runs of these studies."""
    tables = [read(f"{study}.csv", COLUMNS) for study in studies]
    table = pd.concat([table for table in tables if len(table)] or tables)
    return table.fillna({"variation": "", "note": ""})


def select(task, arm, *studies, seeds=None):
    """The runs of an arm on a task, by seed."""
    table = load(*studies).sort_values("seed")
    found = table[(table.task == task) & (table.arm == arm)]
    return found if seeds is None else found[found.seed.isin(seeds)]


@cache
def load_curves(*studies):
    """{(task, arm, seed, metric): array of points over the run}."""
    table = pd.concat([read(f"{study}.curves.csv", CURVE_COLUMNS) for study in studies])
    rows = table.itertuples(index=False)
    return {tuple(key): np.fromstring(points, sep=" ") for *key, points in rows}


def append(name, columns, rows):
    """Appends rows to results/NAME. Several processes may do so at once."""
    with open(RESULTS / name, "a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        file.seek(0, 2)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows(rows if file.tell() else [columns, *rows])


def made_by(*files):
    """The commit that last changed one of the files, the script and a patch, + if they were
    changed since; versions; CPU."""
    git = lambda *words: subprocess.run(["git", "-C", ROOT, *words], capture_output=True)
    commit = git("log", "-1", "--format=%h", "--", *files).stdout.decode().strip()
    changed = git("diff", "--quiet", "HEAD", "--", *files).returncode == 1
    versions = [platform.python_version(), version("torch"), version("gymnasium")]
    return [commit + ("+" if changed else ""), *versions, cpu()]


def cpu():
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return models[0] if models else platform.processor()
