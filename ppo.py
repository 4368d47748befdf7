"""Proximal Policy Optimization (PPO) for discrete actions and vector observations.

    python ppo.py                                                # CartPole-v1, 30 s
    python ppo.py --env-id Acrobot-v1 --seed 2 --num-envs 8      # --help lists all flags
    python ppo.py --resume runs/DIR                              # continue a run
    python ppo.py --evaluate runs/DIR --greedy --capture-video   # play and film an agent

Read from the top; everything after train is tooling. The README explains labels like (gae).
Shapes: T steps of N environments; B rows, or (T, N); observations of size D.
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

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm

SCRIPT = "ppo.py"
LOGS = ("metrics.csv", "episodes.csv")  # in each run directory


# ---------- Flags ----------
@dataclass
class Args:  # tyro: each field is a flag, its comment the help
    env_id: str = "CartPole-v1"  # environment with discrete actions, or my_module:MyEnv-v0
    vectorization_mode: Literal["sync", "async"] | None = None  # None: the environment's, or sync
    total_timesteps: int = 500_000  # of all environments, in whole rollouts
    num_envs: int = 4  # parallel environments, N
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
    clip_coef: float = 0.2  # ε: moving the ratio further than this from 1 gains nothing, (clip)
    clip_vloss: bool = True  # clip the value loss with the same ε, (vf-clip)
    ent_coef: float = 0.01  # weight of the entropy bonus, c_e in (total)
    vf_coef: float = 0.5  # weight of the value loss, c_v in (total)
    max_grad_norm: float = 0.5  # upper limit of the gradient's norm; inf: none
    target_kl: float | None = None  # stop an update after an epoch with a larger approx_kl, (k3)
    norm_obs: bool = False  # normalise observations by running mean and variance, (obs-norm)
    norm_reward: bool = False  # divide rewards by the std of discounted sums, (rew-norm)
    reference: str | None = None  # run directory of an agent to start from; keeps its norm_obs
    kl_coef: float = 0.0  # β: penalty for leaving the reference, (kl-ref)

    device: Literal["auto", "cpu", "cuda"] = "auto"  # for training; auto: a GPU if there is one
    threads: int = 1  # CPU threads of torch in training
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
        lowest |= {"save_every": 1, "eval_episodes": 1, "num_steps": 2}
        highest = {"seed": 2**32 - 1, "gamma": 1, "gae_lambda": 1}
        for name, value in vars(self).items():
            low, high = lowest.get(name, 0), highest.get(name, math.inf)
            if isinstance(value, int | float) and not low <= value <= high:  # also refuses nan
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be in [{low}, {high}]")
        rows, parts = self.num_envs * self.num_steps, self.num_minibatches  # of a rollout
        if self.resume is None and self.evaluate is None:
            if self.total_timesteps < rows:
                raise UsageError(f"--total-timesteps {self.total_timesteps}: must be >= {rows}")
            if rows % parts > 0 or rows < 2 * parts:
                raise UsageError(f"--num-minibatches {parts}: must divide {rows}, >= 2 rows each")
            if self.kl_coef > 0 and self.reference is None:
                raise UsageError("--kl-coef needs --reference")
        if self.resume is not None and self.evaluate is not None:
            raise UsageError("--resume and --evaluate exclude each other")
        if (self.greedy or self.capture_video) and self.evaluate is None:
            raise UsageError("--greedy and --capture-video need --evaluate")


class UsageError(ValueError):
    """Bad input; main prints it."""


# ---------- Environments ----------
def make_envs(args):
    """A VectorEnv of args.num_envs environments with flat observations (N, D)."""
    options = {"render_mode": "rgb_array"} if args.capture_video else {}
    try:
        envs = gym.make_vec(args.env_id, args.num_envs, args.vectorization_mode, **options)
    except (gym.error.Error, ImportError) as error:
        raise UsageError(f"--env-id {args.env_id}: {error}") from error
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    if not isinstance(action_space, gym.spaces.Discrete) or action_space.start != 0:
        raise UsageError(f"{args.env_id}: needs Discrete actions from 0; Box: ppo_continuous.py")
    if envs.metadata.get("autoreset_mode") != gym.vector.AutoresetMode.NEXT_STEP:
        raise UsageError(f"{args.env_id}: must reset in the step after an episode (NEXT_STEP)")
    if args.capture_video:
        folder = f"{args.evaluate}/videos/{time.time_ns()}"
        options = {"record_first_only": True, "episode_trigger": lambda n: n < args.eval_episodes}
        envs = gym.wrappers.vector.RecordVideo(envs, folder, **options)
    is_flat = isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) == 1
    return envs if is_flat else gym.wrappers.vector.FlattenObservation(envs)


def start_envs(args, iteration):
    """New environments and observations. Seed and iteration decide all randomness from here on."""
    state = np.random.SeedSequence((args.seed, iteration)).generate_state(1)
    seed = int(state[0]) % (2**31 - 1 - args.num_envs)  # environment i gets seed + i < 2^31
    torch.manual_seed(seed)
    envs = make_envs(args)
    obs, _ = envs.reset(seed=seed)
    return envs, obs


# ---------- Agent ----------
class RunningStats(nn.Module):
    """Mean and variance of all rows seen so far; buffers, so that they are saved."""

    def __init__(self, *shape):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    def update(self, rows):
        """Merges rows (B, *shape) by Chan's formula; how they are split does not matter."""
        var, mean = torch.var_mean(rows.double(), 0, correction=0)
        share = len(rows) / (self.count + len(rows))  # the new rows' share of all
        delta = mean - self.mean
        self.mean += share * delta
        self.var += share * (var - self.var) + share * (1 - share) * delta**2
        self.count += len(rows)


