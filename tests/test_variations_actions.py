"""The patches of ppo.py in benchmark/variations/ for action masks, actions of several
components, and pictures."""

from itertools import product
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import column, load_variation, make_args, train

import ppo

BOX = gym.spaces.Box(-1, 1, (2,))
# Quick on the small tasks below, where an action changes no later reward.
FLAGS = {"num_envs": 8, "num_steps": 32, "num_minibatches": 4, "update_epochs": 4}
FLAGS |= {"learning_rate": 2e-3, "gamma": 0.5, "total_timesteps": 8 * 32 * 30}


def make_agent(script, actions):
    """An Agent whose actions are not almost equally probable."""
    spaces = {"single_action_space": actions, "single_observation_space": BOX}
    agent = script.Agent(SimpleNamespace(**spaces), script.Args())
    torch.manual_seed(1)
    torch.nn.init.normal_(agent.actor[-1].weight)
    return agent


def scores(script, run_dir, name, **flags):
    """The mean returns of 80 sampled and of 80 greedy episodes."""
    agent = script.load_agent(run_dir)
    args = make_args(script, name, num_envs=8, eval_episodes=10, **flags)
    sampled = script.evaluate(agent, args).mean()
    args.greedy = True
    return sampled, script.evaluate(agent, args).mean()


# ---------- Action masks ----------
def test_an_impossible_action_has_no_part_in_probabilities_and_gradients(tmp_path):
    agent = make_agent(load_variation("action_masks", tmp_path), gym.spaces.Discrete(5))
    x, possible = torch.randn(200, 2), [1, 3]
    masks = torch.zeros(200, 5, dtype=torch.bool)
    masks[:, possible] = True
    logits = agent.actor(x)
    assert (logits.argmax(-1) != logits[:, possible].argmax(-1) * 2 + 1).any()
    assert torch.equal(agent.act(x, masks, True), logits[:, possible].argmax(-1) * 2 + 1)
    actions = agent.act(x, masks)
    assert set(actions.tolist()) == set(possible)

    log_probs, entropy = agent.evaluate_actions(x, actions, masks)
    expected = torch.distributions.Categorical(logits=logits[:, possible])
    torch.testing.assert_close(log_probs, expected.log_prob(actions // 2))
    torch.testing.assert_close(entropy, expected.entropy())
    (log_probs + entropy).sum().backward()
    gradient = agent.actor[-1].weight.grad.abs().sum(-1)
    assert gradient.isfinite().all() and (gradient > 0).tolist() == [0, 1, 0, 1, 0]


def test_training_with_masks_takes_no_impossible_action_and_is_faster(tmp_path):
    script = load_variation("action_masks", tmp_path)
    flags = FLAGS | {"total_timesteps": 1280}
    run_dir = train(script, tmp_path / "masked", "LocksStrict", **flags)
    assert min(scores(script, run_dir, "LocksStrict")) > 9
    assert max(column(run_dir, "entropy")) < np.log(2)  # of two actions
    run_dir = train(ppo, tmp_path / "free", "Locks", **flags)
    assert scores(ppo, run_dir, "Locks")[0] < 4


def test_masks_come_to_the_rows_where_they_were_used(tmp_path):
    script, once = load_variation("action_masks", tmp_path), {"num_minibatches": 1}
    once |= {"update_epochs": 1}  # then the ratio is 1 everywhere
    run_dir = train(script, tmp_path / "runs", "LocksStrict", **FLAGS | once)
    assert max(column(run_dir, "max_ratio_dev")) < 1e-5
    with pytest.raises(script.UsageError, match="has no action_mask"):
        train(script, tmp_path / "runs", "Stub")


# ---------- Actions of several components ----------
def test_components_are_those_of_the_joint_distribution(tmp_path):
    space = gym.spaces.MultiDiscrete([2, 3, 2])
    agent = make_agent(load_variation("multi_discrete", tmp_path), space)
    x = torch.randn(1, 2).expand(12, 2)
    first, second, third = (z.softmax(-1) for z in agent.actor(x[0]).split([2, 3, 2]))
    joint = torch.einsum("a,b,c->abc", first, second, third).flatten()
    actions = torch.tensor(list(product(range(2), range(3), range(2))))
    log_probs, entropy = agent.evaluate_actions(x, actions)
    torch.testing.assert_close(log_probs.exp(), joint)
    torch.testing.assert_close(entropy, -(joint * joint.log()).sum().expand(12))
    assert torch.equal(agent.act(x, greedy=True)[0], actions[joint.argmax()])
    drawn = agent.act(x[:1].expand(20_000, 2)) @ torch.tensor([6, 2, 1])
    frequencies = torch.bincount(drawn, minlength=12) / 20_000
    torch.testing.assert_close(frequencies, joint, atol=0.015, rtol=0)


@pytest.mark.parametrize("name", ["Pair", "Bits", "Square", "Four"])
def test_each_component_is_learned(name, tmp_path):
    script = load_variation("multi_discrete", tmp_path)
    run_dir = train(script, tmp_path / "runs", name, **FLAGS)
    assert min(scores(script, run_dir, name)) > 9.5


def test_other_spaces_are_refused(tmp_path):
    script = load_variation("multi_discrete", tmp_path)
    for name in ("StubBox", "FromOne", "MultiFromOne"):
        with pytest.raises(script.UsageError, match="needs discrete actions from 0"):
            train(script, tmp_path / "runs", name)


# ---------- Pictures ----------
def test_pictures_and_colours_become_channels_between_0_and_1(tmp_path):
    script, seen = load_variation("images", tmp_path), []
    network = script.CNN((2, 12, 10, 3), 5, output_gain=1.0)
    network.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.extend(inputs))
    x = torch.randint(256, (4, 3, 2, 12, 10, 3), dtype=torch.uint8)
    together = network(x)
    assert seen[0].shape == (12, 6, 12, 10) and together.shape == (4, 3, 5)
    assert torch.equal(seen[0][5, 4], x[1, 2, 1, :, :, 1] / 255)
    torch.testing.assert_close(network(x[1])[2], together[1, 2])


@pytest.mark.parametrize(
    ("name", "stack", "low", "high"),
    [("Drift", 1, 4, 6.5), ("Drift", 2, 8.5, 9.7), ("DriftColour", 2, 8.5, 9.7)],
)
def test_only_stacked_pictures_show_motion(name, stack, low, high, tmp_path, record):
    script = load_variation("images", tmp_path)
    batches = record(script, "ppo_loss")
    run_dir = train(script, tmp_path / "runs", name, stack=stack, **FLAGS)
    assert batches[0][0][1]["x"].dtype == torch.uint8
    for score in scores(script, run_dir, name, stack=stack):
        assert low < score < high  # 5 by chance, 9.5 at best: the first step is a guess
