"""Proximal Policy Optimization (PPO) for discrete actions and vector observations, in one file.

    python ppo.py                                                  # CartPole-v1: 500,000 steps, half a minute
    python ppo.py --env-id Acrobot-v1 --seed 2 --num-envs 8        # any flag of Args; --help lists them
    python ppo.py --resume runs/DIR                                # go on with a run that was stopped
    python ppo.py --evaluate runs/DIR --greedy --capture-video     # play a trained agent and film it

Map: Args, the flags · make_envs · RunningStats and Agent, the networks · compute_gae, policy_loss, value_loss and the
rest of the mathematics, labelled like (gae) as in the README · evaluate · the run directory: checkpoints and logs ·
train, the algorithm: rollout, advantages, update · main, the command line.
ppo_continuous.py differs in its Gaussian policy and its defaults, ppo_atari.py in its network for pixels.
"""

import contextlib
import csv
import difflib
import io
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm

SCRIPT = "ppo.py"
LIMITS = {  # (lowest, highest): the flags
    (1, 10**12): ["total_timesteps", "num_envs", "num_steps", "num_minibatches", "update_epochs", "eval_episodes"],
    (0, 10**12): ["learning_rate", "ent_coef", "vf_coef", "threads", "save_every"],
    (1e-12, math.inf): ["clip_coef", "max_grad_norm"],
    (1e-12, 10**12): ["target_kl"],
    (0, 1): ["gamma", "gae_lambda"],
    (0, 2**32 - 1): ["seed"],
}
MAY_DIFFER = {  # the flags that need not be those of the saved run
    "resume": ["resume", "device", "capture_video", "track", "wandb_project_name"],
    "evaluate": ["evaluate", "eval_episodes", "greedy", "num_envs", "seed", "device", "capture_video", "track"],
}
HEADERS = {
    "metrics.csv": "iteration global_step episodes episodic_return episodic_length policy_loss value_loss entropy "
    "old_approx_kl approx_kl clipfrac max_ratio_dev explained_variance grad_norm learning_rate sps seconds",
    "episodes.csv": "global_step episodic_return episodic_length",
}


class UsageError(ValueError):
    """What was asked for cannot work; the message names the flag, its value and what would work."""


def reject(flag, value, advice):
    raise UsageError(f"--{flag.replace('_', '-')} {value}: {advice}")


