"""Runs what studies.py declares and results/ lacks, and appends a row a run.

    python benchmark/run.py results                      # every run that has no row yet
    python benchmark/run.py results --jobs 8 --seeds 21  # eight at a time, only one seed
    python benchmark/run.py results --only 'Hopper*'     # runs whose names match
    python benchmark/run.py results --resume             # continue what was interrupted
    python benchmark/run.py results --dry-run            # a command each
    python benchmark/run.py random                       # random policies, for the claims

A run trains in --work, with the patch of its variation applied to a copy of the script. Its
curves are appended to results/STUDY.curves.csv, its row to results/STUDY.csv; its
directory is deleted. Delete a row to make a run again. Only one process a study may run.
Afterwards: benchmark/report.py.
"""

import argparse
import fnmatch
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import claims
import gymnasium as gym
import numpy as np
import pandas as pd
import results
from results import ROOT
from studies import STUDIES, runs

HERE = Path(__file__).parent
# Flags that say nothing about training, or have a column of their own.
TOOLS = "env_id seed threads runs_dir save_every resume track evaluate eval_episodes "
TOOLS += "greedy capture_video"


def name_of(run):
    return f"{run.task}--{run.arm}-{run.seed}"


def missing(study):
    rows = results.load(study)
    done = set(zip(rows.task, rows.arm, rows.seed))
    return [run for run in runs(study) if (run.task, run.arm, run.seed) not in done]


def patch_of(script, variation):
    return HERE / "variations" / f"{variation}.{Path(script).stem}.patch"


def patched(script, variation, folder):
    """The script, or a copy in folder with the patch of the variation."""
    if not variation:
        return ROOT / script
    patch = patch_of(script, variation)
    folder.mkdir(parents=True, exist_ok=True)
    command = ["patch", "--fuzz=0", "-o", folder / script, ROOT / script, patch]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"{patch.name} does not fit {script}: {done.stdout}\nTo renew it, make its "
            f"change there, put `git diff` below its first lines, and undo the change."
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
    if run.script.startswith("ppo"):
        counts = [str(study.evaluations), str(study.played)]
        command = [sys.executable, HERE / "train.py", script, *counts]
    if resume and unfinished:
        command += ["--resume", *unfinished]
    else:
        command += f"--env-id {run.task} --seed {run.seed} {run.flags}".split()
        command += ["--threads", str(threads), "--runs-dir", folder / "runs"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("runs/*/args.json")).parent


def parts_of(values):
    """Means of up to 100 equal parts, without what is not finite."""
    bounds = np.linspace(0, len(values), min(100, len(values)) + 1).round().astype(int)
    parts = [values[low:high] for low, high in zip(bounds, bounds[1:])]
    return [np.nanmean(part) if np.isfinite(part).any() else np.nan for part in parts]


def rows_of(run, run_dir, made_by):
    """The row of a finished run, and the rows of its curves."""
    study, args = STUDIES[run.study], json.loads((run_dir / "args.json").read_text())
    episodes, metrics = (pd.read_csv(run_dir / f"{x}.csv") for x in ("episodes", "metrics"))
    evaluation = run_dir.parent / "evaluation.json"
    played = json.loads(evaluation.read_text()) if evaluation.exists() else {}
    returns, ended = episodes.episodic_return.to_numpy(), episodes.global_step.to_numpy()
    steps = int(metrics.global_step.iloc[-1])
    flags = " ".join(f"{name}={args[name]}" for name in args if name not in TOOLS.split())
    row = [*run[:-1], flags, *made_by, args["threads"], steps]
    row += [f"{metrics.seconds.max() / 60:.4g}", len(returns), returns[-100:].mean()]
    row += [returns[ended > 0.75 * steps].mean(), returns.mean()]
    row += [played.get("sampled"), played.get("greedy"), study.played or None, ""]

    counts = np.searchsorted(ended, np.linspace(0, steps, 101)[1:], side="right")
    last_100 = [returns[max(count - 100, 0) : count] for count in counts]
    curves = {"return": [part.mean() if len(part) else np.nan for part in last_100]}
    curves |= {name: parts_of(metrics[name].to_numpy()) for name in study.metrics}
    if study.evaluations:
        curves["evaluations"] = [played[str(i + 1)] for i in range(study.evaluations)]
    text = lambda points: " ".join(f"{point:.5g}" for point in points)
    return row, [[*run[1:4], name, text(points)] for name, points in curves.items()]


def execute(run, args):
    """Trains, appends, cleans up; one that fails does not stop the others."""
    try:
        files = [run.script]
        if run.variation:
            files.append(patch_of(run.script, run.variation))
        made_by = results.made_by(*files)  # now: they may change meanwhile
        run_dir = train(run, args.work.resolve(), args.threads, args.resume)
        row, curves = rows_of(run, run_dir, made_by)
        results.append(f"{run.study}.curves.csv", results.CURVE_COLUMNS, curves)
        results.append(f"{run.study}.csv", results.COLUMNS, [row])
        shutil.rmtree(args.work / run.study / name_of(run))
        return "done"
    except Exception as problem:
        text = getattr(problem, "stderr", None) or repr(problem)
        return "FAILED: " + "\n".join(text.strip().splitlines()[-12:])


def play_randomly(task):
    """The mean return of at least 100 episodes and 20,000 steps."""
    env, returns, steps = gym.make(task), [], 0
    env.action_space.seed(1)
    while len(returns) < 100 or steps < 20_000:
        env.reset(seed=len(returns))
        returns.append(0.0)
        ended = False
        while not ended:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            returns[-1] += reward
            ended = terminated or truncated
            steps += 1
    row = [task, len(returns), np.mean(returns)]
    results.append("random.csv", ["task", "episodes", "mean"], [row])


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("study", choices=[*STUDIES, "random"])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these seeds")
    parser.add_argument("--only", nargs="+", default=["*"], help="only such names")
    parser.add_argument("--resume", action="store_true", help="continue interrupted runs")
    parser.add_argument("--dry-run", action="store_true", help="only print commands")
    work = ROOT / "runs" / "benchmark"
    parser.add_argument("--work", type=Path, default=work, help="unfinished runs")
    args = parser.parse_args()
    if args.study == "random":
        tasks = set(" ".join(claims.TABLE.tasks).split())
        for task in tasks - set(results.read("random.csv", ["task"]).task):
            play_randomly(task)
        return
    todo = [run for run in missing(args.study) if not args.seeds or run.seed in args.seeds]
    todo = [run for run in todo if any(fnmatch.fnmatch(name_of(run), x) for x in args.only)]
    if args.dry_run:
        command = f"python benchmark/run.py {args.study} --jobs 1 --resume --only"
        print("\n".join(f"{command} '{name_of(run)}'" for run in todo))
        return
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {pool.submit(execute, run, args): name_of(run) for run in todo}
        for count, job in enumerate(as_completed(jobs), 1):
            print(f"[{count} of {len(todo)}] {jobs[job]}: {job.result()}", flush=True)
    if failed := [name for job, name in jobs.items() if job.result() != "done"]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
