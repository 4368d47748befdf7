"""What ppo_continuous.py does differently from ppo.py: the Gaussian policy, the action map, the defaults."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import environments  # noqa: F401, registers the environments
import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo_continuous as ppo

ROOT = Path(__file__).parents[1]
SMALL = {"num_envs": 2, "num_steps": 64, "num_minibatches": 4, "update_epochs": 2}


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def outcome(run_dir):
    metrics = [{k: v for k, v in row.items() if k not in ("sps", "seconds")} for row in read(run_dir / "metrics.csv")]
    return metrics, read(run_dir / "episodes.csv")


def train(tmp_path, **flags):
    return ppo.train(ppo.Args(runs_dir=str(tmp_path), **flags))


def make_agent(actions, size=3, **flags):
    torch.manual_seed(1)
    return ppo.Agent(gym.spaces.Box(-1, 1, (size,)), actions, ppo.Args(**flags))


def box(low, high):
    return gym.spaces.Box(np.array(low, np.float32), np.array(high, np.float32))


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
    x, action = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    old, values, returns, advantages = torch.randn(4, 6).double()
    minibatch = (x, action, old - 2, values, returns, advantages, torch.ones(6).double())

    def loss():
        return ppo.ppo_loss(agent, ppo.Args(ent_coef=0.1), *minibatch)[0]

    loss().backward()
    for parameter in (agent.log_std, agent.actor[0].bias, agent.actor[-1].weight, agent.critic[-1].bias):
        entry = parameter.detach().flatten()[:1]  # a view: nudge one entry and see what the loss does
        numbers = []
        for step in (1e-6, -2e-6):
            entry += step
            numbers.append(loss().item())
        entry += 1e-6
        slope = (numbers[0] - numbers[1]) / 2e-6
        assert parameter.grad.flatten()[0].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)
        assert abs(slope) > 1e-6
    live = torch.tensor([True, False, True, True, False, True])
    weighted = ppo.ppo_loss(agent, ppo.Args(ent_coef=0.1), *minibatch[:-1], live.double())[0].item()
    alone = ppo.ppo_loss(agent, ppo.Args(ent_coef=0.1), *(tensor[live] for tensor in minibatch))[0].item()
    assert weighted == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("initial", [-0.5, 0.0, 0.7])
def test_samples_have_the_deviation_asked_for(initial):
    agent = make_agent(box([-1] * 2, [1] * 2), initial_log_std=initial)
    x = torch.zeros(100_000, 3)
    actions = agent.act(x, agent.noise(100_000))
    np.testing.assert_allclose(actions.detach().std(0), math.exp(initial), rtol=0.02)
    assert torch.equal(agent.act(x, torch.zeros(2)), agent.actor(x))
    assert agent.actor(3 * torch.randn(100, 3)).abs().max() < 0.1  # at first all means are about 0


def test_actions_are_mapped_onto_the_box():
    agent = make_agent(box([-2, 0, -0.4], [2, 10, 0.4]))
    sampled = torch.tensor([[-1.0, -1.0, -1.0], [0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [9.0, 1.0, -9.0]])
    expected = [[-2, 0, -0.4], [0, 5, 0], [1, 7.5, 0.2], [2, 10, -0.4]]
    np.testing.assert_allclose(agent.env_action(sampled), expected, rtol=1e-6)
    clipped = make_agent(box([-2, 0, -0.4], [2, 10, 0.4]), rescale_actions=False)
    expected = [[-1, 0, -0.4], [0, 0, 0], [0.5, 0.5, 0.4], [2, 1, -0.4]]
    np.testing.assert_allclose(clipped.env_action(sampled), expected, rtol=1e-6)


def test_where_a_bound_is_infinite_actions_are_clipped_to_the_finite_side():
    agent = make_agent(box([-np.inf, 0, -np.inf, -4], [np.inf, np.inf, 3, 4]))
    sampled = torch.tensor([[-7.0, -7.0, -7.0, -7.0], [7.0, 7.0, 7.0, 0.5]])
    np.testing.assert_allclose(agent.env_action(sampled), [[-7, 0, -7, -4], [7, 7, 3, 2]])


def test_actions_stay_in_the_box_in_its_own_precision():
    for dtype, bound in ((np.float64, 0.1), (np.float16, 0.1), (np.float32, np.finfo(np.float32).max)):
        space = gym.spaces.Box(-bound, bound, (1,), dtype)
        actions = make_agent(space).env_action(torch.tensor([[-2.0], [0.0], [1.0]]))
        assert actions.dtype == dtype and all(space.contains(action) for action in actions)
        assert actions[1] == 0


def test_actions_of_any_shape_reach_the_environment_in_it():
    agent = make_agent(gym.spaces.Box(-2, 2, (2, 3), np.float32))
    assert agent.env_action(agent.act(torch.zeros(5, 3), agent.noise(5)).detach()).shape == (5, 2, 3)


def test_the_stored_action_is_the_unmapped_sample(tmp_path, monkeypatch):
    stored, sent, original = [], [], ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda *args: stored.append(args[3].clone()) or original(*args))
    mapped = ppo.Agent.env_action
    monkeypatch.setattr(ppo.Agent, "env_action", lambda self, a: sent.append(mapped(self, a)) or sent[-1])
    train(tmp_path, env_id="Pendulum-v1", total_timesteps=128, initial_log_std=1.0, **SMALL)
    stored = torch.cat(stored[:4])
    assert stored.abs().max() > 1.5 and np.abs(sent).max() == 2.0
    np.testing.assert_allclose(np.sort(np.clip(2 * stored.flatten(), -2, 2)), np.sort(np.ravel(sent)), rtol=1e-5)


def test_first_minibatch_of_every_update_has_ratio_one(tmp_path, monkeypatch):
    deviations, original = [], ppo.ppo_loss

    def loss(*args):
        result = original(*args)
        deviations.append(result[-1].expm1().abs().max().item())
        return result

    monkeypatch.setattr(ppo, "ppo_loss", loss)
    train(tmp_path, env_id="Pendulum-v1", total_timesteps=512, **SMALL)
    assert len(deviations) == 32 and max(deviations[::8]) < 1e-5 and min(deviations[7::8]) > 1e-4


def test_advantages_are_recomputed_in_every_epoch(tmp_path, monkeypatch):
    calls, original = [], ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda *args: calls.append(args[1]) or original(*args))
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 128, **SMALL}
    train(tmp_path, **flags)
    assert len(calls) == 2 and not torch.equal(*calls)
    train(tmp_path, recompute_advantages=False, **flags)
    assert len(calls) == 3


def test_target_kl_stops_after_the_epoch_that_exceeds_it(tmp_path, monkeypatch):
    losses, original = [], ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda *args: losses.append(1) or original(*args))
    for target_kl, minibatches in ((1e-9, 4), (1e9, 8), (None, 8)):
        losses.clear()
        train(tmp_path, env_id="Pendulum-v1", total_timesteps=128, **SMALL, target_kl=target_kl)
        assert len(losses) == minibatches


@pytest.mark.parametrize(
    "change",
    [{"initial_log_std": 0.0}, {"rescale_actions": False}, {"recompute_advantages": False}, {"norm_obs": False},
     {"norm_reward": False}, {"norm_adv": False}, {"clip_vloss": True}, {"norm_adv_over": "batch"}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_switch_changes_the_run(tmp_path, change):
    flags = {"env_id": "Pendulum-v1", "total_timesteps": 512, **SMALL}
    assert outcome(train(tmp_path, **flags))[0] != outcome(train(tmp_path, **flags | change))[0]


def test_one_seed_decides_everything_and_returns_are_the_environments_own(tmp_path):
    flags = {"env_id": "Hopper-v5", "total_timesteps": 4096}
    first = outcome(train(tmp_path, **flags))
    assert first == outcome(train(tmp_path, **flags))
    for row in first[1]:  # Hopper pays 1 for every step that it stands, and little else at first: never scaled
        assert 0.1 < float(row["episodic_return"]) / int(row["episodic_length"]) < 3


@pytest.mark.parametrize("env_id", ["BipedalWalker-v3", "HalfCheetah-v5"])
def test_a_killed_run_resumes_exactly(tmp_path, env_id):
    flags = [f"--env-id={env_id}", "--total-timesteps=12288", "--save-every=1", "--update-epochs=4"]

    def start(name, *more):
        command = [sys.executable, str(ROOT / "ppo_continuous.py"), *more]
        command += [*flags, f"--runs-dir={tmp_path / name}"] if name else []
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)

    killed = start("killed")
    while not (found := list((tmp_path / "killed").glob("*/checkpoint.pt"))):
        time.sleep(0.01)
    first = found[0].stat().st_ino
    while found[0].stat().st_ino == first and killed.poll() is None:  # until a checkpoint after training steps
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    checkpoint = torch.load(found[0].parent / "checkpoint.pt", weights_only=True)
    assert 1 <= checkpoint["iteration"] < 6
    whole = start("whole")
    assert whole.communicate() and whole.returncode == 0
    resumed = start(None, "--resume", str(found[0].parent))
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors.decode()
    assert outcome(found[0].parent) == outcome(next((tmp_path / "whole").iterdir()))


def test_a_saved_agent_plays_as_well_as_it_did_in_training(tmp_path):
    """The statistics are saved with the agent and frozen: no collapse after loading."""
    flags = {"num_envs": 16, "num_steps": 128, "total_timesteps": 60_000, "save_every": 0}
    args = ppo.Args(env_id="InvertedPendulum-v5", runs_dir=str(tmp_path), **flags)
    run_dir = ppo.train(args)
    returns = [float(row["episodic_return"]) for row in read(run_dir / "episodes.csv")]
    assert np.mean(returns[:20]) < 40
    last = np.mean(returns[-20:])
    assert last > 150  # it has learned
    checkpoint = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    assert checkpoint["obs_stats.count"] > 50_000
    scores = ppo.evaluate(ppo.Args(**vars(args) | {"eval_episodes": 3}), checkpoint)
    assert scores.shape == (16, 3) and scores.mean() > 0.8 * last
    checkpoint["obs_stats.mean"] += 1  # what lost statistics would do
    assert ppo.evaluate(ppo.Args(**vars(args) | {"eval_episodes": 3}), checkpoint).mean() < 0.5 * last


@pytest.mark.parametrize(
    ("argv", "advice"),
    [
        (["--env-id", "CartPole-v1"], "use ppo.py"),
        (["--env-id", "HalfCheeta-v5"], "HalfCheetah"),
        (["--env-id", "HalfCheetah-v3"], "mujoco"),
        (["--env-id", "StubMultiDiscrete-v0"], "Box space of floats"),
        (["--env-id", "StubBoxSameStep-v0"], "NEXT_STEP is needed"),
        (["--env-id", "CarRacing-v3"], "only ppo_atari.py"),
        (["--initial-log-std", "nan"], "must be in"),
        (["--num-minibatches", "33"], "must divide"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, monkeypatch, capsys, argv, advice):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ppo_continuous.py", *argv])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as stop:
        ppo.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and argv[0] in line and argv[1] in line and advice in line
    assert not list(tmp_path.iterdir())
