"""Proximal Policy Optimization (PPO) for Atari games, from pixels.

    python ppo_atari.py                                              # Breakout
    python ppo_atari.py --env-id Pong --total-timesteps 3000000      # --help lists all flags
    python ppo_atari.py --resume runs/DIR                            # continue a run
    python ppo_atari.py --evaluate runs/DIR --greedy --capture-video # play and film an agent
    torchrun --nproc-per-node 8 ppo_atari.py                         # on 8 GPUs

Read from the top; everything after train is tooling. The README explains labels like (gae).
Shapes: T steps of N environments; B rows, or (T, N). With torchrun, each process plays --num-envs
games of its own, and the gradients are averaged.
"""

import csv
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

# Before `import torch`: lets torch's idle threads soon free the CPU for the games.
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
LOGS = ("metrics.csv", "episodes.csv")  # in each run directory
RANK = int(os.environ.get("RANK", 0))  # index of this process, set by torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # its index on this machine
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # number of processes


# ---------- Flags ----------
@dataclass
class Args:  # tyro: each field is a flag, its comment the help
    env_id: str = "ALE/Breakout-v5"  # game; Breakout, BreakoutNoFrameskip-v4 mean the same
    total_timesteps: int = 10_000_000  # of all environments, in whole rollouts
    num_envs: int = 8  # parallel environments, N
    num_steps: int = 128  # steps of each environment in a rollout, T; at least 2
    seed: int = 1  # seeds everything random, in [0, 2^32)

    learning_rate: float = 2.5e-4  # initial learning rate of Adam
    anneal_lr: bool = True  # lower the learning rate linearly to 0, (lr)
    gamma: float = 0.99  # discount factor in [0, 1], (td)
    gae_lambda: float = 0.95  # λ: 0 gives least variance, 1 least bias, (gae)
    bootstrap_truncated: bool = True  # add the value of the state after a time limit, (td)
    num_minibatches: int = 4  # minibatches per epoch; must divide num_envs * num_steps
    update_epochs: int = 4  # passes over each rollout
    norm_adv: bool = True  # normalise the advantages of each minibatch, (norm)
    clip_coef: float = 0.1  # ε: moving the ratio further than this from 1 gains nothing, (clip)
    clip_vloss: bool = True  # clip the value loss with the same ε, (vf-clip)
    ent_coef: float = 0.01  # weight of the entropy bonus, c_e in (total)
    vf_coef: float = 0.5  # weight of the value loss, c_v in (total)
    max_grad_norm: float = 0.5  # upper limit of the gradient's norm; inf: none
    target_kl: float | None = None  # stop an update after an epoch with a larger approx_kl, (k3)
    clip_rewards: bool = True  # learn from the sign of the rewards; logs show the score
    episodic_life: bool = True  # a lost life counts as terminated, and FIRE is pressed next
    sticky_actions: float = 0.0  # probability of repeating the last action; newer papers: 0.25
    max_episode_frames: int = 108_000  # time limit of a game; a step has 4 frames

    bf16: Literal["auto", "on", "off"] = "auto"  # bfloat16 in Agent.network; auto: if supported
    device: Literal["auto", "cpu", "cuda"] = "auto"  # for training; auto: a GPU if there is one
    threads: int | None = None  # CPU threads of torch in training; None: torch decides
    compile: bool = False  # use torch.compile (CUDA graphs on a GPU); starts slowly
    runs_dir: str = "runs"  # holds the run directories
    save_every: int | None = None  # iterations between checkpoints, which cut episodes; None: auto
    resume: str | None = None  # continue the run in this directory, with its own flags
    track: bool = False  # log to Weights & Biases, project $WANDB_PROJECT; offline if not logged in
    evaluate: str | None = None  # play the agent of this run directory
    eval_episodes: int = 10  # episodes that --evaluate plays in each environment
    greedy: bool = False  # with --evaluate: the most probable actions, not sampled ones
    capture_video: bool = False  # with --evaluate: film the first environment

    def __post_init__(self):
        lowest = dict.fromkeys(["num_envs", "num_minibatches", "update_epochs", "threads"], 1)
        lowest |= {"save_every": 1, "eval_episodes": 1, "num_steps": 2, "max_episode_frames": 400}
        highest = {"seed": 2**32 - 1, "gamma": 1, "gae_lambda": 1, "sticky_actions": 1}
        for name, value in vars(self).items():
            low, high = lowest.get(name, 0), highest.get(name, math.inf)
            if isinstance(value, int | float) and not low <= value <= high:  # also refuses nan
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be in [{low}, {high}]")
        rows, parts = self.num_envs * self.num_steps, self.num_minibatches  # of a rollout
        if self.resume is None and self.evaluate is None:
            steps, total = rows * WORLD_SIZE, self.total_timesteps
            if total < steps:
                raise UsageError(f"--total-timesteps {total}: must be >= {steps}")
            if rows % parts > 0 or rows < 2 * parts:
                raise UsageError(f"--num-minibatches {parts}: must divide {rows}, >= 2 rows each")
        if self.resume is not None and self.evaluate is not None:
            raise UsageError("--resume and --evaluate exclude each other")
        if (self.greedy or self.capture_video) and self.evaluate is None:
            raise UsageError("--greedy and --capture-video need --evaluate")


