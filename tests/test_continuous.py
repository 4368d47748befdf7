"""What ppo_continuous.py does differently from ppo.py: Gaussian policy, action map, defaults."""

import copy
import csv
import dataclasses
import math
import os
import re
import subprocess
import sys
import time

import environments
import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo_continuous as ppo

FIVE_STEPS = {"max_episode_steps": 5}
INTEGERS = {"actions": gym.spaces.Box(0, 3, (2,), np.int64)}
gym.register("ShortPendulum-v0", gym.spec("InvertedPendulum-v5").entry_point, **FIVE_STEPS)
gym.register("StubIntegers-v0", environments.Stub, kwargs=INTEGERS)

SMALL = {"num_envs": 2, "num_steps": 64, "num_minibatches": 4, "update_epochs": 2}


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def outcome(run_dir):
    """The rows of both csv files, without what depends on the time."""
    metrics = read(run_dir / "metrics.csv")
    for row in metrics:
        del row["sps"], row["seconds"]
    return metrics, read(run_dir / "episodes.csv")


def train(tmp_path, **flags):
    return ppo.train(ppo.Args(runs_dir=str(tmp_path), **flags))


def make_agent(actions, initial_log_std=-0.5, rescale_actions=True):
    torch.manual_seed(1)
    observations = gym.spaces.Box(-1, 1, (3,))
    return ppo.Agent(observations, actions, False, initial_log_std, rescale_actions)


def box(low, high):
    return gym.spaces.Box(np.array(low, np.float32), np.array(high, np.float32))


def double(rows):
    return np.array(rows, np.float64)


@pytest.fixture
def losses(monkeypatch):
    """The calls of ppo_loss: (minibatch, what is logged, the agent as it was)."""
    calls, original = [], ppo.ppo_loss

    def loss(agent, batch, args):
        before = copy.deepcopy(agent)
        result = original(agent, batch, args)
        calls.append((batch, result[1], before))
        return result

    monkeypatch.setattr(ppo, "ppo_loss", loss)
    return calls


# The Gaussian policy: (gaussian), (entropy)


def test_log_probability_and_entropy_are_those_of_a_diagonal_gaussian():
    agent = make_agent(box([-1] * 4, [1] * 4))
    with torch.no_grad():
        agent.log_std.copy_(torch.tensor([-1.0, 0.0, 0.5, 1.0]))
    x, action = torch.randn(50, 3), torch.randn(50, 4)
    reference = torch.distributions.Normal(agent.actor(x), agent.log_std.exp())
    log_prob, entropy = agent.evaluate_actions(x, action)
    torch.testing.assert_close(log_prob, reference.log_prob(action).sum(-1))
    torch.testing.assert_close(entropy, reference.entropy().sum(-1))


def test_gradients_of_the_loss_are_right():
    agent = make_agent(box([-1] * 2, [1] * 2)).double()
    args = ppo.Args(ent_coef=0.1)
    names = ("old_log_probs", "old_values", "returns", "advantages")
    batch = dict(zip(names, torch.randn(4, 6).double()))
    batch |= {"x": torch.randn(6, 3).double(), "actions": torch.randn(6, 2).double()}
    batch["old_log_probs"] -= 2

    ppo.ppo_loss(agent, batch, args)[0].backward()
    actor, critic = agent.actor, agent.critic
    for parameter in (agent.log_std, actor[0].bias, actor[-1].weight, critic[-1].bias):
        entry = parameter.detach().flatten()[:1]  # a view: nudge it and see what the loss does
        numbers = []
        for step in (1e-6, -2e-6):
            entry += step
            numbers.append(ppo.ppo_loss(agent, batch, args)[0].item())
        entry += 1e-6
        slope = (numbers[0] - numbers[1]) / 2e-6
        assert parameter.grad.flatten()[0].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)
        assert abs(slope) > 1e-6


