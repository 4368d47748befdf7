"""What ppo_continuous.py does differently: Gaussian policy, action map, new advantages."""

import copy
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import make_args, outcome, train

import ppo_continuous as ppo

PENDULUM = gym.spec("InvertedPendulum-v5").entry_point
gym.register("ShortPendulum-v0", PENDULUM, max_episode_steps=5)


def make_agent(actions, **flags):
    torch.manual_seed(1)
    spaces = {"single_observation_space": gym.spaces.Box(-1, 1, (3,))}
    envs = SimpleNamespace(**spaces, single_action_space=actions)
    return ppo.Agent(envs, ppo.Args(norm_obs=False, **flags))


def box(low, high):
    return gym.spaces.Box(np.array(low, np.float32), np.array(high, np.float32))


def double(rows):
    return np.array(rows, np.float64)


# The Gaussian policy: (gaussian), (entropy)


def test_log_probability_and_entropy_are_those_of_a_diagonal_gaussian():
    agent = make_agent(box([-1] * 4, [1] * 4))
    with torch.no_grad():
        agent.log_std.copy_(torch.tensor([-1.0, 0.0, 0.5, 1.0]))
    x, actions = torch.randn(50, 3), torch.randn(50, 4)
    expected = torch.distributions.Normal(agent.actor(x), agent.log_std.exp())
    log_probs, entropy = agent.evaluate_actions(x, actions)
    torch.testing.assert_close(log_probs, expected.log_prob(actions).sum(-1))
    torch.testing.assert_close(entropy, expected.entropy().sum(-1))


