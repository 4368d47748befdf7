"""Every equation, pinned to numbers in each script that has it; labels as in the README."""

import itertools
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import stable_baselines3
import torch
from conftest import make_agent
from stable_baselines3.common.buffers import RolloutBuffer

import ppo
import ppo_atari
import ppo_continuous

discrete = pytest.mark.parametrize("script", [ppo, ppo_atari], indirect=True)
vectors = pytest.mark.parametrize("script", [ppo, ppo_continuous], indirect=True)


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def random_rollout(steps=40, envs=3, seed=0):
    """rewards, values, terminated, done of random data with both kinds of ends."""
    rng = np.random.default_rng(seed)
    terminated = rng.random((steps, envs)) < 0.1
    done = terminated | (rng.random((steps, envs)) < 0.1)
    rewards, values = rng.normal(size=(steps, envs)), rng.normal(size=(steps + 1, envs))
    return [torch.tensor(x) for x in (rewards, values, terminated, done)]


def loss_of(script, log_ratio, advantages=0, values=0, entropy=0, returns=0, **flags):
    """ppo_loss of an agent with these log-ratios, values (0 before) and entropies."""
    zeros = torch.zeros_like(log_ratio)
    old_log_probs = zeros - 1.5
    agent = SimpleNamespace(
        features=lambda obs: obs,
        evaluate_actions=lambda x, actions: (old_log_probs + log_ratio, zeros + entropy),
        value=lambda x: zeros + values,
    )
    batch = {"x": None, "obs": None, "actions": None, "old_log_probs": old_log_probs}
    batch |= {"old_values": zeros, "advantages": zeros + advantages}
    batch["returns"] = zeros + returns
    return script.ppo_loss(agent, batch, script.Args(**flags))


# (ratio), (pg), (cpi), (clip)


def test_policy_gradient_and_both_surrogates_have_one_gradient_at_the_old_policy(script):
    torch.manual_seed(0)
    logits, advantages = torch.randn(64, 5).double(), torch.randn(64).double()
    log_prob = torch.log_softmax(logits.requires_grad_(), -1)[:, 2]
    log_ratio = log_prob - log_prob.detach()
    losses = [-(log_prob * advantages).mean()]  # (pg); then (cpi), (clip)
    losses += [script.policy_loss(log_ratio, advantages, clip) for clip in (math.inf, 0.2)]
    gradient = lambda loss: torch.autograd.grad(loss, logits, retain_graph=True)[0]
    expected, *others = map(gradient, losses)
    for other in others:
        torch.testing.assert_close(other, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (1.1, 2.0, 2.2, 2.0),  # worked number 1: the probability was 0.2, and is 0.22
        (1.1, -2.0, -2.2, -2.0),
        (0.5, 2.0, 1.0, 2.0),
        (0.5, -2.0, -1.6, 0.0),
        (2.5, 2.0, 2.4, 0.0),  # or 0.5
        (2.5, -2.0, -5.0, -2.0),
        (3.0, 1.0, 1.2, 0.0),  # worked number 4: it was 0.01, and is 0.03
        (3.0, -1.0, -3.0, -1.0),
    ],
)
def test_the_six_clip_cases(script, ratio, advantage, objective, slope):
    log_ratio = double(math.log(ratio)).requires_grad_()
    loss = script.policy_loss(log_ratio, double(advantage), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-objective)
    assert log_ratio.grad.item() == pytest.approx(-slope * ratio)  # d ρ / d log ρ = ρ


def test_small_steps_have_a_kl_of_half_their_mean_square(script):
    """Of ρ − 1; worked number 4: ½ 0.2² = 0.02."""
    for eps, error in ((0.02, 1e-3), (0.2, 0.03)):
        _, logged = loss_of(script, double(1 + eps, 1 - eps).log())
        assert logged["approx_kl"].item() == pytest.approx(0.5 * eps**2, rel=error)


# (vf), (vf-clip), (total), (k1), (k3), (clipfrac)


def test_value_loss_clipped(script):
    """V_old is 1, the target 2. V stays in the interval; moves to the target, where the
    clipped error is larger; moves away, where the unclipped error pulls it back."""
    values = double(1.1, 1.5, 0.5).requires_grad_()
    loss = script.value_loss(values, double(1, 1, 1), double(2, 2, 2), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.9**2 + 0.8**2 + 1.5**2) / 3)
    torch.testing.assert_close(values.grad, double(-0.9, 0, -1.5) / 3)


