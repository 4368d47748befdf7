"""Runs the training studies and keeps their raw data in benchmark/results/.

    python benchmark/run.py ppo                        # every run that has no results yet
    python benchmark/run.py ppo --jobs 8 --seeds 1     # eight at a time, only the first seed
    python benchmark/run.py selection --dry-run        # one command a line, for a job array
    python benchmark/run.py selection --only 'Hopper*' # runs whose names match
    python benchmark/run.py ppo --resume               # also continue what was interrupted

studies.py and claims.py list the studies. A run trains in --work and leaves its results in
results/<study>/<label>-<seed>.*: headline studies keep flags, episodes and metrics, the others one
.json of at most 20 kB: score, a curve of 200 points, 50 rows of metrics, and the flags that differ
from the defaults. Delete those files to make a run again. report.py makes tables and figures.
"""

import argparse
import csv
import fnmatch
import gzip
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import claims  # noqa: E402 (the line above finds it)
import studies  # noqa: E402

STUDIES = {**studies.STUDIES, **claims.STUDIES}

SPEEDS = {"ppo_atari.py": 1000, "benchmark/sb3.py": 1500}  # rough steps a second of one thread
CURVE_POINTS, METRIC_ROWS = 200, 50


def five_digits(text):
    """Rounds numbers with more than six decimals to five significant digits: half the size once
    compressed."""
    return re.sub(r"-?\d+\.\d{7,}(e-?\d+)?", lambda found: f"{float(found[0]):.5g}", text)


def target(run):
    return RESULTS / run.study / run.name


def is_done(run):
    ending = "args.json" if run.keeps_episodes else "json"
    return target(run).with_name(f"{run.name}.{ending}").exists()


def expected_seconds(run):
    steps = re.findall(r"--total-timesteps (\d+)", run.flags)  # the last one counts
    default = 10_000_000 if run.script == "ppo_atari.py" else 1_000_000
    return int(steps[-1] if steps else default) / SPEEDS.get(run.script, 7000)


def edited_script(run, folder):
    """The script, or a copy in which each replacement was found exactly once."""
    if not run.edits:
        return ROOT / run.script
    text = (ROOT / run.script).read_text()
    for old, new in run.edits:
        if text.count(old) != 1:
            raise ValueError(f"{run.script} has {text.count(old)} times, not once: {old}")
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / run.script).write_text(text)
    return folder / run.script


