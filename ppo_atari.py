"""Proximal Policy Optimization (PPO) for Atari games, from pixels.

    python ppo_atari.py                                             # Breakout, 2.5 hours
    python ppo_atari.py --env-id Pong --seed 2                      # --help lists all flags
    python ppo_atari.py --resume runs/DIR                           # continue a run
    python ppo_atari.py --evaluate runs/DIR --greedy --capture-video  # play and film
    torchrun --nproc-per-node 8 ppo_atari.py                        # on 8 GPUs

In this order: flags, equations, agent, training. What follows training is tooling.
Names in parentheses, like (gae), mark equations; the project's README explains each.
Shapes: T steps of N environments; B rows of a batch.
The N environments never stop: the step after a game's end ignores its action and only
resets, with reward 0 and the next game's first state. Nothing is learned from it.
"""

import csv
import json
import math
import os
import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

# Set before torch is imported: its idle threads then soon stop looking for work, and leave
# the CPU to the games' threads.
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

SCRIPT = Path(__file__).name

# torchrun starts several processes and numbers them. Each process plays games of its own,
# and their gradients are averaged. Process 0 logs its own games and losses. Without
# torchrun there is only process 0.
TORCHRUN = dist.is_torchelastic_launched()
RANK = int(os.environ["RANK"]) if TORCHRUN else 0  # number of this process
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if TORCHRUN else 0  # its number on this machine
WORLD_SIZE = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1  # how many there are


# ---------- Flags ----------
@dataclass
class Args:  # tyro makes each field a flag and its comment the flag's help
    env_id: str = "ALE/Breakout-v5"  # or just Breakout, or BreakoutNoFrameskip-v4
    total_timesteps: int = 10_000_000  # of all environments; rounded down to whole rollouts
    num_envs: int = 8  # parallel environments, N, of each process
    num_steps: int = 128  # steps of each environment in a rollout, T
    seed: int = 1  # decides everything that is random

    learning_rate: float = 2.5e-4  # initial learning rate of Adam
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of the advantages: 0 least variance, 1 least bias
    bootstrap_truncated: bool = True  # at a time limit, the value stands for later rewards
    num_minibatches: int = 4  # minibatches per epoch; must divide num_envs * num_steps
    update_epochs: int = 4  # passes over each rollout
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.1  # epsilon: no gain from a ratio further than this from 1
    clip_vloss: bool = True  # clip the value loss with the same epsilon
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # longer gradients are shortened to this norm; inf: none
    target_kl: float | None = None  # end an update after an epoch with a larger approx_kl
    clip_rewards: bool = True  # learn from the sign of rewards; logs show the score
    episodic_life: bool = True  # for learning, a lost life is a termination
    sticky_actions: float = 0.0  # probability that a game repeats the last action
    max_episode_frames: int = 108_000  # time limit of a game: 30 minutes; 4 frames a step

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    bf16: Literal["auto", "on", "off"] = "auto"  # 16-bit networks; auto: if supported
    threads: int | None = None  # CPU threads of torch; None: torch decides
    compile: bool = False  # torch.compile: faster after a minute of compilation
    runs_dir: str = "runs"  # holds the run directories
    save_every: int | None = None  # iterations between checkpoints; None: about 20 in a run
    resume: str | None = None  # continue the run in this directory, with its own flags
    track: bool = False  # log to Weights & Biases, offline if not logged in
    evaluate: str | None = None  # play the agent of this run directory
    eval_episodes: int = 10  # episodes that --evaluate plays in each environment
    greedy: bool = False  # with --evaluate: the most probable actions, not sampled ones
    capture_video: bool = False  # with --evaluate: film the first environment