def test_total_loss_and_what_is_logged_of_a_minibatch(script):
    """Four rows worked by hand: ratios 1.25, 0.7, 1, 1.1 and ε = 0.15."""
    log_ratio = double(1.25, 0.7, 1.0, 1.1).log().requires_grad_()
    values = double(0.5, 2.0, -1.0, 0.1).requires_grad_()
    entropy = double(0.1, 0.2, 0.4, 0.9).requires_grad_()
    rows = {"advantages": double(1, -1, 2, -3), "values": values, "entropy": entropy}
    rows |= {"returns": 1, "clip_coef": 0.15, "vf_coef": 0.3, "ent_coef": 0.07}
    loss, logged = loss_of(script, log_ratio, **rows, norm_adv=False, clip_vloss=True)
    expected = {
        "policy_loss": -(1.15 - 0.85 + 2.0 - 3.3) / 4,
        "value_loss": 0.5 * (0.85**2 + 1.0**2 + 2.0**2 + 0.9**2) / 4,  # V within ±0.15
        "entropy": 0.4,
        "old_approx_kl": -math.log(1.25 * 0.7 * 1.1) / 4,  # (k1)
        "approx_kl": (0.25 - 0.3 + 0.1 - math.log(1.25 * 0.7 * 1.1)) / 4,  # (k3)
        "clipfrac": 2 / 4,
        "max_ratio_dev": 0.3,
    }
    assert {name: value.item() for name, value in logged.items()} == pytest.approx(expected)
    assert not any(value.requires_grad for value in logged.values())
    total = expected["policy_loss"] + 0.3 * expected["value_loss"] - 0.07 * 0.4
    assert loss.item() == pytest.approx(total)
    loss.backward()
    torch.testing.assert_close(log_ratio.grad, double(0, 0, -2.0, 3.3) / 4)
    torch.testing.assert_close(values.grad, 0.3 * double(0, 1, -2, -0.9) / 4)
    torch.testing.assert_close(entropy.grad, double(-0.07, -0.07, -0.07, -0.07) / 4)

    _, logged = loss_of(script, log_ratio, **rows, norm_adv=False, clip_vloss=False)
    value_loss = 0.5 * (0.5**2 + 1 + 2**2 + 0.9**2) / 4
    assert logged["value_loss"].item() == pytest.approx(value_loss)
    # (norm): the mean is 3, the unbiased variance 14/3.
    _, logged = loss_of(script, log_ratio, **rows | {"advantages": double(6, 3, 2, 1)})
    objective = (1.15 * 3 + 0.7 * 0 - 1.0 * 1 - 1.1 * 2) / math.sqrt(14 / 3)
    assert logged["policy_loss"].item() == pytest.approx(-objective / 4)


def test_k1_and_k3_estimate_the_same_divergence(script):
    torch.manual_seed(0)
    old, new = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    new = (0.7 * old + 0.3 * new).log_softmax(-1)
    divergence = (old.exp() * (old - new)).sum().item()
    log_ratio = (new - old)[torch.multinomial(old.exp(), 400_000, replacement=True)]
    _, logged = loss_of(script, log_ratio)
    assert logged["old_approx_kl"].item() == pytest.approx(divergence, rel=0.05), "(k1)"
    assert logged["approx_kl"].item() == pytest.approx(divergence, rel=0.02), "(k3)"
    k3 = log_ratio.expm1() - log_ratio
    assert k3.min() >= 0 and k3.std() < log_ratio.std()  # the lower variance it is for


# (categorical), (entropy); (gaussian) in test_continuous.py


def random_inputs(script, rows):
    return torch.randn(rows, 512 if script is ppo_atari else 4)


@discrete
def test_categorical_log_probability_and_entropy(script):
    agent, x = make_agent(script), random_inputs(script, 32)
    actions = torch.randint(4, (32,))
    expected = torch.distributions.Categorical(logits=agent.actor(x))
    log_probs, entropy = agent.evaluate_actions(x, actions)
    torch.testing.assert_close(log_probs, expected.log_prob(actions))
    torch.testing.assert_close(entropy, expected.entropy())


