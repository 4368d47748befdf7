"""Trains stable-baselines3's PPO on a continuous task, for run.py to set beside ppo_continuous.py.

    python benchmark/sb3.py --env-id Hopper-v5 --seed 1            # its defaults
    python benchmark/sb3.py --env-id Hopper-v5 --seed 1 --tuned    # the hyperparameters of rl-zoo3

Both with VecNormalize, the sampled policy evaluated for ten episodes after every tenth of the
steps. Leaves args.json, episodes.csv and evaluations.csv in a directory of runs_dir.
"""

import csv
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization

SIZES = [256, 256]
WIDE = {
    "log_std_init": -2,
    "ortho_init": False,
    "activation_fn": nn.ReLU,
    "net_arch": {"pi": SIZES, "vf": SIZES},
}
TUNED = {  # rl-zoo3's hyperparams/ppo.yml, there for older versions of these environments
    "HalfCheetah-v5": {
        "batch_size": 64,
        "n_steps": 512,
        "gamma": 0.98,
        "learning_rate": 2.0633e-05,
        "ent_coef": 0.000401762,
        "clip_range": 0.1,
        "n_epochs": 20,
        "gae_lambda": 0.92,
        "max_grad_norm": 0.8,
        "vf_coef": 0.58096,
        "policy_kwargs": WIDE,
    },
    "Hopper-v5": {
        "batch_size": 32,
        "n_steps": 512,
        "gamma": 0.999,
        "learning_rate": 9.80828e-05,
        "ent_coef": 0.00229519,
        "clip_range": 0.2,
        "n_epochs": 5,
        "gae_lambda": 0.99,
        "max_grad_norm": 0.7,
        "vf_coef": 0.835671,
        "policy_kwargs": WIDE,
    },
    "Walker2d-v5": {
        "batch_size": 32,
        "n_steps": 512,
        "gamma": 0.99,
        "learning_rate": 5.05041e-05,
        "ent_coef": 0.000585045,
        "clip_range": 0.1,
        "n_epochs": 20,
        "gae_lambda": 0.95,
        "max_grad_norm": 1,
        "vf_coef": 0.871923,
    },
}


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"
    total_timesteps: int = 1_000_000
    seed: int = 1
    tuned: bool = False
    threads: int = 1
    runs_dir: str = "runs"


class Evaluations(BaseCallback):
    def __init__(self, eval_envs, every):
        super().__init__()
        self.eval_envs, self.every, self.rows = eval_envs, every, []

    def _on_step(self):
        if self.num_timesteps % self.every == 0:
            sync_envs_normalization(self.training_env, self.eval_envs)
            options = {"deterministic": False, "return_episode_rewards": True}
            returns, _ = evaluate_policy(self.model, self.eval_envs, 10, **options)
            self.rows += [(self.num_timesteps, score) for score in returns]
        return True


def main():
    args = tyro.cli(Args)
    torch.set_num_threads(args.threads)
    options = TUNED[args.env_id] if args.tuned else {}
    gamma = options.get("gamma", 0.99)
    Path(args.runs_dir).mkdir(parents=True, exist_ok=True)
    run_dir = Path(tempfile.mkdtemp(prefix=f"{args.env_id}__sb3__{args.seed}__", dir=args.runs_dir))
    envs = make_vec_env(args.env_id, 1, args.seed, monitor_dir=str(run_dir))
    envs = VecNormalize(envs, gamma=gamma)
    eval_envs = make_vec_env(args.env_id, 10, args.seed)
    eval_envs = VecNormalize(eval_envs, training=False, norm_reward=False)
    model = PPO("MlpPolicy", envs, seed=args.seed, device="cpu", **options)
    callback = Evaluations(eval_envs, args.total_timesteps // 10)
    model.learn(args.total_timesteps, callback)
    monitor = np.genfromtxt(run_dir / "0.monitor.csv", delimiter=",", skip_header=2)
    returns, lengths = monitor[:, 0].tolist(), monitor[:, 1].astype(int)
    episodes = list(zip(np.cumsum(lengths), returns, lengths))
    columns = {"episodes.csv": ("global_step", "episodic_return", "episodic_length")}
    columns["evaluations.csv"] = columns["episodes.csv"][:2]
    for name, rows in (("episodes.csv", episodes), ("evaluations.csv", callback.rows)):
        with open(run_dir / name, "w", newline="") as file:
            csv.writer(file).writerows([columns[name], *rows])
    (run_dir / "args.json").write_text(json.dumps(asdict(args)))


if __name__ == "__main__":
    main()
