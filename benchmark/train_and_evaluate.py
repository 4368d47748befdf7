"""Trains ppo_continuous.py with the flags given, and evaluates its policy ten times on the way, for run.py.

    python benchmark/train_and_evaluate.py --env-id Hopper-v5

Adds to the run directory evaluations.csv, ten episodes of the sampled policy after every tenth of the iterations, and
reloaded.csv, twenty episodes that --evaluate played from the finished directory. Training is not disturbed: the
evaluations have environments of their own, and the random numbers go on as if there had been none.
"""

import contextlib
import csv
import io
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
    batch_size = args.num_envs * args.num_steps
    iterations = args.total_timesteps // batch_size
    milestones = {iterations * tenth // 10 * batch_size for tenth in range(1, 11)}
    agents, evaluations = [], []
    flat_parameters, show = ppo_continuous.flat_parameters, ppo_continuous.Logger.show

    def keep_agent(agent):
        agents.append(agent)
        return flat_parameters(agent)

    def show_and_evaluate(logger, step, sps):
        show(logger, step, sps)
        if step in milestones:
            with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng():
                ten = replace(args, num_envs=10, eval_episodes=1)
                scores = ppo_continuous.evaluate(ten, agents[0].state_dict())
            evaluations.extend((step, score) for score in scores.flatten().tolist())

    ppo_continuous.flat_parameters, ppo_continuous.Logger.show = keep_agent, show_and_evaluate
    run_dir = ppo_continuous.train(args)
    write(run_dir / "evaluations.csv", ("global_step", "episodic_return"), evaluations)

    script, twenty = ROOT / "ppo_continuous.py", ["--num-envs", "20", "--eval-episodes", "1"]
    command = [sys.executable, script, "--evaluate", run_dir, *twenty]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    write(run_dir / "reloaded.csv", ("episodic_return",), ([score] for score in output.splitlines()[-1].split()))


if __name__ == "__main__":
    main()