@pytest.mark.parametrize("initial", [-0.5, 0.0, 0.7])
def test_samples_have_the_deviation_asked_for(initial):
    agent = make_agent(box([-1] * 2, [1] * 2), initial_log_std=initial)
    x = torch.zeros(100_000, 3)
    actions = agent.act(x)
    np.testing.assert_allclose(actions.detach().std(0), math.exp(initial), rtol=0.02)
    np.testing.assert_allclose(actions.detach().mean(0), [0, 0], atol=0.02)
    assert torch.equal(agent.act(x, greedy=True), agent.actor(x))
    assert agent.actor(3 * torch.randn(100, 3)).abs().max() < 0.1  # means start close to 0


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
    """The largest float32 stands for infinity, too."""
    huge = np.finfo(np.float32).max
    agent = make_agent(box([-np.inf, 0, -np.inf, -4, -huge], [np.inf, np.inf, 3, 4, huge]))
    sampled = double([[-7, -7, -7, -7, -7], [7, 7, 7, 0.5, 7]])
    expected = [[-7, 0, -7, -4, -7], [7, 7, 3, 2, 7]]
    np.testing.assert_allclose(agent.env_action(sampled), expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_actions_stay_in_the_box_in_its_own_precision(dtype):
    space = gym.spaces.Box(-0.1, 0.1, (1,), dtype)
    actions = make_agent(space).env_action(np.float32([[-2], [0], [1]]))
    assert actions.dtype == dtype and all(space.contains(action) for action in actions)
    assert actions.flatten().tolist() == [space.low.item(), 0, space.high.item()]


def test_actions_of_any_shape_reach_the_environment_in_it():
    agent = make_agent(gym.spaces.Box(-2, 2, (2, 3), np.float32))
    sampled = agent.act(torch.zeros(5, 3)).detach().numpy()
    assert sampled.shape == (5, 6)
    expected = np.clip(2 * sampled, -2, 2).reshape(5, 2, 3)
    np.testing.assert_allclose(agent.env_action(sampled), expected)


def test_the_stored_action_is_the_unmapped_sample(tmp_path, record):
    sent, losses = record(ppo.Agent, "env_action"), record(ppo, "ppo_loss")
    flags = {"total_timesteps": 32, "initial_log_std": 1.0}
    train(ppo, tmp_path, env_id="Pendulum-v1", **flags)
    sent = np.concatenate([actions for _, actions in sent])
    stored = np.concatenate([batch["actions"] for (_, batch, _), _ in losses[:2]])
    assert np.abs(stored).max() > 1.5 and np.abs(sent).max() == 2.0
    np.testing.assert_allclose(np.sort(np.clip(2 * stored, -2, 2), 0), np.sort(sent, 0))


# Training


@pytest.mark.parametrize("recompute", [True, False])
def test_advantages_are_recomputed(tmp_path, monkeypatch, record, recompute):
    """Old values, advantages, returns are those of the critic at the start of the epoch."""
    gaes, losses, ppo_loss = record(ppo, "compute_gae"), [], ppo.ppo_loss

    def keep(agent, batch, args):
        losses.append((batch, copy.deepcopy(agent)))
        return ppo_loss(agent, batch, args)

    monkeypatch.setattr(ppo, "ppo_loss", keep)
    flags = {"num_steps": 64, "num_minibatches": 4, "update_epochs": 3}
    flags |= {"recompute_advantages": recompute, "total_timesteps": 128, "num_envs": 2}
    # With this deviation the pendulum falls after three to five steps.
    flags |= {"env_id": "ShortPendulum-v0", "initial_log_std": 1.0, "learning_rate": 1e-2}
    train(ppo, tmp_path, **flags)
    assert len(gaes) == (3 if recompute else 1) and len(losses) == 12

    for epoch in range(3):
        inputs, advantages = gaes[epoch if recompute else 0]
        rewards, values, terminated, done, *more = inputs
        assert more == list(gaes[0][0][4:])
        for i in (0, 2, 3):
            assert torch.equal(inputs[i], gaes[0][0][i])
        valid = torch.ones_like(done)
        valid[1:] = ~done[:-1]
        assert valid.sum() < 126 and 10 < terminated.sum() < done.sum() - 2
        returns = advantages + values[:-1]
        expected = torch.stack([values[:-1], advantages, returns], -1)[valid]
        minibatches = [batch for batch, _ in losses[4 * epoch : 4 * epoch + 4]]
        names = ("old_values", "advantages", "returns")
        rows = [torch.stack([batch[name] for name in names], -1) for batch in minibatches]
        # Without the rows that fill up the epoch, which come twice:
        assert torch.equal(torch.cat(rows).unique(dim=0), expected.unique(dim=0))

        agent = losses[4 * epoch if recompute else 0][1]
        with torch.no_grad():
            for batch in minibatches:
                torch.testing.assert_close(batch["old_values"], agent.value(batch["x"]))
    before, after = (losses[i][1].value(losses[0][0]["x"]) for i in (0, 4))
    assert (before - after).abs().mean() > 0.01  # the critic has moved


def test_mujoco_repeats_and_returns_are_the_environments_own(tmp_path):
    flags = {"env_id": "Hopper-v5", "num_steps": 128, "total_timesteps": 2048}
    first = outcome(train(ppo, tmp_path, **flags))
    assert first == outcome(train(ppo, tmp_path, **flags))
    # Hopper pays 1 for every step that it stands, and little else at first: never scaled.
    assert len(first[1]) > 30
    for row in first[1]:
        assert 0.1 < float(row["episodic_return"]) / int(row["episodic_length"]) < 3


@pytest.mark.slow
def test_a_saved_agent_plays_as_well_as_it_did_in_training(tmp_path):
    """The statistics are saved with the agent and frozen: no collapse after loading."""
    flags = {"num_envs": 16, "num_steps": 128, "num_minibatches": 8}
    flags |= {
        "total_timesteps": 2**15,
        "learning_rate": 3e-3,
        "seed": 3,
        "update_epochs": 10,
    }
    flags["target_kl"] = 0.02
    run_dir = train(ppo, tmp_path, env_id="InvertedPendulum-v5", **flags)
    returns = [float(row["episodic_return"]) for row in outcome(run_dir)[1]]
    last = np.mean(returns[-20:])
    assert np.mean(returns[:20]) < 20 and last > 300  # it has learned
    agent = ppo.load_agent(run_dir)
    args = make_args(ppo, env_id="InvertedPendulum-v5", num_envs=16, eval_episodes=3)
    assert ppo.evaluate(agent, args).mean() > 0.8 * last
    agent.obs_stats.mean += 1  # what lost statistics would do
    assert ppo.evaluate(agent, args).mean() < 0.5 * last
