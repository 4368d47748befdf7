"""Patches of loss and loop: those of the claims, resets within a step, a memory."""

from types import SimpleNamespace

import conftest
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    STEPS,
    column,
    equal,
    load,
    load_variation,
    make_agent,
    make_args,
    outcome,
    train,
)
from torch.testing import assert_close

import ppo


class Cue(gym.Env):
    """The first observation says which action will be right in the last of 5 to 8 steps."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cue, self.left = self.np_random.integers([0, 5], [2, 9])
        return np.array([2 * self.cue - 1, 0], np.float32), {}

    def step(self, action):
        self.left -= 1
        reward = float(self.left == 0 and action == self.cue)
        return np.array([0, self.left == 1], np.float32), reward, self.left == 0, False, {}


gym.register("Cue-v0", Cue)
PENDULUM = gym.spec("InvertedPendulum-v5").entry_point
gym.register("ShortPendulum-v0", PENDULUM, max_episode_steps=5)


@pytest.fixture
def script(request, tmp_path, monkeypatch):
    """A patched script, under the name of the script."""
    variation, name = request.param.split(".")
    module = load_variation(variation, tmp_path, name)
    if hasattr(module.Args, "target_kl"):  # as make_args expects
        monkeypatch.setattr(conftest, name, module)
    return module


def patched(variation, *names):
    patches = [f"{variation}.{name}" for name in names or ("ppo", "ppo_continuous")]
    return pytest.mark.parametrize("script", patches, indirect=True)


@patched("dual_clip")
def test_dual_clip_bounds_what_a_bad_action_costs(script, tmp_path, record):
    log_ratio = torch.tensor([0.5, 2, 5, 5]).log().requires_grad_()
    rows = zip(log_ratio.split(1), torch.tensor([-1.0, -1, -1, 1]).split(1))
    losses = torch.stack([script.policy_loss(*row, 0.2) for row in rows])
    assert losses.tolist() == pytest.approx([0.8, 2, 3, -1.2])  # with the clip alone 5
    losses.sum().backward()
    assert log_ratio.grad.tolist() == pytest.approx([0, 2, 0, 0])
    calls = record(script, "policy_loss")
    flags = {"learning_rate": 0.03, "update_epochs": 20, "total_timesteps": 20 * STEPS}
    train(script, tmp_path, **flags)
    saved = [(ppo.policy_loss(*inputs) - loss).item() for inputs, loss in calls]
    assert min(saved) > -1e-4 and max(saved) > 0.01


@patched("spo")
def test_spo_penalises_the_squared_distance_of_the_ratio_from_1(script):
    log_ratio, advantages = torch.tensor([1.5, 0.5, 1.5]).log(), torch.tensor([2.0, -1, -1])
    rows = zip(log_ratio, advantages)
    losses = [script.policy_loss(*row, 0.2).item() for row in rows]
    # -(ratio A - |A| (ratio - 1)² / (2 ε))
    assert losses == pytest.approx([-3 + 1.25, 0.5 + 0.625, 1.5 + 0.625])


@patched("kl_penalty")
def test_the_kl_penalty_replaces_the_clip(script):
    zero, log_ratio = torch.zeros(1), torch.tensor([2.0]).log()
    evaluate_actions, value = lambda *_: (log_ratio, zero), lambda *_: zero
    agent = SimpleNamespace(evaluate_actions=evaluate_actions, value=value)
    names = ("x", "actions", "old_log_probs", "old_values", "returns")
    batch = dict.fromkeys(names, zero) | {"advantages": torch.ones(1)}
    args = script.Args(norm_adv=False, kl_penalty=3.0)
    _, logged = script.ppo_loss(agent, batch, args)
    assert logged["policy_loss"].item() == pytest.approx(3 * (1 - np.log(2)) - 2)


@patched("adaptive_kl")
def test_the_learning_rate_follows_the_kl(script, tmp_path, monkeypatch):
    kls, ppo_loss = iter([0.03, 0.03, 0.01, 0.004]), script.ppo_loss

    def loss_with_kl(*inputs):
        loss, logged = ppo_loss(*inputs)
        return loss, logged | {"approx_kl": torch.tensor(next(kls))}

    monkeypatch.setattr(script, "ppo_loss", loss_with_kl)
    flags = {"num_minibatches": 1, "update_epochs": 1, "anneal_lr": False}
    run_dir = train(script, tmp_path, learning_rate=9e-4, **flags)
    rates = np.array(column(run_dir, "learning_rate")) / 9e-4
    assert rates == pytest.approx([1 / 1.5, 1 / 2.25, 1 / 2.25, 1 / 1.5])


@patched("adam_betas")
def test_both_betas_are_equal(script, tmp_path):
    (group,) = load(train(script, tmp_path))["optimizer"]["param_groups"]
    assert tuple(group["betas"]) == (0.9, 0.9)


@patched("head_gain")
def test_the_head_has_a_gain_of_1(script):
    weight = make_agent(script, actions=3).actor[-1].weight
    assert_close(weight @ weight.T, torch.eye(3), atol=1e-5, rtol=0)


@patched("recompute_advantages", "ppo_continuous")
def test_advantages_are_recomputed(script, tmp_path, record):
    """Old values, advantages, returns are those of the critic at the start of the epoch."""
    gaes, losses = record(script, "compute_gae"), record(script, "ppo_loss")
    value_losses = record(script, "value_loss")
    flags = {"num_steps": 64, "num_minibatches": 4, "update_epochs": 3}
    flags |= {"total_timesteps": 128, "num_envs": 2, "learning_rate": 1e-2}
    # With this deviation the pendulum falls after three to five steps.
    train(script, tmp_path, env_id="ShortPendulum-v0", initial_log_std=1.0, **flags)
    assert len(gaes) == 3 and len(losses) == 12
    rest = [dict(enumerate(inputs)) | {1: None} for inputs, _ in gaes]  # all but values
    assert all(equal(inputs, rest[0]) for inputs in rest)
    # In the first minibatch of an epoch, new values are those of the critic as it is.
    for (new, old, *_), _ in value_losses[::4]:
        assert_close(new, old, rtol=1e-4, atol=1e-5)

    terminated, done = gaes[0][0][2:4]
    valid = torch.ones_like(done)
    valid[1:] = ~done[:-1]
    assert valid.sum() < 126 and 10 < terminated.sum() < done.sum() - 2
    for epoch, ((_, values, *_), advantages) in enumerate(gaes):
        columns = {"old_values": values[:-1], "advantages": advantages}
        columns["returns"] = advantages + values[:-1]
        for name, expected in columns.items():
            rows = torch.cat([batch[name] for (_, batch, _), _ in losses[4 * epoch :][:4]])
            # Some come twice, in place of those that only reset.
            assert torch.equal(rows.unique(), expected[valid].unique()), name


@patched("short_episodes", "ppo_continuous")
def test_only_training_has_short_episodes(script):
    for evaluate, limit in ((None, 100), ("runs/DIR", 200)):
        envs = script.make_envs(make_args(script, env_id="Pendulum-v1", evaluate=evaluate))
        assert envs.get_attr("spec")[0].max_episode_steps == limit
        envs.close()


@patched("no_clip_early_stop")
def test_early_stopping_replaces_the_clip(script, tmp_path, record):
    zeros, log_probs = torch.zeros(3), torch.tensor([0.5, 2, 3]).log()
    evaluate_actions, value = lambda *_: (log_probs, zeros), lambda *_: zeros
    agent = SimpleNamespace(evaluate_actions=evaluate_actions, value=value)
    names = ("x", "actions", "old_log_probs", "old_values", "returns")
    batch = dict.fromkeys(names, zeros) | {"advantages": torch.tensor([1.0, -1, 2])}
    _, logged = script.ppo_loss(agent, batch, script.Args(norm_adv=False))
    assert logged["policy_loss"].item() == pytest.approx(-(0.5 - 2 + 6) / 3)
    assert logged["mean_ratio_dev"].item() == pytest.approx((0.5 + 1 + 2) / 3)

    losses = record(script, "ppo_loss")
    env_id = {"ppo.py": "Pole-v0", "ppo_continuous.py": "PoleBox-v0"}[script.SCRIPT]
    flags = {"env_id": env_id, "learning_rate": 1e-2, "update_epochs": 5}
    train(script, tmp_path, **flags, total_timesteps=STEPS, ratio_limit=np.inf)
    deviations = [logged["mean_ratio_dev"].item() for _, (_, logged) in losses]
    for limit in (deviations[1] * 0.99, deviations[4], 2 * max(deviations)):
        expected = next((i for i, x in enumerate(deviations, 1) if x > limit), 10)
        losses.clear()
        train(script, tmp_path, **flags, total_timesteps=STEPS, ratio_limit=limit)
        assert len(losses) == expected


@patched("same_step")
def test_no_step_is_lost_and_values_cross_a_time_limit(script, tmp_path, record):
    """Ring pays 1, 2, 3 in turn. Its time limit is 4: an episode ends in state 1."""
    gaes, losses = record(script, "compute_gae"), record(script, "ppo_loss")
    flags = {"num_envs": 8, "total_timesteps": 6400, "gamma": 0.9, "num_minibatches": 4}
    flags |= {"learning_rate": 1e-2, "clip_vloss": False, "max_grad_norm": np.inf}
    flags |= {"update_epochs": 4, "norm_obs": False, "norm_reward": False}
    run_dir = train(script, tmp_path, "Ring", **flags)
    for (rewards, values, next_values, terminated, *_), found in gaes[:2]:
        assert rewards[:, 0].tolist() == [1, 2, 3, 1] * 4 and not terminated.any()
        values, next_values = values[:4, 0], next_values[:4, 0]
        assert_close(next_values, values[[1, 2, 3, 1]])
        deltas = rewards[:4, 0] + 0.9 * next_values - values
        assert_close(found[0, 0], sum(0.855**k * deltas[k] for k in range(4)))  # γλ
    assert {len(batch["x"]) for (_, batch, _), _ in losses} == {32}
    episodes = [tuple(row.values())[1:] for row in outcome(run_dir)[1]]
    assert episodes == [("7.0", "4")] * 1600
    first = (1 + 0.9 * 2 + 0.81 * 3) / (1 - 0.9**3)  # not limited to an episode
    truth = torch.tensor([first, 2 + 2.7 + 0.81 * first, 3 + 0.9 * first])
    agent = script.load_agent(run_dir)
    assert_close(agent.value(torch.eye(3)), truth, atol=0.5, rtol=0)
    assert (script.evaluate(agent, make_args(script, "Ring")) == 7).all()
    with pytest.raises(script.UsageError, match="SAME_STEP"):
        script.make_envs(make_args(script, "Ring", vectorization_mode=None))


@patched("same_step")
def test_statistics_are_those_of_all_steps(script, tmp_path):
    """In an episode the states are 0, 1, 2, 0; with γ = 0.9 rewards sum up to G."""
    flags = {"norm_obs": True, "norm_reward": True, "gamma": 0.9}
    run_dir = train(script, tmp_path, "Ring", **flags)
    agent, sums = script.load_agent(run_dir), [1, 2.9, 5.61, 6.049]
    assert agent.obs_stats.count == agent.return_stats.count == 4 * STEPS
    assert agent.obs_stats.mean.tolist() == pytest.approx([0.5, 0.25, 0.25])
    assert agent.return_stats.var.item() == pytest.approx(np.var(sums), rel=1e-5)
    again = train(script, tmp_path, "Ring", **flags, vectorization_mode="async")
    assert outcome(run_dir) == outcome(again)


@patched("lstm", "ppo")
def test_states_follow_the_episodes(script, tmp_path, record):
    """Each episode alone, with torch's own LSTM: four steps, then one that only resets."""
    losses, gaes = record(script, "ppo_loss"), record(script, "compute_gae")
    policy = record(script, "policy_loss")
    flags = {"num_steps": 8, "num_envs": 1, "num_minibatches": 1, "update_epochs": 1}
    flags |= {"total_timesteps": 40, "learning_rate": 0.0}
    agent = script.load_agent(train(script, tmp_path, "Ring", **flags))
    x, actions, old_log_probs, valid = (
        torch.cat([batch[name][:, 0] for (_, batch, _), _ in losses]).unflatten(0, (8, 5))
        for name in ("x", "actions", "old_log_probs", "valid")
    )  # (episode, step, ...)
    assert valid.tolist() == [[True] * 4 + [False]] * 8
    assert [len(inputs[0]) for inputs, _ in policy] == [7, 6, 7, 6, 6]

    def replay(network):
        lstm, cell = torch.nn.LSTM(3, 64, batch_first=True), network.lstm.state_dict()
        lstm.load_state_dict({f"{name}_l0": value for name, value in cell.items()})
        return network.head(lstm(x)[0])

    log_probs = replay(agent.actor).log_softmax(-1).gather(-1, actions.unsqueeze(-1))
    assert_close(log_probs.squeeze(-1)[valid], old_log_probs[valid])
    # Of the step that resets, too: it is the value of an episode's last state.
    values = torch.cat([inputs[1][:-1] for inputs, _ in gaes]).reshape(8, 5)
    assert_close(replay(agent.critic).squeeze(-1), values)
    for (before, _), (after, _) in zip(gaes, gaes[1:]):
        assert_close(before[1][-1], after[1][0])  # V(s_T)
    weights = agent.actor.lstm.weight_hh
    assert_close(weights.T @ weights, torch.eye(64), atol=1e-4, rtol=0)