@dataclass
class Args:
    env_id: str = "CartPole-v1"  # environment with discrete actions; module:EnvId imports the module first
    vectorization_mode: Literal["auto", "sync", "async", "vector_entry_point"] = "auto"  # auto: native, else sync
    total_timesteps: int = 500_000  # steps of all environments together, rounded down to whole iterations
    num_envs: int = 4  # environments that run in parallel, N
    num_steps: int = 128  # steps of each environment in a rollout, T
    seed: int = 1  # decides everything random, in [0, 2^32)
    exp_name: str = "ppo"  # part of the run directory's name

    learning_rate: float = 2.5e-4  # of Adam, the first in (lr)
    anneal_lr: bool = True  # lower the learning rate linearly towards 0, (lr)
    gamma: float = 0.99  # discount factor in [0, 1], (td)
    gae_lambda: float = 0.95  # from 0, biased advantages, to 1, noisy ones, (gae)
    bootstrap_truncated: bool = True  # count on V after a time limit; off: as after termination, (td)
    num_minibatches: int = 4  # per epoch; must divide num_envs * num_steps
    update_epochs: int = 4  # passes over each rollout
    norm_adv: bool = True  # normalise advantages, (norm)
    norm_adv_over: Literal["minibatch", "batch"] = "minibatch"  # the rows normalised together, (norm)
    clip_coef: float = 0.2  # how far the ratio pays, epsilon; inf is the unclipped surrogate, (clip)
    clip_vloss: bool = True  # clip the value loss with the same epsilon, (vf-clip)
    ent_coef: float = 0.01  # weight of the entropy bonus, c_e in (total)
    vf_coef: float = 0.5  # weight of the value loss, c_v in (total)
    max_grad_norm: float = 0.5  # largest norm of the whole gradient; inf: no limit
    target_kl: float | None = None  # skip an update's other epochs once (k3) of an epoch exceeds this
    norm_obs: bool = False  # normalise observations by running mean and variance, (obs-norm)
    norm_reward: bool = False  # divide rewards by the running deviation of the return, (rew-norm)

    device: str = "auto"  # cpu, cuda or cuda:N; auto: cuda where there is one
    threads: int = 0  # CPU threads of torch; 0: chosen by the size of a minibatch
    compile: bool = False  # torch.compile the loss: slow to start, then faster (CUDA graphs on CUDA)
    runs_dir: str = "runs"  # where run directories are made
    save_every: int | None = None  # iterations between checkpoints, 0: only at the end; default: 20 or fewer per run
    resume: str | None = None  # go on with the run in this directory, with its own flags
    evaluate: str | None = None  # play the agent of this run directory instead of training
    eval_episodes: int = 10  # how many --evaluate plays in each environment
    greedy: bool = False  # --evaluate: the most probable action instead of a sampled one
    capture_video: bool = False  # film --evaluate, or in training one episode at every checkpoint
    track: bool = False  # log to Weights & Biases; offline where it cannot be reached
    wandb_project_name: str = "ppo"  # project on Weights & Biases

    @property
    def iterations(self):
        return self.total_timesteps // (self.num_envs * self.num_steps)

    def check(self):
        """Raises UsageError for flags that no environment can work with."""
        for (low, high), names in LIMITS.items():
            for name, value in ((name, getattr(self, name)) for name in names):
                if value is not None and not low <= value <= high:  # also rejects nan
                    reject(name, value, f"must be {low:g} or more" if high > 1e9 else f"must be in [{low:g}, {high:g}]")
        if self.resume and self.evaluate:
            reject("evaluate", self.evaluate, "leave out --resume, or resume first and evaluate then")
        batch_size = self.num_envs * self.num_steps
        if batch_size % self.num_minibatches and not self.evaluate:
            reject("num_minibatches", self.num_minibatches, f"must divide num_envs * num_steps = {batch_size}")
        if self.iterations < 1 and not self.evaluate:
            reject("total_timesteps", self.total_timesteps, f"must be at least one rollout, {batch_size}")


def make_envs(args, video_dir=None):
    """A gymnasium VectorEnv of args.num_envs environments with flat observations, filmed into video_dir.

    Raises UsageError for environments that do not exist or that this script cannot train on.
    """
    options = {"vectorization_mode": None if args.vectorization_mode == "auto" else args.vectorization_mode}
    if video_dir:
        folders = (f"{video_dir}/env-{i}" for i in itertools.count())
        film = lambda env: gym.wrappers.RecordVideo(env, next(folders), lambda episode: episode < args.eval_episodes)
        options = {"vectorization_mode": "sync", "render_mode": "rgb_array", "wrappers": [film]}
    try:
        envs = gym.make_vec(args.env_id, args.num_envs, **options)
    except Exception as error:
        if args.env_id.startswith("ALE/"):
            reject("env_id", args.env_id, "is an Atari game: use ppo_atari.py")
        advice = (str(error).strip() or repr(error)).splitlines()[0]
        if isinstance(error, gym.error.UnregisteredEnv):
            advice += f" The nearest is {difflib.get_close_matches(args.env_id, gym.registry, 1, 0)[0]}."
        if "vector entry point" in advice:
            reject("vectorization_mode", args.vectorization_mode, f"{advice} Use sync or async.")
        reject("env_id", args.env_id, advice)
    observations, actions = envs.single_observation_space, envs.single_action_space
    autoreset = envs.metadata.get("autoreset_mode")
    if isinstance(actions, gym.spaces.Box):
        reject("env_id", args.env_id, "has continuous actions: use ppo_continuous.py")
    if not isinstance(actions, gym.spaces.Discrete):
        reject("env_id", args.env_id, f"has actions {actions}: one with a Discrete space is needed")
    if isinstance(observations, gym.spaces.Box) and observations.dtype == np.uint8 and len(observations.shape) > 1:
        reject("env_id", args.env_id, "observes images: use ppo_atari.py")
    if not observations.is_np_flattenable:
        reject("env_id", args.env_id, f"observes {observations}: one that gymnasium can flatten is needed")
    if autoreset != gym.vector.AutoresetMode.NEXT_STEP:
        reject("env_id", args.env_id, f"has autoreset_mode {autoreset}: AutoresetMode.NEXT_STEP is needed")
    flat = isinstance(observations, gym.spaces.Box) and len(observations.shape) == 1
    return envs if flat else gym.wrappers.vector.FlattenObservation(envs)