class UsageError(ValueError):
    """Bad input; main prints it."""


# ---------- Environments ----------
class AtariGames(gym.vector.VectorWrapper):
    """Presses FIRE after a lost life, and tells which steps the policy can learn from.

    With life_loss_info, ale-py reports a lost life as terminated, but the game goes on. Many games
    then wait for FIRE: where this button exists, it replaces the next action.

    info["new_game"] (N,): this step only reset the game; its action was ignored. info["valid"]
    (N,): the action was the policy's. Points scored by FIRE are logged, but not learned from.
    """

    def __init__(self, envs):
        super().__init__(envs)
        buttons = envs.ale.get_action_set()
        self.fire = buttons.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in buttons else None

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.ended = np.zeros(self.num_envs, bool)
        self.frame = info["episode_frame_number"]
        return obs, info

    def step(self, actions):
        if self.fire is not None:
            actions = np.where(self.ended, self.fire, actions)
        obs, reward, terminated, truncated, info = self.env.step(actions)
        info["new_game"] = info["episode_frame_number"] < self.frame  # it starts again
        info["valid"] = ~(info["new_game"] if self.fire is None else self.ended)  # reset or FIRE
        self.ended = terminated | truncated
        self.frame = info["episode_frame_number"]
        return obs, reward, terminated, truncated, info