def mlp(inputs, units, outputs, output_gain):
    """Two hidden layers of tanh units; orthogonal weights, zero biases."""
    layers = [nn.Linear(inputs, units), nn.Linear(units, units), nn.Linear(units, outputs)]
    for layer, gain in zip(layers, [math.sqrt(2), math.sqrt(2), output_gain]):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class Agent(nn.Module):
    """The policy (actor) and the value function (critic). x are observations after `normalize`."""

    def __init__(self, observation_space, action_space, norm_obs=False):
        super().__init__()
        self.norm_obs = norm_obs
        self.obs_stats = RunningStats(observation_space.shape[0])
        self.return_stats = RunningStats()  # for (rew-norm)
        self.actor = mlp(observation_space.shape[0], 64, int(action_space.n), 0.01)  # near-uniform
        self.critic = mlp(observation_space.shape[0], 64, 1, 1.0)

    def normalize(self, obs):
        """(obs-norm): observations (B, D) → x (B, D)."""
        if not self.norm_obs:
            return obs
        std = (self.obs_stats.var + 1e-8).sqrt().float()
        return ((obs - self.obs_stats.mean.float()) / std).clamp(-10, 10)

    def act(self, x, greedy=False):
        """x (B, D) → actions (B,): sampled from π, or the most probable ones."""
        logits = self.actor(x)
        if not greedy:  # −log(exponential) is Gumbel noise: the argmax then samples from π
            logits = logits - torch.empty_like(logits).exponential_().log()
        return logits.argmax(-1)

    def value(self, x):
        """x (B, D) → V(s) (B,)."""
        return self.critic(x).squeeze(-1)

    def evaluate_actions(self, x, action):
        """x (B, D), action (B,) → log π(a|s), (categorical), and (entropy), both (B,)."""
        log_probs = torch.log_softmax(self.actor(x), -1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1), entropy


def flat_parameters(agent):
    """Moves all parameters into one vector; weights and gradients become views of it and its grad.

    Only for speed: clipping and Adam then take one operation, not one per layer. Call it after
    agent.to(device), and zero the gradient in place: setting None breaks the views."""
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
    log_probs, entropy = agent.evaluate_actions(batch["x"], batch["actions"])
    log_ratio = log_probs - batch["old_log_probs"]
    advantages = batch["advantages"]
    if args.norm_adv:
        advantages = normalize_advantages(advantages)
    pi_loss = policy_loss(log_ratio, advantages, args.clip_coef)
    value_clip = args.clip_coef if args.clip_vloss else None
    v_loss = value_loss(agent.value(batch["x"]), batch["old_values"], batch["returns"], value_clip)
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


def scale_rewards(rewards, resets, stats, gamma, running_sum):
    """(rew-norm): divides rewards (T, N) by the standard deviation of their discounted sums, and
    clips to ±10. Sums restart at resets (T, N); running_sum (N,) is kept between rollouts."""
    sums = []
    for t in range(len(rewards)):
        running_sum = gamma * running_sum * ~resets[t] + rewards[t]
        sums.append(running_sum)
    stats.update(torch.stack(sums)[~resets])
    return (rewards / (stats.var + 1e-8).sqrt().float()).clamp(-10, 10), running_sum


