"""Trains stable-baselines3's PPO on a continuous task, to set beside ppo_continuous.py.

    python benchmark/sb3.py --env-id Hopper-v5 --seed 1          # its defaults
    python benchmark/sb3.py --env-id Hopper-v5 --seed 1 --tuned  # rl-zoo3's hyperparameters

Both with VecNormalize. Leaves the files that run.py reads in a directory of --runs-dir.
"""

import argparse
import json
import time
from pathlib import Path

import pandas as pd
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

STEPS = 1_000_000
WIDE = {"log_std_init": -2, "ortho_init": False, "activation_fn": torch.nn.ReLU}
WIDE["net_arch"] = {"pi": [256, 256], "vf": [256, 256]}
NAMES = "batch_size n_steps gamma learning_rate ent_coef clip_range n_epochs gae_lambda "
NAMES += "max_grad_norm vf_coef policy_kwargs"
# rl-zoo3's hyperparams/ppo.yml, there for older versions of these environments
CHEETAH = (64, 512, 0.98, 2.0633e-5, 4.01762e-4, 0.1, 20, 0.92, 0.8, 0.58096, WIDE)
HOPPER = (32, 512, 0.999, 9.80828e-5, 2.29519e-3, 0.2, 5, 0.99, 0.7, 0.835671, WIDE)
WALKER = (32, 512, 0.99, 5.05041e-5, 5.85045e-4, 0.1, 20, 0.95, 1, 0.871923, None)
TUNED = {"HalfCheetah-v5": CHEETAH, "Hopper-v5": HOPPER, "Walker2d-v5": WALKER}


def main():
    parser, began = argparse.ArgumentParser(), time.perf_counter()
    parser.add_argument("--env-id", choices=TUNED, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs-dir", default="runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    options = dict(zip(NAMES.split(), TUNED[args.env_id])) if args.tuned else {}
    run_dir = Path(args.runs_dir, f"{args.env_id}__sb3__{args.seed}__{time.time_ns()}")
    run_dir.mkdir(parents=True)
    envs = make_vec_env(args.env_id, 1, args.seed, monitor_dir=str(run_dir))
    envs = VecNormalize(envs, gamma=options.get("gamma", 0.99))
    model = PPO("MlpPolicy", envs, seed=args.seed, device="cpu", **options)
    model.learn(STEPS)
    monitor = pd.read_csv(run_dir / "0.monitor.csv", skiprows=1)
    episodes = {"global_step": monitor.l.cumsum(), "episodic_return": monitor.r}
    pd.DataFrame(episodes).to_csv(run_dir / "episodes.csv")
    metrics = {"global_step": [STEPS], "seconds": [time.perf_counter() - began]}
    pd.DataFrame(metrics).to_csv(run_dir / "metrics.csv")
    (run_dir / "args.json").write_text(json.dumps(vars(args)))


if __name__ == "__main__":
    main()