def make_envs(args, for_film=False):
    """args.num_envs games: 4 frames a step, after up to 29 no-ops; observations are the last
    4 steps in grey, (N, 4, 84, 84), or, for_film, the last one in colour, (N, 1, 210, 160, 3)."""
    game = args.env_id.removeprefix("ALE/").removesuffix("-v5").removesuffix("NoFrameskip-v4")
    options = {"life_loss_info": args.episodic_life, "reward_clipping": False}  # scores, not signs
    options |= {"repeat_action_probability": args.sticky_actions}
    options |= {"max_num_frames_per_episode": args.max_episode_frames}
    if for_film:
        options |= {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    try:
        envs = gym.make_vec(f"ALE/{game}-v5", args.num_envs, **options)
    except (gym.error.Error, ImportError) as error:
        raise UsageError(f"--env-id {args.env_id}: {error}") from error
    return AtariGames(envs)


def start_envs(args, iteration, for_film=False):
    """New environments and observations. Seed and iteration decide all randomness from here on."""
    state = np.random.SeedSequence((args.seed, iteration)).generate_state(1)
    seed = int(state[0]) % (2**31 - 1 - args.num_envs * WORLD_SIZE)
    seed += args.num_envs * RANK  # environment i gets seed + i < 2^31, different in each process
    torch.manual_seed(seed)
    envs = make_envs(args, for_film)
    obs, _ = envs.reset(seed=seed)
    return envs, obs


# ---------- Agent ----------
def supports_bf16(device):
    """Whether the hardware supports bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(key) for key in ("avx512_bf16", "amx_bf16", "bf16"))


def orthogonal(layer, gain=2**0.5):
    """Orthogonal weights, zero biases."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The policy (actor) and the value function (critic): two heads on the convolutional network
    of Mnih et al. 2015. x (B, 512) are the features of observations."""

    def __init__(self, observation_space, action_space, bf16=False):
        super().__init__()
        self.bf16 = bf16
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
        self.actor = orthogonal(nn.Linear(512, int(action_space.n)), 0.01)  # near-uniform
        self.critic = orthogonal(nn.Linear(512, 1), 1.0)

    def features(self, obs):
        """Observations (B, 4, 84, 84), uint8 → x (B, 512), float32."""
        x = obs.contiguous(memory_format=torch.channels_last)  # twice as fast on a CPU
        x = x.to(torch.bfloat16 if self.bf16 else torch.float32).div_(255)
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network(x).float()

    def act(self, x, greedy=False):
        """x (B, 512) → actions (B,): sampled from π, or the most probable ones."""
        logits = self.actor(x)
        if not greedy:  # −log(exponential) is Gumbel noise: the argmax then samples from π
            logits = logits - torch.empty_like(logits).exponential_().log()
        return logits.argmax(-1)

    def value(self, x):
        """x (B, 512) → V(s) (B,)."""
        return self.critic(x).squeeze(-1)

    def evaluate_actions(self, x, action):
        """x (B, 512), action (B,) → log π(a|s), (categorical), and (entropy), both (B,)."""
        log_probs = torch.log_softmax(self.actor(x), -1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1), entropy


def flat_parameters(agent):
    """Moves all parameters into one vector; weights and gradients become views of it and its grad.

    Only for speed: clipping, Adam and averaging then take one operation, not one per layer.
    Call it after agent.to(device), and zero the gradient in place: setting None breaks the views.
    """
    parameters = list(agent.parameters())
    vector = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    vector.grad = torch.zeros_like(vector)
    nn.utils.vector_to_parameters(vector.data, parameters)  # makes them views
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, grad in zip(parameters, vector.grad.split(sizes)):
        parameter.grad = grad.view_as(parameter)
    return vector


# ---------- Equations ----------
def compute_gae(rewards, values, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016).

    (td)   δ_t = r_t + γ V(s_{t+1}) (1 − terminated_t) − V(s_t)
    (gae)  Â_t = δ_t + γλ (1 − done_t) Â_{t+1}

    rewards, terminated, done (T, N); values (T+1, N) → advantages (T, N). After termination no
    reward follows; after a time limit (done, not terminated), V(s_{t+1}) stands for the rest."""
    deltas = rewards + gamma * values[1:] * (1 - terminated.to(values)) - values[:-1]
    decays = gamma * gae_lambda * (1 - done.to(values))
    advantages, advantage = [], 0
    for t in reversed(range(len(deltas))):
        advantage = deltas[t] + decays[t] * advantage
        advantages.insert(0, advantage)
    return torch.stack(advantages)


def normalize_advantages(advantages):
    """(norm): mean 0 and standard deviation 1 over a minibatch (B,)."""
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def policy_loss(log_ratio, advantages, clip_coef):
    """(clip): −E[min(ρ Â, clip(ρ, 1−ε, 1+ε) Â)], ρ = exp(log_ratio), ε = clip_coef; inputs (B,)."""
    ratio = log_ratio.exp()  # ρ, (ratio)
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped_ratio * advantages).mean()


def value_loss(values, old_values, returns, clip_coef):
    """(vf-clip): ½ E[max((V − R̂)², (V_clip − R̂)²)], V_clip = V_old + clip(V − V_old, −ε, ε).
    Inputs (B,); ε = clip_coef, None for the unclipped (vf)."""
    error = (values - returns) ** 2
    if clip_coef is not None:
        clipped_values = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        error = torch.max(error, (clipped_values - returns) ** 2)
    return 0.5 * error.mean()


