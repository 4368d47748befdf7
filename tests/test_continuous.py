"""What ppo_continuous.py does differently: Gaussian policy, action map, new advantages."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import equal, make_agent, train

import ppo_continuous as ppo

PENDULUM = gym.spec("InvertedPendulum-v5").entry_point
gym.register("ShortPendulum-v0", PENDULUM, max_episode_steps=5)


def box(low, high):
    return gym.spaces.Box(np.array(low, np.float32), np.array(high, np.float32))


def double(rows):
    return np.array(rows, np.float64)


# The Gaussian policy: (gaussian), (entropy)


def test_log_probability_and_entropy_are_those_of_a_diagonal_gaussian():
    agent = make_agent(ppo, actions=box([-1] * 4, [1] * 4))
    with torch.no_grad():
        agent.log_std.copy_(torch.tensor([-1.0, 0.0, 0.5, 1.0]))
    x, actions = torch.randn(50, 4), torch.randn(50, 4)
    expected = torch.distributions.Normal(agent.actor(x), agent.log_std.exp())
    log_probs, entropy = agent.evaluate_actions(x, actions)
    torch.testing.assert_close(log_probs, expected.log_prob(actions).sum(-1))
    torch.testing.assert_close(entropy, expected.entropy().sum(-1))


@pytest.mark.parametrize("initial", [-0.5, 0.0, 0.7])
def test_samples_have_the_deviation_asked_for(initial):
    agent = make_agent(ppo, actions=box([-1] * 2, [1] * 2), initial_log_std=initial)
    x = torch.zeros(100_000, 4)
    actions = agent.act(x)
    np.testing.assert_allclose(actions.detach().std(0), math.exp(initial), rtol=0.02)
    np.testing.assert_allclose(actions.detach().mean(0), [0, 0], atol=0.02)
    assert torch.equal(agent.act(x, greedy=True), agent.actor(x))
    assert agent.actor(3 * torch.randn(100, 4)).abs().max() < 0.1  # means start close to 0


# (action-map)


def test_actions_are_mapped_onto_the_box():
    space = box([-2, 0, -0.4], [2, 10, 0.4])
    sampled = double([[-1, -1, -1], [0, 0, 0], [0.5, 0.5, 0.5], [9, 1, -9]])
    expected = [[-2, 0, -0.4], [0, 5, 0], [1, 7.5, 0.2], [2, 10, -0.4]]
    mapped = make_agent(ppo, actions=space)
    np.testing.assert_allclose(mapped.env_action(sampled), expected, rtol=1e-6)
    clipped = make_agent(ppo, actions=space, rescale_actions=False)
    expected = [[-1, 0, -0.4], [0, 0, 0], [0.5, 0.5, 0.4], [2, 1, -0.4]]
    np.testing.assert_allclose(clipped.env_action(sampled), expected, rtol=1e-6)


def test_where_a_bound_is_infinite_actions_are_clipped_to_the_finite_side():
    """The largest float32 stands for infinity, too."""
    huge = np.finfo(np.float32).max
    space = box([-np.inf, 0, -np.inf, -4, -huge], [np.inf, np.inf, 3, 4, huge])
    sampled = double([[-7, -7, -7, -7, -7], [7, 7, 7, 0.5, 7]])
    expected = [[-7, 0, -7, -4, -7], [7, 7, 3, 2, 7]]
    agent = make_agent(ppo, actions=space)
    np.testing.assert_allclose(agent.env_action(sampled), expected)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_actions_stay_in_the_box_in_its_own_precision(dtype):
    space = gym.spaces.Box(-0.1, 0.1, (1,), dtype)
    actions = make_agent(ppo, actions=space).env_action(np.float32([[-2], [0], [1]]))
    assert actions.dtype == dtype and all(space.contains(action) for action in actions)
    assert actions.flatten().tolist() == [space.low.item(), 0, space.high.item()]


def test_actions_of_any_shape_reach_the_environment_in_it():
    agent = make_agent(ppo, actions=gym.spaces.Box(-2, 2, (2, 3), np.float32))
    sampled = agent.act(torch.zeros(5, 4)).detach().numpy()
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
def test_advantages_are_recomputed(tmp_path, record, recompute):
    """Old values, advantages, returns are those of the critic at the start of the epoch."""
    gaes, losses = record(ppo, "compute_gae"), record(ppo, "ppo_loss")
    value_losses = record(ppo, "value_loss")
    flags = {"num_steps": 64, "num_minibatches": 4, "update_epochs": 3}
    flags |= {"recompute_advantages": recompute, "total_timesteps": 128, "num_envs": 2}
    # With this deviation the pendulum falls after three to five steps.
    flags |= {"env_id": "ShortPendulum-v0", "initial_log_std": 1.0, "learning_rate": 1e-2}
    train(ppo, tmp_path, **flags)
    assert len(gaes) == (3 if recompute else 1) and len(losses) == 12
    rest = [dict(enumerate(inputs)) | {1: None} for inputs, _ in gaes]  # all but values
    assert all(equal(inputs, rest[0]) for inputs in rest)
    # In the first minibatch of an epoch, new values are those of the critic as it is.
    pairs = [inputs[:2] for inputs, _ in value_losses[::4]]
    unchanged = [torch.allclose(*pair, rtol=1e-4, atol=1e-5) for pair in pairs]
    assert unchanged == [True, recompute, recompute]

    terminated, done = gaes[0][0][2:4]
    valid = torch.ones_like(done)
    valid[1:] = ~done[:-1]
    assert valid.sum() < 126 and 10 < terminated.sum() < done.sum() - 2
    for epoch in range(3):
        (_, values, *_), advantages = gaes[epoch if recompute else 0]
        columns = {"old_values": values[:-1], "advantages": advantages}
        columns["returns"] = advantages + values[:-1]
        for name, column in columns.items():
            rows = torch.cat([batch[name] for (_, batch, _), _ in losses[4 * epoch :][:4]])
            # Some come twice, in place of those that only reset.
            assert torch.equal(rows.unique(), column[valid].unique()), name