# ---------- Training ----------
def train(args):
    """Trains an agent, or continues the run in args.resume; returns the run directory."""
    T, N = args.num_steps, args.num_envs
    batch_size = T * N
    iterations = args.total_timesteps // batch_size

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU")
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)  # for the initial weights
    envs = make_envs(args)  # for their spaces; training starts with new ones
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.norm_obs).to(device)
    reference = None if args.reference is None else load_agent(args.reference)
    if reference is not None:
        if [p.shape for p in reference.parameters()] != [p.shape for p in agent.parameters()]:
            raise UsageError(f"--reference {args.reference}: trained on other spaces")
        agent.load_state_dict(reference.to(device).state_dict())
        agent.norm_obs = args.norm_obs = reference.norm_obs
    parameters = flat_parameters(agent)  # one vector
    optimizer = torch.optim.Adam([parameters], args.learning_rate, eps=1e-5, fused=True)
    loss_function = torch.compile(ppo_loss, mode="reduce-overhead") if args.compile else ppo_loss

    # The environments use numpy, so a rollout is recorded in numpy.
    obs = np.zeros((T + 1, N, *envs.single_observation_space.shape), np.float32)
    done = np.zeros((T + 1, N), bool)  # done[t]: step t-1 ended an episode, step t only resets
    actions = np.zeros((T, N), np.int64)
    rewards = np.zeros((T, N))
    terminated = np.zeros((T, N), bool)
    to_tensor = lambda array: torch.from_numpy(array).to(device)

    run_dir, iterations_done, seconds_done = open_run(args, agent, optimizer)
    logger = Logger(args, run_dir, iterations_done * batch_size, iterations * batch_size)
    began = time.perf_counter() - seconds_done
    # Checkpoints cut episodes, so keep them ten time limits apart (if there is one).
    ten_episodes = 10 * (envs.spec.max_episode_steps or 0) / T  # in iterations
    save_every = args.save_every or math.ceil(max(iterations / 20, ten_episodes))
    for iteration in range(iterations_done + 1, iterations + 1):
        iteration_began = time.perf_counter()
        if (iteration - 1) % save_every == 0:  # also at the start
            # Each checkpoint starts new environments, so their state need not be saved.
            save_checkpoint(run_dir, agent, optimizer, iteration - 1, iteration_began - began)
            envs.close()
            envs, obs[T] = start_envs(args, iteration)
            done[T] = False
            sums = torch.zeros(N, device=device)  # of discounted rewards, for (rew-norm)
            logger.score, logger.length = np.zeros(N), np.zeros(N, int)
        if args.anneal_lr:  # (lr)
            remaining = 1 - (iteration - 1) / iterations
            optimizer.param_groups[0]["lr"] = args.learning_rate * remaining

        # 1. Rollout: the policy plays T steps in N environments.
        obs[0], done[0] = obs[T], done[T]  # continue where the last rollout ended
        with torch.inference_mode():  # a faster no_grad
            for t in range(T):
                x = agent.normalize(to_tensor(obs[t]))
                actions[t] = agent.act(x).cpu().numpy()
                obs[t + 1], rewards[t], terminated[t], truncated, _ = envs.step(actions[t])
                done[t + 1] = terminated[t] | truncated

        # 2. Advantages. Values and log-probabilities are those of the policy that played: its
        # weights have not changed yet, so both can be computed for all steps at once.
        with torch.no_grad():
            x = agent.normalize(to_tensor(obs))
            values = agent.value(x)
            log_probs, _ = agent.evaluate_actions(x[:-1], to_tensor(actions))
        resets, ended = to_tensor(done[:-1]), to_tensor(done[1:])  # ended: done_t of (gae)
        scaled = to_tensor(rewards).float()  # for learning
        if reference is not None:  # (kl-ref): drifting away costs reward
            reference_x = reference.normalize(to_tensor(obs[:-1]))
            reference_log_probs, _ = reference.evaluate_actions(reference_x, to_tensor(actions))
            drift = (log_probs - reference_log_probs) * ~resets
            scaled = scaled - args.kl_coef * drift
        if args.norm_reward:
            scaled, sums = scale_rewards(scaled, resets, agent.return_stats, args.gamma, sums)
        stops = to_tensor(terminated) if args.bootstrap_truncated else ended  # no value after these
        advantages = compute_gae(scaled, values, stops, ended, args.gamma, args.gae_lambda)
        batch = {
            "x": x[:-1],
            "actions": to_tensor(actions),
            "old_log_probs": log_probs,
            "old_values": values[:-1],
            "advantages": advantages,
            "returns": advantages + values[:-1],  # (return)
        }
        # (valid): drop the steps that only reset, (T, N, ...) → (B, ...)
        batch = {name: column[~resets] for name, column in batch.items()}
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
                grad_norm = parameters.grad.norm()  # as clip_grad_norm_ does, but faster
                parameters.grad *= (args.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1)
                optimizer.step()
                logged["grad_norm"] = grad_norm
                logs.append(torch.stack(list(logged.values())))
                epoch_kl += logged["approx_kl"]
            if args.target_kl is not None and epoch_kl / args.num_minibatches > args.target_kl:
                break
        if args.norm_obs:  # not earlier: update and values must see what the policy saw
            agent.obs_stats.update(to_tensor(obs[:-1])[~resets])

        if not all(value.isfinite().all() for value in agent.state_dict().values()):
            raise FloatingPointError(f"iteration {iteration}: the agent has a nan or infinity")
        means = torch.stack(logs).mean(0).tolist()  # over all minibatches
        now = time.perf_counter()
        metrics = {
            "iteration": iteration,
            "global_step": iteration * batch_size,
            **dict(zip(logged, means)),
            "explained_variance": explained.item() if explained.isfinite() else None,
            "kl_reference": drift[~resets].mean().item() if reference else None,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "sps": round(batch_size / (now - iteration_began)),
            "seconds": round(now - began, 3),
        }
        logger.log(metrics, rewards, done)
    save_checkpoint(run_dir, agent, optimizer, iterations, time.perf_counter() - began)
    return run_dir