@discrete
@torch.no_grad()
def test_a_policy_of_known_probabilities(script):
    """(entropy), worked number 3; what is sampled, and the greedy action."""
    agent, x = make_agent(script), random_inputs(script, 1)
    head = agent.actor if script is ppo_atari else agent.actor[-1]
    head.weight.zero_()
    head.bias.copy_(torch.tensor([0.1, 0.1, 0.7, 0.1]).log())
    log_prob, entropy = agent.evaluate_actions(x, torch.tensor([2]))
    assert entropy.item() == pytest.approx(0.9404, abs=5e-5)
    assert log_prob.item() == pytest.approx(math.log(0.7))
    shares = torch.bincount(agent.act(x.expand(100_000, -1)), minlength=4) / 100_000
    assert shares.tolist() == pytest.approx([0.1, 0.1, 0.7, 0.1], abs=6e-3)
    assert agent.act(x, greedy=True).tolist() == [2]


# (td), (gae), (n-step), (ev)

REWARDS, VALUES = double([1], [2], [-1], [3]), double([0], [1.5], [2], [1], [0])


def test_gae_worked_number_2(script):
    end = torch.tensor([[False], [False], [False], [True]])
    inputs = REWARDS, VALUES, end, end
    expected = {0.0: (2.35, 2.3, -2.1, 2.0), 0.8: (3.663856, 1.8248, -0.66, 2.0)}
    for gae_lambda, numbers in expected.items():  # (td), (gae)
        advantages = script.compute_gae(*inputs, 0.9, gae_lambda).flatten()
        torch.testing.assert_close(advantages, double(*numbers), rtol=0, atol=1e-6)


def test_a_time_limit_keeps_the_bootstrap_and_cuts_the_trace(script):
    done = torch.tensor([[False], [True], [False], [False]])
    inputs = REWARDS, VALUES
    advantages = script.compute_gae(*inputs, torch.zeros_like(done), done, 0.9, 0.8)
    # Its own δ, with V(s_2), and nothing after it.
    assert advantages[1].item() == pytest.approx(2 + 0.9 * 2.0 - 1.5)
    advantages = script.compute_gae(*inputs, done, done, 0.9, 0.8)
    assert advantages[1].item() == pytest.approx(2 - 1.5)


@pytest.mark.parametrize("lam", [0.8, 1.0])  # 1: the whole return minus V
def test_gae_is_the_weighted_average_of_n_step_advantages(script, lam):
    rewards, values, terminated, done = random_rollout(steps=25)
    gamma, (steps, envs) = 0.95, rewards.shape
    advantages = script.compute_gae(rewards, values, terminated, done, gamma, lam)
    for t, e in itertools.product(range(steps), range(envs)):
        n_step, discounted = [], 0.0
        for n in range(1, steps - t + 1):
            last = t + n - 1
            discounted += gamma ** (n - 1) * rewards[last, e]
            bootstrap = gamma**n * values[last + 1, e] * ~terminated[last, e]
            n_step.append(discounted + bootstrap - values[t, e])
            if done[last, e]:
                break
        weights = [(1 - lam) * lam**i for i in range(len(n_step) - 1)]
        weights.append(lam ** (len(n_step) - 1))
        average = sum(w * a for w, a in zip(weights, n_step))
        assert sum(weights) == pytest.approx(1)
        assert advantages[t, e].item() == pytest.approx(average.item(), abs=1e-5)


