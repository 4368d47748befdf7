"""Steps per second of our scripts and of their peers, run in turn on the CPU.

    python benchmark/speed.py ppo_atari
    python benchmark/speed.py ppo --cleanrl VENV/bin/python CLEANRL/cleanrl/ppo.py
    python benchmark/speed.py ppo --sbx VENV/bin/python

Appends to results/speed.csv. README.md beside this file says what is measured, and what the
environments of CleanRL and SBX need; peers that are not given are left out.
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

HERE = Path(__file__).parent
STEPS = {  # all of them, and those not counted
    "ppo": (100_000, 10_240),
    "ppo_continuous": (61_440, 20_480),
    "ppo_atari": (20_480, 5_120),
}
THREADS = {"ppo": 1, "ppo_continuous": 1, "ppo_atari": os.cpu_count()}
SAME = (
    "--num-envs 1 --num-steps 2048 --no-recompute-advantages --target-kl None --clip-vloss"
)
OPTIONS = {  # of stable-baselines3 and SBX, the same hyperparameters
    "ppo": {"n_steps": 128, "batch_size": 128, "n_epochs": 4, "ent_coef": 0.01},
    "ppo_continuous": {"n_steps": 2048, "batch_size": 64, "n_epochs": 10},
    "ppo_atari": {"n_steps": 128, "batch_size": 256, "n_epochs": 4, "ent_coef": 0.01},
}
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


def ours(script, flags="", steps=None):
    steps = steps or STEPS[script][0]
    with tempfile.TemporaryDirectory() as runs_dir:
        command = [sys.executable, HERE.parent / f"{script}.py", "--runs-dir", runs_dir]
        flags += f" --total-timesteps {steps} --threads {THREADS[script]} --device cpu"
        subprocess.run([*command, *flags.split()], check=True, capture_output=True)
        with open(next(Path(runs_dir).glob("*/metrics.csv")), newline="") as file:
            rows = [
                (int(x["global_step"]), float(x["seconds"])) for x in csv.DictReader(file)
            ]
    (first, began), *_, (last, ended) = [row for row in rows if row[0] >= STEPS[script][1]]
    return (last - first) / (ended - began)


def peer(package, script, python=sys.executable):
    """stable_baselines3 or sbx, in a process of its own."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import speed; "
    code += f"speed.train_peer({package!r}, {script!r})"
    options = {"check": True, "capture_output": True, "text": True}
    return float(subprocess.run([python, "-c", code], **options).stdout)


def train_peer(package, script):
    """Prints the steps per second of the package's PPO."""
    import importlib

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
    rate = 3e-4 if script == "ppo_continuous" else 2.5e-4
    options = OPTIONS[script] | {"learning_rate": lambda left: rate * left, "seed": 1}
    options["clip_range"] = 0.1 if script == "ppo_atari" else 0.2
    if package == "stable_baselines3":  # SBX does not clip the value loss
        options |= {"clip_range_vf": options["clip_range"], "device": "cpu"}
    if script == "ppo_atari":
        import ale_py  # noqa: F401, registers the games

        envs = VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", 8), 4)
    elif script == "ppo_continuous":
        envs = VecNormalize(make_vec_env("HalfCheetah-v5", 1))
        options["policy_kwargs"] = {"net_arch": {"pi": [64, 64], "vf": [256, 256]}}
    else:
        envs = make_vec_env("CartPole-v1", 4)
        options["policy_kwargs"] = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}}
    policy, clock = "CnnPolicy" if script == "ppo_atari" else "MlpPolicy", Clock()
    model = importlib.import_module(package).PPO(policy, envs, **options)
    model.learn(STEPS[script][0], callback=clock)
    print((model.num_timesteps - clock.first) / (time.perf_counter() - clock.began))


def cleanrl(script, python, file):
    with tempfile.TemporaryDirectory() as folder:  # it writes its runs there
        command = [Path(python).absolute(), Path(file).absolute(), "--no-cuda"]
        command += ["--total-timesteps", str(STEPS[script][0])]
        options = {"check": True, "capture_output": True, "text": True, "cwd": folder}
        output = subprocess.run(command, **options).stdout
    return float(
        re.findall(r"SPS: (\d+)", output)[-1]
    )  # its own count, from its first step


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
    script, same = args.script, SAME if args.script == "ppo_continuous" else ""
    os.environ["OMP_NUM_THREADS"] = str(THREADS[script])
    programs = {
        f"{script}.py": lambda: ours(script, same),
        f"{script}.py --compile": lambda: ours(script, f"{same} --compile"),
        "stable-baselines3": lambda: peer("stable_baselines3", script),
    }
    if args.cleanrl:
        programs["CleanRL"] = lambda: cleanrl(script, *args.cleanrl)
    if args.sbx:
        programs["SBX"] = lambda: peer("sbx", script, args.sbx)
    more = {"ppo": ["--vectorization-mode sync"], "ppo_atari": ["--bf16 off"]}
    for flags in more.get(script, []):
        programs[f"{script}.py {flags}"] = lambda flags=flags: ours(script, flags)
    if script == "ppo":
        programs["ppo.py --num-envs 32"] = lambda: ours(script, "--num-envs 32", 800_000)
    if script == "ppo_continuous":  # to the end: the KL limit acts in the later updates
        for flags in ("", " --compile"):
            whole = lambda flags=flags: ours(script, flags, 1_000_000)
            programs[f"ppo_continuous.py{flags}, its own defaults"] = whole
    where = [f"{script}.py", results.cpu(), os.cpu_count(), torch.__version__, date.today()]
    for turn in range(1, args.rounds + 1):
        found = {name: round(program()) for name, program in programs.items()}
        rows = [[*where, turn, name, speed] for name, speed in found.items()]
        results.append("speed.csv", COLUMNS, rows)
        print(found, flush=True)


if __name__ == "__main__":
    main()