# ---------- Evaluation ----------
@torch.inference_mode()
def evaluate(agent, args):
    """Plays args.eval_episodes episodes in each environment → scores (N, episodes)."""
    envs, obs = start_envs(args, 0)
    scores = np.zeros((args.num_envs, args.eval_episodes + 1))  # last column: surplus episodes
    episode = np.zeros(args.num_envs, int)  # each environment's column in scores
    while episode.min() < args.eval_episodes:
        x = agent.normalize(torch.as_tensor(obs, dtype=torch.float32))
        actions = agent.act(x, args.greedy).numpy()
        obs, reward, terminated, truncated, _ = envs.step(actions)
        scores[np.arange(args.num_envs), episode] += reward  # 0 in a step that only resets
        episode = np.minimum(episode + (terminated | truncated), args.eval_episodes)
    envs.close()
    return scores[:, :-1]


# ---------- Runs ----------
def open_run(args, agent, optimizer):
    """A new run directory or that of args.resume, and the iterations and seconds done."""
    if args.resume is not None:
        run_dir = Path(args.resume)
        _, checkpoint = load_run(run_dir)
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for name, size in checkpoint["sizes"].items():  # drop rows that are redone
            os.truncate(run_dir / name, size)
        return run_dir, checkpoint["iteration"], checkpoint["seconds"]
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
    sizes = {name: (run_dir / name).stat().st_size for name in LOGS}
    checkpoint = {"iteration": iteration, "seconds": seconds, "sizes": sizes}
    checkpoint |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
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
    """The trained agent of a run, on the CPU: agent.act(agent.normalize(obs)), obs a tensor."""
    args, checkpoint = load_run(run_dir)
    envs = make_envs(args)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.norm_obs)
    envs.close()
    agent.load_state_dict(checkpoint["agent"])
    return agent.requires_grad_(False)


class Logger:
    """Appends to metrics.csv and episodes.csv, shows progress, logs to Weights & Biases."""

    def __init__(self, args, run_dir, step, total_steps):
        print(f"Training in {run_dir}. To continue: python {SCRIPT} --resume {run_dir}", flush=True)
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

    def log(self, metrics, rewards, done):
        """Writes metrics and the episodes of a rollout: rewards (T, N), done (T+1, N)."""
        T, N = rewards.shape
        episodes = []
        for t in range(T):
            self.score += rewards[t]  # train zeroes it
            self.length += ~done[t]  # a step that only resets does not count
            for n in np.flatnonzero(done[t + 1]):
                step = metrics["global_step"] - (T - t - 1) * N
                episode = {"global_step": step, "episodic_return": self.score[n]}
                episodes.append(episode | {"episodic_length": self.length[n]})
                self.score[n] = self.length[n] = 0
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
#   "gymnasium[box2d,classic-control,toy-text]==1.4.0", "torch==2.13.0", "numpy==2.4.6",
#   "tyro==1.0.17", "tqdm==4.70.1", "moviepy==2.2.1", "wandb==0.31.0",
# ]
# ///
