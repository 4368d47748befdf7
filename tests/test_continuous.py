"""What ppo_continuous.py does differently: Gaussian policy, action map, start ages."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import make_agent, read, train
from gymnasium.envs.classic_control import PendulumEnv

import ppo_continuous as ppo


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


# (random_start_ages)


def ends(folder, env_id="Pendulum-v1", **flags):
    """Steps and lengths of the episodes that are logged."""
    flags |= {"num_envs": 8, "num_steps": 450, "update_epochs": 1, "total_timesteps": 3600}
    episodes = read(train(ppo, folder, env_id=env_id, **flags) / "episodes.csv")
    return [(int(row["global_step"]), int(row["episodic_length"])) for row in episodes]


class InDict(gym.ObservationWrapper):
    def __init__(self):
        super().__init__(PendulumEnv())
        self.observation_space = gym.spaces.Dict(x=self.env.observation_space)

    def observation(self, observation):
        return {"x": observation}


LIMITS = {"max_episode_steps": 500, "kwargs": {"max_episode_steps": 200}}  # the latter acts
gym.register("DictPendulum-v0", InDict, **LIMITS)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "DictPendulum-v0"])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_first_episodes_end_at_random_times_and_are_not_logged(tmp_path, env_id, mode):
    """Each environment has an episode cut short, and then whole ones of 200 steps."""
    flags = {"vectorization_mode": mode, "random_start_ages": True}
    found = ends(tmp_path / "random", env_id, **flags)
    ages = np.random.default_rng(1).integers(200, size=8)
    first = 201 - ages  # the step that only resets
    steps = [8 * (start + 201 * i + 200) for start in first for i in range(2)]
    assert found == [(step, 200) for step in sorted(steps) if step <= 3600]
    assert ends(tmp_path / "together") == [(1600, 200)] * 8 + [(3208, 200)] * 8


def test_without_a_time_limit_all_episodes_are_logged(tmp_path):
    found = ends(tmp_path, "RingTerminalBox-v0", random_start_ages=True)
    assert found[:8] == [(24, 3)] * 8


def test_vectors_without_set_attr_start_together():
    envs = SimpleNamespace(spec=SimpleNamespace(max_episode_steps=5))
    envs.unwrapped = envs
    run = SimpleNamespace(args=ppo.Args(), iteration=0, score=np.zeros(2))
    ppo.start_at_random_ages(envs, run)
    assert run.score.tolist() == [0, 0]
