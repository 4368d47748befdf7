"""Proximal Policy Optimization (PPO) for discrete actions and vector observations, in one file.

    python ppo.py                                                  # CartPole-v1: 500,000 steps, half a minute
    python ppo.py --env-id Acrobot-v1 --seed 2 --num-envs 8        # any flag of Args; --help lists them
    python ppo.py --resume runs/DIR                                # go on with a run that was stopped
    python ppo.py --evaluate runs/DIR --greedy --capture-video     # play a trained agent and film it

Map: Args, the flags · make_envs · RunningStats and Agent, the networks · compute_gae, policy_loss, value_loss and the
rest of the mathematics, labelled like (gae) as in the README · evaluate · the run directory: checkpoints and logs ·
train, the algorithm: rollout, advantages, update · main, the command line.
ppo_continuous.py differs in its Gaussian policy, in estimating the advantages anew for every epoch, and in defaults.
"""

import contextlib
import csv
import difflib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import time
import uuid
import warnings
from collections import deque
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm

SCRIPT = "ppo.py"
CPU_THREADS = torch.get_num_threads()
STOP_SIGNALS = []  # those that have come in
LIMITS = {  # (lowest value, highest value): flags
    (1, 10**12): ["total_timesteps", "num_steps", "num_minibatches", "update_epochs", "eval_episodes"],
    (1, 10**5): ["num_envs"],
    (0, 10**3): ["threads"],
    (0, 10**12): ["learning_rate", "ent_coef", "vf_coef", "save_every"],
    (1e-12, math.inf): ["clip_coef", "max_grad_norm"],
    (1e-12, 10**12): ["target_kl"],
    (0, 1): ["gamma", "gae_lambda"],
    (0, 2**32 - 1): ["seed"],
}
MAY_DIFFER = {  # flags that may be given along with --resume or --evaluate
    "resume": "resume runs_dir device threads capture_video track wandb_project_name".split(),
    "evaluate": "evaluate runs_dir device threads capture_video eval_episodes greedy num_envs seed".split(),
}
HEADERS = {  # columns
    "metrics.csv": "iteration global_step episodes episodic_return episodic_length policy_loss value_loss entropy "
    "old_approx_kl approx_kl clipfrac max_ratio_dev explained_variance grad_norm learning_rate sps seconds",
    "episodes.csv": "global_step episodic_return episodic_length",
}


class UsageError(ValueError):
    """What was asked for cannot work; the message names the flag, its value and what would work."""


def reject(flag, value, advice):
    raise UsageError(f"--{flag.replace('_', '-')} {value}: {advice}")


def first_line(error):
    return (str(error).strip() or repr(error)).splitlines()[0][:200]


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
    bootstrap_truncated: bool = True  # at a time limit use V of the last observation; off: as if terminated, (td)
    num_minibatches: int = 4  # per epoch; must divide num_envs * num_steps
    update_epochs: int = 4  # passes over each rollout
    norm_adv: bool = True  # normalise advantages, (norm)
    norm_adv_over: Literal["minibatch", "batch"] = "minibatch"  # the rows normalised together, (norm)
    clip_coef: float = 0.2  # epsilon: moving the ratio beyond 1 ± this gains nothing; inf: no clip, (clip)
    clip_vloss: bool = True  # clip the value loss with the same epsilon, (vf-clip)
    ent_coef: float = 0.01  # weight of the entropy bonus, c_e in (total)
    vf_coef: float = 0.5  # weight of the value loss, c_v in (total)
    max_grad_norm: float = 0.5  # scale the whole gradient down if its norm is larger; inf: never
    target_kl: float | None = None  # stop an update after the first epoch whose mean (k3) exceeds this; None: never
    norm_obs: bool = False  # normalise observations by running mean and variance, (obs-norm)
    norm_reward: bool = False  # divide rewards by the running deviation of the return, (rew-norm)

    device: str = "auto"  # cpu, cuda or cuda:N; auto: cuda where there is one
    threads: int = 0  # CPU threads of torch; 0: chosen by the size of a minibatch
    compile: bool = False  # torch.compile: slow to start, then often faster (CUDA graphs on CUDA)
    runs_dir: str = "runs"  # where run directories are made
    save_every: int | None = None  # iterations between checkpoints, 0: only at the end; default: 20 or fewer per run
    resume: str | None = None  # go on with the run in this directory, with its own flags
    evaluate: str | None = None  # play the agent of this run directory instead of training
    eval_episodes: int = 10  # how many --evaluate plays in each environment
    greedy: bool = False  # --evaluate: the most probable action instead of a sampled one
    capture_video: bool = False  # film --evaluate, by default of one environment; in training one episode a checkpoint
    track: bool = False  # log to Weights & Biases; offline where it cannot be reached
    wandb_project_name: str = "ppo"  # project on Weights & Biases

    def check(self):
        """Raises UsageError for flags that no environment can work with."""
        for (low, high), names in LIMITS.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not low <= value <= high:  # also rejects nan
                    reject(name, value, f"must be in [{low}, {high}]")
        for name in ("resume", "evaluate"):
            if getattr(self, name) == "":
                reject(name, '""', "must name a run directory")
        if len(self.exp_name) > 100:
            reject("exp_name", self.exp_name, "must have at most 100 characters")