def check_renderer(args):
    """Raises UsageError where no picture of the environment can be made here."""
    try:
        env = gym.make(args.env_id, render_mode="rgb_array")
        env.reset()
        env.render()
        env.close()
    except Exception as error:
        reject("capture_video", True, f"{args.env_id} cannot be filmed here ({str(error).strip().splitlines()[0]})")


def start_worlds(args, iteration, video_dir=None):
    """New environments and their first observations, a function of (seed, iteration) alone, like every random number
    from here on: a resumed run sees what the uninterrupted one sees. Environment i gets the seed + i."""
    seed = int(np.random.SeedSequence((args.seed, iteration)).generate_state(1)[0]) % (2**31 - 1 - args.num_envs)
    torch.manual_seed(seed)
    envs = make_envs(args, video_dir)
    return envs, envs.reset(seed=seed)[0]


def setup_device(args):
    """The torch device of --device. Raises UsageError for one that is not here."""
    devices = ["auto", "cpu"] + ["cuda"] * torch.cuda.is_available()
    devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if args.device not in devices:
        reject("device", args.device, f"is not here; use one of: {', '.join(devices)}")
    return torch.device(args.device if args.device != "auto" else "cuda" if "cuda" in devices else "cpu")


class RunningStats(nn.Module):
    """Mean and variance of all rows seen so far, kept in buffers so that they are saved with the agent."""

    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    def update(self, x):
        """Merges the rows x (rows, *shape) by Chan's formula, so that any split into batches gives the same."""
        rows, total = len(x), self.count + len(x)
        if rows == 0:
            return
        mean, var = x.double().mean(0), x.double().var(0, unbiased=False)
        delta = mean - self.mean
        self.var.copy_((self.var * self.count + var * rows + delta**2 * self.count * rows / total) / total)
        self.mean += delta * rows / total
        self.count.copy_(total)


def mlp(inputs, outputs, output_std):
    """Two hidden layers of 64 tanh units; orthogonal weights, scaled by sqrt(2) and output_std, and zero biases."""
    sizes = [(inputs, 64, math.sqrt(2)), (64, 64, math.sqrt(2)), (64, outputs, output_std)]
    layers = []
    for size_in, size_out, std in sizes:
        linear = nn.Linear(size_in, size_out)
        nn.init.orthogonal_(linear.weight, std)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """The policy (actor) and the value function (critic), two separate networks.

    B stands for any leading dimensions, D for the size of an observation, A for the number of actions. `normalize`
    takes observations; everything else takes what it returns.
    """

    def __init__(self, observation_space, action_space, norm_obs=False):
        super().__init__()
        self.norm_obs = norm_obs
        self.num_actions = int(action_space.n)
        self.register_buffer("first_action", torch.tensor(int(action_space.start)))
        self.obs_stats = RunningStats(observation_space.shape[0])
        self.return_stats = RunningStats()
        self.actor = mlp(observation_space.shape[0], self.num_actions, 0.01)  # at first all actions are as probable
        self.critic = mlp(observation_space.shape[0], 1, 1.0)

    def normalize(self, obs):
        """(obs-norm): observations (B, D) → what the networks are fed (B, D)."""
        if not self.norm_obs:
            return obs
        mean, std = self.obs_stats.mean.float(), (self.obs_stats.var + 1e-8).sqrt().float()
        return ((obs - mean) / std).clamp(-10, 10)

    def noise(self, *shape):
        """Gumbel noise (*shape, A): logits + noise is largest at a with probability softmax(logits)_a."""
        return -torch.empty(*shape, self.num_actions, device=self.first_action.device).exponential_().log()

    def act(self, x, noise):
        """x (B, D) → sampled actions (B,); noise 0 gives the most probable ones."""
        return (self.actor(x) + noise).argmax(-1)

    def env_action(self, action):
        """Actions 0 … A−1 → what the environment counts from, as numpy."""
        return (action + self.first_action).cpu().numpy()

    def value(self, x):
        """x (B, D) → V(s) (B,)."""
        return self.critic(x).squeeze(-1)

    def evaluate_actions(self, x, action):
        """x (B, D), action (B,) → log π(a|s) (B,) by (categorical) and the policy's entropy (B,) by (entropy)."""
        log_probs = torch.log_softmax(self.actor(x), -1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1), entropy


