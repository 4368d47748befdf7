"""Reinforcement learning from human feedback in miniature: a KL penalty against gaming a proxy.

    python benchmark/rlhf.py            # makes what is missing in results/rlhf/, two runs at a time
    python benchmark/rlhf.py --dry-run  # prints the commands

A half-trained LunarLander agent is the reference. It is fine-tuned with `ppo.py --reference` on a
proxy of the true reward, as language models are on a learned reward model. The proxy is the true
reward plus BONUS for every step near the pad. It agrees with the true reward on how to get there,
but it can be gamed: hovering near the pad until the time limit pays more than landing. What a
trained agent is worth is the true return.

Fixed before the runs: BETAS, BONUS, five seeds, and the rule of the verdict. "The KL penalty keeps
the policy from drifting and from gaming the reward" holds if
(1) the mean KL to the reference per episode falls from each β to the next larger one,
(2) without a penalty (β = 0) the proxy return is above the reference's, and the true return below,
(3) some β > 0 has a true return above that of β = 0.
"Above" and "below" mean that the 95 % bootstrap interval of the mean over seeds, or of the
difference of two means, excludes the other value, or 0. It fails if (1), (2) or (3) is reversed in
that sense. Otherwise it is not settled.
"""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "rlhf"
RUNS = ROOT / "runs" / "rlhf"
BETAS = [0, 0.1, 0.3, 1, 3]
SEEDS = range(1, 6)
BONUS = 2
ONE_AT_A_TIME = threading.Lock()
FLAGS = (
    "--num-envs 16 --num-steps 256 --num-minibatches 32 --update-epochs 10 --gamma 0.995".split()
)
FLAGS += "--learning-rate 3e-4 --ent-coef 0.003 --norm-obs --norm-reward".split()


def near_the_pad(obs):
    """Whether a lander (..., 8) is within 0.3 of the middle and less than 0.5 above the ground."""
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


@torch.inference_mode()
def measure(run_dir, reference_dir):
    """Plays 100 episodes of LunarLander: true and proxy return and KL(π ‖ π_ref) per episode."""
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
        actions = agent.act(x).numpy()
        obs, reward, terminated, truncated, _ = envs.step(actions)
        played = ~reset  # the other steps only reset
        sums += played * np.stack([reward, reward + BONUS * near_the_pad(obs), kl])
        reset = terminated | truncated
        for n in np.flatnonzero(reset):
            finished[n].append(sums[:, n].copy())
            sums[:, n] = 0
    envs.close()
    means = np.mean([episode for episodes in finished for episode in episodes[:5]], axis=0)
    return dict(zip(("true", "proxy", "kl"), means.round(4).tolist()))


def train(name, *flags):
    """Runs ppo.py, if runs/rlhf/NAME is not there; returns its run directory."""
    paths = os.pathsep.join([str(ROOT / "benchmark"), os.environ.get("PYTHONPATH", "")])
    folder = RUNS / name
    if not list(folder.glob("*/done")):
        command = [sys.executable, str(ROOT / "ppo.py"), *flags, *FLAGS, "--runs-dir", str(folder)]
        if "--dry-run" in sys.argv:
            print(*command)
            return folder / "DIR"
        variables = os.environ | {"PYTHONPATH": paths}
        subprocess.run(command, check=True, env=variables, capture_output=True)
        max(folder.iterdir(), key=os.path.getmtime).joinpath("done").touch()
    return next(folder.glob("*/done")).parent


def fine_tune(reference, beta, seed):
    name = f"beta-{beta}-seed-{seed}"
    path = RESULTS / f"{name}.json"
    if path.exists():
        return
    flags = ["--env-id", "rlhf:ProxyLander-v0", "--total-timesteps", "300000", "--seed", str(seed)]
    run_dir = train(name, *flags, "--reference", str(reference), "--kl-coef", str(beta))
    if "--dry-run" not in sys.argv:
        with ONE_AT_A_TIME:  # torch's random numbers are those of the whole process
            path.write_text(json.dumps(measure(run_dir, reference)) + "\n")
        print(path.name, path.read_text().strip(), flush=True)


def main():
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    reference = train(
        "reference", "--env-id", "LunarLander-v3", "--total-timesteps", "300000", "--seed", "1"
    )
    if "--dry-run" not in sys.argv:
        (RESULTS / "reference.json").write_text(json.dumps(measure(reference, reference)) + "\n")
        print("reference", (RESULTS / "reference.json").read_text().strip(), flush=True)
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(lambda job: fine_tune(reference, *job), [(b, s) for s in SEEDS for b in BETAS])
        )


if __name__ == "__main__":
    main()
