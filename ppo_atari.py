"""Proximal Policy Optimization (PPO) for Atari games from pixels, in one file.

    python ppo_atari.py                                                 # Breakout: 10,000,000 steps
    python ppo_atari.py --env-id Pong --total-timesteps 3000000         # any flag of Args; --help lists them
    python ppo_atari.py --resume runs/DIR                               # go on with a run that was stopped
    python ppo_atari.py --evaluate runs/DIR --greedy --capture-video    # play a trained agent and film it

On several GPUs, or several machines, flags are per process (so the batch grows with their number, and --learning-rate
is yours to scale), but for --total-timesteps, which counts the steps of all:
    torchrun --nproc-per-node 8 ppo_atari.py
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 ppo_atari.py    # on each
Every process plays games of its own and normalises advantages over its own rows; gradients are averaged. Process 0
writes the run directory; --resume needs as many, who must all see it. A signal ends all after the iteration at hand,
for which torchrun gives them 30 s.

Map: Args, the flags · AtariGames, make_envs · Agent, the network · compute_gae, policy_loss, value_loss and the rest of
the mathematics, labelled like (gae) as in the README · evaluate · the run directory: checkpoints and logs · train, the
algorithm: rollout, advantages, update · main, the command line.
ppo.py differs in its networks, in normalising observations and rewards, and in running as one process only.
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

# For OpenMP, read when torch is imported: how long its idle threads spin before they leave the cores to the games.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import ale_py
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter
from tqdm import tqdm

SCRIPT = "ppo_atari.py"
CPU_THREADS = torch.get_num_threads()
STOP_SIGNALS = []  # those that have come in
ALONE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
TORCHRUN = os.environ if dist.is_torchelastic_launched() else ALONE
RANK, WORLD_SIZE = int(TORCHRUN["RANK"]), int(TORCHRUN["WORLD_SIZE"])  # this process's number, and of how many
LOCAL_RANK, LOCAL_WORLD_SIZE = int(TORCHRUN["LOCAL_RANK"]), int(TORCHRUN["LOCAL_WORLD_SIZE"])  # on this machine
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
LIMITS[0, 1] += ["sticky_actions"]
LIMITS[400, 10**8] = ["max_episode_frames"]  # far above the number of no-ops, which AtariGames relies on
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
    env_id: str = "ALE/Breakout-v5"  # Atari game: ALE/Pong-v5, PongNoFrameskip-v4 or Pong, all the same here
    total_timesteps: int = 10_000_000  # steps of all environments together, rounded down to whole iterations
    num_envs: int = 8  # environments that run in parallel, N
    num_steps: int = 128  # steps of each environment in a rollout, T
    seed: int = 1  # decides everything random, in [0, 2^32)
    exp_name: str = "ppo_atari"  # part of the run directory's name

    learning_rate: float = 2.5e-4  # of Adam, the first in (lr)
    anneal_lr: bool = True  # lower the learning rate linearly towards 0, (lr)
    gamma: float = 0.99  # discount factor in [0, 1], (td)
    gae_lambda: float = 0.95  # from 0, biased advantages, to 1, noisy ones, (gae)
    bootstrap_truncated: bool = True  # at a time limit use V of the last observation; off: as if terminated, (td)
    num_minibatches: int = 4  # per epoch; must divide num_envs * num_steps
    update_epochs: int = 4  # passes over each rollout
    norm_adv: bool = True  # normalise advantages, (norm)
    norm_adv_over: Literal["minibatch", "batch"] = "minibatch"  # the rows normalised together, (norm)
    clip_coef: float = 0.1  # epsilon: moving the ratio beyond 1 ± this gains nothing; inf: no clip, (clip)
    clip_vloss: bool = True  # clip the value loss with the same epsilon, (vf-clip)
    ent_coef: float = 0.01  # weight of the entropy bonus, c_e in (total)
    vf_coef: float = 0.5  # weight of the value loss, c_v in (total)
    max_grad_norm: float = 0.5  # scale the whole gradient down if its norm is larger; inf: never
    target_kl: float | None = None  # stop an update after the first epoch whose mean (k3) exceeds this; None: never
    clip_rewards: bool = True  # learn from the sign of a reward; scores are the game's own
    episodic_life: bool = True  # a lost life counts as terminated and the game goes on; off: FIRE is the policy's
    sticky_actions: float = 0.0  # probability that the last action is repeated; newer papers have 0.25
    max_episode_frames: int = 108_000  # of the emulator, after which a game is cut off

    bf16: Literal["auto", "on", "off"] = "auto"  # bfloat16 below the two heads; auto: where the hardware has it
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
    """Ends the program, between two steps or epochs; one of several processes only ends with all, in `train`."""
    if STOP_SIGNALS and WORLD_SIZE == 1:
        sys.exit(128 + STOP_SIGNALS[0])


class AtariGames(gym.vector.VectorWrapper):
    """Does for ale-py's environments what they leave to the player, and tells which rows are which.

    With life_loss_info a lost life reads terminated, but the game goes on. Breakout and some others then wait for FIRE,
    so in games that have that button it takes the place of the policy's action after a lost life. And the end of a game
    is told from a lost life by the count of frames, which then starts anew; lives may be left, or were never there.

    info["new_game"] (N,): the row only reset, its action was ignored. info["valid"] (N,): the row is the policy's,
    neither a reset nor our FIRE. What FIRE brings still counts in the score.
    """

    def __init__(self, envs):
        super().__init__(envs)
        buttons = envs.ale.get_action_set()
        self.fire = buttons.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in buttons else None

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        self.ended, self.frame = np.zeros(self.num_envs, bool), info["episode_frame_number"]
        return obs, info

    def step(self, actions):
        if self.fire is not None:
            actions = np.where(self.ended, self.fire, actions)
        obs, reward, terminated, truncated, info = self.env.step(actions)
        info["new_game"] = info["episode_frame_number"] < self.frame
        info["valid"] = ~(info["new_game"] if self.fire is None else self.ended)  # after any end: a reset or our FIRE
        self.ended, self.frame = terminated | truncated, info["episode_frame_number"]
        return obs, reward, terminated, truncated, info


class Film(gym.vector.VectorWrapper):
    """Films whole games in colour: twins of the environments, of the same seed, play along with the same actions."""

    def __init__(self, games, twin, video_dir, eval_episodes):
        super().__init__(games)
        self.twin, self.video_dir, self.eval_episodes = twin, Path(video_dir), eval_episodes
        self.filmed = [0] * games.num_envs
        self.films = [self.new_film(n) for n in range(games.num_envs)]

    def new_film(self, n):
        (self.video_dir / f"env-{n}").mkdir(parents=True, exist_ok=True)
        path = self.video_dir / f"env-{n}" / f"game-{self.filmed[n]}.mp4"
        return FFMPEG_VideoWriter(str(path), (160, 210), fps=15)  # one frame in four of the emulator's 60 a second

    def reset(self, **options):
        self.twin.reset(**options)
        return self.env.reset(**options)

    def step(self, actions):
        pictures = self.twin.step(actions)[0]  # (N, 1, 210, 160, 3)
        *rest, info = self.env.step(actions)
        for n in np.flatnonzero(info["new_game"]):
            if self.films[n]:
                self.films[n].close()
                self.filmed[n] += 1
                self.films[n] = self.new_film(n) if self.filmed[n] < self.eval_episodes else None
        for film, (picture,) in zip(self.films, pictures):
            if film:
                film.write_frame(picture)
        return *rest, info

    def close(self, **options):
        for film in filter(None, self.films):
            film.close()
        self.twin.close()
        super().close(**options)


def make_envs(args, video_dir=None):
    """A gymnasium VectorEnv of args.num_envs games, filmed into video_dir. Raises UsageError for other environments."""
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    specs = [spec for spec in gym.registry.values() if "ale_py" in str(spec.entry_point)]
    games = {spec.kwargs["game"]: spec.name for spec in specs if spec.namespace == "ALE"}  # as in "pong": "Pong"
    # Every id and every bare name → game. Deterministic ids are no longer registered; their games are the same.
    names = {spec.id: games[spec.kwargs["game"]] for spec in specs} | {game: game for game in games.values()}
    game = names.get(args.env_id.removeprefix("ale_py:").replace("Deterministic", "NoFrameskip"))
    if game is None:
        try:
            with warnings.catch_warnings(action="ignore"):
                env = gym.make(args.env_id)
        except Exception:
            if args.env_id in gym.registry:
                reject("env_id", args.env_id, "is no Atari game: use ppo.py or ppo_continuous.py")
            lower = {name.lower(): name for name in names}
            (nearest,) = difflib.get_close_matches(args.env_id.lower(), lower, 1, 0)
            reject("env_id", args.env_id, f"is no Atari game. The nearest is {lower[nearest]}.")
        script = "ppo_continuous.py" if isinstance(env.action_space, gym.spaces.Box) else "ppo.py"
        images = len(env.observation_space.shape or ()) > 1
        advice = ", and no script here trains on its images" if images else f": use {script}"
        reject("env_id", args.env_id, f"is no Atari game{advice}")
    options = {
        "repeat_action_probability": args.sticky_actions,
        "max_num_frames_per_episode": args.max_episode_frames,
        "life_loss_info": args.episodic_life,
        "reward_clipping": False,  # would hide the score
    }
    make = lambda **more: AtariGames(gym.make_vec(f"ALE/{game}-v5", args.num_envs, **options, **more))
    if not video_dir:
        return make()
    twin = make(grayscale=False, img_height=210, img_width=160, stack_num=1)
    return Film(make(), twin, video_dir, args.eval_episodes)


def new_worlds(args, iteration, video_dir=None):
    """Environments built anew and their first observations. They and all random numbers from here on are a function of
    (seed, iteration), so that a resumed run sees what the uninterrupted one sees. Environment i gets the seed + i, and
    i counts on from process to process."""
    seeds = 2**31 - 1 - args.num_envs * WORLD_SIZE  # ale-py takes smaller ones than 2^31
    seed = int(np.random.SeedSequence((args.seed, iteration)).generate_state(1)[0]) % seeds + args.num_envs * RANK
    torch.manual_seed(seed)
    envs = make_envs(args, video_dir)
    return envs, envs.reset(seed=seed)[0]


def setup_device(args):
    """The torch device of --device. Raises UsageError for one that is not here."""
    devices = ["auto", "cpu"] + ["cuda"] * torch.cuda.is_available()
    devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if args.device not in devices:
        reject("device", args.device, f"is not here; use one of: {', '.join(devices)}")
    device = torch.device(args.device if args.device != "auto" else "cuda" if "cuda" in devices else "cpu")
    if device.type == "cuda":
        if WORLD_SIZE > 1 and device.index is not None:
            reject("device", args.device, "cannot serve all processes of torchrun: use cuda")
        if LOCAL_WORLD_SIZE > torch.cuda.device_count():
            reject("device", args.device, f"has {torch.cuda.device_count()} GPU(s): use no larger --nproc-per-node")
        device = torch.device("cuda", LOCAL_RANK if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def check_compiler(args, device):
    """Raises UsageError for --compile where there is nothing to compile with."""
    try:
        if args.compile:
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:
        reject("compile", True, f"cannot work here: {first_line(error)}")


def gather(x):
    """A list of what every process has for x."""
    everyone = [x] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(everyone, x)
    return everyone


def use_bf16(args):
    """Whether to compute in bfloat16: what --bf16 says, or whether the device can do so without emulation."""
    if args.bf16 != "auto":
        return args.bf16 == "on"
    if setup_device(args).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last: Arm


def orthogonal(layer, gain=2**0.5):
    """The layer with orthogonal weights, scaled by the gain, and zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The policy (actor) and the value function (critic), on one network of convolutions (Mnih et al. 2015).

    B stands for any leading dimensions, A for the number of actions. `features` takes observations; `act`, `value` and
    `evaluate_actions` take what it returns, (B, 512).
    """

    def __init__(self, observation_space, action_space, args):
        super().__init__()
        self.bf16 = use_bf16(args)
        self.num_actions = int(action_space.n)
        self.network = nn.Sequential(
            orthogonal(nn.Conv2d(observation_space.shape[0], 32, 8, stride=4)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
            orthogonal(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        )
        self.actor = orthogonal(nn.Linear(512, self.num_actions), 0.01)  # at first all are about as probable
        self.critic = orthogonal(nn.Linear(512, 1), 1.0)

    def features(self, obs):
        """Observations (B, 4, 84, 84), uint8 → (B, 512), float32."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        x = obs.flatten(0, -4)  # any leading dimensions to one, and back at the end
        x = x.contiguous(memory_format=torch.channels_last)  # convolutions then take half the time on a CPU
        x = x.to(dtype).div_(255)
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network(x).float().unflatten(0, obs.shape[:-3])

    def noise(self, *shape):
        """Gumbel noise (*shape, A): argmax(logits + noise) is a with probability softmax(logits)_a."""
        return -torch.empty(*shape, self.num_actions, device=self.actor.bias.device).exponential_().log()

    def act(self, x, noise):
        """x (B, 512) → sampled actions (B,), by the Gumbel-max trick; noise 0 gives the most probable ones."""
        return (self.actor(x) + noise).argmax(-1)

    def env_action(self, action):
        """Actions 0 … A−1, as numpy."""
        return action.cpu().numpy()

    def value(self, x):
        """x (B, 512) → V(s) (B,)."""
        return self.critic(x).squeeze(-1)

    def evaluate_actions(self, x, action):
        """x (B, 512), action (B,) → log π(a|s) (B,) by (categorical) and the policy's entropy (B,) by (entropy)."""
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