# ---------- Equations ----------
def compute_gae(rewards, values, terminated, done, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016).

    (td)   δ_t = r_t + γ V(s_{t+1}) (1 − terminated_t) − V(s_t)
    (gae)  Â_t = δ_t + γλ (1 − done_t) Â_{t+1}

    An episode is done when it terminated (no reward can follow: V is 0 there) or when a
    time limit truncated it (rewards would have followed: V stands for them). In both cases
    s_{t+1} is its last state, not the next episode's first. Of what comes after the rollout
    only V(s_T) is known, and δ_{T−1} has it. Later δ are unknown, so the recursion starts
    with Â_T = 0.

    rewards (T, N), values (T+1, N), terminated, done (T, N, bool) → advantages (T, N)."""
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]
    decays = gamma * gae_lambda * ~done

    advantages, advantage = [], 0
    for t in reversed(range(len(deltas))):
        advantage = deltas[t] + decays[t] * advantage
        advantages.append(advantage)
    return torch.stack(advantages[::-1])


def normalize_advantages(advantages):
    """(norm): mean 0 and standard deviation 1 over a minibatch (B,)."""
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


def policy_loss(log_ratio, advantages, clip_coef):
    """(clip): −E[min(ρ Â, clip(ρ, 1−ε, 1+ε) Â)], where E is the mean over a minibatch,
    (ratio) ρ = π(a|s) / π_old(a|s) = exp(log_ratio), and ε = clip_coef. Inputs (B,)."""
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return -torch.min(ratio * advantages, clipped_ratio * advantages).mean()


def value_loss(values, old_values, returns, clip_coef):
    """(vf-clip): ½ E[max((V − R̂)², (V_clip − R̂)²)], where R̂ = returns, ε = clip_coef and
    V_clip = V_old + clip(V − V_old, −ε, ε): nothing is gained by moving V more than ε,
    here in units of return. With clip_coef None, (vf): ½ E[(V − R̂)²]. Inputs (B,)."""
    error = (values - returns) ** 2
    if clip_coef is not None:
        clipped_values = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
        error = torch.max(error, (clipped_values - returns) ** 2)
    return 0.5 * error.mean()


def ppo_loss(agent, batch, args):
    """(total): policy_loss + c_v value_loss − c_e H, where c_v = vf_coef, c_e = ent_coef,
    and H is the mean entropy.

    agent is an Agent (below), batch a dict of columns (B, ...) → loss, metrics to log."""
    x = agent.features(batch["obs"])
    log_probs, entropy = agent.evaluate_actions(x, batch["actions"])
    log_ratio = log_probs - batch["old_log_probs"]

    advantages = batch["advantages"]
    if args.norm_adv:
        advantages = normalize_advantages(advantages)
    pi_loss = policy_loss(log_ratio, advantages, args.clip_coef)

    values = agent.value(x)
    value_clip = args.clip_coef if args.clip_vloss else None
    v_loss = value_loss(values, batch["old_values"], batch["returns"], value_clip)

    loss = pi_loss + args.vf_coef * v_loss - args.ent_coef * entropy.mean()

    log_ratio = log_ratio.detach()  # what follows needs no gradient
    ratio_dev = log_ratio.exp() - 1  # ρ − 1
    return loss, {
        "policy_loss": pi_loss.detach(),
        "value_loss": v_loss.detach(),
        "entropy": entropy.detach().mean(),
        # The actions came from π_old, so −log ρ is KL(π_old, π) on average: (k1), the older
        # estimate. (k3) adds ρ − 1, which is 0 on average. This cancels most of the noise
        # where ρ is near 1, and no term is negative, since log ρ ≤ ρ − 1.
        "old_approx_kl": -log_ratio.mean(),  # (k1)
        "approx_kl": (ratio_dev - log_ratio).mean(),  # (k3)
        "clipfrac": (ratio_dev.abs() > args.clip_coef).float().mean(),  # (clipfrac)
        "max_ratio_dev": ratio_dev.abs().max(),  # logged as the mean over minibatches
    }


def compute_gradient(agent, batch, args):
    """Puts the gradient of the loss into .grad → metrics."""
    loss, logged = ppo_loss(agent, batch, args)
    loss.backward()
    return logged


def explained_variance(advantages, returns):
    """(ev): 1 − Var(R̂ − V) / Var(R̂): 1 for a perfect critic, 0 for a constant one.
    R̂ − V is Â, as R̂ = Â + V. Inputs (B,) → float, or None where R̂ does not vary."""
    explained = 1 - advantages.var(correction=0) / returns.var(correction=0)
    return explained.item() if explained.isfinite() else None


# ---------- Agent ----------
def orthogonal(layer, gain=2**0.5):
    """Orthogonal weights with a gain of √2, usual in PPO: from layer to layer, signals
    hardly shrink or grow."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """The policy (actor) and the value function (critic): two linear layers on top of one
    convolutional network (Mnih et al. 2015). x are the features that it finds."""

    bf16 = False  # whether the network computes in bfloat16

    def __init__(self, envs, args):
        super().__init__()
        # 84 x 84 pixels become 20 x 20, then 9 x 9, then 7 x 7.
        self.network = nn.Sequential(
            orthogonal(nn.Conv2d(4, 32, 8, stride=4)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
            orthogonal(nn.Linear(64 * 7 * 7, 512)),
            nn.ReLU(),
        )
        # The gain of 0.01 makes all actions almost equally probable at first.
        self.actor = orthogonal(nn.Linear(512, int(envs.single_action_space.n)), gain=0.01)
        self.critic = orthogonal(nn.Linear(512, 1), gain=1.0)

    def features(self, obs):
        """Observations (B, 4, 84, 84), uint8: the last 4 pictures, since one does not show
        where a ball flies → x (B, 512), float32."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        # channels_last is another order in memory, in which convolutions are faster.
        pixels = obs.contiguous(memory_format=torch.channels_last).to(dtype).div_(255)
        # With bf16, layers compute with bfloat16 copies of their float32 weights.
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            return self.network(pixels).float()

    def act(self, x, greedy=False):
        """x (B, 512) → actions (B,): sampled from π, or the most probable ones."""
        logits = self.actor(x)
        if greedy:
            return logits.argmax(-1)
        return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)

    def value(self, x):
        """x (B, 512) → V(s) (B,). Also (T, N, 512) → (T, N)."""
        return self.critic(x).squeeze(-1)

    def evaluate_actions(self, x, actions):
        """x (B, 512), actions (B,) → log π(a|s), entropy, (B,). Also (T, N, 512), (T, N).
        (categorical): log π(a|s) = z_a − log Σ_b exp(z_b), where z are the actor's outputs.
        (entropy): −Σ_a π(a|s) log π(a|s)."""
        log_probs = torch.log_softmax(self.actor(x), -1)  # of all actions
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        taken = actions.unsqueeze(-1)  # gather picks these
        return log_probs.gather(-1, taken).squeeze(-1), entropy


