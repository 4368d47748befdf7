"""Steps per second of ppo.py beside stable-baselines3's and CleanRL's PPO, run in turn, one thread each.

    python benchmark/speed.py --cleanrl-script CLEANRL/cleanrl/ppo.py --cleanrl-python VENV/bin/python

CleanRL needs an environment of its own (gymnasium 0.29.1, numpy < 2, tyro, tensorboard, setuptools < 81, the same
torch); without these two flags it is left out. All train CartPole-v1 with the same hyperparameters; start-up and the
first 20 iterations (with --compile: the compilation) are not counted, but for CleanRL, whose own figure counts from its
first step on. Writes results/speed_ppo.json, where all of them ran.
"""

import argparse
import csv
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
WARMUP = 20  # iterations


def ours(steps, *flags):
    with tempfile.TemporaryDirectory() as runs_dir:
        command = [sys.executable, ROOT / "ppo.py", "--runs-dir", runs_dir, "--total-timesteps", str(steps), *flags]
        subprocess.run([*command, "--threads", "1", "--device", "cpu"], check=True, stdout=subprocess.DEVNULL)
        with open(next(Path(runs_dir).glob("*/metrics.csv")), newline="") as file:
            rows = list(csv.DictReader(file))
    first, last = rows[WARMUP - 1], rows[-1]
    counted = int(last["global_step"]) - int(first["global_step"])
    return counted / (float(last["seconds"]) - float(first["seconds"]))


def stable_baselines3(steps):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import speed; speed.train_sb3({steps})"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def train_sb3(steps):
    """Prints the steps per second of stable-baselines3's PPO with the hyperparameters of ppo.py's defaults."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Clock(BaseCallback):
        times = ()

        def _on_rollout_start(self):
            self.times += (time.perf_counter(),)

        def _on_step(self):
            return True

    torch.set_num_threads(1)
    clock, sizes = Clock(), [64, 64]
    options = {"n_steps": 128, "batch_size": 128, "n_epochs": 4, "ent_coef": 0.01, "clip_range_vf": 0.2}
    policy = {"net_arch": {"pi": sizes, "vf": sizes}}
    model = PPO(
        "MlpPolicy", make_vec_env("CartPole-v1", 4), learning_rate=lambda left: 2.5e-4 * left, **options,
        policy_kwargs=policy, device="cpu", seed=1,
    )  # fmt: skip
    model.learn(steps, callback=clock)
    elapsed = time.perf_counter() - clock.times[WARMUP]
    print((model.num_timesteps - WARMUP * 512) / elapsed)


def cleanrl(steps, python, script):
    with tempfile.TemporaryDirectory() as folder:  # it writes its runs into the working directory
        command = [Path(python).absolute(), Path(script).absolute(), "--total-timesteps", str(steps), "--no-cuda"]
        output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stdout
    return float(re.findall(r"SPS: (\d+)", output)[-1])  # counted by CleanRL itself, from its first step on


def machine():
    model = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{model[0] if model else platform.processor()}, {os.cpu_count()} cores, torch {torch.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cleanrl-python")
    parser.add_argument("--cleanrl-script")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100_000)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    programs = {
        "ppo.py": lambda: ours(args.steps),
        "ppo.py --compile": lambda: ours(args.steps, "--compile"),
        "stable-baselines3": lambda: stable_baselines3(args.steps),
    }
    if args.cleanrl_script and args.cleanrl_python:
        programs["CleanRL"] = lambda: cleanrl(args.steps, args.cleanrl_python, args.cleanrl_script)
    programs["ppo.py --num-envs 32"] = lambda: ours(8 * args.steps, "--num-envs", "32")
    rounds = []
    for _ in range(args.rounds):
        rounds.append({name: round(program()) for name, program in programs.items()})
        print(rounds[-1], flush=True)
    if "CleanRL" not in programs:
        return
    target = Path(__file__).parent / "results" / "speed_ppo.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"machine": machine(), "steps": args.steps, "rounds": rounds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