def exit_if_stopped():
    """Ends the program between two steps or epochs, where all of its processes can be ended cleanly."""
    if STOP_SIGNALS:
        sys.exit(128 + STOP_SIGNALS[0])


def make_envs(args, video_dir=None):
    """A gymnasium VectorEnv of args.num_envs environments with flat observations, filmed into video_dir.

    Raises UsageError for environments that do not exist or that this script cannot train on.
    """
    options = {"vectorization_mode": None if args.vectorization_mode == "auto" else args.vectorization_mode}
    if video_dir:
        folders = (f"{video_dir}/env-{i}" for i in itertools.count())  # each environment films into its own
        film = lambda env: gym.wrappers.RecordVideo(env, next(folders), lambda episode: episode < args.eval_episodes)
        options = {"vectorization_mode": "sync", "render_mode": "rgb_array", "wrappers": [film]}
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # the error says it too
            envs = gym.make_vec(args.env_id, args.num_envs, **options)
    except Exception as error:
        if args.env_id.startswith("ALE/"):
            reject("env_id", args.env_id, "is an Atari game: use ppo_atari.py")
        advice = first_line(error)
        if isinstance(error, gym.error.UnregisteredEnv):
            names = {name.lower(): name for name in gym.registry}
            nearest = difflib.get_close_matches(args.env_id.split(":")[-1].lower(), names, 1, 0)
            advice += f" The nearest is {names[nearest[0]]}."
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
        reject("env_id", args.env_id, "observes images; only ppo_atari.py trains on those, of Atari games")
    if not observations.is_np_flattenable:
        reject("env_id", args.env_id, f"observes {observations}: one that gymnasium can flatten is needed")
    if autoreset != gym.vector.AutoresetMode.NEXT_STEP:
        reject("env_id", args.env_id, f"has autoreset_mode {autoreset}: AutoresetMode.NEXT_STEP is needed")
    flat = isinstance(observations, gym.spaces.Box) and len(observations.shape) == 1
    return envs if flat else gym.wrappers.vector.FlattenObservation(envs)


def check_renderer(args):
    """Raises UsageError where no picture of the environment can be made here."""
    try:
        import moviepy  # noqa: F401, RecordVideo asks for it only after an episode

        with warnings.catch_warnings(action="ignore"):  # the error says it too
            env = gym.make(args.env_id, render_mode="rgb_array")
            env.reset()
            env.render()
            env.close()
    except Exception as error:
        advice = f"{first_line(error)} (MuJoCo needs a display, or MUJOCO_GL=egl or osmesa)"
        reject("capture_video", True, f"{args.env_id} cannot be filmed here: {advice}")


def new_worlds(args, iteration, video_dir=None):
    """Environments built anew and their first observations. They and all random numbers from here on are a function of
    (seed, iteration), so that a resumed run sees what the uninterrupted one sees. Environment i gets the seed + i; a
    simulator that plays all of them at once, as CartPole's, gets the seed."""
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


