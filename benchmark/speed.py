"""Steps per second of our scripts and of their peers, run in turn on the CPU.

    python benchmark/speed.py ppo_atari
    python benchmark/speed.py ppo --cleanrl VENV/bin/python CLEANRL/cleanrl/ppo.py \\
        --sbx SBX_VENV/bin/python
    python benchmark/speed.py ppo_continuous \\
        --cleanrl VENV/bin/python CLEANRL/cleanrl/ppo_continuous_action.py

Peers that are not given are left out. CleanRL needs an environment of its own
(gymnasium[mujoco] 0.29.1, mujoco 3.1.6, numpy < 2, tyro, tensorboard, setuptools < 81, the same
torch), and SBX (pip install sbx-rl; on CartPole only) another. All train with the same
hyperparameters, those of CleanRL's defaults: ppo on CartPole-v1; ppo_continuous on
HalfCheetah-v5, in CleanRL's older gymnasium on HalfCheetah-v4, both with one thread; ppo_atari
on Breakout without sticky actions, with all cores. With its own defaults ppo_continuous trains to
the end. Start-up and the first steps (with --compile: the compilation) are not counted, but for
CleanRL, whose own figure counts from its first step on. Appends to results/speed.csv.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

STEPS = {  # all of them, and those not counted
    "ppo": (100_000, 10_240),
    "ppo_continuous": (61_440, 20_480),
    "ppo_atari": (20_480, 5_120),
}
THREADS = {"ppo": 1, "ppo_continuous": 1, "ppo_atari": os.cpu_count()}
CLASSIC = "--num-envs 1 --num-steps 2048 --no-recompute-advantages --target-kl None "
CLASSIC += "--clip-vloss"
COLUMNS = [
    "script",
    "cpu",
    "cores",
    "torch",
    "date",
    "round",
    "program",
    "steps_per_second",
]
HERE = Path(__file__).parent


def ours(script, steps, *flags):
    with tempfile.TemporaryDirectory() as runs_dir:
        command = [
            sys.executable,
            HERE.parent / f"{script}.py",
            "--runs-dir",
            runs_dir,
            *flags,
        ]
        command += (
            f"--total-timesteps {steps} --threads {THREADS[script]} --device cpu".split()
        )
        subprocess.run(command, check=True, capture_output=True)
        with open(next(Path(runs_dir).glob("*/metrics.csv")), newline="") as file:
            rows = list(csv.DictReader(file))
    counted = [row for row in rows if int(row["global_step"]) >= STEPS[script][1]]
    steps = int(counted[-1]["global_step"]) - int(counted[0]["global_step"])
    return steps / (float(counted[-1]["seconds"]) - float(counted[0]["seconds"]))


def peer(package, script, steps, python=sys.executable):
    """stable_baselines3 or sbx, which has the same interface; in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import speed; "
    code += f"speed.train_peer({package!r}, {script!r}, {steps})"
    output = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    )
    return float(output.stdout)


def train_peer(package, script, steps):
    """Prints the steps per second of its PPO with CleanRL's hyperparameters."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env, make_vec_env
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

    class Clock(BaseCallback):
        began = None

        def _on_rollout_start(self):
            if self.began is None and self.num_timesteps >= STEPS[script][1]:
                self.began, self.first = time.perf_counter(), self.num_timesteps

        def _on_step(self):
            return True

    torch.set_num_threads(THREADS[script])
    clock, sizes, rate, clip = Clock(), {"pi": [64, 64], "vf": [64, 64]}, 2.5e-4, 0.2
    if script == "ppo":
        envs = make_vec_env("CartPole-v1", 4)
        options = {"n_steps": 128, "batch_size": 128, "n_epochs": 4, "ent_coef": 0.01}
    elif script == "ppo_continuous":
        envs, rate = VecNormalize(make_vec_env("HalfCheetah-v5", 1)), 3e-4
        options = {"n_steps": 2048, "batch_size": 64, "n_epochs": 10}
        sizes["vf"] = [256, 256]
    else:
        import ale_py  # noqa: F401, registers the games

        envs, clip = VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", 8), 4), 0.1
        options = {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "ent_coef": 0.01}
    if script != "ppo_atari":
        options["policy_kwargs"] = {"net_arch": sizes}
    options |= {"learning_rate": lambda left: rate * left, "clip_range": clip}
    if package == "sbx":  # it has no clipped value loss, and its networks are its own
        from sbx import PPO
    else:
        from stable_baselines3 import PPO

        options |= {"clip_range_vf": clip, "device": "cpu"}
    policy = "CnnPolicy" if script == "ppo_atari" else "MlpPolicy"
    model = PPO(policy, envs, seed=1, **options)
    model.learn(steps, callback=clock)
    print((model.num_timesteps - clock.first) / (time.perf_counter() - clock.began))


def cleanrl(steps, python, script):
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # it writes its runs into the working directory
        command = [Path(python).absolute(), Path(script).absolute(), "--no-cuda"]
        command += ["--total-timesteps", str(steps)]
        options = {"check": True, "capture_output": True, "text": True, "cwd": folder}
        output = subprocess.run(command, **options).stdout
    return float(
        re.findall(r"SPS: (\d+)", output)[-1]
    )  # its own count, from its first step on


def main():
    import results
    import torch

    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("script", choices=STEPS)
    parser.add_argument("--cleanrl", nargs=2, metavar=("PYTHON", "SCRIPT"))
    parser.add_argument("--sbx", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(THREADS[args.script])
    script, steps = args.script, STEPS[args.script][0]
    same = CLASSIC.split() if script == "ppo_continuous" else []
    programs = {
        f"{script}.py": lambda: ours(script, steps, *same),
        f"{script}.py --compile": lambda: ours(script, steps, *same, "--compile"),
        "stable-baselines3": lambda: peer("stable_baselines3", script, steps),
    }
    if args.cleanrl:
        programs["CleanRL"] = lambda: cleanrl(steps, *args.cleanrl)
    if args.sbx and script == "ppo":
        programs["SBX"] = lambda: peer("sbx", script, steps, args.sbx)
    if script == "ppo":  # sync: environments in Python, as the peers have them
        sync = lambda: ours(script, steps, *same, "--vectorization-mode", "sync")
        programs["ppo.py --vectorization-mode sync"] = sync
        programs["ppo.py --num-envs 32"] = lambda: ours(
            script, 8 * steps, "--num-envs", "32"
        )
    elif script == "ppo_continuous":
        whole = 1_000_000  # the limit of the KL ends more of the later updates early
        programs["ppo_continuous.py, its own defaults"] = lambda: ours(script, whole)
        compiled = lambda: ours(script, whole, "--compile")
        programs["ppo_continuous.py --compile, its own defaults"] = compiled
    else:
        programs["ppo_atari.py --bf16 off"] = lambda: ours(script, steps, "--bf16", "off")
    where = [f"{script}.py", results.cpu(), os.cpu_count(), torch.__version__, date.today()]
    for turn in range(1, args.rounds + 1):
        found = {name: round(program()) for name, program in programs.items()}
        rows = [[*where, turn, name, speed] for name, speed in found.items()]
        results.append("speed.csv", COLUMNS, rows)
        print(found, flush=True)


if __name__ == "__main__":
    main()