@pytest.mark.parametrize("initial", [-0.5, 0.0, 0.7])
def test_samples_have_the_deviation_asked_for(initial):
    agent = make_agent(box([-1] * 2, [1] * 2), initial_log_std=initial)
    x = torch.zeros(100_000, 3)
    actions = agent.act(x)
    np.testing.assert_allclose(actions.detach().std(0), math.exp(initial), rtol=0.02)
    assert torch.equal(agent.act(x, greedy=True), agent.actor(x))
    assert agent.actor(3 * torch.randn(100, 3)).abs().max() < 0.1  # all means start close to 0


# (action-map)


def test_actions_are_mapped_onto_the_box():
    space = box([-2, 0, -0.4], [2, 10, 0.4])
    sampled = double([[-1, -1, -1], [0, 0, 0], [0.5, 0.5, 0.5], [9, 1, -9]])
    expected = [[-2, 0, -0.4], [0, 5, 0], [1, 7.5, 0.2], [2, 10, -0.4]]
    np.testing.assert_allclose(make_agent(space).env_action(sampled), expected, rtol=1e-6)
    clipped = make_agent(space, rescale_actions=False)
    expected = [[-1, 0, -0.4], [0, 0, 0], [0.5, 0.5, 0.4], [2, 1, -0.4]]
    np.testing.assert_allclose(clipped.env_action(sampled), expected, rtol=1e-6)


def test_where_a_bound_is_infinite_actions_are_clipped_to_the_finite_side():
    agent = make_agent(box([-np.inf, 0, -np.inf, -4], [np.inf, np.inf, 3, 4]))
    sampled = double([[-7, -7, -7, -7], [7, 7, 7, 0.5]])
    np.testing.assert_allclose(agent.env_action(sampled), [[-7, 0, -7, -4], [7, 7, 3, 2]])


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(np.float64, 0.1), (np.float16, 0.1), (np.float32, np.finfo(np.float32).max)],
)
def test_actions_stay_in_the_box_in_its_own_precision(dtype, bound):
    space = gym.spaces.Box(-bound, bound, (1,), dtype)
    with np.errstate(over="ignore"):  # the last bound times 2
        actions = make_agent(space).env_action(np.float32([[-2], [0], [1]]))
    assert actions.dtype == dtype and all(space.contains(action) for action in actions)
    assert actions.flatten().tolist() == [space.low.item(), 0, space.high.item()]


def test_actions_of_any_shape_reach_the_environment_in_it():
    agent = make_agent(gym.spaces.Box(-2, 2, (2, 3), np.float32))
    sampled = agent.act(torch.zeros(5, 3)).detach().numpy()
    assert sampled.shape == (5, 6)
    np.testing.assert_allclose(
        agent.env_action(sampled), np.clip(2 * sampled, -2, 2).reshape(5, 2, 3)
    )


def test_the_stored_action_is_the_unmapped_sample(tmp_path, monkeypatch, losses):
    sent, mapped = [], ppo.Agent.env_action
    spy = lambda agent, action: sent.append(mapped(agent, action)) or sent[-1]
    monkeypatch.setattr(ppo.Agent, "env_action", spy)
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 128, "initial_log_std": 1.0}
    train(tmp_path, **flags, **SMALL)
    stored = np.concatenate([batch["actions"].flatten() for batch, *_ in losses[:4]])
    assert np.abs(stored).max() > 1.5 and np.abs(sent).max() == 2.0
    np.testing.assert_allclose(np.sort(np.clip(2 * stored, -2, 2)), np.sort(np.ravel(sent)))


# Training


def test_first_minibatch_of_every_update_has_ratio_one(tmp_path, losses):
    train(tmp_path, env_id="Pendulum-v1", total_timesteps=512, **SMALL, target_kl=None)
    deviations = [logged["max_ratio_dev"].item() for _, logged, _ in losses]
    assert len(deviations) == 32
    assert max(deviations[::8]) < 1e-5 and min(deviations[7::8]) > 1e-4


