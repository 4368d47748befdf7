"""Trains ppo_continuous.py, for run.py, and evaluates the policy ten times on the way.

    python benchmark/train_and_evaluate.py --env-id Hopper-v5    # the flags of ppo_continuous.py
    python benchmark/train_and_evaluate.py --resume runs/DIR     # continue an interrupted run

Adds to the run directory evaluations.csv, ten episodes of the sampled policy after every tenth of
the iterations, and reloaded.csv, twenty episodes that --evaluate played from the finished
directory. Training is not disturbed: the evaluations have environments of their own, and the random
numbers go on as if there had been none.
"""

import copy
import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import ppo_continuous  # noqa: E402 (the line above finds it)


def write(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def main():
    args = tyro.cli(ppo_continuous.Args)
    if args.resume is not None:
        saved, _ = ppo_continuous.load_run(args.resume)
        args = replace(saved, resume=args.resume)
    batch_size = args.num_envs * args.num_steps
    iterations = args.total_timesteps // batch_size
    milestones = {iterations * tenth // 10 * batch_size for tenth in range(1, 11)}
    agents = []
    flat_parameters, log = ppo_continuous.flat_parameters, ppo_continuous.Logger.log

    def keep_agent(agent):
        agents.append(agent)
        return flat_parameters(agent)

    def log_and_evaluate(logger, metrics, *rollout):
        log(logger, metrics, *rollout)
        step = metrics["global_step"]
        if step in milestones:
            ten = replace(
                args, num_envs=10, eval_episodes=1, resume=None, evaluate="during training"
            )
            with torch.random.fork_rng():
                returns = ppo_continuous.evaluate(copy.deepcopy(agents[0]).cpu(), ten)
            run_dir = Path(logger.files[0].name).parent
            path = run_dir / "evaluations" / f"{step:09}.csv"
            path.parent.mkdir(exist_ok=True)
            write(path, (), ((step, score) for score in returns.flatten().tolist()))

    ppo_continuous.flat_parameters = keep_agent
    ppo_continuous.Logger.log = log_and_evaluate
    run_dir = ppo_continuous.train(args)
    evaluations = []
    for path in sorted((run_dir / "evaluations").iterdir()):  # those before a --resume, too
        with open(path) as file:
            evaluations += [row for row in csv.reader(file) if row]
    write(run_dir / "evaluations.csv", ("global_step", "episodic_return"), evaluations)

    command = [sys.executable, ROOT / "ppo_continuous.py", "--evaluate", run_dir]
    command += "--num-envs 20 --eval-episodes 1".split()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    scores = output.splitlines()[-1].split()
    write(run_dir / "reloaded.csv", ("episodic_return",), ([score] for score in scores))


if __name__ == "__main__":
    main()