def flat_parameters(agent):
    """One vector of all parameters, which become views of it. What a small network's update spends its time on is the
    number of operations; with one vector, clipping the gradient and Adam are one each instead of one per layer."""
    parameters = list(agent.parameters())
    vector = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    vector.grad = torch.zeros_like(vector)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, data, grad in zip(parameters, vector.data.split(sizes), vector.grad.split(sizes)):
        parameter.data, parameter.grad = data.view_as(parameter), grad.view_as(parameter)
    return vector


def masked_mean(x, weight=None):
    """Mean of x along its last dimension over the rows of weight 1: Σ w x / Σ w, (valid)."""
    return x.mean(-1) if weight is None else (x * weight).sum(-1) / weight.sum(-1).clamp(min=1)


def compute_gae(rewards, values, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016), (td) and (gae).

    δ_t = r_t + γ V(s_{t+1}) (1 − terminated_t) − V(s_t)
    Â_t = δ_t + γλ (1 − done_t) Â_{t+1}

    rewards, terminated, done (T, N), the last two bool or float; values (T+1, N), the last row is V(s_T).
    Returns the advantages (T, N). Only termination cuts the bootstrap; any end of an episode cuts the trace.
    """
    deltas = rewards + gamma * values[1:] * (1 - terminated.to(values)) - values[:-1]
    decays = gamma * gae_lambda * (1 - done.to(values))
    advantages, advantage = [], torch.zeros_like(deltas[0])
    for delta, decay in zip(deltas.flip(0), decays.flip(0)):
        advantage = delta + decay * advantage
        advantages.append(advantage)
    return torch.stack(advantages).flip(0)


def policy_loss(log_ratio, advantages, clip_coef, weight=None):
    """(clip): −E[min(r Â, clip(r, 1−ε, 1+ε) Â)] with r = exp(log_ratio), a scalar.

    log_ratio = log π_θ(a|s) − log π_old(a|s), advantages and weight (B,); ε = clip_coef.
    """
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -masked_mean(torch.min(ratio * advantages, clipped * advantages), weight)


def value_loss(values, old_values, returns, clip_coef, weight=None):
    """(vf-clip): ½ E[max((V − R̂)², (V_clip − R̂)²)], V_clip = V_old + clip(V − V_old, −ε, ε), a scalar.

    values, old_values, returns and weight (B,); ε = clip_coef, None is the unclipped (vf).
    """
    error = (values - returns) ** 2
    if clip_coef is not None:
        clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        error = torch.max(error, (clipped - returns) ** 2)
    return 0.5 * masked_mean(error, weight)


def normalize_advantages(advantages, weight):
    """(norm): (Â − mean) / (std + 1e-8) along the last dimension of (..., B), over the rows of weight 1.

    The deviation is unbiased; fewer than two rows of weight 1 are left alone.
    """
    rows = weight.sum(-1, keepdim=True)
    mean = (advantages * weight).sum(-1, keepdim=True) / rows.clamp(min=1)
    variance = ((advantages - mean) ** 2 * weight).sum(-1, keepdim=True) / (rows - 1).clamp(min=1)
    return torch.where(rows < 2, advantages, (advantages - mean) / (variance.sqrt() + 1e-8))


def scale_rewards(rewards, done, valid, stats, gamma, carry):
    """(rew-norm): rewards over the running deviation of G_t = γ (1 − done_{t−1}) G_{t−1} + r_t, clipped to ±10.

    rewards, done, valid (T, N); carry (N,) is γ (1 − done) G of the row before, also returned for the next rollout.
    """
    returns = []
    for reward, end in zip(rewards, done):
        returns.append(carry + reward)
        carry = gamma * ~end * returns[-1]
    stats.update(torch.stack(returns)[valid])
    return (rewards / (stats.var + 1e-8).sqrt().float()).clamp(-10, 10), carry


def ppo_loss(agent, args, x, action, old_log_prob, old_values, returns, advantages, weight):
    """(total): −L_CLIP + c_v L_VF − c_e H over a minibatch of B rows, then its three parts and the log-ratios (B,)."""
    log_prob, entropy = agent.evaluate_actions(x, action)
    log_ratio = log_prob - old_log_prob  # (ratio)
    policy = policy_loss(log_ratio, advantages, args.clip_coef, weight)
    value = value_loss(agent.value(x), old_values, returns, args.clip_coef if args.clip_vloss else None, weight)
    entropy = masked_mean(entropy, weight)
    loss = policy + args.vf_coef * value - args.ent_coef * entropy
    return loss, policy.detach(), value.detach(), entropy.detach(), log_ratio.detach()


def diagnostics(log_ratio, weight, clip_coef):
    """(k1), (k3), (clipfrac), means over minibatches, and the largest |r − 1|; both arguments (minibatches, B)."""
    deviation = log_ratio.expm1()  # r − 1
    means = (-log_ratio, deviation - log_ratio, (deviation.abs() > clip_coef).float())
    return *(masked_mean(x, weight).mean().item() for x in means), (deviation.abs() * weight).max().item()


def explained_variance(values, returns):
    """(ev): 1 − Var(R̂ − V) / Var(R̂) over rows (B,), or "" where Var R̂ is 0."""
    variance = returns.var(unbiased=False)
    return (1 - (returns - values).var(unbiased=False) / variance).item() if variance > 0 else ""


def new_run_dir(args):
    """Makes runs_dir/env__exp__seed__time, with a suffix where that exists, and writes the flags to args.json."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in itertools.chain([""], itertools.count(2)):
        run_dir = Path(args.runs_dir) / (re.sub(r"[^\w.-]+", "-", name) + f"-{suffix}".rstrip("-"))
        try:
            run_dir.mkdir(parents=True)
            (run_dir / "args.json").write_text(json.dumps({"script": SCRIPT, **vars(args)}, indent=2))
            return run_dir
        except FileExistsError:
            continue
        except OSError as error:
            reject("runs_dir", args.runs_dir, f"cannot be written ({error.strerror}); name a directory that can")


