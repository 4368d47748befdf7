"""Trains stable-baselines3's PPO on a continuous task, to set beside ppo_continuous.py.

    python benchmark/sb3.py --env-id Hopper-v5 --seed 1            # its defaults
    python benchmark/sb3.py --env-id Hopper-v5 --seed 1 --tuned    # rl-zoo3's hyperparameters

Both with VecNormalize; the sampled policy is evaluated for ten episodes after every tenth of the
steps. Leaves the files that run.py reads in a directory of runs_dir.
"""

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization

SIZES = {"pi": [256, 256], "vf": [256, 256]}
WIDE = {
    "log_std_init": -2,
    "ortho_init": False,
    "activation_fn": nn.ReLU,
    "net_arch": SIZES,
}
NAMES = "batch_size n_steps gamma learning_rate ent_coef clip_range n_epochs gae_lambda "
NAMES += "max_grad_norm vf_coef policy_kwargs"
# rl-zoo3's hyperparams/ppo.yml, there for older versions of these environments
CHEETAH = (64, 512, 0.98, 2.0633e-05, 0.000401762, 0.1, 20, 0.92, 0.8, 0.58096, WIDE)
HOPPER = (32, 512, 0.999, 9.80828e-05, 0.00229519, 0.2, 5, 0.99, 0.7, 0.835671, WIDE)
WALKER = (32, 512, 0.99, 5.05041e-05, 0.000585045, 0.1, 20, 0.95, 1, 0.871923, None)
TUNED = {"HalfCheetah-v5": CHEETAH, "Hopper-v5": HOPPER, "Walker2d-v5": WALKER}


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
        self.eval_envs, self.every, self.means = eval_envs, every, {}

    def _on_step(self):
        if self.num_timesteps % self.every == 0:
            sync_envs_normalization(self.training_env, self.eval_envs)
            mean, _ = evaluate_policy(self.model, self.eval_envs, 10, deterministic=False)
            self.means[self.num_timesteps // self.every] = mean
        return True


def main():
    args, began = tyro.cli(Args), time.perf_counter()
    torch.set_num_threads(args.threads)
    options = dict(zip(NAMES.split(), TUNED[args.env_id])) if args.tuned else {}
    gamma = options.get("gamma", 0.99)
    Path(args.runs_dir).mkdir(parents=True, exist_ok=True)
    run_dir = Path(tempfile.mkdtemp(prefix=f"{args.env_id}__sb3__", dir=args.runs_dir))
    envs = make_vec_env(args.env_id, 1, args.seed, monitor_dir=str(run_dir))
    envs = VecNormalize(envs, gamma=gamma)
    eval_envs = make_vec_env(args.env_id, 10, args.seed)
    eval_envs = VecNormalize(eval_envs, training=False, norm_reward=False)
    model = PPO("MlpPolicy", envs, seed=args.seed, device="cpu", **options)
    callback = Evaluations(eval_envs, args.total_timesteps // 10)
    model.learn(args.total_timesteps, callback)
    monitor = np.genfromtxt(run_dir / "0.monitor.csv", delimiter=",", skip_header=2)
    steps = monitor[:, 1].cumsum().astype(int)
    episodes = pd.DataFrame({"global_step": steps, "episodic_return": monitor[:, 0]})
    episodes.to_csv(run_dir / "episodes.csv")
    seconds = time.perf_counter() - began
    metrics = pd.DataFrame({"global_step": [args.total_timesteps], "seconds": [seconds]})
    metrics.to_csv(run_dir / "metrics.csv")
    (run_dir / "args.json").write_text(json.dumps(asdict(args)))
    (run_dir.parent / "evaluation.json").write_text(json.dumps(callback.means))


if __name__ == "__main__":
    main()