def check_compiler(args, device):
    """Raises UsageError for --compile where there is nothing to compile with."""
    try:
        if args.compile:
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:
        reject("compile", True, f"cannot work here: {first_line(error)}")


class RunningStats(nn.Module):
    """Mean and variance of all rows seen so far, kept in buffers so that they are saved with the agent."""

    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))  # at first nearly no rows

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


def mlp(inputs, outputs, output_gain):
    """Two hidden layers of 64 tanh units; orthogonal weights, scaled by sqrt(2) and output_gain, and zero biases."""
    sizes = [(inputs, 64, math.sqrt(2)), (64, 64, math.sqrt(2)), (64, outputs, output_gain)]
    layers = []
    for size_in, size_out, gain in sizes:
        linear = nn.Linear(size_in, size_out)
        nn.init.orthogonal_(linear.weight, gain)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Agent(nn.Module):
    """The policy (actor) and the value function (critic), two separate networks.

    B stands for any leading dimensions, D for the size of an observation, A for the number of actions. `normalize`
    takes observations; everything else takes what it returns.
    """

    def __init__(self, observation_space, action_space, args):
        super().__init__()
        self.norm_obs = args.norm_obs
        self.num_actions = int(action_space.n)
        self.register_buffer("first_action", torch.tensor(int(action_space.start)))
        self.obs_stats = RunningStats(observation_space.shape[0])
        self.return_stats = RunningStats()
        self.actor = mlp(observation_space.shape[0], self.num_actions, 0.01)  # at first all are about as probable
        self.critic = mlp(observation_space.shape[0], 1, 1.0)

    def normalize(self, obs):
        """(obs-norm): observations (B, D) → what the networks are fed (B, D)."""
        if not self.norm_obs:
            return obs
        mean, std = self.obs_stats.mean.float(), (self.obs_stats.var + 1e-8).sqrt().float()
        return ((obs - mean) / std).clamp(-10, 10)

    def noise(self, *shape):
        """Gumbel noise (*shape, A): argmax(logits + noise) is a with probability softmax(logits)_a."""
        return -torch.empty(*shape, self.num_actions, device=self.first_action.device).exponential_().log()

    def act(self, x, noise):
        """x (B, D) → sampled actions (B,), by the Gumbel-max trick; noise 0 gives the most probable ones."""
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
    """Copies all parameters into one vector, which the weights and gradients of the layers become views of.

    The result of training is the same, but gradient clipping and Adam take one operation each instead of one a layer;
    their number is what a small network's update spends its time on.
    """
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
    advantages, next_advantage = [], torch.zeros_like(deltas[0])
    for delta, decay in zip(deltas.flip(0), decays.flip(0)):  # from the last step to the first
        next_advantage = delta + decay * next_advantage
        advantages.append(next_advantage)
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
    discounted_returns = []
    for reward, end in zip(rewards, done):
        discounted_returns.append(carry + reward)
        carry = gamma * ~end * discounted_returns[-1]
    stats.update(torch.stack(discounted_returns)[valid])
    return (rewards / (stats.var + 1e-8).sqrt().float()).clamp(-10, 10), carry


def ppo_loss(agent, args, x, action, old_log_prob, old_values, returns, advantages, weight):
    """(total): −L_CLIP + c_v L_VF − c_e H over a minibatch of B rows, then its three parts and the log-ratios (B,)."""
    log_prob, entropy = agent.evaluate_actions(x, action)
    log_ratio = log_prob - old_log_prob  # (ratio)
    policy = policy_loss(log_ratio, advantages, args.clip_coef, weight)
    value = value_loss(agent.value(x), old_values, returns, args.clip_coef if args.clip_vloss else None, weight)
    mean_entropy = masked_mean(entropy, weight)
    loss = policy + args.vf_coef * value - args.ent_coef * mean_entropy
    return loss, policy.detach(), value.detach(), mean_entropy.detach(), log_ratio.detach()


