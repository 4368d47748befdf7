"""Runs what studies.py declares and results/ lacks, and appends a row a run.

    python benchmark/run.py results                        # every run that has no row yet
    python benchmark/run.py results --jobs 8 --seeds 21    # eight at a time, only one seed
    python benchmark/run.py results --only 'Hopper*'       # runs whose names match
    python benchmark/run.py results --resume               # also continue what was interrupted
    python benchmark/run.py results --dry-run              # one command a line, for a job array

A run trains in --work, with the patch of its variation applied to a copy of the script. When it
has finished, its curves are appended to results/STUDY.curves.csv, its row to results/STUDY.csv,
and its directory is deleted. Delete a row to make a run again. Then: benchmark/report.py.
"""

import argparse
import fnmatch
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
import pandas as pd
import results
from results import ROOT
from studies import STUDIES, runs

HERE = Path(__file__).parent
SPEEDS = {"ppo_atari.py": 500, "benchmark/sb3.py": 1000}  # rough steps a second
TOOLS = "env_id seed runs_dir resume track evaluate eval_episodes greedy capture_video "
TOOLS += "save_every"  # flags that say nothing about training, or have a column
POINTS = 100  # of a curve


def name_of(run):
    return f"{run.task}--{run.arm}-{run.seed}"


def missing(study):
    rows = results.load(study)
    done = set(zip(rows.task, rows.arm, rows.seed))
    return [run for run in runs(study) if (run.task, run.arm, run.seed) not in done]


def expected_seconds(run):
    steps = re.findall(r"--total-timesteps (\d+)", run.flags)  # the last one counts
    default = 10_000_000 if run.script == "ppo_atari.py" else 1_000_000
    return int(steps[-1] if steps else default) / SPEEDS.get(run.script, 5000)


def patched(script, variation, folder):
    """The script, or a copy in folder with the patch of the variation."""
    if not variation:
        return ROOT / script
    patch = HERE / "variations" / f"{variation}.{Path(script).stem}.patch"
    folder.mkdir(parents=True, exist_ok=True)
    command = ["patch", "--fuzz=0", "-o", folder / script, ROOT / script, patch]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"{patch.relative_to(ROOT)} does not fit {script}: {done.stdout.strip()}\n"
            f"To renew it, make the change in {script}, write `git diff {script}` below the "
            "patch's first lines, and undo the change."
        )
    return folder / script


def train(run, work, threads, resume):
    """Trains in work/STUDY/NAME, or continues there; returns the run directory."""
    folder, study = work / run.study / name_of(run), STUDIES[run.study]
    unfinished = [path.parent for path in folder.glob("runs/*/checkpoint.pt")]
    if folder.exists() and not (resume and unfinished):
        shutil.rmtree(folder)
    script = patched(run.script, run.variation, folder)
    command = [sys.executable, script]
    if run.script != "benchmark/sb3.py":
        command = [sys.executable, HERE / "train.py", script]
        command += [str(study.evaluations), str(study.played)]
    if resume and unfinished:
        command += ["--resume", *unfinished]
    else:
        command += f"--env-id {run.task} --seed {run.seed} {run.flags}".split()
        command += ["--threads", str(threads), "--runs-dir", folder / "runs"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("runs/*/args.json")).parent


def flags_of(args):
    """All flags of a run, as on the command line."""
    words = []
    for name, value in args.items():
        if name in TOOLS.split():
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words.append(f"--{flag} {value}")
    return " ".join(words)