@pytest.mark.parametrize("recompute", [True, False])
def test_advantages_are_recomputed_before_each_epoch(tmp_path, monkeypatch, losses, recompute):
    """In each epoch old values, advantages and returns are those of the critic of its start."""
    calls, original = [], ppo.compute_gae
    spy = lambda *inputs: calls.append((inputs, original(*inputs))) or calls[-1][1]
    monkeypatch.setattr(ppo, "compute_gae", spy)
    flags = SMALL | {"update_epochs": 3, "target_kl": None, "recompute_advantages": recompute}
    # With this deviation the pendulum falls after three to five steps.
    flags |= {"env_id": "ShortPendulum-v0", "initial_log_std": 1.0, "learning_rate": 1e-2}
    train(tmp_path, total_timesteps=128, **flags)
    assert len(calls) == (3 if recompute else 1) and len(losses) == 12

    for epoch in range(3):
        (rewards, values, terminated, done, *_), advantages = calls[epoch if recompute else 0]
        for now, first in zip((rewards, terminated, done), (calls[0][0][i] for i in (0, 2, 3))):
            assert torch.equal(now, first)
        valid = torch.ones_like(done)
        valid[1:] = ~done[:-1]
        assert valid.sum() < 126 and 10 < terminated.sum() < done.sum() - 2
        expected = torch.stack([values[:-1], advantages, advantages + values[:-1]], -1)[valid]
        minibatches = [batch for batch, *_ in losses[4 * epoch : 4 * epoch + 4]]
        names = ("old_values", "advantages", "returns")
        rows = [torch.stack([batch[name] for name in names], -1) for batch in minibatches]
        # Without the rows that fill up the epoch, which come twice:
        assert torch.equal(torch.cat(rows).unique(dim=0), expected.unique(dim=0))

        agent = losses[4 * epoch if recompute else 0][2]
        with torch.no_grad():
            for batch in minibatches:
                torch.testing.assert_close(batch["old_values"], agent.value(batch["x"]))
    before, after = (losses[i][2].value(losses[0][0]["x"]) for i in (0, 4))
    assert (before - after).abs().mean() > 0.01  # the critic has moved


def test_target_kl_stops_after_the_epoch_whose_mean_exceeds_it(tmp_path, losses):
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 128, **SMALL}
    train(tmp_path, **flags, target_kl=None)
    assert len(losses) == 8
    kl = np.mean([logged["approx_kl"].item() for _, logged, _ in losses[:4]])
    for target_kl, minibatches in ((0.99 * kl, 4), (1.01 * kl, 8)):
        losses.clear()
        train(tmp_path, **flags, target_kl=target_kl)
        assert len(losses) == minibatches


# One run, and what it becomes with another value of one flag.
PENDULUM = {"env_id": "Pendulum-v1", "total_timesteps": 512, "learning_rate": 3e-3, **SMALL}
SWITCHES = [
    field.name
    for field in dataclasses.fields(ppo.Args)
    if field.type is bool and field.name not in ("compile", "track", "greedy", "capture_video")
]
VALUES = {"gamma": 0.9, "gae_lambda": 0.5, "clip_coef": 0.01, "ent_coef": 0.1, "vf_coef": 1.0}
VALUES |= {"max_grad_norm": 0.1, "initial_log_std": 0.0, "save_every": 1, "seed": 2}


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return outcome(train(tmp_path_factory.mktemp("runs"), **PENDULUM))[0]


@pytest.mark.parametrize("name", [*SWITCHES, *VALUES])
def test_every_switch_changes_the_run(tmp_path, usual, name):
    value = VALUES.get(name, not getattr(ppo.Args(), name))
    assert outcome(train(tmp_path, **PENDULUM | {name: value}))[0] != usual


def test_one_seed_decides_everything_and_returns_are_the_environments_own(tmp_path):
    flags = {"env_id": "Hopper-v5", "total_timesteps": 4096}
    first = outcome(train(tmp_path, **flags))
    assert first == outcome(train(tmp_path, **flags))
    # Hopper pays 1 for every step that it stands, and little else at first: never scaled.
    assert len(first[1]) > 50
    for row in first[1]:
        assert 0.1 < float(row["episodic_return"]) / int(row["episodic_length"]) < 3


