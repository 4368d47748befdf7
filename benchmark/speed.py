"""Steps per second of our scripts and of their peers, run in turn on the CPU.

    python benchmark/speed.py ppo_atari
    python benchmark/speed.py ppo --cleanrl VENV/bin/python CLEANRL/cleanrl/ppo.py
    python benchmark/speed.py ppo --sbx VENV/bin/python

Appends to results/speed.csv. README.md beside this file says what is measured, and what the
environments of CleanRL and SBX need; peers that are not given are left out.
"""

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import pandas as pd
import results
import torch
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

HERE = Path(__file__).parent
STEPS = {  # all of them, and those not counted
    "ppo": (61_440, 10_240),
    "ppo_continuous": (40_960, 10_240),
    "ppo_atari": (10_240, 3_072),
}
THREADS = {"ppo": 1, "ppo_continuous": 1, "ppo_atari": os.cpu_count()}
SAME = "--num-envs 1 --num-steps 2048 --target-kl None --clip-vloss"
RUNS = {  # flags of our script
    "ppo": ["", "--compile", "--vectorization-mode sync", "--num-envs 32"],
    "ppo_continuous": ["", "--compile"],
    "ppo_atari": ["", "--compile", "--bf16 off"],
}
COLUMNS = "script cpu cores torch date round program steps_per_second".split()


def output_of(*command, **options):
    options |= {"check": True, "capture_output": True, "text": True}
    return subprocess.run(command, **options).stdout


def ours(script, flags, steps):
    with tempfile.TemporaryDirectory() as runs_dir:
        flags += f" --total-timesteps {steps} --threads {THREADS[script]} --device cpu"
        path = HERE.parent / f"{script}.py"
        output_of(sys.executable, path, "--runs-dir", runs_dir, *flags.split())
        metrics = pd.read_csv(next(Path(runs_dir).glob("*/metrics.csv")))
    ends = metrics[metrics.global_step >= STEPS[script][1]].iloc[[0, -1]]
    return ends.global_step.diff().iloc[1] / ends.seconds.diff().iloc[1]


def cleanrl(script, python, file):
    command = [Path(python).absolute(), Path(file).absolute(), "--no-cuda"]
    with tempfile.TemporaryDirectory() as folder:  # it writes its runs there
        steps = str(STEPS[script][0])
        output = output_of(*command, "--total-timesteps", steps, cwd=folder)
    return float(re.findall(r"SPS: (\d+)", output)[-1])  # its own, from the first step on


def peer(package, script, python=sys.executable):
    """stable_baselines3 or sbx, in a process of its own."""
    code = f"import speed; speed.train_peer({package!r}, {script!r})"
    return float(output_of(python, "-c", code, cwd=HERE))


def train_peer(package, script):
    """Prints the steps per second of the package's PPO."""
    torch.set_num_threads(THREADS[script])
    policy, rate, clip, sizes = "MlpPolicy", 2.5e-4, 0.2, {"pi": [64, 64], "vf": [64, 64]}
    options = {"n_steps": 128, "batch_size": 128, "n_epochs": 4, "ent_coef": 0.01}
    if script == "ppo":
        envs = make_vec_env("CartPole-v1", 4)
    elif script == "ppo_continuous":
        envs, rate = VecNormalize(make_vec_env("HalfCheetah-v5", 1)), 3e-4
        options |= {"n_steps": 2048, "batch_size": 64, "n_epochs": 10, "ent_coef": 0.0}
        sizes["vf"] = [256, 256]
    else:
        import ale_py  # noqa: F401, registers the games

        envs = VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", 8), 4)
        policy, clip, options["batch_size"] = "CnnPolicy", 0.1, 256
    if policy == "MlpPolicy":
        options["policy_kwargs"] = {"net_arch": sizes}
    options |= {"learning_rate": lambda left: rate * left, "clip_range": clip, "seed": 1}
    if package == "stable_baselines3":  # SBX does not clip the value loss
        options |= {"clip_range_vf": clip, "device": "cpu"}
    model = importlib.import_module(package).PPO(policy, envs, **options)
    model.learn(STEPS[script][1])
    first, began = model.num_timesteps, time.perf_counter()
    model.learn(STEPS[script][0] - first, reset_num_timesteps=False)
    print((model.num_timesteps - first) / (time.perf_counter() - began))


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("script", choices=STEPS)
    parser.add_argument("--cleanrl", nargs=2, metavar=("PYTHON", "SCRIPT"))
    parser.add_argument("--sbx", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    script, steps = args.script, STEPS[args.script][0]
    same = SAME if script == "ppo_continuous" else ""
    os.environ["OMP_NUM_THREADS"] = str(THREADS[script])
    where = [f"{script}.py", results.cpu(), os.cpu_count(), torch.__version__, date.today()]
    for turn in range(1, args.rounds + 1):
        found = {}
        for flags in RUNS[script]:
            name = f"{script}.py {flags}".strip()
            count = 8 * steps if "--num-envs" in flags else steps
            found[name] = ours(script, f"{same} {flags}", count)
        found["stable-baselines3"] = peer("stable_baselines3", script)
        if args.cleanrl:
            found["CleanRL"] = cleanrl(script, *args.cleanrl)
        if args.sbx:
            found["SBX"] = peer("sbx", script, args.sbx)
        rows = [[*where, turn, name, round(speed)] for name, speed in found.items()]
        results.append("speed.csv", COLUMNS, rows)
        print(found, flush=True)


if __name__ == "__main__":
    main()