def ppo_loss(agent, batch, args):
    """(total): −L_CLIP + c_v L_VF − c_e H over a minibatch, and metrics to log."""
    x = agent.features(batch["obs"].movedim(-1, 1))  # a view, (B, 4, 84, 84)
    log_probs, entropy = agent.evaluate_actions(x, batch["actions"])
    log_ratio = log_probs - batch["old_log_probs"]
    advantages = batch["advantages"]
    if args.norm_adv:
        advantages = normalize_advantages(advantages)
    pi_loss = policy_loss(log_ratio, advantages, args.clip_coef)
    value_clip = args.clip_coef if args.clip_vloss else None
    v_loss = value_loss(agent.value(x), batch["old_values"], batch["returns"], value_clip)
    loss = pi_loss + args.vf_coef * v_loss - args.ent_coef * entropy.mean()

    log_ratio = log_ratio.detach()
    ratio_dev = log_ratio.exp() - 1  # ρ − 1
    return loss, {
        "policy_loss": pi_loss.detach(),
        "value_loss": v_loss.detach(),
        "entropy": entropy.detach().mean(),
        "old_approx_kl": -log_ratio.mean(),  # (k1): E[−log ρ], the old, noisy estimate
        "approx_kl": (ratio_dev - log_ratio).mean(),  # (k3): E[ρ − 1 − log ρ], never negative
        "clipfrac": (ratio_dev.abs() > args.clip_coef).float().mean(),  # (clipfrac)
        "max_ratio_dev": ratio_dev.abs().max(),
    }