def save_checkpoint(run_dir, agent, optimizer, **progress):
    """Replaces checkpoint.pt in one move: at any moment it is the old one or the new one, whole."""
    buffer, temporary = io.BytesIO(), run_dir / "checkpoint.tmp"
    torch.save({"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), **progress}, buffer)
    with open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, run_dir / "checkpoint.pt")


def load_run(flag, args):
    """Flags and checkpoint of the run that --resume or --evaluate names. Raises UsageError where it is none of ours."""
    path = Path(getattr(args, flag))
    if not (path / "args.json").is_file():
        reject(flag, path, "is no run directory" if path.is_dir() else f"does not exist; runs are in {args.runs_dir}/")
    try:
        saved = json.loads((path / "args.json").read_text())
        if (script := saved.pop("script")) == SCRIPT:
            saved, checkpoint = Args(**saved), torch.load(path / "checkpoint.pt", "cpu", weights_only=True)
            for name, size in checkpoint["sizes"].items():
                assert (path / name).stat().st_size >= size, f"{name} is shorter than it was"
    except Exception as error:
        reject(flag, path, f"is damaged ({str(error).strip().splitlines()[0][:80]!r}); name another run")
    if script != SCRIPT:
        reject(flag, path, f"is a run of {script}: use that script")
    return saved, checkpoint


def start_tracking(args, run_dir):
    """A run on Weights & Biases, the same one after --resume. Tracking must not wait, ask or end a run: without
    credentials, or an answer from the server within seconds, it records offline."""
    import wandb

    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(wandb.util.generate_id())
    options = {"project": args.wandb_project_name, "name": run_dir.name, "id": id_file.read_text(), "resume": "allow"}
    options |= {"config": vars(args), "dir": run_dir}
    settings = wandb.Settings(init_timeout=10, finish_timeout=60)
    try:
        mode = "offline" if settings.mode == "online" and not wandb.login(prompt=False) else settings.mode
        tracker = wandb.init(**options, mode=mode, settings=settings)
    except wandb.Error:
        mode, tracker = "offline", wandb.init(**options, mode="offline")
    if mode == "offline":
        print(f"Weights & Biases is offline; later: wandb sync {run_dir}/wandb/offline-run-*")
    tracker.define_metric("*", step_metric="global_step")
    return tracker


class Logger:
    """metrics.csv, a row per iteration; episodes.csv, a row per finished episode; W&B; and the progress shown."""

    def __init__(self, args, run_dir, sizes):
        """sizes: the lengths of the files at the checkpoint to go on from; what is beyond them is made again."""
        self.tracker = start_tracking(args, run_dir) if args.track else None
        self.recent, self.total, self.shown = deque(maxlen=100), args.iterations * args.num_envs * args.num_steps, 0
        self.files = {name: open(run_dir / name, "a", newline="") for name in HEADERS}
        for name, file in self.files.items():
            file.truncate(sizes.get(name, 0))
            if name not in sizes:
                csv.writer(file).writerow(HEADERS[name].split())
        self.bar = tqdm(total=self.total, unit=" steps", disable=not sys.stderr.isatty())

    def log(self, name, *row):
        csv.writer(self.files[name]).writerow(row)
        if self.tracker:
            self.tracker.log({key: value for key, value in zip(HEADERS[name].split(), row) if value != ""})

    def show(self, step, sps):
        score = f"return {np.mean(self.recent):.2f}" if self.recent else "no episode yet"
        self.bar.set_postfix_str(score, refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and (time.monotonic() > self.shown + 5 or step == self.total):
            self.shown = time.monotonic()
            left = f"{(self.total - step) / sps:,.0f} s left"
            print(f"step {step:,} of {self.total:,}, {score}, {sps:,.0f} steps/s, {left}", flush=True)

    def sync(self):
        """Brings the files to the disk; returns their lengths."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self.files.items()}

    def close(self):
        self.bar.close()
        for file in self.files.values():
            file.close()
        if self.tracker:
            self.tracker.finish()


def train(args, checkpoint=None):
    """Trains an agent, or goes on from the checkpoint of the run in args.resume; returns the run directory."""
    args.check()
    if checkpoint and checkpoint["iteration"] == args.iterations:
        print(f"{args.resume} is finished: all its {args.iterations} iterations are done")
        return Path(args.resume)
    device = setup_device(args)
    envs = make_envs(args)
    if args.capture_video:
        check_renderer(args)
    T, N, M, batch_size = args.num_steps, args.num_envs, args.num_minibatches, args.num_steps * args.num_envs
    ten_episodes = math.ceil(10 * (envs.spec.max_episode_steps or 0) / T)
    save_every = max(math.ceil(args.iterations / 20), ten_episodes) if args.save_every is None else args.save_every
    save_every = save_every or args.iterations
    if save_every < min(ten_episodes, args.iterations):
        print(f"warning: --save-every {save_every} cuts many episodes short; {ten_episodes} is enough", file=sys.stderr)
    if args.total_timesteps % batch_size:
        print(f"{args.total_timesteps:,} steps are rounded down to {args.iterations} iterations of {batch_size}")

    torch.manual_seed(args.seed)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.norm_obs).to(device)
    parameters = flat_parameters(agent)
    optimizer = torch.optim.Adam([parameters], args.learning_rate, eps=1e-5, fused=True)
    small = batch_size // M * parameters.numel() < 5e7  # sharing less work between threads costs more than it saves
    torch.set_num_threads(args.threads or (1 if small else torch.get_num_threads()))
    loss_function = ppo_loss
    if args.compile:
        loss_function = torch.compile(ppo_loss, mode="reduce-overhead" if device.type == "cuda" else None)

    if args.resume:
        run_dir, logger = Path(args.resume), Logger(args, Path(args.resume), checkpoint["sizes"])
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    else:
        run_dir = new_run_dir(args)
        logger = Logger(args, run_dir, {})
        checkpoint = {"iteration": 0, "seconds": 0.0, "sizes": logger.sync()}
        save_checkpoint(run_dir, agent, optimizer, **checkpoint)
    print(f"{args.env_id} on {device}, {torch.get_num_threads()} thread(s); the run is kept in {run_dir}", flush=True)

    obs = np.zeros((T + 1, N, envs.single_observation_space.shape[0]), np.float32)
    actions = torch.zeros((T, N), dtype=torch.int64, device=device)
    rewards = np.zeros((T, N), np.float32)
    terminated, done, valid = np.zeros((3, T, N), bool)
    saved, began = checkpoint["iteration"], time.perf_counter() - checkpoint["seconds"]
    try:
        for iteration in range(saved + 1, args.iterations + 1):
            started, first_step = time.perf_counter(), (iteration - 1) * batch_size
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (iteration - 1) / args.iterations)  # (lr)
            if iteration - 1 == saved:  # after every checkpoint the worlds are new, also in a resumed run
                envs.close()
                envs, obs[-1] = start_worlds(args, iteration)
                ended, discounted = np.zeros(N, bool), torch.zeros(N, device=device)
                episodic_return, episodic_length = np.zeros(N), np.zeros(N, int)

            # Act 1, rollout. With NEXT_STEP autoreset the step after an episode's last ignores the action and returns
            # the first observation of the next episode: the policy did not cause it, so that row is not valid.
            finished, noise = [], agent.noise(T, N)
            obs[0] = obs[-1]
            with torch.inference_mode():
                for t in range(T):
                    actions[t] = agent.act(agent.normalize(torch.from_numpy(obs[t]).to(device)), noise[t])
                    obs[t + 1], reward, terminated[t], truncated, _ = envs.step(agent.env_action(actions[t]))
                    valid[t] = ~ended
                    done[t] = ended = terminated[t] | truncated
                    rewards[t] = reward
                    episodic_return += reward
                    episodic_length += valid[t]
                    for n in np.flatnonzero(ended):
                        finished.append((first_step + (t + 1) * N, float(episodic_return[n]), int(episodic_length[n])))
                        episodic_return[n], episodic_length[n] = 0.0, 0

            # Act 2, advantages. What follows an episode's last obs[t] is its true last observation, also where a time
            # limit ended it: V there is what (td) bootstraps from.
            with torch.no_grad():
                x = agent.normalize(torch.from_numpy(obs).to(device))
                old_log_prob, _ = agent.evaluate_actions(x[:-1], actions)
                values = agent.value(x)
                reward, over, end, live = (torch.from_numpy(y).to(device) for y in (rewards, terminated, done, valid))
                if args.norm_reward:
                    reward, discounted = scale_rewards(reward, end, live, agent.return_stats, args.gamma, discounted)
                over, weight = over if args.bootstrap_truncated else end, live.float()
                advantages = compute_gae(reward, values, over, end, args.gamma, args.gae_lambda)
                returns = advantages + values[:-1]  # (return)
                if args.norm_adv and args.norm_adv_over == "batch":
                    advantages = normalize_advantages(advantages.flatten(), weight.flatten()).view_as(advantages)
                batch = (x[:-1], actions, old_log_prob, values[:-1], returns, advantages, weight)
                batch = [y.flatten(0, 1) for y in batch]  # (T, N, …) → (T N, …)

            # Act 3, update: every epoch goes once over all rows, in random minibatches.
            parts, log_ratios, weights = [], [], []
            for _ in range(args.update_epochs):
                order = torch.randperm(batch_size, device=device)
                *rows, advantages, weight = (y[order].unflatten(0, (M, -1)) for y in batch)
                if args.norm_adv and args.norm_adv_over == "minibatch":
                    advantages = normalize_advantages(advantages, weight)
                for minibatch in zip(*rows, advantages, weight):
                    loss, *losses, log_ratio = loss_function(agent, args, *minibatch)
                    parameters.grad.zero_()
                    loss.backward()
                    grad_norm = parameters.grad.norm()
                    parameters.grad *= (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
                    optimizer.step()
                    parts.append(torch.stack((*losses, grad_norm)))
                    log_ratios.append(log_ratio.clone())
                weights.append(weight)
                if args.target_kl is not None:
                    _, kl, _, _ = diagnostics(torch.stack(log_ratios[-M:]), weight, args.clip_coef)
                    if kl > args.target_kl:
                        break
            if args.norm_obs:  # not before: the update must see what the policy saw
                agent.obs_stats.update(torch.from_numpy(obs[:-1][valid]).to(device))

            policy, value, entropy, grad_norm = torch.stack(parts).mean(0).tolist()
            if not all(map(math.isfinite, (policy, value, entropy, grad_norm))):
                kept = f"{run_dir} keeps the checkpoint of iteration {saved}"
                raise FloatingPointError(f"iteration {iteration}: a loss is not finite; {kept}")
            ratios = diagnostics(torch.stack(log_ratios), torch.cat(weights), args.clip_coef)
            score, length = ("", "") if not finished else np.mean(finished, 0)[1:].tolist()
            row = [iteration, iteration * batch_size, len(finished), score, length, policy, value, entropy, *ratios]
            row += [explained_variance(values[:-1][live], returns[live]), grad_norm, optimizer.param_groups[0]["lr"]]
            seconds, sps = time.perf_counter() - began, batch_size / (time.perf_counter() - started)
            for episode in finished:
                logger.log("episodes.csv", *episode)
                logger.recent.append(episode[1])
            logger.log("metrics.csv", *row, round(sps), round(seconds, 3))
            logger.show(iteration * batch_size, sps)
            if iteration % save_every == 0 or iteration == args.iterations:
                sizes = logger.sync()  # the rows reach the disk before the checkpoint that covers them
                save_checkpoint(run_dir, agent, optimizer, iteration=iteration, seconds=seconds, sizes=sizes)
                saved = iteration
                if args.capture_video:
                    videos = run_dir / "videos" / f"iteration-{iteration}"
                    evaluate(replace(args, num_envs=1, eval_episodes=1), agent.state_dict(), videos)
    except (KeyboardInterrupt, SystemExit):
        step = saved * batch_size
        print(f"\nstopped; `python {SCRIPT} --resume {run_dir}` continues from step {step:,}", file=sys.stderr)
        raise
    finally:
        with contextlib.suppress(Exception):  # workers that were interrupted may be gone already
            envs.close()
        logger.close()
    return run_dir


@torch.inference_mode()
def evaluate(args, state, video_dir=None):
    """Plays the agent of the state_dict `state`, its statistics frozen; prints and returns its returns.

    They have the shape (num_envs, eval_episodes): as many of each environment, since the first to finish among all
    would be the short ones.
    """
    args.check()
    device = setup_device(args)
    envs, obs = start_worlds(args, 0, video_dir)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.norm_obs).to(device)
    agent.load_state_dict(state)
    returns, current = [[] for _ in range(args.num_envs)], np.zeros(args.num_envs)
    while min(map(len, returns)) < args.eval_episodes:
        noise = agent.noise(args.num_envs) * (not args.greedy)
        x = agent.normalize(torch.as_tensor(obs, dtype=torch.float32, device=device))
        obs, reward, terminated, truncated, _ = envs.step(agent.env_action(agent.act(x, noise)))
        current += reward
        for n in np.flatnonzero(terminated | truncated):
            returns[n].append(current[n])
            current[n] = 0.0  # the next step only resets, with reward 0
    envs.close()
    returns = np.array([several[: args.eval_episodes] for several in returns])
    print(f"mean return {returns.mean():.2f}, standard deviation {returns.std():.2f}, {returns.size} episodes:")
    print(*(f"{value:.2f}" for value in returns.flatten()))
    return returns


def main():
    """The command line. Exit status: 0 done, 1 a run failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    args = tyro.cli(Args, description=__doc__)
    try:
        checkpoint, flag = None, "evaluate" if args.evaluate else "resume"
        if getattr(args, flag):  # the run's own flags take the place of the defaults, and few may differ
            saved, checkpoint = load_run(flag, args)
            args = tyro.cli(Args, description=__doc__, default=saved)
            for name, value in vars(saved).items():
                if getattr(args, name) != value and name not in MAY_DIFFER[flag]:
                    reject(name, getattr(args, name), f"contradicts the run of --{flag}, which has {value}")
        if args.evaluate:
            if args.capture_video:
                check_renderer(args)
            videos = Path(args.evaluate) / "videos" / f"evaluation-{time.time_ns()}" if args.capture_video else None
            evaluate(args, checkpoint["agent"], videos)
        else:
            train(args, checkpoint)
    except UsageError as error:
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        sys.exit(2)
    except (FloatingPointError, OSError) as error:
        print(f"{SCRIPT}: stopped: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