def diagnostics(log_ratio, weight, clip_coef):
    """(k1), (k3), (clipfrac), means over minibatches, and the largest |r − 1|; both arguments (minibatches, B)."""
    deviation = log_ratio.expm1()  # r − 1
    means = (-log_ratio, deviation - log_ratio, (deviation.abs() > clip_coef).float())
    return *(masked_mean(x, weight).mean().item() for x in means), (deviation.abs() * weight).max().item()


def explained_variance(values, returns):
    """(ev): 1 − Var(R̂ − V) / Var(R̂) over rows (B,), or "" where Var R̂ is 0."""
    variance = returns.var(unbiased=False)
    return (1 - (returns - values).var(unbiased=False) / variance).item() if variance > 0 else ""


@torch.inference_mode()
def evaluate(args, state, video_dir=None):
    """Plays the agent of the state_dict `state`, its statistics frozen; prints and returns its returns.

    They have the shape (num_envs, eval_episodes): as many of each environment, since the first to finish among all
    would be the short ones.
    """
    args.check()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = setup_device(args)
    if video_dir:
        check_renderer(args)
    envs, obs = new_worlds(args, 0, video_dir)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    load_agent(agent, state, args)
    scores, running = [[] for _ in range(args.num_envs)], np.zeros(args.num_envs)
    while min(map(len, scores)) < args.eval_episodes:
        exit_if_stopped()
        noise = agent.noise(args.num_envs) * (not args.greedy)
        x = agent.normalize(torch.as_tensor(obs, dtype=torch.float32, device=device))
        obs, reward, terminated, truncated, _ = envs.step(agent.env_action(agent.act(x, noise)))
        running += reward
        for n in np.flatnonzero(terminated | truncated):
            scores[n].append(running[n])
            running[n] = 0.0  # the next step only resets, with reward 0
    envs.close()
    scores = np.array([finished[: args.eval_episodes] for finished in scores])
    print(f"mean return {scores.mean():.2f}, standard deviation {scores.std():.2f}, {scores.size} episodes:")
    print(*(f"{score:.2f}" for score in scores.flatten()))
    return scores


def new_run_dir(args):
    """Makes runs_dir/env__exp__seed__time, with a suffix where that exists, and writes the flags to args.json."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    name = re.sub(r"[^\w.-]+", "-", name)
    try:
        Path(args.runs_dir).mkdir(parents=True, exist_ok=True)
        for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2))):
            run_dir = Path(args.runs_dir) / (name + suffix)
            with contextlib.suppress(FileExistsError):
                run_dir.mkdir()
                (run_dir / "args.json").write_text(json.dumps({"script": SCRIPT, **vars(args)}, indent=2))
                return run_dir
    except OSError as error:
        reject("runs_dir", args.runs_dir, f"cannot be written ({error.strerror}); name a directory that can")


def load_agent(agent, state, args):
    """Gives the agent the parameters and statistics of a checkpoint. Raises UsageError where they do not fit."""
    try:
        agent.load_state_dict(state)
    except RuntimeError:
        flag = "resume" if args.resume else "evaluate"
        reject(flag, getattr(args, flag), f"was trained on other spaces than {args.env_id} has now")


def save_checkpoint(run_dir, agent, optimizer, **progress):
    """Replaces checkpoint.pt in one move: at any moment it is the old one or the new one, whole."""
    buffer, temporary = io.BytesIO(), run_dir / "checkpoint.tmp"  # from memory, so that a full disk is an OSError
    torch.save({"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), **progress}, buffer)
    with open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, run_dir / "checkpoint.pt")


def fits(value, kind):
    """Whether a value from args.json is one that a flag of this type can have; where a float can be, an int can."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))