def train(run, work, resume):
    """Trains in work/<study>/<name>, or continues there; returns the run directory."""
    folder = work / run.study / run.name
    unfinished = [path.parent for path in folder.glob("runs/*/checkpoint.pt")]
    if folder.exists() and not (resume and unfinished):
        shutil.rmtree(folder)
    command = [sys.executable, edited_script(run, folder)]
    if resume and unfinished:
        command += ["--resume", *unfinished]
    else:
        command += f"--env-id {run.env_id} --seed {run.seed} {run.flags} --threads 1".split()
        command += ["--runs-dir", folder / "runs"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (run_dir,) = (folder / "runs").iterdir()
    if run.study in ("atari", "double-pendulum"):
        # The finished agent, loaded from its directory, plays a hundred episodes of full length.
        options = "--num-envs 20 --eval-episodes 5".split()
        command = [sys.executable, ROOT / run.script, "--evaluate", run_dir, *options]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        scores = output.splitlines()[-1].split()
        (run_dir / "reloaded.csv").write_text("\n".join(["episodic_return", *scores, ""]))
    return run_dir


def keep_all(run, run_dir):
    """Compresses the tables of a run, with its flags."""
    for path in run_dir.glob("[!0]*.csv"):
        text = five_digits(path.read_text()) if path.name == "metrics.csv" else path.read_text()
        packed = gzip.compress(text.encode(), mtime=0)
        target(run).with_name(f"{run.name}.{path.name}.gz").write_bytes(packed)
    args = json.loads((run_dir / "args.json").read_text()) | {"runs_dir": "runs", "resume": None}
    target(run).with_name(f"{run.name}.args.json").write_text(json.dumps(args, indent=2) + "\n")


def summary(run, run_dir):
    """What is kept of a run: score, mean return over the run, curve, metrics, flags."""
    args = json.loads((run_dir / "args.json").read_text())
    defaults = vars(importlib.import_module(run.script.removesuffix(".py")).Args())
    ignored = {"runs_dir", "resume", "threads", "seed"}
    flags = {k: v for k, v in args.items() if k not in ignored and v != defaults[k]}
    with open(run_dir / "episodes.csv") as file:
        rows = list(csv.DictReader(file))
    steps = np.array([int(row["global_step"]) for row in rows])
    returns = np.array([float(row["episodic_return"]) for row in rows])
    lengths = [int(row["episodic_length"]) for row in rows]
    with open(run_dir / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    total = int(rows[-1]["global_step"])
    curve, last = [], None  # mean return of the episodes that ended in each part of the run
    for part in range(CURVE_POINTS):
        low, high = total * part / CURVE_POINTS, total * (part + 1) / CURVE_POINTS
        ended = returns[(steps > low) & (steps <= high)]
        last = rounded(ended.mean()) if len(ended) else last
        curve.append(last)
    metrics = {}
    for name in rows[0].keys() - {"iteration", "global_step", "episodes", "sps", "seconds"}:
        parts = np.array_split([float(row[name] or "nan") for row in rows], METRIC_ROWS)
        means = [np.nanmean(part) if np.isfinite(part).any() else None for part in parts]
        metrics[name] = [None if mean is None else rounded(mean, 4) for mean in means]
    reloaded = run_dir / "reloaded.csv"
    evaluation = np.loadtxt(reloaded, skiprows=1).mean() if reloaded.exists() else None
    return {
        "flags": flags,
        "edits": [new for _, new in run.edits],
        "score": rounded(returns[-100:].mean()),  # the last 100 episodes
        "evaluation": evaluation and rounded(evaluation),  # the finished agent, full episodes
        "mean_return": rounded(np.mean([point for point in curve if point is not None])),
        "steps": total,
        "minutes": rounded(float(rows[-1]["seconds"]) / 60, 3),
        "last_returns": [rounded(score, 4) for score in returns[-100:]],
        "last_lengths": lengths[-100:],
        "curve": curve,
        "metrics": metrics,
    }


def rounded(x, digits=5):
    return float(f"{x:.{digits}g}")


def execute(run, work, resume):
    run_dir = train(run, work, resume)
    target(run).parent.mkdir(parents=True, exist_ok=True)
    if run.keeps_episodes:
        keep_all(run, run_dir)
    else:
        text = json.dumps(summary(run, run_dir), separators=(",", ":"))
        target(run).with_name(f"{run.name}.json").write_text(text + "\n")
    shutil.rmtree(work / run.study / run.name)


def clock(seconds):
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


class Progress:
    """Prints a line for each finished run, with the time that the rest will take."""

    def __init__(self, runs, jobs):
        self.began, self.lock = time.monotonic(), threading.Lock()
        self.total = self.left = sum(map(expected_seconds, runs))
        self.count, self.done, self.failed = len(runs), 0, []
        print(f"{len(runs)} runs to do, about {clock(self.total / jobs)}", flush=True)

    def finished(self, run, error=None):
        with self.lock:
            self.done += 1
            self.left -= expected_seconds(run)
            if error:
                self.failed.append(run.name)
            elapsed = time.monotonic() - self.began
            left = elapsed * max(self.left, 0) / max(self.total - self.left, 1e-9)
            state = f"FAILED: {error}" if error else "done"
            counts = f"{self.done}/{self.count}, {len(self.failed)} failed"
            print(f"[{counts}; {clock(left)} left] {run.name}: {state}", flush=True)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument("--only", nargs="+", default=["*"], help="only runs with such names")
    parser.add_argument("--resume", action="store_true", help="continue interrupted runs")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs/benchmark", help="unfinished runs"
    )
    parser.add_argument("--dry-run", action="store_true", help="print a command for each run")
    args = parser.parse_args()
    runs = [run for run in STUDIES[args.study] if not is_done(run)]
    runs = [run for run in runs if args.seeds is None or run.seed in args.seeds]
    runs = [run for run in runs if any(fnmatch.fnmatch(run.name, only) for only in args.only)]
    if args.dry_run:
        for run in runs:
            print(f"python benchmark/run.py {args.study} --jobs 1 --resume --only {run.name}")
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    progress = Progress(runs, args.jobs)

    def attempt(run):  # one that fails does not stop the others
        error = None
        try:
            execute(run, args.work.resolve(), args.resume)
        except subprocess.CalledProcessError as problem:
            error = "\n".join(problem.stderr.strip().splitlines()[-5:])
        except Exception as problem:
            error = repr(problem)
        progress.finished(run, error)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(attempt, runs))
    if progress.failed:
        sys.exit(f"failed: {', '.join(progress.failed)}")


if __name__ == "__main__":
    main()