# Runs


# BipedalWalker keeps the state of its solver across reset.
@pytest.mark.parametrize("env_id", ["BipedalWalker-v3", "HalfCheetah-v5"])
def test_a_killed_run_resumes_exactly(tmp_path, env_id):
    flags = {"env_id": env_id, "num_envs": 8, "num_steps": 64, "total_timesteps": 6 * 8 * 64}
    flags |= {"save_every": 2, "update_epochs": 4}
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    program, quiet = [sys.executable, ppo.__file__], {"stderr": subprocess.DEVNULL}
    environ = os.environ | {"PYTHONWARNINGS": "ignore"}
    killed = subprocess.Popen(
        [*program, *argv, f"--runs-dir={tmp_path}/killed"], env=environ, **quiet
    )
    logged = []
    while len(logged) < 3 and killed.poll() is None:  # one row after the second checkpoint
        time.sleep(0.01)
        for path in tmp_path.glob("killed/*/metrics.csv"):
            run_dir, logged = path.parent, read(path)
    killed.kill()
    killed.wait()
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    assert 2 <= checkpoint["iteration"] < 6
    subprocess.run([*program, "--resume", str(run_dir)], check=True, **quiet)
    assert outcome(run_dir) == outcome(train(tmp_path / "whole", **flags))
    assert len(read(run_dir / "metrics.csv")) == 6


def test_a_saved_agent_plays_as_well_as_it_did_in_training(tmp_path):
    """The statistics are saved with the agent and frozen: no collapse after loading."""
    flags = {"num_envs": 16, "num_steps": 128, "num_minibatches": 8, "total_timesteps": 2**15}
    flags |= {"learning_rate": 3e-3, "seed": 3, "save_every": 1000}
    run_dir = train(tmp_path, env_id="InvertedPendulum-v5", **flags)
    returns = [float(row["episodic_return"]) for row in read(run_dir / "episodes.csv")]
    assert np.mean(returns[:20]) < 20
    last = np.mean(returns[-20:])
    assert last > 300  # it has learned
    agent = ppo.load_agent(run_dir)
    assert agent.obs_stats.count > 30_000
    args = dataclasses.replace(ppo.load_run(run_dir)[0], eval_episodes=3)
    before = copy.deepcopy(agent.state_dict())
    scores = ppo.evaluate(agent, args)
    assert scores.shape == (16, 3) and scores.mean() > 0.8 * last
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())
    agent.obs_stats.mean += 1  # what lost statistics would do
    assert ppo.evaluate(agent, args).mean() < 0.5 * last


# Bad input


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs the script with bad flags; returns what it says."""

    def run(*argv):
        monkeypatch.chdir(tmp_path)
        short = ["--total-timesteps", "2048"]  # should it train after all
        monkeypatch.setattr(sys, "argv", ["ppo_continuous.py", *short, *argv])
        with pytest.raises(SystemExit) as stop:
            ppo.main()
        assert stop.value.code == 2 and not list(tmp_path.iterdir())
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("env_id", "advice"),
    [
        ("CartPole-v1", "Discrete: ppo.py"),
        ("HalfCheeta-v5", "HalfCheetah"),
        ("HalfCheetah-v3", "gymnasium-robotics"),
        ("StubMultiDiscrete-v0", "Box actions of floats"),
        ("StubIntegers-v0", "Box actions of floats"),
        ("StubBoxSameStep-v0", "NEXT_STEP"),
    ],
)
def test_bad_environments_get_one_line(refused, env_id, advice):
    (line,) = refused("--env-id", env_id).splitlines()
    assert re.match(f"ppo_continuous.py: (--env-id )?{env_id}: ", line) and advice in line


@pytest.mark.parametrize("value", ["nan", "-11", "11"])
def test_a_bad_initial_deviation_is_refused(refused, value):
    message = refused("--initial-log-std", value)
    assert "--initial-log-std" in message and "must be in [-10, 10]" in message