def load_run(flag, args, compare=True):
    """Flags and checkpoint of the run that --resume or --evaluate names. Raises UsageError where it is none of ours,
    and, with `compare`, for a flag of args that contradicts the run's."""
    path = Path(getattr(args, flag))
    if not (path / "args.json").is_file():
        reject(flag, path, "is no run directory" if path.is_dir() else f"does not exist; runs are in {args.runs_dir}/")
    try:
        saved = json.loads((path / "args.json").read_text())
        if (script := saved.pop("script")) == SCRIPT:
            saved, checkpoint = Args(**saved), torch.load(path / "checkpoint.pt", "cpu", weights_only=True)
            for field in fields(saved):
                assert fits(getattr(saved, field.name), field.type), f"{field.name} is {getattr(saved, field.name)!r}"
            assert checkpoint.keys() >= {"agent", "optimizer", "iteration", "seconds"}, "a part is missing"
            for name, size in checkpoint["sizes"].items():
                assert (path / name).stat().st_size >= size, f"{name} is shorter than it was"
    except Exception as error:
        reject(flag, path, f"args.json or checkpoint.pt is damaged ({first_line(error)}); name another run")
    if script != SCRIPT:
        reject(flag, path, f"is a run of {script}: use that script")
    for name, value in vars(saved).items():
        if compare and getattr(args, name) != value and name not in MAY_DIFFER[flag]:
            reject(name, getattr(args, name), f"contradicts the run of --{flag}, which has {value}")
    return saved, checkpoint


def start_tracking(args, run_dir):
    """A run on Weights & Biases, the same one after --resume. Tracking must not wait, ask or end a run: without
    credentials, or an answer from the server within seconds, it records offline."""
    import wandb

    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex)
    options = {"project": args.wandb_project_name, "name": run_dir.name, "id": id_file.read_text(), "resume": "allow"}
    options |= {"config": vars(args), "dir": run_dir, "settings": wandb.Settings(init_timeout=10, finish_timeout=60)}
    mode = wandb.setup().settings.mode
    try:
        mode = "offline" if mode == "online" and not wandb.login(prompt=False) else mode
        tracker = wandb.init(**options, mode=mode)
    except Exception:
        mode, tracker = "offline", wandb.init(**options, mode="offline")
    if mode == "offline":
        print(f"Weights & Biases is offline; later: wandb sync {run_dir}/wandb/offline-run-*")
    tracker.define_metric("*", step_metric="global_step")
    return tracker


class Logger:
    """metrics.csv, a row per iteration; episodes.csv, a row per finished episode; W&B; and the progress shown."""

    def __init__(self, args, run_dir, total_steps, sizes):
        """sizes: the lengths of the files at the checkpoint to go on from; what is beyond them is made again."""
        self.recent_returns, self.total, self.shown = deque(maxlen=100), total_steps, 0
        self.files = {name: open(run_dir / name, "a", newline="") for name in HEADERS}
        try:
            os.lockf(self.files["metrics.csv"].fileno(), os.F_TLOCK, 0)  # held while this process lives
        except BlockingIOError:
            reject("resume", run_dir, "is being trained by another process; stop that first")
        except (AttributeError, OSError):  # Windows and some file systems have no locks
            pass
        self.tracker = None
        if args.track:
            try:
                self.tracker = start_tracking(args, run_dir)
            except Exception as error:
                print(f"{SCRIPT}: not tracked: {first_line(error)}", file=sys.stderr)
        for name, file in self.files.items():
            file.truncate(sizes.get(name, 0))
            if name not in sizes:
                csv.writer(file).writerow(HEADERS[name].split())
        with open(run_dir / "episodes.csv", newline="") as file:
            self.recent_returns.extend(float(row["episodic_return"]) for row in csv.DictReader(file))
        self.bar = tqdm(total=self.total, unit=" steps", disable=not sys.stderr.isatty())

    def log(self, name, *row):
        csv.writer(self.files[name]).writerow(row)
        if self.tracker:
            pairs = zip(HEADERS[name].split(), row)
            self.tracker.log({k if k == "global_step" else f"{name[:-4]}/{k}": v for k, v in pairs if v != ""})

    def show(self, step, sps):
        score = f"return {np.mean(self.recent_returns):.2f}" if self.recent_returns else "no episode yet"
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
        return {name: os.fstat(file.fileno()).st_size for name, file in self.files.items()}

    def close(self):
        self.bar.close()
        for file in self.files.values():
            file.close()
        if self.tracker:
            self.tracker.finish()