def ppo_loss(agent, args, obs, action, old_log_prob, old_values, returns, advantages, weight):
    """(total): −L_CLIP + c_v L_VF − c_e H over a minibatch of B rows, then its three parts and the log-ratios (B,)."""
    x = agent.features(obs)
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
    """Plays the agent of the state_dict `state`; prints and returns its returns.

    They have the shape (num_envs, eval_episodes): as many of each environment, since the first to finish among all
    would be the short ones.
    """
    args.check()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = setup_device(args)
    envs, obs = new_worlds(args, 0, video_dir)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    load_agent(agent, state, args)
    scores, running = [[] for _ in range(args.num_envs)], np.zeros(args.num_envs)
    while min(map(len, scores)) < args.eval_episodes:
        exit_if_stopped()
        noise = agent.noise(args.num_envs) * (not args.greedy)
        x = agent.features(torch.from_numpy(obs).to(device))
        obs, reward, _, _, info = envs.step(agent.env_action(agent.act(x, noise)))
        for n in np.flatnonzero(info["new_game"]):  # the row before was the last of a game
            scores[n].append(running[n])
            running[n] = 0.0
        running += reward
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
    iteration_size = batch_size * WORLD_SIZE
    iterations = args.total_timesteps // iteration_size
    if batch_size % M:
        reject("num_minibatches", M, f"must divide num_envs * num_steps = {batch_size}")
    if iterations == 0:
        reject("total_timesteps", args.total_timesteps, f"must be at least one rollout, {iteration_size}")
    checkpoint = load_run("resume", args)[1] if args.resume else None
    if checkpoint and checkpoint["world_size"] != WORLD_SIZE:
        advice = f"was trained by {checkpoint['world_size']} process(es), not {WORLD_SIZE}: start as many"
        reject("resume", args.resume, advice + " (torchrun --nproc-per-node)")
    if checkpoint and checkpoint["iteration"] >= iterations:
        print(f"{args.resume} is finished: all its {iterations} iterations are done")
        return Path(args.resume)
    device = setup_device(args)
    check_compiler(args, device)
    envs = make_envs(args)
    if args.total_timesteps % iteration_size:
        print(f"{args.total_timesteps:,} steps are rounded down to {iterations} iterations of {iteration_size}")
    two_longest = math.ceil(2 * args.max_episode_frames / 4 / T)  # games, in iterations; a step is four frames
    save_every = max(math.ceil(iterations / 20), two_longest) if args.save_every is None else args.save_every
    save_every = save_every or iterations
    if save_every < min(two_longest, iterations) and RANK == 0:
        print(f"warning: --save-every {save_every} cuts many games short; {two_longest} is enough", file=sys.stderr)

    if WORLD_SIZE > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    torch.set_num_threads(args.threads or CPU_THREADS)  # the last bits of the first weights depend on it
    torch.manual_seed(args.seed)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    parameters = flat_parameters(agent)
    if WORLD_SIZE > 1:
        dist.broadcast(parameters.data, 0)  # the processes begin with the same weights
    optimizer = torch.optim.Adam([parameters], args.learning_rate, eps=1e-5, fused=True)
    little_work = batch_size // M * parameters.numel() < 5e7  # more threads then cost more than they save (measured)
    torch.set_num_threads(args.threads or (1 if little_work else CPU_THREADS))
    loss_function, features = ppo_loss, agent.features
    if args.compile:
        mode = "reduce-overhead" if device.type == "cuda" else None
        loss_function, features = torch.compile(ppo_loss, mode=mode), torch.compile(features, mode=mode)

    images = torch.from_numpy(np.zeros((T + 1, N, 84, 84, 4), np.uint8)).to(device)  # numpy: MemoryError if too large
    staging = torch.zeros((N, 84, 84, 4), dtype=torch.uint8, pin_memory=device.type == "cuda")  # to copy from, async
    x = torch.zeros((T + 1, N, 512), device=device)  # features, kept so that V and log π_old need no second pass
    actions = torch.zeros((T, N), dtype=torch.int64, device=device)
    rewards = np.zeros((T, N), np.float32)
    terminated, done, valid = np.zeros((3, T, N), bool)

    run_dir, logger = None, None
    if args.resume:
        run_dir = Path(args.resume)
        load_agent(agent, checkpoint["agent"], args)
        optimizer.load_state_dict(checkpoint["optimizer"])
    elif RANK == 0:
        run_dir = new_run_dir(args)
    if RANK == 0:
        logger = Logger(args, run_dir, iterations * iteration_size, checkpoint["sizes"] if checkpoint else {})
    if not checkpoint:
        checkpoint = {"iteration": 0, "seconds": 0.0, "world_size": WORLD_SIZE}
        if RANK == 0:
            save_checkpoint(run_dir, agent, optimizer, **checkpoint, sizes=logger.sync())
    print(f"{args.env_id} on {device}, {torch.get_num_threads()} thread(s); the run is kept in {run_dir}", flush=True)

    saved, began = checkpoint["iteration"], time.perf_counter() - checkpoint["seconds"]
    try:
        for iteration in range(saved + 1, iterations + 1):
            started, first_step = time.perf_counter(), (iteration - 1) * iteration_size
            if numbers := sum(gather(STOP_SIGNALS), []):  # all processes stop at the same iteration
                sys.exit(128 + numbers[0])
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (iteration - 1) / iterations)  # (lr)
            if iteration - 1 == saved:
                # At the start and after every checkpoint the environments are built anew, here and in a resumed run
                # alike: no state of a simulator needs saving. It cuts the running episodes short, as a time limit does.
                envs.close()
                envs, obs = new_worlds(args, iteration)
                episodic_return, episodic_length = np.zeros(N), np.zeros(N, int)

            # Act 1, rollout. A lost life reads terminated; rows that only reset and those where AtariGames pressed FIRE
            # are not valid. Scores are those of whole games: the row after the last one of a game says that it was.
            finished, noise = [], agent.noise(T, N)
            # The outer autocast is off, but as long as it lasts the one in features casts the weights only once.
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                for t in range(T + 1):
                    staging.copy_(torch.from_numpy(obs).movedim(1, -1))  # channels last, once and for all
                    images[t].copy_(staging, non_blocking=True)
                    x[t] = features(images[t].movedim(-1, 1))
                    if t == T:  # the observation that the next rollout starts from: only for the bootstrap
                        break
                    exit_if_stopped()
                    actions[t] = agent.act(x[t], noise[t])
                    obs, reward, terminated[t], truncated, info = envs.step(agent.env_action(actions[t]))
                    rewards[t] = np.sign(reward) if args.clip_rewards else reward
                    valid[t] = info["valid"]
                    done[t] = terminated[t] | truncated
                    for n in np.flatnonzero(info["new_game"]):
                        step = first_step + (t + 1) * N * WORLD_SIZE
                        finished.append((step, float(episodic_return[n]), int(episodic_length[n])))
                        episodic_return[n], episodic_length[n] = 0.0, 0
                    episodic_return += reward
                    episodic_length += ~info["new_game"]

            # Act 2, advantages. What follows an episode's last obs[t] is its true last observation, also where a time
            # limit ended it: V there is what (td) bootstraps from.
            with torch.no_grad():
                old_log_prob, _ = agent.evaluate_actions(x[:-1], actions)
                values = agent.value(x)
                arrays = (rewards, terminated, done, valid)
                reward, is_terminated, is_done, is_valid = (torch.from_numpy(array).to(device) for array in arrays)
                no_bootstrap = is_terminated if args.bootstrap_truncated else is_done
                advantages = compute_gae(reward, values, no_bootstrap, is_done, args.gamma, args.gae_lambda)
                returns = advantages + values[:-1]  # (return)
                weight = is_valid.float()
                if args.norm_adv and args.norm_adv_over == "batch":
                    advantages = normalize_advantages(advantages.flatten(), weight.flatten()).view_as(weight)
                batch = (images[:-1], actions, old_log_prob, values[:-1], returns, advantages, weight)
                batch = [tensor.flatten(0, 1) for tensor in batch]  # (T, N, …) → (T N, …)

            # Act 3, update. Every epoch shuffles all rows and goes once over them, in M minibatches.
            losses, log_ratios, weights = [], [], []
            for _ in range(args.update_epochs):
                exit_if_stopped()
                order = torch.randperm(batch_size, device=device)
                *rows, adv, w = (tensor.index_select(0, order).unflatten(0, (M, -1)) for tensor in batch)  # (M, B, …)
                rows[0] = rows[0].movedim(-1, 2)  # images (M, B, 4, 84, 84)
                if args.norm_adv and args.norm_adv_over == "minibatch":
                    adv = normalize_advantages(adv, w)  # of each of the M minibatches by itself
                for minibatch in zip(*rows, adv, w):
                    loss, *parts, log_ratio = loss_function(agent, args, *minibatch)
                    parameters.grad.zero_()
                    loss.backward()
                    if WORLD_SIZE > 1:
                        dist.all_reduce(parameters.grad)
                        parameters.grad /= WORLD_SIZE
                    grad_norm = parameters.grad.norm()
                    parameters.grad *= (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
                    optimizer.step()
                    losses.append(torch.stack((*parts, grad_norm)))
                    log_ratios.append(log_ratio.clone())  # CUDA graphs overwrite it
                weights.append(w)
                if args.target_kl is not None:
                    _, kl, _, _ = diagnostics(torch.stack(log_ratios[-M:]), w, args.clip_coef)
                    if np.mean(gather(kl)) > args.target_kl:
                        break
            *kl_and_clipping, deviation = diagnostics(torch.stack(log_ratios), torch.cat(weights), args.clip_coef)
            variance = explained_variance(values[:-1][is_valid], returns[is_valid])
            means = torch.stack(losses).mean(0).tolist() + kl_and_clipping
            # Over all processes: means (a variance may be ""), the largest of the deviations, all games in one list.
            means, deviations, variances, finished = zip(*gather((means, deviation, variance, finished)))
            means, variances = np.mean(means, 0).tolist(), [variance for variance in variances if variance != ""]
            if not all(map(math.isfinite, (*means, parameters.detach().sum()))):
                kept = f"{run_dir} keeps the checkpoint of iteration {saved}"
                raise FloatingPointError(f"iteration {iteration}: a loss or a weight is not finite; {kept}")
            finished = sorted(itertools.chain(*finished))
            score, length = np.mean(finished, 0)[1:].tolist() if finished else ("", "")
            seconds, sps = time.perf_counter() - began, iteration_size / (time.perf_counter() - started)
            policy, value, entropy, grad_norm, *kl_and_clipping = means
            row = [iteration, iteration * iteration_size, len(finished), score, length, policy, value, entropy]
            row += [*kl_and_clipping, max(deviations), np.mean(variances).item() if variances else "", grad_norm]
            row += [optimizer.param_groups[0]["lr"], round(sps), round(seconds, 3)]
            if RANK == 0:
                for episode in finished:
                    logger.log("episodes.csv", *episode)
                    logger.recent_returns.append(episode[1])
                logger.log("metrics.csv", *row)
                logger.show(iteration * iteration_size, sps)
            if iteration % save_every == 0 or iteration == iterations:
                if RANK == 0:
                    sizes = logger.sync()  # the rows reach the disk before the checkpoint that covers them
                    progress = {"iteration": iteration, "seconds": seconds, "world_size": WORLD_SIZE, "sizes": sizes}
                    save_checkpoint(run_dir, agent, optimizer, **progress)
                saved = iteration
                if args.capture_video and RANK == 0:
                    videos = run_dir / "videos" / f"iteration-{iteration}"
                    evaluate(replace(args, num_envs=1, eval_episodes=1), agent.state_dict(), videos)
    except (KeyboardInterrupt, SystemExit, OSError, MemoryError):
        machines = WORLD_SIZE // LOCAL_WORLD_SIZE
        launcher = "python" if WORLD_SIZE == 1 else f"torchrun --nnodes {machines} --nproc-per-node {LOCAL_WORLD_SIZE}"
        command = f"{launcher} {SCRIPT} --resume {shlex.quote(str(run_dir))}"
        if RANK == 0:
            print(f"\nstopped; `{command}` continues from step {saved * iteration_size:,}", file=sys.stderr)
        raise
    finally:
        envs.close()
        if RANK == 0:
            logger.close()
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    return run_dir


def main():
    """The command line. Exit status: 0 done, 1 a run failed, 2 bad input, 130 Ctrl-C, 143 SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the second one does not wait for the step at hand
        signal.signal(number, lambda number, _: sys.exit(128 + number) if STOP_SIGNALS else STOP_SIGNALS.append(number))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    console = sys.stderr if LOCAL_RANK == 0 else sys.stdout  # bad input is told once on each machine
    args = tyro.cli(Args, description=__doc__)
    try:
        if args.resume and args.evaluate:
            reject("evaluate", args.evaluate, "cannot go with --resume; resume first, then evaluate")
        if args.evaluate and WORLD_SIZE > 1:
            reject("evaluate", args.evaluate, "runs in one process: start it without torchrun")
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
        print(f"{SCRIPT}: {error}", file=console)
        sys.exit(2)
    except (FloatingPointError, MemoryError, torch.OutOfMemoryError, OSError) as error:
        if RANK == 0 or not isinstance(error, FloatingPointError):  # which all processes meet
            print(f"{SCRIPT}: stopped: {error}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:  # of torch.distributed, where another process is gone
        if not re.search("connection|socket", str(error), re.I):
            raise
        if not STOP_SIGNALS:
            print(f"{SCRIPT}: process {RANK} stopped: another process has", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

# What `uv run` installs for this file alone:
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "gymnasium==1.4.0",
#   "ale-py==0.12.1",
#   "numpy==2.4.6",
#   "torch==2.13.0",
#   "tyro==1.0.17",
#   "tqdm==4.70.1",
#   "wandb==0.31.0",
#   "moviepy==2.2.1",
# ]
# ///
