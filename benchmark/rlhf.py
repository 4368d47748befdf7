"""Reinforcement learning from human feedback in miniature: a KL penalty against gaming a proxy.

    python benchmark/rlhf.py    # runs what is missing in results/rlhf.csv, two at a time

A half-trained LunarLander agent is the reference. `ppo.py --reference` fine-tunes it on a proxy of
the true reward: the true one plus BONUS for every step near the pad. The rule of the verdict was
fixed before the runs and stands in README.md, beside this file.
"""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
import pandas as pd
import results
import torch

RUNS = results.ROOT / "runs" / "rlhf"
BETAS = [0, 0.1, 0.3, 1, 3]
BONUS = 2
COLUMNS = ["beta", "seed", *results.MADE_BY, "kl", "proxy", "true"]
ONE_AT_A_TIME = threading.Lock()  # torch's random numbers are those of the whole process
FLAGS = "--total-timesteps 300000 --num-envs 16 --num-steps 256 --num-minibatches 32 "
FLAGS += "--update-epochs 10 --gamma 0.995 --learning-rate 3e-4 --ent-coef 0.003 "
FLAGS += "--norm-obs --norm-reward"


def near_the_pad(obs):
    """Whether a lander (..., 8) is within 0.3 of the middle, less than 0.5 above the ground."""
    return (np.abs(obs[..., 0]) < 0.3) & (obs[..., 1] < 0.5)


class ProxyLander(gym.Wrapper):
    """LunarLander-v3 that pays the proxy instead of the true reward."""

    def __init__(self):
        super().__init__(gym.make("LunarLander-v3").unwrapped)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward + BONUS * float(near_the_pad(obs)), terminated, truncated, info


if "ProxyLander-v0" not in gym.registry:  # this module is imported again as rlhf
    gym.register("ProxyLander-v0", ProxyLander, max_episode_steps=1000)


@torch.no_grad()
def measure(run_dir, reference_dir):
    """100 episodes of LunarLander: KL(π ‖ π_ref), proxy and true return per episode."""
    import ppo

    agent, reference = ppo.load_agent(run_dir), ppo.load_agent(reference_dir)
    args = ppo.Args(env_id="LunarLander-v3", num_envs=20, seed=12345)
    envs, obs = ppo.start_envs(args, 0)
    sums, finished, reset = np.zeros((3, 20)), [[] for _ in range(20)], np.zeros(20, bool)
    while min(map(len, finished)) < 5:
        observed = torch.as_tensor(obs, dtype=torch.float32)
        x = agent.normalize(observed)
        log_probs = agent.actor(x).log_softmax(-1)
        reference_log_probs = reference.actor(reference.normalize(observed)).log_softmax(-1)
        kl = (log_probs.exp() * (log_probs - reference_log_probs)).sum(-1).numpy()
        obs, reward, terminated, truncated, _ = envs.step(agent.act(x).numpy())
        played = ~reset  # the other steps only reset
        sums += played * np.stack([kl, reward + BONUS * near_the_pad(obs), reward])
        reset = terminated | truncated
        for n in np.flatnonzero(reset):
            finished[n].append(sums[:, n].copy())
            sums[:, n] = 0
    envs.close()
    return np.mean([episode for env in finished for episode in env[:5]], axis=0).round(4)


def train(beta, seed, *flags):
    """Runs ppo.py, if runs/rlhf/ does not have it; returns its run directory."""
    folder = RUNS / f"{beta}-{seed}"
    if not list(folder.glob("*/done")):
        command = [sys.executable, results.ROOT / "ppo.py", *FLAGS.split(), *flags]
        command += ["--seed", str(seed), "--runs-dir", folder]
        paths = [str(results.ROOT / "benchmark"), os.environ.get("PYTHONPATH", "")]
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        subprocess.run(command, check=True, env=variables, capture_output=True)
        max(folder.iterdir(), key=os.path.getmtime).joinpath("done").touch()
    return next(folder.glob("*/done")).parent


def main():
    sys.path.insert(0, str(results.ROOT))
    torch.set_num_threads(1)
    path, done = results.RESULTS / "rlhf.csv", set()
    if path.exists():
        table = pd.read_csv(path, dtype=str)
        done = set(zip(table.beta, table.seed))
    reference = train("reference", 1, "--env-id", "LunarLander-v3")

    def finish(job):
        beta, seed = job
        if (str(beta), str(seed)) in done:
            return
        run_dir = reference
        if beta != "reference":
            flags = ["--env-id", "rlhf:ProxyLander-v0", "--kl-coef", str(beta)]
            run_dir = train(beta, seed, *flags, "--reference", reference)
        with ONE_AT_A_TIME:
            row = [beta, seed, *results.made_by("ppo.py"), *measure(run_dir, reference)]
        results.append("rlhf.csv", COLUMNS, [row])
        print(*row, flush=True)

    finish(("reference", 1))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(finish, [(beta, seed) for seed in range(1, 6) for beta in BETAS]))


if __name__ == "__main__":
    main()