def train(args):
    """Trains an agent, or goes on with the run in args.resume; returns the run directory."""
    args.check()
    T, N, M, batch_size = args.num_steps, args.num_envs, args.num_minibatches, args.num_steps * args.num_envs
    iterations = args.total_timesteps // batch_size
    if batch_size % M:
        reject("num_minibatches", M, f"must divide num_envs * num_steps = {batch_size}")
    if iterations == 0:
        reject("total_timesteps", args.total_timesteps, f"must be at least one rollout, {batch_size}")
    checkpoint = load_run("resume", args)[1] if args.resume else None
    if checkpoint and checkpoint["iteration"] >= iterations:
        print(f"{args.resume} is finished: all its {iterations} iterations are done")
        return Path(args.resume)
    device = setup_device(args)
    check_compiler(args, device)
    envs = make_envs(args)
    if args.capture_video:
        check_renderer(args)
    if args.total_timesteps % batch_size:
        print(f"{args.total_timesteps:,} steps are rounded down to {iterations} iterations of {batch_size}")
    ten_episodes = math.ceil(10 * (envs.spec.max_episode_steps or 0) / T)  # in iterations
    save_every = max(math.ceil(iterations / 20), ten_episodes) if args.save_every is None else args.save_every
    save_every = save_every or iterations
    if save_every < min(ten_episodes, iterations):
        print(f"warning: --save-every {save_every} cuts many episodes short; {ten_episodes} is enough", file=sys.stderr)

    torch.set_num_threads(args.threads or CPU_THREADS)  # the last bits of the first weights depend on it
    torch.manual_seed(args.seed)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    parameters = flat_parameters(agent)
    optimizer = torch.optim.Adam([parameters], args.learning_rate, eps=1e-5, fused=True)
    little_work = batch_size // M * parameters.numel() < 5e7  # more threads then cost more than they save (measured)
    torch.set_num_threads(args.threads or (1 if little_work else CPU_THREADS))
    loss_function = ppo_loss
    if args.compile:
        loss_function = torch.compile(ppo_loss, mode="reduce-overhead" if device.type == "cuda" else None)

    obs = np.zeros((T + 1, N, *envs.single_observation_space.shape), np.float32)  # the last starts the next rollout
    actions = torch.zeros((T, N), dtype=torch.int64, device=device)
    rewards = np.zeros((T, N), np.float32)
    terminated, done, valid = np.zeros((3, T, N), bool)

    if args.resume:
        run_dir = Path(args.resume)
        load_agent(agent, checkpoint["agent"], args)
        optimizer.load_state_dict(checkpoint["optimizer"])
        logger = Logger(args, run_dir, iterations * batch_size, checkpoint["sizes"])
    else:
        run_dir = new_run_dir(args)
        logger = Logger(args, run_dir, iterations * batch_size, {})
        checkpoint = {"iteration": 0, "seconds": 0.0, "sizes": logger.sync()}
        save_checkpoint(run_dir, agent, optimizer, **checkpoint)
    print(f"{args.env_id} on {device}, {torch.get_num_threads()} thread(s); the run is kept in {run_dir}", flush=True)

    saved, began = checkpoint["iteration"], time.perf_counter() - checkpoint["seconds"]
    try:
        for iteration in range(saved + 1, iterations + 1):
            started, first_step = time.perf_counter(), (iteration - 1) * batch_size
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (iteration - 1) / iterations)  # (lr)
            if iteration - 1 == saved:
                # At the start and after every checkpoint the environments are built anew, here and in a resumed run
                # alike: no state of a simulator needs saving. It cuts the running episodes short, as a time limit does.
                envs.close()
                envs, obs[-1] = new_worlds(args, iteration)
                previous_done, return_carry = np.zeros(N, bool), torch.zeros(N, device=device)
                episodic_return, episodic_length = np.zeros(N), np.zeros(N, int)

            # Act 1, rollout. With NEXT_STEP autoreset the step after an episode's last ignores the action and returns
            # the first observation of the next episode: the policy did not cause it, so that row is not valid.
            finished, noise = [], agent.noise(T, N)
            obs[0] = obs[-1]
            with torch.inference_mode():
                for t in range(T):
                    exit_if_stopped()
                    actions[t] = agent.act(agent.normalize(torch.from_numpy(obs[t]).to(device)), noise[t])
                    obs[t + 1], reward, terminated[t], truncated, _ = envs.step(agent.env_action(actions[t]))
                    rewards[t] = reward
                    valid[t] = ~previous_done
                    done[t] = previous_done = terminated[t] | truncated
                    episodic_return += reward
                    episodic_length += valid[t]
                    for n in np.flatnonzero(done[t]):
                        finished.append((first_step + (t + 1) * N, float(episodic_return[n]), int(episodic_length[n])))
                        episodic_return[n], episodic_length[n] = 0.0, 0

            # Act 2, advantages. What follows an episode's last obs[t] is its true last observation, also where a time
            # limit ended it: V there is what (td) bootstraps from.
            with torch.no_grad():
                x = agent.normalize(torch.from_numpy(obs).to(device))
                old_log_prob, _ = agent.evaluate_actions(x[:-1], actions)
                values = agent.value(x)
                arrays = (rewards, terminated, done, valid)
                reward, is_terminated, is_done, is_valid = (torch.from_numpy(array).to(device) for array in arrays)
                if args.norm_reward:
                    stats = agent.return_stats
                    reward, return_carry = scale_rewards(reward, is_done, is_valid, stats, args.gamma, return_carry)
                no_bootstrap = is_terminated if args.bootstrap_truncated else is_done
                advantages = compute_gae(reward, values, no_bootstrap, is_done, args.gamma, args.gae_lambda)
                returns = advantages + values[:-1]  # (return)
                weight = is_valid.float()
                if args.norm_adv and args.norm_adv_over == "batch":
                    advantages = normalize_advantages(advantages.flatten(), weight.flatten()).view_as(weight)
                batch = (x[:-1], actions, old_log_prob, values[:-1], returns, advantages, weight)
                batch = [tensor.flatten(0, 1) for tensor in batch]  # (T, N, …) → (T N, …)

            # Act 3, update. Every epoch shuffles all rows and goes once over them, in M minibatches.
            losses, log_ratios, weights = [], [], []
            for _ in range(args.update_epochs):
                exit_if_stopped()
                order = torch.randperm(batch_size, device=device)
                *rows, adv, w = (tensor.index_select(0, order).unflatten(0, (M, -1)) for tensor in batch)  # (M, B, …)
                if args.norm_adv and args.norm_adv_over == "minibatch":
                    adv = normalize_advantages(adv, w)  # of each of the M minibatches by itself
                for minibatch in zip(*rows, adv, w):
                    loss, *parts, log_ratio = loss_function(agent, args, *minibatch)
                    parameters.grad.zero_()
                    loss.backward()
                    grad_norm = parameters.grad.norm()
                    parameters.grad *= (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
                    optimizer.step()
                    losses.append(torch.stack((*parts, grad_norm)))
                    log_ratios.append(log_ratio.clone())  # CUDA graphs overwrite it
                weights.append(w)
                if args.target_kl is not None:
                    _, kl, _, _ = diagnostics(torch.stack(log_ratios[-M:]), w, args.clip_coef)
                    if kl > args.target_kl:
                        break
            if args.norm_obs:  # not before: the update must see what the policy saw
                agent.obs_stats.update(torch.from_numpy(obs[:-1][valid]).to(device))

            means = torch.stack(losses).mean(0).tolist()
            # Also of the statistics, which the agent keeps: what is not finite there would stay.
            kept_values = (parameters.detach().sum(), agent.obs_stats.var.sum(), agent.return_stats.var.sum())
            if not all(map(math.isfinite, (*means, *kept_values))):
                kept = f"{run_dir} keeps the checkpoint of iteration {saved}"
                raise FloatingPointError(f"iteration {iteration}: a loss or a weight is not finite; {kept}")
            kl_and_clipping = diagnostics(torch.stack(log_ratios), torch.cat(weights), args.clip_coef)
            variance = explained_variance(values[:-1][is_valid], returns[is_valid])
            score, length = np.mean(finished, 0)[1:].tolist() if finished else ("", "")
            seconds, sps = time.perf_counter() - began, batch_size / (time.perf_counter() - started)
            row = [iteration, iteration * batch_size, len(finished), score, length, *means[:3], *kl_and_clipping]
            row += [variance, means[3], optimizer.param_groups[0]["lr"], round(sps), round(seconds, 3)]
            for episode in finished:
                logger.log("episodes.csv", *episode)
                logger.recent_returns.append(episode[1])
            logger.log("metrics.csv", *row)
            logger.show(iteration * batch_size, sps)
            if iteration % save_every == 0 or iteration == iterations:
                sizes = logger.sync()  # the rows reach the disk before the checkpoint that covers them
                save_checkpoint(run_dir, agent, optimizer, iteration=iteration, seconds=seconds, sizes=sizes)
                saved = iteration
                if args.capture_video:
                    videos = run_dir / "videos" / f"iteration-{iteration}"
                    evaluate(replace(args, num_envs=1, eval_episodes=1), agent.state_dict(), videos)
    except (KeyboardInterrupt, SystemExit, OSError, MemoryError, EOFError) as error:
        if isinstance(error, EOFError | ConnectionError):  # a worker is gone, and close would wait for it
            envs.unwrapped.closed = True
        command = f"python {SCRIPT} --resume {shlex.quote(str(run_dir))}"
        print(f"\nstopped; `{command}` continues from step {saved * batch_size:,}", file=sys.stderr)
        raise
    finally:
        with contextlib.suppress(Exception):  # workers that were interrupted may be gone already
            envs.close()
        logger.close()
    return run_dir


def main():
    """The command line. Exit status: 0 done, 1 a run failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the second one does not wait for the step at hand
        # Forked workers inherit this, so that Ctrl-C in a terminal leaves them for envs.close().
        signal.signal(number, lambda number, _: sys.exit(128 + number) if STOP_SIGNALS else STOP_SIGNALS.append(number))
    args = tyro.cli(Args, description=__doc__)
    try:
        if args.resume and args.evaluate:
            reject("evaluate", args.evaluate, "cannot go with --resume; resume first, then evaluate")
        if args.resume or args.evaluate:  # the run's own flags take the place of the defaults
            saved, _ = load_run("resume" if args.resume else "evaluate", args, compare=False)
            if args.evaluate:  # films are asked for anew, and of one environment unless told otherwise
                saved.capture_video, saved.num_envs = False, 1 if args.capture_video else saved.num_envs
            args = tyro.cli(Args, description=__doc__, default=saved)
        if args.evaluate:
            _, checkpoint = load_run("evaluate", args)
            videos = Path(args.evaluate) / "videos" / f"evaluation-{time.time_ns()}" if args.capture_video else None
            evaluate(args, checkpoint["agent"], videos)
        else:
            train(args)
    except UsageError as error:
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        sys.exit(2)
    except (FloatingPointError, MemoryError, torch.OutOfMemoryError, OSError, EOFError) as error:
        why = "a worker of the environments is gone" if isinstance(error, EOFError | ConnectionError) else error
        print(f"{SCRIPT}: stopped: {why}", file=sys.stderr)
        sys.exit(1)
    finally:
        for worker in multiprocessing.active_children():  # of environments that were not closed
            worker.kill()
            worker.join()


if __name__ == "__main__":
    main()

# What `uv run` installs for this file alone:
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "gymnasium[box2d,classic-control,toy-text]==1.4.0",
#   "numpy==2.4.6",
#   "torch==2.13.0",
#   "tyro==1.0.17",
#   "tqdm==4.70.1",
#   "wandb==0.31.0",
#   "moviepy==2.2.1",
# ]
# ///