# ---------- Training ----------
def train(args):
    """Trains an agent, or continues the run in args.resume; returns the run directory."""
    T, N = args.num_steps, args.num_envs
    batch_size = T * N
    steps = batch_size * WORLD_SIZE  # per iteration, in all processes
    iterations = args.total_timesteps // steps

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU")
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(LOCAL_RANK)  # "cuda" now means this GPU
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)  # for the initial weights
    envs = make_envs(args)  # for their spaces; training starts with new ones
    bf16 = supports_bf16(device) if args.bf16 == "auto" else args.bf16 == "on"
    agent = Agent(envs.single_observation_space, envs.single_action_space, bf16).to(device)
    parameters = flat_parameters(agent)  # one vector
    optimizer = torch.optim.Adam([parameters], args.learning_rate, eps=1e-5, fused=True)
    mode = "reduce-overhead"  # with CUDA graphs, on a GPU
    loss_function = torch.compile(ppo_loss, mode=mode) if args.compile else ppo_loss
    features = torch.compile(agent.features, mode=mode) if args.compile else agent.features

    obs = torch.zeros((T + 1, N, 84, 84, 4), dtype=torch.uint8, device=device)  # channels last
    # The environments use numpy, so the rest of a rollout is recorded in numpy.
    actions = np.zeros((T, N), np.int64)
    rewards = np.zeros((T, N))
    terminated = np.zeros((T, N), bool)
    truncated = np.zeros((T, N), bool)
    new_game = np.zeros((T, N), bool)
    valid = np.zeros((T, N), bool)
    x = torch.zeros((T + 1, N, 512), device=device)  # features, kept for the values in part 2
    to_tensor = lambda array: torch.from_numpy(array).to(device)

    run_dir, iterations_done, seconds_done = open_run(args, agent, optimizer)
    if RANK == 0:
        logger = Logger(args, run_dir, iterations_done * steps, iterations * steps)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        dist.broadcast(parameters.data, 0)  # the same weights for all; waits for all processes
    began = time.perf_counter() - seconds_done
    # Checkpoints cut games, so they are at least two of the longest games apart.
    two_games = 2 * args.max_episode_frames / 4 / T  # in iterations; a step is four frames
    save_every = args.save_every or math.ceil(max(iterations / 20, two_games))
    for iteration in range(iterations_done + 1, iterations + 1):
        iteration_began = time.perf_counter()
        if (iteration - 1) % save_every == 0:  # also at the start
            # Each checkpoint starts new environments, so their state need not be saved.
            save_checkpoint(run_dir, agent, optimizer, iteration - 1, iteration_began - began)
            envs.close()
            envs, first_obs = start_envs(args, iteration)
            obs[T] = torch.from_numpy(first_obs).movedim(1, -1)
            if RANK == 0:
                logger.score, logger.length = np.zeros(N), np.zeros(N, int)
        if args.anneal_lr:  # (lr)
            remaining = 1 - (iteration - 1) / iterations
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

        # 1. Rollout: the policy plays T steps in N environments.
        obs[0] = obs[T]  # continue where the last rollout ended
        # autocast drops its bfloat16 copies of the weights when its outermost block ends. This
        # block, which casts nothing, spans the rollout, so features makes them just once.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for t in range(T):
                x[t] = features(obs[t].movedim(-1, 1))
                actions[t] = agent.act(x[t]).cpu().numpy()
                next_obs, rewards[t], terminated[t], truncated[t], info = envs.step(actions[t])
                obs[t + 1] = torch.from_numpy(next_obs).movedim(1, -1)
                new_game[t], valid[t] = info["new_game"], info["valid"]
            x[T] = features(obs[T].movedim(-1, 1))

        # 2. Advantages. Values and log-probabilities are those of the policy that played: its
        # weights have not changed yet, so both can be computed for all steps at once.
        with torch.no_grad():
            values = agent.value(x)
            log_probs, _ = agent.evaluate_actions(x[:-1], to_tensor(actions))
        ended, played = to_tensor(terminated | truncated), to_tensor(valid)
        stops = to_tensor(terminated) if args.bootstrap_truncated else ended  # no value after these
        scaled = to_tensor(np.sign(rewards) if args.clip_rewards else rewards).float()
        advantages = compute_gae(scaled, values, stops, ended, args.gamma, args.gae_lambda)
        batch = {
            "obs": obs[:-1],
            "actions": to_tensor(actions),
            "old_log_probs": log_probs,
            "old_values": values[:-1],
            "advantages": advantages,
            "returns": advantages + values[:-1],  # (return)
        }
        # (valid): drop the steps that are not the policy's, (T, N, ...) → (B, ...)
        batch = {name: column[played] for name, column in batch.items()}
        explained = 1 - batch["advantages"].var() / batch["returns"].var()  # (ev), as Â = R̂ − V

        # 3. Update: several epochs over the batch, shuffled and cut into minibatches.
        rows = len(batch["actions"])
        # Repeat a few rows in place of the dropped ones: torch.compile needs fixed shapes.
        fill_up = torch.arange(batch_size, device=device) % rows
        logs = []
        for _ in range(args.update_epochs):
            order = torch.randperm(rows, device=device)[fill_up]
            epoch_kl = 0
            for part in order.chunk(args.num_minibatches):
                minibatch = {name: column.index_select(0, part) for name, column in batch.items()}
                loss, logged = loss_function(agent, minibatch, args)
                parameters.grad.zero_()
                loss.backward()
                if WORLD_SIZE > 1:
                    dist.all_reduce(parameters.grad)
                    parameters.grad /= WORLD_SIZE
                grad_norm = parameters.grad.norm()  # as clip_grad_norm_ does, but faster
                parameters.grad *= (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
                optimizer.step()
                logged["grad_norm"] = grad_norm
                logs.append(torch.stack(list(logged.values())))
                epoch_kl += logged["approx_kl"]
            if WORLD_SIZE > 1:
                dist.all_reduce(epoch_kl)
                epoch_kl /= WORLD_SIZE
            if args.target_kl is not None and epoch_kl / args.num_minibatches > args.target_kl:
                break

        if not all(value.isfinite().all() for value in agent.state_dict().values()):
            raise FloatingPointError(f"iteration {iteration}: the agent has a nan or infinity")
        means = torch.stack(logs).mean(0).tolist()  # over all minibatches
        now = time.perf_counter()
        metrics = {
            "iteration": iteration,
            "global_step": iteration * steps,
            **dict(zip(logged, means)),
            "explained_variance": explained.item() if explained.isfinite() else None,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "sps": round(steps / (now - iteration_began)),
            "seconds": round(now - began, 3),
        }
        if RANK == 0:
            logger.log(metrics, rewards, new_game)
    save_checkpoint(run_dir, agent, optimizer, iterations, time.perf_counter() - began)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    return run_dir


# ---------- Evaluation ----------
@torch.inference_mode()
def evaluate(agent, args):
    """Plays args.eval_episodes episodes in each environment → scores (N, episodes)."""
    envs, obs = start_envs(args, 0)
    if args.capture_video:  # the same games once more, in colour
        twin, _ = start_envs(args, 0, for_film=True)
        os.makedirs(f"{args.evaluate}/videos", exist_ok=True)
        path = f"{args.evaluate}/videos/{time.time_ns()}.mp4"
        film = FFMPEG_VideoWriter(path, (160, 210), fps=15)
    scores = np.zeros((args.num_envs, args.eval_episodes + 1))  # last column: surplus episodes
    episode = np.zeros(args.num_envs, int)  # each environment's column in scores
    while episode.min() < args.eval_episodes:
        x = agent.features(torch.from_numpy(obs))
        actions = agent.act(x, args.greedy).numpy()
        obs, reward, _, _, info = envs.step(actions)
        episode = np.minimum(episode + info["new_game"], args.eval_episodes)
        scores[np.arange(args.num_envs), episode] += reward
        if args.capture_video and episode[0] < args.eval_episodes:
            pictures, *_ = twin.step(actions)
            film.write_frame(pictures[0, 0])
    if args.capture_video:
        film.close()
        twin.close()
    envs.close()
    return scores[:, :-1]


# ---------- Runs ----------
def open_run(args, agent, optimizer):
    """A new run directory or that of args.resume, and the iterations and seconds done."""
    if args.resume is not None:
        run_dir = Path(args.resume)
        _, checkpoint = load_run(run_dir)
        if checkpoint["world_size"] != WORLD_SIZE:
            raise UsageError(f"--resume {run_dir}: needs {checkpoint['world_size']} processes")
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for name, size in checkpoint["sizes"].items():  # drop rows that are redone
            os.truncate(run_dir / name, size)
        return run_dir, checkpoint["iteration"], checkpoint["seconds"]
    if RANK > 0:  # process 0 saves for all, and logs its own games
        return None, 0, 0.0
    name = f"{args.env_id}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run_dir = Path(args.runs_dir, name.replace("/", "-").replace(":", "-"))
    try:
        run_dir.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"--runs-dir {args.runs_dir}: {error}") from error
    (run_dir / "args.json").write_text(json.dumps(vars(args), indent=2))
    return run_dir, 0, 0.0