def rows_of(run, run_dir):
    """The row of a finished run, and the rows of its curves."""
    args = json.loads((run_dir / "args.json").read_text())
    episodes, metrics = (pd.read_csv(run_dir / f"{x}.csv") for x in ("episodes", "metrics"))
    evaluation = run_dir.parent / "evaluation.json"
    played = json.loads(evaluation.read_text()) if evaluation.exists() else {}
    returns, steps = episodes.episodic_return.to_numpy(), int(metrics.global_step.iloc[-1])
    last_quarter = returns[episodes.global_step > 0.75 * steps]
    row = [*run[:5], run.variation, flags_of(args), *results.made_by(run.script)]
    row += [args["threads"], steps, f"{metrics.seconds.max() / 60:.3g}", len(returns)]
    row += [returns[-100:].mean(), last_quarter.mean(), returns.mean()]
    row += [played.get("sampled", ""), played.get("greedy", "")]
    row += [STUDIES[run.study].played or "", ""]

    ended = np.searchsorted(
        episodes.global_step, np.linspace(0, steps, POINTS + 1)[1:], side="right"
    )
    curves = {"return": [mean(returns[max(end - 100, 0) : end]) for end in ended]}
    for pattern in STUDIES[run.study].metrics:
        for name in fnmatch.filter(metrics, pattern):
            parts = np.array_split(metrics[name].to_numpy(), min(POINTS, len(metrics)))
            curves[name] = [mean(part) for part in parts]
    on_the_way = {int(name): value for name, value in played.items() if name.isdigit()}
    if on_the_way:
        curves["evaluations"] = [on_the_way[i] for i in sorted(on_the_way)]
    text = lambda points: " ".join(f"{point:.5g}" for point in points)
    return row, [[*run[1:4], name, text(points)] for name, points in curves.items()]


def mean(values):
    return values[np.isfinite(values)].mean() if np.isfinite(values).any() else np.nan


def execute(run, work, threads, resume):
    run_dir = train(run, work, threads, resume)
    row, curves = rows_of(run, run_dir)
    results.append(f"{run.study}.curves.csv", results.CURVE_COLUMNS, curves)
    results.append(f"{run.study}.csv", results.COLUMNS, [row])
    shutil.rmtree(work / run.study / name_of(run))


def clock(seconds):
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


class Progress:
    """Prints a line for each finished run, with the time that the rest will take."""

    def __init__(self, todo, jobs):
        self.began, self.lock = time.monotonic(), threading.Lock()
        self.total = self.left = sum(map(expected_seconds, todo))
        self.count, self.done, self.failed = len(todo), 0, []
        print(f"{len(todo)} runs to do, about {clock(self.total / jobs)}", flush=True)

    def finished(self, run, error=None):
        with self.lock:
            self.done += 1
            self.left -= expected_seconds(run)
            if error:
                self.failed.append(name_of(run))
            elapsed = time.monotonic() - self.began
            left = elapsed * max(self.left, 0) / max(self.total - self.left, 1e-9)
            state = f"FAILED: {error}" if error else "done"
            counts = f"{self.done}/{self.count}, {len(self.failed)} failed"
            print(f"[{counts}; {clock(left)} left] {name_of(run)}: {state}", flush=True)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="only runs with such names"
    )
    parser.add_argument("--resume", action="store_true", help="continue interrupted runs")
    parser.add_argument(
        "--dry-run", action="store_true", help="print a command for each run"
    )
    work = ROOT / "runs" / "benchmark"
    parser.add_argument("--work", type=Path, default=work, help="unfinished runs")
    args = parser.parse_args()
    todo = [run for run in missing(args.study) if not args.seeds or run.seed in args.seeds]
    todo = [run for run in todo if any(fnmatch.fnmatch(name_of(run), x) for x in args.only)]
    if args.dry_run:
        for run in todo:
            command = f"python benchmark/run.py {args.study} --jobs 1 --resume"
            print(f"{command} --only '{name_of(run)}'")
        return
    os.environ |= {
        "OMP_NUM_THREADS": str(args.threads),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    progress = Progress(todo, args.jobs)

    def attempt(run):  # one that fails does not stop the others
        error = None
        try:
            execute(run, args.work.resolve(), args.threads, args.resume)
        except subprocess.CalledProcessError as problem:
            error = "\n".join(problem.stderr.strip().splitlines()[-5:])
        except Exception as problem:
            error = repr(problem)
        progress.finished(run, error)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(attempt, todo))
    if progress.failed:
        sys.exit(f"failed: {', '.join(progress.failed)}")


if __name__ == "__main__":
    main()
