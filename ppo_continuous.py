"""Proximal Policy Optimization (PPO) for continuous actions and vector observations.

    python ppo_continuous.py                                    # HalfCheetah-v5, 6 minutes
    python ppo_continuous.py --env-id Hopper-v5 --seed 2        # --help lists all flags
    python ppo_continuous.py --resume runs/DIR                  # continue a run
    python ppo_continuous.py --evaluate runs/DIR --greedy --capture-video  # play and film

In this order: flags, equations, agent, training. What follows training is tooling.
Names in parentheses, like (gae), mark equations; the project's README explains each.
Shapes: T steps of N environments; B rows of a batch; observations of D numbers,
actions of A numbers.
The N environments never stop: the step after an episode's end ignores its action and only
resets, with reward 0 and the next episode's first state. Nothing is learned from it.
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

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm

SCRIPT = Path(__file__).name


# ---------- Flags ----------
@dataclass
class Args:  # tyro makes each field a flag and its comment the flag's help
    env_id: str = "HalfCheetah-v5"  # with continuous actions; your own: my_module:MyEnv-v0
    # sync: environments in one process; async: a process each; None: gymnasium decides
    vectorization_mode: Literal["sync", "async"] | None = None
    total_timesteps: int = 1_000_000  # of all environments; rounded down to whole rollouts
    num_envs: int = 32  # parallel environments, N
    num_steps: int = 64  # steps of each environment in a rollout, T
    seed: int = 1  # decides everything that is random

    learning_rate: float = 3e-4  # initial learning rate of Adam
    anneal_lr: bool = True  # lower the learning rate linearly to 0
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of the advantages: 0 least variance, 1 least bias
    bootstrap_truncated: bool = True  # at a time limit, the value stands for later rewards
    num_minibatches: int = 32  # minibatches per epoch; must divide num_envs * num_steps
    update_epochs: int = 10  # passes over each rollout
    norm_adv: bool = True  # normalise the advantages of each minibatch
    clip_coef: float = 0.2  # epsilon: no gain from a ratio further than this from 1
    clip_vloss: bool = False  # clip the value loss with the same epsilon
    ent_coef: float = 0.0  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # longer gradients are shortened to this norm; inf: none
    target_kl: float | None = 0.02  # end an update after an epoch with a larger approx_kl
    norm_obs: bool = True  # normalise observations by their running mean and variance
    norm_reward: bool = True  # divide rewards by the std of their discounted sums
    initial_log_std: float = -0.5  # log of the actions' standard deviation at the start
    rescale_actions: bool = True  # map [-1, 1] to the actions' bounds; clip in any case
    random_start_ages: bool = True  # cut first episodes at random; else all may end at once

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    threads: int = 1  # CPU threads of torch; more are slower for networks this small
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
    log_probs, entropy = agent.evaluate_actions(batch["x"], batch["actions"])
    log_ratio = log_probs - batch["old_log_probs"]

    advantages = batch["advantages"]
    if args.norm_adv:
        advantages = normalize_advantages(advantages)
    pi_loss = policy_loss(log_ratio, advantages, args.clip_coef)

    values = agent.value(batch["x"])
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
    """Puts the gradient of the loss, shortened to max_grad_norm, into .grad → metrics."""
    loss, logged = ppo_loss(agent, batch, args)
    loss.backward()
    # clip_grad_norm_ returns the norm before clipping.
    logged["grad_norm"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    return logged


def explained_variance(advantages, returns):
    """(ev): 1 − Var(R̂ − V) / Var(R̂): 1 for a perfect critic, 0 for a constant one.
    R̂ − V is Â, as R̂ = Â + V. Inputs (B,) → float, or None where R̂ does not vary."""
    explained = 1 - advantages.var(correction=0) / returns.var(correction=0)
    return explained.item() if explained.isfinite() else None


class RunningStats(nn.Module):
    """Mean and variance of all rows seen so far; buffers, so that they are saved."""

    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0.0, dtype=torch.float64))

    def update(self, rows):
        """Merges rows (B, *shape) (Chan et al. 1979). The variance of all rows is the mean
        of the old and the new variance, weighted by rows, plus the variance between the two
        means, which is share (1 − share) delta²."""
        var, mean = torch.var_mean(rows.double(), 0, correction=0)
        share = len(rows) / (self.count + len(rows))  # the new rows' weight
        delta = mean - self.mean
        self.mean += share * delta
        self.var += share * (var - self.var) + share * (1 - share) * delta**2
        self.count += len(rows)


def scale_rewards(rewards, valid, stats, gamma, running_sum):
    """(rew-norm): r_t / √Var(G), so that returns, which the critic learns, are of order 1
    in all environments; then clipped to ±10. No mean is subtracted: a constant in each step
    would favour long or short episodes. G_t = γ G_{t−1} + r_t sums the episode's rewards so
    far, which are known; it varies about as much as the return, the sum of those to come.

    rewards (T, N); valid (T, N), False in the step after an episode, which only resets;
    stats, the variance of all G so far; running_sum (N,), the last G of the rollout before
    → scaled rewards (T, N), the last G of this rollout (N,)."""
    sums = []
    for t in range(len(rewards)):
        running_sum = gamma * running_sum * valid[t] + rewards[t]
        sums.append(running_sum)
    stats.update(torch.stack(sums)[valid])

    std = (stats.var + 1e-8).sqrt().float()
    return (rewards / std).clamp(-10, 10), running_sum


# ---------- Agent ----------
def mlp(inputs, units, outputs, output_gain):
    """Two hidden layers of tanh units. Orthogonal weights with a gain of √2, usual in PPO:
    from layer to layer, signals hardly shrink or grow."""
    layers = [nn.Linear(inputs, units), nn.Linear(units, units), nn.Linear(units, outputs)]
    for layer, gain in zip(layers, [math.sqrt(2), math.sqrt(2), output_gain]):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class Agent(nn.Module):
    """The policy (actor) and the value function (critic). x are observations, normalised if
    norm_obs is set."""

    def __init__(self, envs, args):
        super().__init__()
        inputs = envs.single_observation_space.shape[0]
        self.norm_obs = args.norm_obs
        self.obs_stats = RunningStats(inputs)
        self.return_stats = RunningStats()  # of one number, the G of (rew-norm)

        # Separate networks: the value loss has no gradient for the policy's weights. But
        # max_grad_norm shortens both gradients together, so a large value loss makes the
        # policy's gradient shorter, too.
        # The gain of 0.01 puts the means of all actions near 0 at first.
        space = envs.single_action_space
        actions = math.prod(space.shape)
        self.actor = mlp(inputs, 64, actions, output_gain=0.01)
        # In our benchmark, 256 units a layer did slightly better than 64, within the noise.
        self.critic = mlp(inputs, 256, 1, output_gain=1.0)
        # log σ, learned: one for each component of an action, the same in all states.
        self.log_std = nn.Parameter(torch.full((actions,), float(args.initial_log_std)))

        # Where both bounds are finite, [-1, 1] is mapped to [low, high]; elsewhere to
        # itself. Some spaces write "no bound" as a huge number: the span may need float64.
        self.low, self.high = space.low, space.high
        span = np.float64(self.high) - np.float64(self.low)
        mapped = (span < 1e30) & args.rescale_actions
        low, high = np.where(mapped, self.low, -1.0), np.where(mapped, self.high, 1.0)
        self.middle, self.scale = (low + high) / 2, (high - low) / 2

    def normalize(self, obs):
        """(obs-norm): x = (observation − mean) / √var, clipped to ±10. Both (..., D)."""
        if not self.norm_obs:
            return obs
        std = (self.obs_stats.var + 1e-8).sqrt().float()
        return ((obs - self.obs_stats.mean.float()) / std).clamp(-10, 10)

    def act(self, x, greedy=False):
        """x (B, D) → actions (B, A): sampled from π, or their means."""
        mean = self.actor(x)
        if greedy:
            return mean
        return mean + self.log_std.exp() * torch.randn_like(mean)

    def env_action(self, actions):
        """(action-map): actions (B, A), an array → what the environments get: mapped,
        clipped to the bounds, in their shape. The loss keeps the actions as sampled, since
        π is the density of these, not of the clipped ones."""
        actions = actions.reshape(-1, *self.low.shape) * self.scale + self.middle
        return np.clip(actions.astype(self.low.dtype), self.low, self.high)

    def value(self, x):
        """x (B, D) → V(s) (B,). Also (T, N, D) → (T, N)."""
        return self.critic(x).squeeze(-1)

    def evaluate_actions(self, x, actions):
        """x (B, D), actions (B, A) → log π(a|s), entropy, (B,). Also (T, N, D), (T, N, A).
        (gaussian): log π(a|s) = Σ_i [−½ z_i² − log σ_i − ½ log 2π], z = (a − mean) / σ.
        (entropy): Σ_i [log σ_i + ½ log 2πe]."""
        z = (actions - self.actor(x)) / self.log_std.exp()
        log_probs = -0.5 * z**2 - self.log_std - 0.5 * math.log(2 * math.pi)
        entropy = self.log_std + 0.5 * math.log(2 * math.pi * math.e)
        return log_probs.sum(-1), entropy.sum().expand(z.shape[:-1])  # alike in all rows


# ---------- Training ----------
def train(args, after_iteration=None):
    """Trains an agent, or continues the run in args.resume; returns the run directory.

    after_iteration(agent, metrics) is called after each iteration: a place to evaluate."""
    check(args)
    run = Run(args)  # reads the checkpoint of --resume
    envs, first_obs = start_envs(args, run.iteration)  # seeds torch, too
    try:
        if args.random_start_ages:
            start_at_random_ages(envs, run)
        run_iterations(args, run, envs, first_obs, after_iteration)
    finally:  # also after an error
        envs.close()
        run.close()
    return run.directory


def run_iterations(args, run, envs, first_obs, after_iteration):
    """The algorithm: rollout, advantages, update, again and again."""
    T, N = args.num_steps, args.num_envs
    iterations = args.total_timesteps // (T * N)

    device = set_up_torch(args)
    agent = Agent(envs, args).to(device)
    # Adam divides each gradient by its usual size + eps. With torch's eps of 1e-8, even
    # gradients of 1e-7, mere noise, would move their weight by about the learning rate.
    # fused: all weights in one operation, which is faster.
    optimizer = torch.optim.Adam(
        agent.parameters(), args.learning_rate, eps=1e-5, fused=True
    )
    backward = compiled(compute_gradient) if args.compile else compute_gradient
    run.open(agent, optimizer)  # a new directory; or loads weights and Adam's state

    # Environments use numpy, so a rollout is recorded in numpy.
    obs = np.zeros((T + 1, N, *envs.single_observation_space.shape), np.float32)
    actions = np.zeros((T, N, len(agent.log_std)), np.float32)
    rewards = np.zeros((T, N))
    terminated = np.zeros((T, N), bool)
    done = np.zeros((T, N), bool)  # this step ended an episode: terminated or truncated
    reset = np.zeros((T, N), bool)  # this step ignored its action and began a new episode
    reward_sums = torch.zeros(N, device=device)  # for (rew-norm)
    to_tensor = lambda array: torch.from_numpy(array).to(device)

    obs[T] = first_obs
    for iteration in range(run.iteration + 1, iterations + 1):
        if args.anneal_lr:  # (lr)
            remaining = 1 - (iteration - 1) / iterations
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

        # 1. Rollout: the policy plays T steps in N environments. When an episode ends,
        # obs[t + 1] is its last state. The step after that only resets: Gymnasium ignores
        # its action, and returns reward 0 and the first state of a new episode.
        obs[0] = obs[T]  # continue where the last rollout ended
        reset[0] = done[T - 1]
        with torch.no_grad():
            for t in range(T):
                x = agent.normalize(to_tensor(obs[t]))
                actions[t] = agent.act(x).cpu().numpy()
                env_action = agent.env_action(actions[t])
                obs[t + 1], rewards[t], terminated[t], truncated, _ = envs.step(env_action)
                done[t] = terminated[t] | truncated
        reset[1:] = done[:-1]

        # 2. Advantages. The weights are still those of the policy that played, so values
        # and log-probabilities can be computed for all steps at once.
        valid, ended = to_tensor(~reset), to_tensor(done)
        with torch.no_grad():
            x = agent.normalize(to_tensor(obs))
            values = agent.value(x)
            log_probs, _ = agent.evaluate_actions(x[:-1], to_tensor(actions))
        if args.norm_obs:  # only now, so that x above is what the policy has seen
            agent.obs_stats.update(to_tensor(obs[:-1])[valid])

        r = to_tensor(rewards).float()
        if args.norm_reward:
            stats = agent.return_stats
            r, reward_sums = scale_rewards(r, valid, stats, args.gamma, reward_sums)

        # Where an episode has no future, V(s_{t+1}) counts as 0. Steps that only reset get
        # advantages, too, but no other step sees these, since (gae) does not go back over
        # the end of an episode. They themselves are dropped below.
        no_future = to_tensor(terminated) if args.bootstrap_truncated else ended
        advantages = compute_gae(r, values, no_future, ended, args.gamma, args.gae_lambda)
        batch = {
            "x": x[:-1],
            "actions": to_tensor(actions),
            "old_log_probs": log_probs,
            "old_values": values[:-1],
            "advantages": advantages,
            "returns": advantages + values[:-1],  # (return), R̂
        }
        # (valid): steps that only reset are dropped, and (T, N, ...) becomes (B, ...).
        batch = {name: column[valid] for name, column in batch.items()}

        # 3. Update: several epochs over the batch, shuffled and cut into minibatches.
        logs = []
        for _ in range(args.update_epochs):
            # For torch.compile, all minibatches must have one size. So after the last of
            # the shuffled rows the first ones come again, until there are T * N, as before
            # those that only reset were dropped. No two resets follow each other, so at
            # least a third of the rows is left (T = 3: reset, step, reset), and 3 copies
            # are enough.
            order = torch.randperm(len(batch["actions"]), device=device).repeat(3)[: T * N]
            for rows in order.chunk(args.num_minibatches):
                # column.index_select(0, rows) is column[rows], but faster.
                minibatch = {k: column.index_select(0, rows) for k, column in batch.items()}
                optimizer.zero_grad()
                logged = backward(agent, minibatch, args)
                optimizer.step()
                logs.append({name: value.item() for name, value in logged.items()})
            epoch_kl = np.mean([log["approx_kl"] for log in logs[-args.num_minibatches :]])
            if args.target_kl is not None and epoch_kl > args.target_kl:
                break

        check_finite(agent, iteration)
        metrics = {name: np.mean([log[name] for log in logs]) for name in logs[0]}
        metrics |= {
            "explained_variance": explained_variance(batch["advantages"], batch["returns"]),
            "learning_rate": optimizer.param_groups[0]["lr"],
        }
        metrics = run.log(iteration, metrics, rewards, done, reset)  # adds scores
        if after_iteration is not None:
            after_iteration(agent, metrics)
        if iteration % run.save_every == 0 or iteration == iterations:
            run.save(iteration, agent, optimizer)


# ---------- Evaluation ----------
@torch.random.fork_rng()  # a training that calls it keeps its own random numbers
@torch.no_grad()
def evaluate(agent, args):
    """Plays args.eval_episodes episodes in each environment → scores (N, episodes)."""
    envs, obs = start_envs(args, 0)  # the same beginning in each evaluation
    device = next(agent.parameters()).device
    scores = [[] for _ in range(args.num_envs)]
    running = np.zeros(args.num_envs)  # scores of the running episodes

    total = args.num_envs * args.eval_episodes
    quiet = args.evaluate is None  # a training has its own bar
    with progress_bar("episodes", total, disable=quiet) as bar:
        while min(map(len, scores)) < args.eval_episodes:
            x = agent.normalize(torch.as_tensor(obs, dtype=torch.float32, device=device))
            actions = agent.act(x, args.greedy).cpu().numpy()
            obs, reward, terminated, truncated, _ = envs.step(agent.env_action(actions))
            running += reward  # reward is 0 in a step that only resets
            for n in np.flatnonzero(terminated | truncated):
                if len(scores[n]) < args.eval_episodes:
                    scores[n].append(running[n])
                running[n] = 0
            bar.update(sum(map(len, scores)) - bar.n)
    envs.close()
    return np.array(scores)


# ---------- Environments ----------
class UsageError(ValueError):
    """Bad input; main prints it."""


def make_envs(args):
    """A VectorEnv of args.num_envs environments with flat observations (N, D)."""
    options, errors = {}, (gym.error.Error, ImportError)
    if args.capture_video:
        options["render_mode"] = "rgb_array"
        errors += (TypeError,)  # of environments that take no render_mode
    try:
        envs = gym.make_vec(args.env_id, args.num_envs, args.vectorization_mode, **options)
    except errors as error:
        raise UsageError(f"--env-id {args.env_id}: {error}") from error

    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    is_box = isinstance(action_space, gym.spaces.Box) and action_space.dtype.kind == "f"
    if not is_box or math.prod(action_space.shape) == 0:
        raise UsageError(f"{args.env_id}: needs Box actions of floats; Discrete: ppo.py")
    if not obs_space.is_np_flattenable:
        raise UsageError(f"{args.env_id}: {obs_space} has no fixed number of values")
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise UsageError(f"{args.env_id}: must reset in the step after an end (NEXT_STEP)")

    if args.capture_video:
        if "rgb_array" not in envs.metadata.get("render_modes", []):
            raise UsageError(f"--capture-video: {args.env_id} has no render mode rgb_array")
        folder = f"{args.evaluate}/videos/{time.time_ns()}"
        is_filmed = lambda episode: episode < args.eval_episodes
        envs = gym.wrappers.vector.RecordVideo(
            envs, folder, record_first_only=True, episode_trigger=is_filmed
        )
    is_flat = isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) == 1
    return envs if is_flat else gym.wrappers.vector.FlattenObservation(envs)


def start_envs(args, iteration):
    """New environments and their first observations (N, D). All that is random from here on
    follows from seed and iteration. So a resumed run goes on with new random numbers, and
    two resumed from the same checkpoint are alike."""
    seed = int(np.random.default_rng([args.seed, iteration]).integers(2**30))
    torch.manual_seed(seed)
    envs = make_envs(args)
    obs, _ = envs.reset(seed=seed)  # each environment gets its own
    return envs, obs


def start_at_random_ages(envs, run):
    """Sets each environment's count of steps to a random number below its time limit. Its
    state is that of a new episode, as ever. Else, where all episodes last until the limit,
    all environments would end theirs in the same step, again and again, and a rollout
    shorter than an episode would show only one part of it. Without a time limit, or in a
    vector environment without set_attr, all stays as it is."""
    envs = envs.unwrapped  # a FlattenObservation has no set_attr
    if envs.spec.max_episode_steps is not None and hasattr(envs, "set_attr"):
        limits = envs.get_attr("_max_episode_steps")  # of gymnasium's TimeLimit
        rng = np.random.default_rng([run.args.seed, run.iteration])
        envs.set_attr("_elapsed_steps", rng.integers(limits).tolist())
        run.score[:] = math.nan  # first episodes may be cut short: none is logged


# ---------- Runs ----------
class Run:
    """A run directory: flags, logs, checkpoints; the progress bar; Weights & Biases."""

    def __init__(self, args):
        """Reads the checkpoint of --resume, if given. Writes nothing."""
        self.args = args
        self.steps = args.num_steps * args.num_envs  # of an iteration
        self.iterations = args.total_timesteps // self.steps
        self.save_every = args.save_every or math.ceil(self.iterations / 20)
        self.directory, self.checkpoint, self.iteration, seconds = None, None, 0, 0.0
        if args.resume is not None:
            self.directory = Path(args.resume)
            _, self.checkpoint = load_run(self.directory)
            self.iteration = self.checkpoint["iteration"]
            seconds = self.checkpoint["seconds"]
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
        try:
            if self.checkpoint is not None:
                agent.load_state_dict(self.checkpoint["agent"])
                optimizer.load_state_dict(self.checkpoint["optimizer"])
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

        command = f"python {SCRIPT} --resume {shlex.quote(str(self.directory))}"
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

    def log(self, iteration, metrics, rewards, done, reset):
        """Writes metrics, and the episodes that ended, without those cut at the start;
        rewards, done, reset (T, N)."""
        global_step = iteration * self.steps
        episodes = []
        for t in range(len(rewards)):
            self.score += rewards[t]
            self.length += ~reset[t]  # a step that only resets belongs to no episode
            for n in np.flatnonzero(done[t]):
                step = global_step - self.steps + (t + 1) * len(done[t])
                if not math.isnan(self.score[n]):  # nan: see start_at_random_ages
                    episodes.append((step, self.score[n], self.length[n]))
                self.score[n] = self.length[n] = 0

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
        checkpoint = {
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
    """The trained agent of a run. For a tensor obs (N, D), the environments get
    agent.env_action(agent.act(agent.normalize(obs)).numpy())."""
    args, checkpoint = load_run(run_dir)
    envs = make_envs(args)  # for their spaces
    agent = Agent(envs, args).to(device)
    envs.close()
    agent.load_state_dict(checkpoint["agent"])
    return agent.requires_grad_(False)


# ---------- Devices ----------
def set_up_torch(args):
    """Sets the number of CPU threads; returns the device."""
    torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU")
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    return torch.device("cuda" if on_gpu else "cpu")


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
    ranges = {"gamma": (0, 1), "gae_lambda": (0, 1)}
    ranges["num_steps"] = (2, math.inf)  # a single step could be a reset everywhere
    positive = "num_envs num_minibatches update_epochs threads save_every eval_episodes"
    ranges |= dict.fromkeys(positive.split(), (1, math.inf))
    ranges["initial_log_std"] = (-10, 10)
    for name, value in vars(args).items():
        low, high = ranges.get(name, (0, math.inf))
        if isinstance(value, int | float) and not low <= value <= high:  # or if nan
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {value}: must be in [{low}, {high}]")

    if args.evaluate is not None:
        if args.resume is not None:
            raise UsageError("--resume and --evaluate exclude each other")
        return
    rows, parts = args.num_envs * args.num_steps, args.num_minibatches
    if args.total_timesteps < rows:
        raise UsageError(f"--total-timesteps {args.total_timesteps}: must be >= {rows}")
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
#   "gymnasium[box2d,classic-control,mujoco]==1.4.0", "mujoco==3.3.7", "torch==2.13.0",
#   "numpy==2.4.6", "tyro==1.0.17", "tqdm==4.70.1", "moviepy==2.2.1", "wandb==0.31.0",
# ]
# ///
