"""Runs the training studies and keeps their raw data in benchmark/results/.

    python benchmark/run.py ppo              # every run that is not there yet, two at a time
    python benchmark/run.py ppo --jobs 8

A study lists environments, flags and numbers of seeds. Each run leaves its flags and, compressed,
its episodes and metrics in results/<study>/<label>-<seed>.*; delete those to make it again.
report.py makes the tables.

ppo                  the classic tasks of ppo.py
continuous           MuJoCo, with the default flags of ppo_continuous.py
continuous-sb3       stable-baselines3's PPO on three of its tasks, with its and rl-zoo3's flags
continuous-defaults  which flags ppo_continuous.py should have as defaults, besides "continuous"
atari                Pong, Breakout, BeamRider: ppo_atari.py's defaults but for the steps; hours
atari-bf16           whether bfloat16 harms learning: 500,000 steps of Breakout with and without
"""

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

CLASSIC = (
    "--total-timesteps 1000000 --num-envs 16 --num-steps 256 --num-minibatches 32 "
    "--update-epochs 10 --norm-obs --norm-reward "
)
MOUNTAIN_CAR = CLASSIC + "--gae-lambda 0.98 --ent-coef 0"
LUNAR_LANDER = CLASSIC + "--gamma 0.995 --learning-rate 3e-4 --ent-coef 0.003"
LOCOMOTION = ["HalfCheetah-v5", "Walker2d-v5", "Hopper-v5"]
MUJOCO = "HalfCheetah-v5 Hopper-v5 Walker2d-v5 Ant-v5 Swimmer-v5 Humanoid-v5 Reacher-v5".split()
MUJOCO += ["InvertedPendulum-v5", "InvertedDoublePendulum-v5", "Ant-v4"]
NO_ADV = "--no-norm-adv --vf-coef 0.25"
VARIANTS = {  # of the flags that ppo_continuous.py might have as its defaults
    "8x256-clip-vloss": "--num-envs 8 --num-steps 256 --target-kl None --clip-vloss",
    "16x128-clip-vloss": "--num-envs 16 --num-steps 128 --target-kl None --clip-vloss",
    "32x64-clip-vloss": "--num-envs 32 --num-steps 64 --target-kl None --clip-vloss",
    "64x32-clip-vloss": "--num-envs 64 --num-steps 32 --target-kl None --clip-vloss",
    "8x256-no-norm-adv": f"--num-envs 8 --num-steps 256 --target-kl None {NO_ADV}",
}
VARIANTS_ON_ALL = {  # the same, on all tasks
    "16x128": "--num-envs 16 --num-steps 128 --target-kl None",
    "64x32": "--num-envs 64 --num-steps 32 --target-kl None --compile",
    "64x32-target-kl": "--num-envs 64 --num-steps 32 --target-kl 0.02 --compile",
}
STUDIES = {  # study: script, then (label, environment, flags, number of seeds, from 1)
    "ppo": (
        "ppo.py",
        [
            ("CartPole-v1", "CartPole-v1", "", 10),
            ("Acrobot-v1", "Acrobot-v1", "", 5),
            ("MountainCar-v0", "MountainCar-v0", MOUNTAIN_CAR, 3),
            ("LunarLander-v3", "LunarLander-v3", LUNAR_LANDER, 3),
        ],
    ),
    "continuous": (
        "benchmark/train_and_evaluate.py",
        [(env, env, "--compile", 5) for env in MUJOCO],
    ),
    "continuous-sb3": (
        "benchmark/sb3.py",
        [
            (f"{env}-{label}", env, flags, 3)
            for label, flags in (("default", ""), ("tuned", "--tuned"))
            for env in LOCOMOTION
        ],
    ),
    "continuous-defaults": (
        "benchmark/train_and_evaluate.py",
        [
            (f"{env}-{name}", env, flags, seeds)
            for variants, envs, seeds in ((VARIANTS, LOCOMOTION, 3), (VARIANTS_ON_ALL, MUJOCO, 5))
            for name, flags in variants.items()
            for env in envs
        ],
    ),
    "atari": (
        "ppo_atari.py",
        [
            ("Pong-3M", "Pong", "--total-timesteps 3000000", 1),
            ("Pong-4M", "Pong", "--total-timesteps 4000000", 1),
            ("Pong-5M", "Pong", "--total-timesteps 5000000", 1),
            ("Pong-10M", "Pong", "", 1),
            ("Breakout-10M", "Breakout", "", 2),
            ("BeamRider-6M", "BeamRider", "--total-timesteps 6000000", 1),
            ("BeamRider-10M", "BeamRider", "", 1),
        ],
    ),
    "atari-bf16": (
        "ppo_atari.py",
        [
            (f"Breakout-{bf16}", "Breakout", f"--total-timesteps 500000 --bf16 {bf16}", 3)
            for bf16 in ("on", "off")
        ],
    ),
}


def five_digits(text):
    """Rounds numbers with more than six decimals to five significant digits: half the size once
    compressed."""
    return re.sub(r"-?\d+\.\d{7,}(e-?\d+)?", lambda found: f"{float(found[0]):.5g}", text)


def run(study, script, label, env_id, flags, seed):
    target = RESULTS / study / f"{label}-{seed}"
    if target.with_name(f"{target.name}.args.json").exists():
        return
    with tempfile.TemporaryDirectory() as runs_dir:
        program = [sys.executable, ROOT / script]
        flags = f"--env-id {env_id} --seed {seed} {flags} --threads 1".split()
        command = [*program, *flags, "--runs-dir", runs_dir]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (run_dir,) = Path(runs_dir).iterdir()
        if study == "atari":  # the finished agent, loaded from its directory, plays a hundred games
            flags = "--num-envs 20 --eval-episodes 5".split()
            command = [*program, "--evaluate", run_dir, *flags]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            scores = output.splitlines()[-1].split()
            (run_dir / "reloaded.csv").write_text("\n".join(["episodic_return", *scores, ""]))
        target.parent.mkdir(parents=True, exist_ok=True)
        for path in run_dir.glob("[!0]*.csv"):
            text = five_digits(path.read_text()) if path.name == "metrics.csv" else path.read_text()
            packed = gzip.compress(text.encode(), mtime=0)
            target.with_name(f"{target.name}.{path.name}.gz").write_bytes(packed)
        args = json.loads((run_dir / "args.json").read_text()) | {"runs_dir": "runs"}
        target.with_name(f"{target.name}.args.json").write_text(json.dumps(args, indent=2) + "\n")
    print(f"{study}: {label}, seed {seed}: done", flush=True)


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # also while an agent is evaluated
    script, configurations = STUDIES[args.study]
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = []
        most_seeds = max(seeds for *_, seeds in configurations)
        for seed in range(1, 1 + most_seeds):  # the first of every task comes first
            for label, env_id, flags, seeds in configurations:
                if seed <= seeds:
                    jobs.append(pool.submit(run, args.study, script, label, env_id, flags, seed))
        for job in jobs:
            job.result()


if __name__ == "__main__":
    main()