def test_gae_agrees_with_stable_baselines3(script):
    rewards, values, terminated, done = random_rollout(seed=3)
    gamma, lam, (steps, envs) = 0.99, 0.95, rewards.shape
    space = gym.spaces.Box(-1, 1, (1,))
    options = {"device": "cpu", "gae_lambda": lam, "gamma": gamma, "n_envs": envs}
    buffer = RolloutBuffer(steps, space, space, **options)
    # Its buffer knows no truncation: the value to bootstrap from is added to the reward, as
    # its collect_rollouts does.
    truncated = done & ~terminated
    buffer.rewards[:] = (rewards + gamma * values[1:] * truncated).numpy()
    buffer.values[:] = values[:-1].numpy()
    buffer.episode_starts[1:] = done[:-1].numpy()
    buffer.compute_returns_and_advantage(values[-1].float(), done[-1].numpy())
    ours = script.compute_gae(rewards, values, terminated, done, gamma, lam)
    np.testing.assert_allclose(buffer.advantages, ours, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(buffer.returns, ours + values[:-1], rtol=1e-4, atol=1e-5)


def test_explained_variance(script):
    """1 for a perfect critic, 0 for a constant one, 1 − Var(R̂ − V) / Var(R̂) between."""
    returns, values = double(1, 2, 3, 6), double(1, 1, 4, 5)
    assert script.explained_variance(returns - returns, returns) == pytest.approx(1)
    assert script.explained_variance(returns - 5, returns) == pytest.approx(0)
    expected = 1 - np.var([0, 1, -1, 1]) / np.var([1, 2, 3, 6])
    assert script.explained_variance(returns - values, returns) == pytest.approx(expected)
    assert script.explained_variance(double(1, 2), double(3, 3)) is None
    assert script.explained_variance(double(1), double(3)) is None  # nor of one row


# (norm), (obs-norm), (rew-norm)


def test_advantages_get_mean_0_and_unbiased_deviation_1(script):
    normalized = script.normalize_advantages(double(1, 2, 3, 6))  # mean 3, variance 14/3
    torch.testing.assert_close(normalized, double(-2, -1, 0, 3) / math.sqrt(14 / 3))
    assert not script.normalize_advantages(double(7, 7)).any()  # and no 0 / 0


@vectors
@pytest.mark.parametrize("sizes", [[300], [1, 299], [100, 50, 150]])
def test_running_statistics_are_those_of_all_rows(script, sizes):
    """However they are split, whatever their offset; they survive saving."""
    stats, loaded = script.RunningStats(2), script.RunningStats(2)
    assert stats.mean.tolist() == [0, 0] and stats.var.tolist() == [1, 1]
    assert stats.count == 0
    data = np.random.default_rng(0).normal([1e5, -3], [1, 5], (300, 2))
    for chunk in np.split(data, np.cumsum(sizes)[:-1]):
        stats.update(torch.tensor(chunk))
    loaded.load_state_dict(stats.state_dict())
    np.testing.assert_allclose(loaded.mean, data.mean(0), rtol=1e-9)
    np.testing.assert_allclose(loaded.var, data.var(0), rtol=1e-9)
    assert loaded.count.item() == 300


@vectors
def test_observations_are_normalised_and_clipped(script):
    agent = make_agent(script, inputs=2, norm_obs=True)
    agent.obs_stats.mean.copy_(torch.tensor([1.0, 2.0]))
    agent.obs_stats.var.copy_(torch.tensor([4.0, 0.25]))
    x = agent.normalize(torch.tensor([[3.0, 1.5], [1000.0, -1000.0]]))
    torch.testing.assert_close(x, torch.tensor([[1.0, -1.0], [10.0, -10.0]]))
    agent.obs_stats.var.zero_()  # of a constant
    assert agent.normalize(torch.tensor([[1.0, 2.0]])).tolist() == [[0, 0]]
    plain, obs = make_agent(script, inputs=2, norm_obs=False), torch.tensor([[1000.0, 7.0]])
    assert torch.equal(plain.normalize(obs), obs)


@vectors
def test_reward_scaling_restarts_with_every_episode_and_spans_rollouts(script):
    """γ = 0.5, three rollouts; a reward of 0 is that of a step which only resets."""
    stats, last_sum, results = script.RunningStats(), torch.zeros(1), []
    for rollout in ([1, 2], [0, 4, 0, 2], [1]):
        rewards = torch.tensor(rollout).float().unsqueeze(-1)
        inputs = rewards, rewards > 0, stats, 0.5, last_sum
        scaled, last_sum = script.scale_rewards(*inputs)
        results.append(scaled.flatten())
    sums = np.array([1, 2.5, 4, 2, 2])
    assert stats.count.item() == 5 and last_sum.item() == 2
    assert stats.var.item() == pytest.approx(sums.var())
    torch.testing.assert_close(results[0], torch.tensor([1.0, 2.0]) / 0.75)
    assert results[2].item() == pytest.approx(1 / sums.std())


@vectors
def test_scaled_rewards_have_no_unit_and_are_clipped(script):
    """A rare reward becomes 10 at most."""
    rewards = torch.rand(500, 1, generator=torch.Generator().manual_seed(0))
    rewards[[200, 300]] = torch.tensor([[1e3], [-1e3]])
    valid, scaled = torch.ones(500, 1, dtype=torch.bool), []
    for unit in (1e-3, 1e3):
        args = unit * rewards, valid, script.RunningStats(), 0.0, torch.zeros(1)
        scaled.append(script.scale_rewards(*args)[0])
    assert scaled[1][[200, 300]].flatten().tolist() == [10, -10]
    torch.testing.assert_close(scaled[0], scaled[1], rtol=1e-3, atol=0)


# The networks at the start; ppo_atari.py's in test_atari.py


def assert_orthogonal(layer, gain):
    weight = layer.weight.flatten(1)
    rows, columns = weight.shape
    weight = weight if rows <= columns else weight.T
    expected = gain**2 * torch.eye(len(weight))
    torch.testing.assert_close(weight @ weight.T, expected, rtol=0, atol=1e-4 * gain**2)
    assert not layer.bias.any()


@vectors
def test_networks_start_orthogonal_with_zero_biases(script):
    agent = make_agent(script, inputs=8, actions=3)
    scales = [math.sqrt(2), math.sqrt(2), 0.01], [math.sqrt(2), math.sqrt(2), 1.0]
    for network, gains in zip((agent.actor, agent.critic), scales):
        for layer, gain in zip(network[::2], gains, strict=True):
            assert_orthogonal(layer, gain)
        assert [type(layer) for layer in network[1::2]] == [torch.nn.Tanh] * 2
    units = 64 if script is ppo else 256
    assert [len(agent.actor[0].bias), len(agent.critic[2].bias)] == [64, units]
    actor, critic = (set(map(id, n.parameters())) for n in (agent.actor, agent.critic))
    assert not actor & critic


# With the same weights and minibatch, the gradient is stable-baselines3's.


@vectors
@pytest.mark.parametrize("clip", [0.2, 0.02])
def test_gradient_is_that_of_stable_baselines3(script, monkeypatch, clip):
    # Its value loss has no ½, so its weight of 0.25 is our 0.5. It clips the value loss by
    # another formula, without the maximum of the two errors, so that clip is off in both.
    env_id = "CartPole-v1" if script is ppo else "Pendulum-v1"
    options = {"n_steps": 128, "batch_size": 128, "n_epochs": 1, "clip_range": clip}
    sizes = {"pi": [64, 64], "vf": [64, 64] if script is ppo else [256, 256]}
    options |= {"ent_coef": 0.01, "vf_coef": 0.25, "policy_kwargs": {"net_arch": sizes}}
    model = stable_baselines3.PPO("MlpPolicy", env_id, seed=1, device="cpu", **options)
    _, callback = model._setup_learn(128)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 128)
    torch.manual_seed(1)
    with torch.no_grad():  # as the first minibatches do, so that ratios differ from 1
        for parameter in model.policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)

    args = script.Args(clip_coef=clip, clip_vloss=False, ent_coef=0.01, vf_coef=0.5)
    agent = make_agent(script, *model.observation_space.shape, model.action_space)
    policy = model.policy
    actor = torch.nn.Sequential(*policy.mlp_extractor.policy_net, policy.action_net)
    critic = torch.nn.Sequential(*policy.mlp_extractor.value_net, policy.value_net)
    agent.actor.load_state_dict(actor.state_dict())
    agent.critic.load_state_dict(critic.state_dict())
    ours = [*agent.actor.parameters(), *agent.critic.parameters()]
    theirs = [*actor.parameters(), *critic.parameters()]
    if script is ppo_continuous:
        agent.log_std.data.copy_(policy.log_std)
        ours.append(agent.log_std), theirs.append(policy.log_std)

    rows = next(model.rollout_buffer.get())  # all 128, in any order
    actions = rows.actions.long().flatten() if script is ppo else rows.actions
    batch = {"x": rows.observations, "actions": actions, "old_log_probs": rows.old_log_prob}
    batch |= {"old_values": rows.old_values, "returns": rows.returns}
    batch["advantages"] = rows.advantages
    script.ppo_loss(agent, batch, args)[0].backward()
    log_ratio = agent.evaluate_actions(rows.observations, actions)[0] - rows.old_log_prob
    deviation = log_ratio.exp() - 1
    shares = [(deviation < -clip).float().mean(), (deviation > clip).float().mean()]
    assert clip == 0.2 or min(shares) > 0.02  # with 0.02, ratios leave it on both sides

    def stop(*_):  # after its first backward pass, before it clips
        raise InterruptedError

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stop)
    with pytest.raises(InterruptedError):
        model.train()
    for parameter, other in zip(ours, theirs, strict=True):
        assert other.grad.abs().max() > 1e-5
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-5, atol=1e-5)