@patched("lstm", "ppo")
def test_evaluation_resets_states_and_bad_flags_are_refused(script, record):
    args = make_args(script, "Ring", eval_episodes=3)
    agent = script.Agent(script.make_envs(args), args)
    calls = record(agent.actor, "forward")
    script.evaluate(agent, args)
    begun = [first[0, 0].item() for (_, first, _), _ in calls]
    assert begun == [step in (5, 10) for step in range(14)]  # 0 starts with zeros
    for (_, (_, states)), ((_, _, before), _) in zip(calls, calls[1:]):
        assert torch.equal(states[0], before)
    with pytest.raises(script.UsageError, match="--num-minibatches 2: must divide 3 envs"):
        script.check(make_args(script, num_envs=3))


@patched("lstm", "ppo")
def test_a_cue_is_remembered(script, tmp_path, record):
    """Without a memory, one of two actions is right by chance."""
    losses = record(script, "ppo_loss")
    flags = {"env_id": "Cue-v0", "num_envs": 32, "num_steps": 32, "num_minibatches": 4}
    flags |= {"update_epochs": 4, "learning_rate": 3e-3, "total_timesteps": 16 * 1024}
    scores = [column(train(x, tmp_path, **flags), "episodic_return") for x in (script, ppo)]
    assert np.mean(scores[0][-2:]) > 0.9 and 0.3 < np.mean(scores[1][-2:]) < 0.7
    deviations = [logged["max_ratio_dev"].item() for _, (_, logged) in losses]
    assert max(deviations[::16]) < 1e-5 and min(deviations[15::16]) > 1e-4
    epoch = torch.cat([batch["old_log_probs"] for (_, batch, _), _ in losses[-4:]], 1)
    assert epoch.shape == epoch.unique(dim=1).shape == (32, 32)  # each environment once