def save_checkpoint(run_dir, agent, optimizer, iteration, seconds):
    """Replaces checkpoint.pt in one step, so that it is always complete."""
    if RANK > 0:
        return
    sizes = {name: (run_dir / name).stat().st_size for name in LOGS}
    checkpoint = {"iteration": iteration, "seconds": seconds, "world_size": WORLD_SIZE}
    checkpoint |= {"sizes": sizes, "agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, run_dir / "checkpoint.tmp")
    os.replace(run_dir / "checkpoint.tmp", run_dir / "checkpoint.pt")


def load_run(run_dir):
    """The Args and the checkpoint of a run, or UsageError."""
    try:
        args = Args(**json.loads(Path(run_dir, "args.json").read_text()))
        return args, torch.load(Path(run_dir, "checkpoint.pt"), "cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"{run_dir} is not a run directory of {SCRIPT}: {error!r:.200}") from error


def load_agent(run_dir):
    """The trained agent of a run, on the CPU: agent.act(agent.features(obs)), obs a tensor."""
    args, checkpoint = load_run(run_dir)
    envs = make_envs(args)
    bf16 = supports_bf16(torch.device("cpu")) if args.bf16 == "auto" else args.bf16 == "on"
    agent = Agent(envs.single_observation_space, envs.single_action_space, bf16)
    envs.close()
    agent.load_state_dict(checkpoint["agent"])
    return agent.requires_grad_(False)


class Logger:
    """Appends to metrics.csv and episodes.csv, shows progress, logs to Weights & Biases."""

    def __init__(self, args, run_dir, step, total_steps):
        print(f"Training in {run_dir}. To continue, add --resume {run_dir}", flush=True)
        self.files = [open(run_dir / name, "a", newline="") for name in LOGS]
        line = "{n_fmt} of {total_fmt} steps{postfix}, {rate_fmt}, {remaining} left\n"
        options = {} if sys.stderr.isatty() else {"bar_format": line, "mininterval": 5}
        self.bar = tqdm(initial=step, total=total_steps, unit=" steps", **options)
        self.wandb = None
        if args.track:
            import wandb  # slow to import

            fallback = "online" if wandb.login(prompt=False) else "offline"  # not logged in
            mode = os.environ.get("WANDB_MODE", fallback)
            run = {"id": run_dir.name, "name": run_dir.name, "dir": run_dir, "config": vars(args)}
            self.wandb = wandb.init(**run, mode=mode, resume="allow")  # same id: same run

    def log(self, metrics, rewards, new_game):
        """Writes metrics and the games of a rollout: rewards, new_game (T, N)."""
        T, N = rewards.shape
        episodes = []
        for t in range(T):
            for n in np.flatnonzero(new_game[t]):  # the step before ended the game
                step = metrics["global_step"] - (T - t - 1) * N * WORLD_SIZE
                episode = {"global_step": step, "episodic_return": self.score[n]}
                episodes.append(episode | {"episodic_length": self.length[n]})
                self.score[n] = self.length[n] = 0
            self.score += rewards[t]  # train zeroes it
            self.length += ~new_game[t]  # a step that only resets does not count
        metrics["episodes"] = len(episodes)
        for name in ("episodic_return", "episodic_length"):
            metrics[name] = np.mean([episode[name] for episode in episodes]) if episodes else None
        for file, rows in zip(self.files, ([metrics], episodes)):
            writer = csv.DictWriter(file, rows[0] if rows else [])
            if rows and file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
            file.flush()
        if self.wandb:
            self.wandb.log(metrics, step=metrics["global_step"])
        if episodes:
            self.bar.set_postfix_str(f"return {metrics['episodic_return']:.1f}", refresh=False)
        self.bar.update(metrics["global_step"] - self.bar.n)


# ---------- Command line ----------
def main():
    try:
        args = tyro.cli(Args, description=__doc__)
        if args.resume is not None or args.evaluate is not None:
            saved, _ = load_run(args.resume or args.evaluate)
            args = tyro.cli(Args, default=saved)  # again, with the run's flags as defaults
            may_differ = {"resume", "evaluate", "device", "threads", "track"}
            if args.evaluate is not None:
                may_differ |= {"num_envs", "seed", "eval_episodes", "greedy", "capture_video"}
            for name, value in vars(saved).items():
                if getattr(args, name) != value and name not in may_differ:
                    flag = "--" + name.replace("_", "-")
                    raise UsageError(f"{flag} {getattr(args, name)}: must stay {value}")
        if args.evaluate is None:
            train(args)
            return
        scores = evaluate(load_agent(args.evaluate), args)
        print(f"mean return {scores.mean():.2f}, standard deviation {scores.std():.2f}:")
        print(*scores.flatten().round(2))
    except UsageError as error:
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "gymnasium==1.4.0", "ale-py==0.12.1", "torch==2.13.0", "numpy==2.4.6",
#   "tyro==1.0.17", "tqdm==4.70.1", "moviepy==2.2.1", "wandb==0.31.0",
# ]
# ///