# ---------- Training ----------
def train(args, after_iteration=None):
    """Trains an agent, or continues the run in args.resume; returns the run directory.

    after_iteration(agent, metrics) is called after each iteration: a place to evaluate."""
    check(args)
    run = Run(args)  # reads the checkpoint of --resume
    envs, first_obs = start_envs(args, run.iteration)  # seeds torch, too
    try:
        run_iterations(args, run, envs, first_obs, after_iteration)
    finally:  # also after an error
        envs.close()
        run.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    return run.directory


def run_iterations(args, run, envs, first_obs, after_iteration):
    """The algorithm: rollout, advantages, update, again and again."""
    T, N = args.num_steps, args.num_envs
    iterations = args.total_timesteps // (T * N * WORLD_SIZE)

    device = set_up_torch(args)
    agent = Agent(envs, args).to(device)
    agent.bf16 = choose_bf16(args, device)
    # Adam divides each gradient by its usual size + eps. With torch's eps of 1e-8, even
    # gradients of 1e-7, mere noise, would move their weight by about the learning rate.
    # fused: all weights in one operation, which is faster.
    optimizer = torch.optim.Adam(
        agent.parameters(), args.learning_rate, eps=1e-5, fused=True
    )
    backward = compiled(compute_gradient) if args.compile else compute_gradient
    features = compiled(agent.features) if args.compile else agent.features
    run.open(agent, optimizer)  # a new directory; or loads weights and Adam's state
    if WORLD_SIZE > 1:
        start_together(agent, device)

    obs = torch.zeros((T + 1, N, 4, 84, 84), dtype=torch.uint8, device=device)
    x = torch.zeros((T + 1, N, 512), device=device)  # their features, for part 2
    # Environments use numpy, so the rest of a rollout is recorded in numpy.
    actions = np.zeros((T, N), np.int64)
    rewards = np.zeros((T, N))
    terminated = np.zeros((T, N), bool)  # a lost life counts, too
    done = np.zeros((T, N), bool)  # terminated or truncated
    valid = np.zeros((T, N), bool)  # the action was the policy's, not FIRE or a reset
    new_game = np.zeros((T, N), bool)  # this step ignored its action and began a new game
    to_tensor = lambda array: torch.from_numpy(array).to(device)

    obs[T] = torch.from_numpy(first_obs)
    for iteration in range(run.iteration + 1, iterations + 1):
        if args.anneal_lr:  # (lr)
            remaining = 1 - (iteration - 1) / iterations
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

        # 1. Rollout: the policy plays T steps in N environments. After a lost life, many
        # games wait for the FIRE button, so AtariGames presses it in place of the policy's
        # action. After the end of a game, the next step only resets. valid tells which
        # actions were the policy's.
        obs[0] = obs[T]  # continue where the last rollout ended
        # With bf16, autocast keeps its bfloat16 copies of the weights until the outermost
        # autocast ends. This outer one converts nothing, but lets them last for T steps.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for t in range(T):
                x[t] = features(obs[t])
                actions[t] = agent.act(x[t]).cpu().numpy()
                next_obs, rewards[t], terminated[t], truncated, info = envs.step(actions[t])
                obs[t + 1] = torch.from_numpy(next_obs)
                done[t] = terminated[t] | truncated
                valid[t], new_game[t] = info["valid"], info["new_game"]
            x[T] = features(obs[T])

        # 2. Advantages. The weights are still those of the policy that played, so values
        # and log-probabilities can be computed for all steps at once.
        ended = to_tensor(done)
        with torch.no_grad():
            values = agent.value(x)
            log_probs, _ = agent.evaluate_actions(x[:-1], to_tensor(actions))

        r = to_tensor(np.sign(rewards) if args.clip_rewards else rewards).float()
        # Where an episode has no future, V(s_{t+1}) counts as 0. Steps of FIRE and resets
        # get advantages, too, but no other step sees these, since (gae) does not go back
        # over the end of an episode. They themselves are dropped below.
        no_future = to_tensor(terminated) if args.bootstrap_truncated else ended
        advantages = compute_gae(r, values, no_future, ended, args.gamma, args.gae_lambda)
        batch = {
            "obs": obs[:-1],
            "actions": to_tensor(actions),
            "old_log_probs": log_probs,
            "old_values": values[:-1],
            "advantages": advantages,
            "returns": advantages + values[:-1],  # (return), R̂
        }
        # (valid): FIRE and resets are dropped, and (T, N, ...) becomes (B, ...).
        batch = {name: column[to_tensor(valid)] for name, column in batch.items()}

        # 3. Update: several epochs over the batch, shuffled and cut into minibatches.
        logs = []
        for _ in range(args.update_epochs):
            # For torch.compile, all minibatches must have one size. So after the last of
            # the shuffled rows the first ones come again, until there are T * N, as before
            # some were dropped. Lives last many steps, so these are few, and 3 copies are
            # more than enough.
            order = torch.randperm(len(batch["actions"]), device=device).repeat(3)[: T * N]
            for rows in order.chunk(args.num_minibatches):
                # column.index_select(0, rows) is column[rows], but faster.
                minibatch = {k: column.index_select(0, rows) for k, column in batch.items()}
                optimizer.zero_grad()
                logged = backward(agent, minibatch, args)
                if WORLD_SIZE > 1:  # the same gradient for all keeps their weights equal
                    for parameter in agent.parameters():
                        average(parameter.grad)
                logged["grad_norm"] = nn.utils.clip_grad_norm_(
                    agent.parameters(), args.max_grad_norm
                )
                optimizer.step()
                logs.append({name: value.item() for name, value in logged.items()})
            epoch_kl = np.mean([log["approx_kl"] for log in logs[-args.num_minibatches :]])
            if WORLD_SIZE > 1:  # all processes must decide alike
                epoch_kl = average(torch.tensor(epoch_kl, device=device)).item()
            if args.target_kl is not None and epoch_kl > args.target_kl:
                break

        check_finite(agent, iteration)
        metrics = {name: np.mean([log[name] for log in logs]) for name in logs[0]}
        metrics |= {
            "explained_variance": explained_variance(batch["advantages"], batch["returns"]),
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        metrics = run.log(iteration, metrics, rewards, new_game)  # adds scores
        if after_iteration is not None:
            after_iteration(agent, metrics)
        if iteration % run.save_every == 0 or iteration == iterations:
            run.save(iteration, agent, optimizer)


# ---------- Evaluation ----------
@torch.random.fork_rng()  # a training that calls it keeps its own random numbers
@torch.no_grad()
def evaluate(agent, args):
    """Plays args.eval_episodes games in each environment → scores (N, games)."""
    envs, obs = start_envs(args, 0)  # the same beginning in each evaluation
    device = next(agent.parameters()).device
    scores = [[] for _ in range(args.num_envs)]
    running = np.zeros(args.num_envs)  # scores of the running games
    film = Film(args) if args.capture_video else None

    total = args.num_envs * args.eval_episodes
    quiet = args.evaluate is None  # a training has its own bar
    with progress_bar("games", total, disable=quiet) as bar:
        while min(map(len, scores)) < args.eval_episodes:
            x = agent.features(torch.from_numpy(obs).to(device))
            actions = agent.act(x, args.greedy).cpu().numpy()
            obs, reward, _, _, info = envs.step(actions)
            for n in np.flatnonzero(info["new_game"]):  # the step before ended a game
                if len(scores[n]) < args.eval_episodes:
                    scores[n].append(running[n])
                running[n] = 0
            running += reward
            if film is not None and len(scores[0]) < args.eval_episodes:
                film.step(actions)
            bar.update(sum(map(len, scores)) - bar.n)
    envs.close()
    if film is not None:
        film.close()
    return np.array(scores)


class Film:
    """Films the first environment. The agent's pictures are small and grey, so each action
    is played in a second set of games, too, with the same seed and in colour."""

    def __init__(self, args):
        self.envs, _ = start_envs(args, 0, in_colour=True)
        folder = Path(args.evaluate, "videos")
        folder.mkdir(exist_ok=True)
        self.writer = FFMPEG_VideoWriter(
            f"{folder}/{time.time_ns()}.mp4", (160, 210), fps=15
        )

    def step(self, actions):
        pictures, *_ = self.envs.step(actions)
        self.writer.write_frame(pictures[0, 0])  # the only picture of environment 0

    def close(self):
        self.writer.close()
        self.envs.close()


# ---------- Environments ----------
class UsageError(ValueError):
    """Bad input; main prints it."""


class AtariGames(gym.vector.VectorWrapper):
    """Presses FIRE where a game waits for it, and tells which steps are the policy's.

    With life_loss_info, ale-py reports a lost life as a termination, and the game goes on.
    Many games then wait for FIRE, which the policy might never press. So where there is
    this button, it replaces the action after a lost life. (When a game starts, ale-py
    presses it. With --no-episodic-life, nobody presses it after a lost life.)

    info["valid"] (N,): the action was the policy's. info["new_game"] (N,): the step ignored
    its action and began a new game. done does not tell, as it includes lost lives; the
    frame number does: it falls."""

    def __init__(self, envs):
        super().__init__(envs)
        buttons = envs.ale.get_action_set()
        self.has_fire = ale_py.Action.FIRE in buttons
        self.fire = buttons.index(ale_py.Action.FIRE) if self.has_fire else 0

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.done = np.zeros(self.num_envs, bool)
        self.frame = info["episode_frame_number"]
        return obs, info

    def step(self, actions):
        forced = self.done & self.has_fire
        actions = np.where(forced, self.fire, actions)
        obs, reward, terminated, truncated, info = self.env.step(actions)
        info["new_game"] = info["episode_frame_number"] < self.frame
        info["valid"] = ~(forced | info["new_game"])
        self.done = terminated | truncated
        self.frame = info["episode_frame_number"]
        return obs, reward, terminated, truncated, info


def make_envs(args, in_colour=False):
    """A VectorEnv of args.num_envs games. By ale-py's defaults, a step repeats its action
    for 4 frames, and an observation is the last 4 steps in grey, (N, 4, 84, 84). in_colour,
    it is only the last step, (N, 1, 210, 160, 3). A game begins with up to 29 no-ops."""
    game = (
        args.env_id.removeprefix("ALE/").removesuffix("-v5").removesuffix("NoFrameskip-v4")
    )
    options = {
        "life_loss_info": args.episodic_life,
        "reward_clipping": False,  # rewards are clipped in training; logs show the score
        "repeat_action_probability": args.sticky_actions,
        "max_num_frames_per_episode": args.max_episode_frames,
    }
    if in_colour:
        options |= {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner
    try:
        envs = gym.make_vec(f"ALE/{game}-v5", args.num_envs, **options)
    except (gym.error.Error, ImportError) as error:
        raise UsageError(f"--env-id {args.env_id}: {error}") from error
    return AtariGames(envs)


def start_envs(args, iteration, in_colour=False):
    """New games and their first observations. All that is random from here on follows from
    seed, iteration and process. So a resumed run goes on with new random numbers, and two
    resumed from the same checkpoint are alike."""
    seed = int(np.random.default_rng([args.seed, iteration, RANK]).integers(2**30))
    torch.manual_seed(seed)
    envs = make_envs(args, in_colour)
    obs, _ = envs.reset(seed=seed)  # each environment gets its own
    return envs, obs


# ---------- Runs ----------
class Run:
    """A run directory: flags, logs, checkpoints; the progress bar; Weights & Biases."""

    def __init__(self, args):
        """Reads the checkpoint of --resume, if given. Writes nothing."""
        self.args = args
        self.steps = args.num_steps * args.num_envs * WORLD_SIZE  # of an iteration
        self.iterations = args.total_timesteps // self.steps
        self.save_every = args.save_every or math.ceil(self.iterations / 20)
        self.directory, self.checkpoint, self.iteration, seconds = None, None, 0, 0.0
        if args.resume is not None:
            self.directory = Path(args.resume)
            _, self.checkpoint = load_run(self.directory)
            self.iteration = self.checkpoint["iteration"]
            seconds = self.checkpoint["seconds"]
            if self.checkpoint["world_size"] != WORLD_SIZE:
                raise UsageError(
                    f"--resume needs {self.checkpoint['world_size']} processes, as before"
                )
            for name, size in self.checkpoint["log_sizes"].items():
                path = self.directory / name
                if not path.exists() or path.stat().st_size < size:
                    raise UsageError(f"{path}: rows are missing")

        self.iteration_began = time.perf_counter()
        self.began = self.iteration_began - seconds
        self.score, self.length = np.zeros(args.num_envs), np.zeros(args.num_envs, int)
        self.opened = ExitStack()  # what close has to close

    def open(self, agent, optimizer):
        """Loads the checkpoint, or makes the directory and saves a first one."""
        if self.checkpoint is not None:
            agent.load_state_dict(self.checkpoint["agent"])
            optimizer.load_state_dict(self.checkpoint["optimizer"])
        if RANK > 0:  # only process 0 writes
            return
        try:
            if self.checkpoint is not None:
                for name, size in self.checkpoint["log_sizes"].items():
                    os.truncate(self.directory / name, size)  # later rows are written again
            else:
                self.directory = make_directory(self.args)
            self.metrics_file = self.opened.enter_context(
                open(self.directory / "metrics.csv", "a", newline="")
            )
            self.episodes_file = self.opened.enter_context(
                open(self.directory / "episodes.csv", "a", newline="")
            )
            self.save(self.iteration, agent, optimizer)  # shows early that this works
        except OSError as error:
            raise UsageError(f"cannot write the run: {error}") from error

        launcher = "torchrun ..." if TORCHRUN else "python"
        command = f"{launcher} {SCRIPT} --resume {shlex.quote(str(self.directory))}"
        print(f"Training in {self.directory}. To continue: {command}", flush=True)
        total, played = self.iterations * self.steps, self.iteration * self.steps
        self.bar = self.opened.enter_context(progress_bar("steps", total, played))
        self.wandb = None
        if self.args.track:
            import wandb  # only here, since it is slow to import

            # With WANDB_MODE or a login, wandb chooses the mode (None); else offline.
            decided = os.environ.get("WANDB_MODE") or wandb.login(prompt=False)
            name = self.directory.resolve().name
            run = {"id": name, "name": name, "resume": "allow"}  # same id: same run
            run |= {"dir": self.directory, "config": vars(self.args)}
            self.wandb = wandb.init(**run, mode=None if decided else "offline")
            self.opened.callback(self.wandb.finish)

    def log(self, iteration, metrics, rewards, new_game):
        """Writes metrics, and games of process 0 that ended; rewards, new_game (T, N)."""
        if RANK > 0:
            return metrics
        global_step = iteration * self.steps
        episodes = []
        for t in range(len(rewards)):
            # The step before ended these games: after t steps of all environments.
            for n in np.flatnonzero(new_game[t]):
                step = global_step - self.steps + t * len(new_game[t]) * WORLD_SIZE
                episodes.append((step, self.score[n], self.length[n]))
                self.score[n] = self.length[n] = 0
            self.score += rewards[t]
            self.length += ~new_game[t]  # a step that only resets belongs to no game

        now = time.perf_counter()
        _, returns, lengths = zip(*episodes) if episodes else ([], [], [])
        metrics = {"iteration": iteration, "global_step": global_step} | metrics
        metrics |= {
            "sps": round(self.steps / (now - self.iteration_began)),
            "seconds": round(now - self.began, 3),
            "episodes": len(episodes),
            "episodic_return": np.mean(returns) if episodes else None,
            "episodic_length": np.mean(lengths) if episodes else None,
        }
        self.iteration_began = now

        append_rows(self.metrics_file, metrics, [metrics.values()])
        columns = ("global_step", "episodic_return", "episodic_length")
        append_rows(self.episodes_file, columns, episodes)
        if self.wandb is not None:
            self.wandb.log(metrics, step=global_step)
        if episodes:
            self.bar.set_postfix_str(f"return {np.mean(returns):.4g}", refresh=False)
        self.bar.update(self.steps)
        return metrics

    def save(self, iteration, agent, optimizer):
        """Replaces checkpoint.pt in one move, so that it is always complete."""
        if RANK > 0:
            return
        checkpoint = {
            "world_size": WORLD_SIZE,
            "iteration": iteration,
            "seconds": time.perf_counter() - self.began,
            "log_sizes": {
                "metrics.csv": self.metrics_file.tell(),
                "episodes.csv": self.episodes_file.tell(),
            },
            "agent": agent.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(checkpoint, self.directory / "checkpoint.tmp")
        os.replace(self.directory / "checkpoint.tmp", self.directory / "checkpoint.pt")

    def close(self):
        self.opened.close()


def make_directory(args):
    """A new directory in args.runs_dir with the flags of the run."""
    name = f"{args.env_id}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    directory = Path(args.runs_dir, name.replace("/", "-").replace(":", "-"))
    directory.mkdir(parents=True)
    (directory / "args.json").write_text(json.dumps(vars(args), indent=2))
    return directory


def append_rows(file, columns, rows):
    """Appends rows to an open csv file, and first the columns' names if it is empty."""
    writer = csv.writer(file)
    if file.tell() == 0 and rows:
        writer.writerow(columns)
    writer.writerows(rows)
    file.flush()


def progress_bar(unit, total, played=0, disable=False):
    """A bar of tqdm; where there is no terminal, a line every five seconds. With
    miniters=0, only time decides when it is drawn."""
    line = "{n_fmt} of {total_fmt}{unit}{postfix}, {rate_fmt}, {remaining} left\n"
    options = {} if sys.stderr.isatty() else {"bar_format": line, "mininterval": 5}
    return tqdm(
        total=total, initial=played, unit=f" {unit}", miniters=0, disable=disable, **options
    )


def load_run(run_dir):
    """The Args and the checkpoint of a run."""
    try:
        args = Args(**json.loads(Path(run_dir, "args.json").read_text()))
        return args, torch.load(Path(run_dir, "checkpoint.pt"), "cpu", weights_only=True)
    except Exception as error:
        message = f"'{run_dir}' is no run that {SCRIPT} can read: {error!r:.200}"
        raise UsageError(message) from error


def load_agent(run_dir, device="cpu"):
    """The trained agent of a run. For a tensor obs (N, 4, 84, 84), its actions are
    agent.act(agent.features(obs))."""
    args, checkpoint = load_run(run_dir)
    envs = make_envs(args)  # for their spaces
    agent = Agent(envs, args).to(device)
    agent.bf16 = choose_bf16(args, torch.device(device))
    envs.close()
    agent.load_state_dict(checkpoint["agent"])
    return agent.requires_grad_(False)


# ---------- Devices ----------
def set_up_torch(args):
    """Sets the number of CPU threads; returns the device."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU")
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    if on_gpu and LOCAL_RANK >= torch.cuda.device_count():
        raise UsageError("torchrun: more processes than GPUs")
    if on_gpu:
        torch.cuda.set_device(LOCAL_RANK)  # "cuda" now means this one
    return torch.device("cuda" if on_gpu else "cpu")


def choose_bf16(args, device):
    """Whether to compute in bfloat16; auto: if the hardware supports it."""
    if args.bf16 != "auto":
        return args.bf16 == "on"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = ("avx512_bf16", "amx_bf16", "bf16")  # Intel and AMD; Intel; Arm
    return any(torch.cpu.get_capabilities().get(name) for name in names)


def start_together(agent, device):
    """Waits for all processes, and gives them the weights of process 0."""
    # nccl connects GPUs, gloo CPUs.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    for parameter in agent.parameters():
        dist.broadcast(parameter.data, 0)


def average(tensor):
    """Replaces a tensor by its mean over all processes; returns it."""
    dist.all_reduce(tensor)  # now the sum
    return tensor.div_(WORLD_SIZE)


def compiled(function):
    """torch.compile of a function as one graph, even if it calls backward; on a GPU, the
    whole graph is then started by one call (CUDA graphs), which overwrites the results of
    the call before."""
    torch._dynamo.config.trace_autograd_ops = True  # else backward() splits the graph
    return torch.compile(function, mode="reduce-overhead")


def check_finite(agent, iteration):
    """Stops a training that has gone wrong, before anything is saved."""
    if not all(value.isfinite().all() for value in agent.state_dict().values()):
        raise FloatingPointError(f"iteration {iteration}: the agent has a nan or infinity")


# ---------- Command line ----------
def check(args):
    """Raises UsageError if a flag makes no sense."""
    ranges = {"gamma": (0, 1), "gae_lambda": (0, 1), "sticky_actions": (0, 1)}
    ranges["num_steps"] = (8, math.inf)  # a few steps could all be FIRE or resets
    ranges["max_episode_frames"] = (400, math.inf)  # more than the no-ops that begin a game
    positive = "num_envs num_minibatches update_epochs threads save_every eval_episodes"
    ranges |= dict.fromkeys(positive.split(), (1, math.inf))
    for name, value in vars(args).items():
        low, high = ranges.get(name, (0, math.inf))
        if isinstance(value, int | float) and not low <= value <= high:  # or if nan
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {value}: must be in [{low}, {high}]")

    if args.evaluate is not None:
        if args.resume is not None:
            raise UsageError("--resume and --evaluate exclude each other")
        if WORLD_SIZE > 1:
            raise UsageError("--evaluate plays in one process, without torchrun")
        return
    rows, parts = args.num_envs * args.num_steps, args.num_minibatches
    steps = rows * WORLD_SIZE
    if args.total_timesteps < steps:
        raise UsageError(f"--total-timesteps {args.total_timesteps}: must be >= {steps}")
    if rows % parts > 0 or rows < 2 * parts:  # (norm) needs two rows
        raise UsageError(f"--num-minibatches {parts}: must divide {rows}, >= 2 rows each")
    if args.greedy or args.capture_video:
        raise UsageError("--greedy and --capture-video need --evaluate")


def parse():
    """The flags; with --resume and --evaluate, those that the run was started with."""
    args = tyro.cli(Args, description=__doc__)
    if args.resume is None and args.evaluate is None:
        return args
    saved, _ = load_run(args.evaluate if args.resume is None else args.resume)
    args = tyro.cli(Args, default=saved)  # parse again: what is not given is as saved

    may_differ = ["resume", "evaluate", "device", "threads", "track"]
    if args.evaluate is not None:
        may_differ += ["num_envs", "seed", "eval_episodes", "greedy", "capture_video"]
    for name, value in vars(saved).items():
        if getattr(args, name) != value and name not in may_differ:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {getattr(args, name)}: must stay {value}")
    return args


def main():
    try:
        args = parse()
        if args.evaluate is None:
            train(args)
            return
        check(args)
        scores = evaluate(load_agent(args.evaluate, set_up_torch(args)), args)
        print(f"mean return {scores.mean():.6g}, standard deviation {scores.std():.6g}:")
        print(*(f"{score:.6g}" for score in scores.flatten()))
    except UsageError as error:
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # the exit status of Ctrl-C, without a traceback


if __name__ == "__main__":
    main()

# The packages that `uv run` installs for this file:
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "gymnasium==1.4.0", "ale-py==0.12.1", "torch==2.13.0", "numpy==2.4.6",
#   "tyro==1.0.17", "tqdm==4.70.1", "moviepy==2.2.1", "wandb==0.31.0",
# ]
# ///
