"""Every equation of ppo.py, pinned to numbers; the labels are those of the README."""

import itertools
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.buffers import RolloutBuffer

import ppo
from ppo import Args, compute_gae, policy_loss, value_loss


def random_rollout(steps=40, envs=3, seed=0):
    """rewards, values, terminated, done of random data with terminations and truncations."""
    rng = np.random.default_rng(seed)
    terminated = rng.random((steps, envs)) < 0.1
    done = terminated | (rng.random((steps, envs)) < 0.1)
    rewards, values = rng.normal(size=(steps, envs)), rng.normal(size=(steps + 1, envs))
    return [torch.tensor(x) for x in (rewards, values, terminated, done)]


def worked_example():
    rewards = torch.tensor([[1.0], [2.0], [-1.0], [3.0]], dtype=torch.float64)
    values = torch.tensor([[0.0], [1.5], [2.0], [1.0], [0.0]], dtype=torch.float64)
    end = torch.tensor([[False], [False], [False], [True]])
    return rewards, values, end


def make_agent(size=4, actions=4, norm_obs=False):
    torch.manual_seed(1)
    return ppo.Agent(gym.spaces.Box(-1, 1, (size,)), gym.spaces.Discrete(actions), norm_obs)


def loss_of(log_ratio, advantages=0, values=0, entropy=0, returns=0, **flags):
    """ppo_loss of an agent that answers these log-ratios, values (all 0 before) and entropies."""
    zeros = torch.zeros_like(log_ratio)
    old_log_probs = zeros - 1.5
    agent = SimpleNamespace(
        evaluate_actions=lambda x, actions: (old_log_probs + log_ratio, zeros + entropy),
        value=lambda x: zeros + values,
    )
    batch = {"x": None, "actions": None, "old_log_probs": old_log_probs, "old_values": zeros}
    batch |= {"advantages": zeros + advantages, "returns": zeros + returns}
    return ppo.ppo_loss(agent, batch, Args(**flags))


# (ratio), (pg), (cpi), (clip)


def test_ratio_is_one_at_the_old_policy_and_worked_number_1():
    advantages = torch.tensor([1.0, 2.0, 6.0])
    assert policy_loss(torch.zeros(3), advantages, 0.2).item() == pytest.approx(-3.0)
    for probability, clip, objective in ((0.5, math.inf, 5.0), (0.5, 0.2, 2.4), (0.22, 0.2, 2.2)):
        log_ratio = torch.tensor([math.log(probability / 0.2)])
        loss = policy_loss(log_ratio, torch.tensor([2.0]), clip)
        assert loss.item() == pytest.approx(-objective)


def test_policy_gradient_and_unclipped_surrogate_have_one_gradient_at_the_old_policy():
    torch.manual_seed(0)
    logits, advantages = torch.randn(64, 5).double(), torch.randn(64).double()
    actions = torch.randint(5, (64, 1))
    gradients = []
    for surrogate in ("pg", "cpi", "clip"):
        z = logits.clone().requires_grad_()
        log_prob = torch.log_softmax(z, -1).gather(1, actions).squeeze(1)
        if surrogate == "pg":
            loss = -(log_prob * advantages).mean()
        else:
            clip = math.inf if surrogate == "cpi" else 0.2
            loss = policy_loss(log_prob - log_prob.detach(), advantages, clip)
        loss.backward()
        gradients.append(z.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        (1.1, 2.0, 2.2, 2.0),
        (1.1, -2.0, -2.2, -2.0),
        (0.5, 2.0, 1.0, 2.0),
        (0.5, -2.0, -1.6, 0.0),
        (1.5, 2.0, 2.4, 0.0),
        (1.5, -2.0, -3.0, -2.0),
    ],
)
def test_the_six_clip_cases(ratio, advantage, objective, slope):
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss = policy_loss(log_ratio, torch.tensor([advantage], dtype=torch.float64), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-objective)
    assert log_ratio.grad.item() == pytest.approx(-slope * ratio)  # d r / d log r = r


def test_worked_number_4():
    for advantage, slope in ((1.0, 0.0), (-1.0, 3.0)):
        log_ratio = torch.tensor([math.log(0.03 / 0.01)], dtype=torch.float64, requires_grad=True)
        policy_loss(log_ratio, torch.tensor([advantage], dtype=torch.float64), 0.2).backward()
        assert log_ratio.grad.item() == pytest.approx(slope)
    for eps, error in ((0.02, 1e-3), (0.2, 0.03)):  # small steps: KL is about ½ E[(ρ − 1)²]
        _, logged = loss_of(torch.tensor([1 + eps, 1 - eps], dtype=torch.float64).log())
        assert logged["approx_kl"].item() == pytest.approx(0.5 * eps**2, rel=error)


# (vf), (vf-clip), (entropy), (total), (categorical)


def test_value_loss_unclipped_is_half_the_mean_square():
    values, returns = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 5.0])
    loss = value_loss(values, torch.zeros(2), returns, None)
    assert loss.item() == pytest.approx(0.5 * (1 + 4) / 2)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),
    [
        (1.1, 1.0, 2.0, 0.5 * 0.9**2, -0.9),  # inside the interval: as unclipped
        (
            1.5,
            1.0,
            2.0,
            0.5 * 0.8**2,
            0.0,
        ),  # moved to the target by more than ε: the clipped error is larger
        (
            0.5,
            1.0,
            2.0,
            0.5 * 1.5**2,
            -1.5,
        ),  # moved away: the unclipped error is larger and pulls back
    ],
)
def test_value_loss_clipped(value, old, target, loss, slope):
    v = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    result = value_loss(v, torch.tensor([old]), torch.tensor([target]), 0.2)
    result.backward()
    assert result.item() == pytest.approx(loss)
    assert v.grad.item() == pytest.approx(slope)


def test_categorical_log_probability_and_entropy():
    agent = make_agent()
    x, action = torch.randn(32, 4), torch.randint(4, (32,))
    reference = torch.distributions.Categorical(logits=agent.actor(x))
    log_prob, entropy = agent.evaluate_actions(x, action)
    torch.testing.assert_close(log_prob, reference.log_prob(action))
    torch.testing.assert_close(entropy, reference.entropy())
    with torch.no_grad():  # worked number 3
        agent.actor[-1].weight.zero_()
        agent.actor[-1].bias.copy_(torch.tensor([0.7, 0.1, 0.1, 0.1]).log())
    assert agent.evaluate_actions(x, action)[1][0].item() == pytest.approx(0.9404, abs=5e-5)


def test_sampling_follows_the_probabilities_and_greedy_takes_the_largest():
    agent, x = make_agent(), torch.randn(4)
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300)
        actions = agent.act(x.expand(200_000, 4))
        probabilities = torch.softmax(agent.actor(x), -1)
        shares = torch.bincount(actions, minlength=4) / len(actions)
        assert probabilities.max() - probabilities.min() > 0.2
        torch.testing.assert_close(shares, probabilities, atol=0.006, rtol=0)
        assert agent.act(x, greedy=True) == probabilities.argmax()


def test_total_loss_and_what_is_logged_of_a_minibatch():
    """Four rows worked by hand: ratios 1.25, 0.7, 1, 1.1 and ε = 0.2."""
    double = lambda *numbers: torch.tensor(numbers, dtype=torch.float64)
    log_ratio = double(1.25, 0.7, 1.0, 1.1).log().requires_grad_()
    values = double(0.5, 2.0, -1.0, 0.1).requires_grad_()
    entropy = double(0.1, 0.2, 0.4, 0.9).requires_grad_()
    rows = {"advantages": double(1, -1, 2, -3), "values": values, "entropy": entropy, "returns": 1}
    flags = {"norm_adv": False, "vf_coef": 0.3, "ent_coef": 0.07}
    loss, logged = loss_of(log_ratio, **rows, **flags)
    expected = {
        "policy_loss": -(1.2 - 0.8 + 2.0 - 3.3) / 4,
        "value_loss": 0.5 * (0.8**2 + 1.0**2 + 2.0**2 + 0.9**2) / 4,  # V clipped to ±0.2, (vf-clip)
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

    _, logged = loss_of(log_ratio, **rows, **flags, clip_vloss=False)
    assert logged["value_loss"].item() == pytest.approx(0.5 * (0.5**2 + 1 + 2**2 + 0.9**2) / 4)
    # (norm): the mean is 3, the unbiased variance 14/3.
    _, logged = loss_of(log_ratio, **rows | {"advantages": double(6, 3, 2, 1)})
    objective = (1.2 * 3 + 0.7 * 0 - 1.0 * 1 - 1.1 * 2) / math.sqrt(14 / 3)
    assert logged["policy_loss"].item() == pytest.approx(-objective / 4)


# (td), (gae), (n-step), (return)


def test_worked_number_2():
    rewards, values, end = worked_example()
    deltas = compute_gae(rewards, values, end, end, 0.9, 0.0)
    expected = torch.tensor([2.35, 2.3, -2.1, 2.0], dtype=torch.float64)
    torch.testing.assert_close(deltas.flatten(), expected)
    advantages = compute_gae(rewards, values, end, end, 0.9, 0.8)
    expected = torch.tensor([3.663856, 1.8248, -0.66, 2.0], dtype=torch.float64)
    torch.testing.assert_close(advantages.flatten(), expected, rtol=0, atol=1e-12)


def test_a_time_limit_keeps_the_bootstrap_and_cuts_the_trace():
    rewards, values, _ = worked_example()
    done = torch.tensor([[False], [True], [False], [False]])
    none = torch.zeros(4, 1)
    advantages = compute_gae(rewards, values, none, done, 0.9, 0.8)
    # Its own δ, with V(s_2), and nothing after it.
    assert advantages[1].item() == pytest.approx(2 + 0.9 * 2.0 - 1.5)
    advantages = compute_gae(rewards, values, done, done, 0.9, 0.8)
    assert advantages[1].item() == pytest.approx(2 - 1.5)


def test_lambda_one_is_the_monte_carlo_return_minus_v():
    rewards, values, terminated, done = random_rollout()
    advantages = compute_gae(rewards, values, terminated, done, 0.97, 1.0)
    returns, ahead = torch.zeros_like(rewards), values[-1]
    for t in reversed(range(len(rewards))):
        after = torch.where(done[t], values[t + 1] * ~terminated[t], ahead)
        returns[t] = ahead = rewards[t] + 0.97 * after
    torch.testing.assert_close(advantages, returns - values[:-1])


def test_gae_is_the_weighted_average_of_n_step_advantages():
    rewards, values, terminated, done = random_rollout(steps=25)
    gamma, lam, (steps, envs) = 0.95, 0.8, rewards.shape
    advantages = compute_gae(rewards, values, terminated, done, gamma, lam)
    for t, e in itertools.product(range(steps), range(envs)):
        n_step, discounted = [], 0.0
        for n in range(1, steps - t + 1):
            last = t + n - 1
            discounted += gamma ** (n - 1) * rewards[last, e]
            bootstrap = gamma**n * values[last + 1, e] * ~terminated[last, e]
            n_step.append(discounted + bootstrap - values[t, e])
            if done[last, e]:
                break
        weights = [(1 - lam) * lam**i for i in range(len(n_step) - 1)] + [lam ** (len(n_step) - 1)]
        average = sum(w * a for w, a in zip(weights, n_step))
        assert sum(weights) == pytest.approx(1)
        assert advantages[t, e].item() == pytest.approx(average.item(), abs=1e-10)


def test_gae_agrees_with_stable_baselines3():
    rewards, values, terminated, done = random_rollout(seed=3)
    gamma, lam, (steps, envs) = 0.99, 0.95, rewards.shape
    space = gym.spaces.Box(-1, 1, (1,))
    options = {"device": "cpu", "gae_lambda": lam, "gamma": gamma, "n_envs": envs}
    buffer = RolloutBuffer(steps, space, space, **options)
    # Its buffer knows no truncation: the value to bootstrap from is added to the reward, as its
    # collect_rollouts does.
    truncated = done & ~terminated
    buffer.rewards[:] = (rewards + gamma * values[1:] * truncated).numpy()
    buffer.values[:] = values[:-1].numpy()
    buffer.episode_starts[1:] = done[:-1].numpy()
    buffer.compute_returns_and_advantage(values[-1].float(), done[-1].numpy())
    ours = compute_gae(rewards, values, terminated, done, gamma, lam)
    np.testing.assert_allclose(buffer.advantages, ours.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(buffer.returns, (ours + values[:-1]).numpy(), rtol=1e-4, atol=1e-5)


# Plain means, (norm), (obs-norm), (rew-norm); (valid) and (lr) are tested in test_training.py


def test_losses_and_normalisation_are_plain_means_over_the_rows():
    log_ratio = torch.tensor([2.5, 1.1, 0.5]).log()
    loss = policy_loss(log_ratio, torch.tensor([2.0, -2.0, -2.0]), 0.2)
    assert loss.item() == pytest.approx(-(2.4 - 2.2 - 1.6) / 3)
    values, old_values = torch.tensor([1.1, 1.5, 0.5]), torch.tensor([1.0, 1.0, 1.0])
    loss = value_loss(values, old_values, torch.tensor([2.0, 2.0, 2.0]), 0.2)
    assert loss.item() == pytest.approx(0.5 * (0.9**2 + 0.8**2 + 1.5**2) / 3)
    # Mean 3, and 14/3 is the unbiased variance.
    normalized = ppo.normalize_advantages(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0]) / math.sqrt(14 / 3)
    torch.testing.assert_close(normalized, expected)
    assert not ppo.normalize_advantages(torch.tensor([7.0, 7.0])).any()  # and no 0 / 0


@pytest.mark.parametrize("sizes", [[300], [1, 299], [100, 50, 150]])
def test_running_statistics_do_not_depend_on_the_split_and_survive_saving(sizes):
    data = np.random.default_rng(0).normal(3, 5, (300, 2))
    stats = ppo.RunningStats(2)
    for chunk in np.split(data, np.cumsum(sizes)[:-1]):
        stats.update(torch.tensor(chunk))
    # The initial mean 0 and variance 1 count as 1e-4 observations.
    np.testing.assert_allclose(stats.mean, data.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.var, data.var(0), rtol=1e-4)
    assert stats.count.item() == pytest.approx(300.0001)
    loaded = ppo.RunningStats(2)
    loaded.load_state_dict(stats.state_dict())
    assert torch.equal(loaded.mean, stats.mean) and torch.equal(loaded.var, stats.var)


def test_observations_are_normalised_and_clipped():
    agent = make_agent(size=2, norm_obs=True)
    agent.obs_stats.mean.copy_(torch.tensor([1.0, 2.0]))
    agent.obs_stats.var.copy_(torch.tensor([4.0, 0.25]))
    x = agent.normalize(torch.tensor([[3.0, 1.5], [1000.0, -1000.0]]))
    torch.testing.assert_close(x, torch.tensor([[1.0, -1.0], [10.0, -10.0]]))
    plain = make_agent(size=2)
    assert torch.equal(
        plain.normalize(torch.tensor([[1000.0, 7.0]])), torch.tensor([[1000.0, 7.0]])
    )


def test_reward_scaling_restarts_with_every_episode_and_spans_rollouts():
    rng, gamma, steps = np.random.default_rng(0), 0.9, 30
    rewards = torch.tensor(rng.normal(2, 1, (steps, 1)), dtype=torch.float32)
    resets = torch.zeros(steps, 1, dtype=torch.bool)
    resets[[7, 18]] = True
    rewards[resets] = 0
    discounted, sums = 0.0, []
    for t in range(steps):
        discounted = 0.0 if resets[t] else rewards[t].item() + gamma * discounted
        sums.append(discounted)
    stats, last_sum, scaled = ppo.RunningStats(), torch.zeros(1), []
    for part in (slice(0, 7), slice(7, 30)):  # the first rollout ends with the episode
        rows = rewards[part], resets[part]
        result, last_sum = ppo.scale_rewards(*rows, stats, gamma, last_sum)
        scaled.append(result)
    assert last_sum.item() == pytest.approx(sums[-1], rel=1e-5)
    sums = np.array(sums)[~resets.flatten().numpy()]
    assert stats.count.item() == pytest.approx(28.0001)
    assert stats.var.item() == pytest.approx(sums.var(), rel=1e-3)
    expected = rewards[7:] / math.sqrt(sums.var())
    torch.testing.assert_close(scaled[1], expected, rtol=1e-3, atol=0)
    huge, resets = torch.tensor([[1e6], [-1e6]]), torch.zeros(2, 1, dtype=torch.bool)
    stats.count.fill_(1e30)  # as if the variance were long known
    scaled, _ = ppo.scale_rewards(huge, resets, stats, gamma, torch.zeros(1))
    assert scaled.flatten().tolist() == [10.0, -10.0]


# (k1), (k3), (clipfrac), (ev), (kl-ref)


def test_k1_and_k3_estimate_the_same_divergence():
    torch.manual_seed(0)
    old, new = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    new = (0.7 * old + 0.3 * new).log_softmax(-1)
    divergence = (old.exp() * (old - new)).sum().item()
    log_ratio = (new - old)[torch.multinomial(old.exp(), 400_000, replacement=True)]
    _, logged = loss_of(log_ratio)
    assert logged["old_approx_kl"].item() == pytest.approx(divergence, rel=0.05)
    assert logged["approx_kl"].item() == pytest.approx(divergence, rel=0.02)
    assert (log_ratio.expm1() - log_ratio).min() >= 0
    assert (
        log_ratio.expm1() - log_ratio
    ).std() < log_ratio.std()  # the lower variance that (k3) is for


def test_fine_tuning_reward_gives_the_gradient_of_reward_minus_kl():
    """(kl-ref): the policy gradient of E[R − β log(π/π_ref)] is that of E[R] − β KL(π ‖ π_ref)."""
    torch.manual_seed(0)
    z = torch.randn(5, dtype=torch.float64, requires_grad=True)
    reference, reward = torch.randn(5).double().log_softmax(-1), torch.randn(5).double()
    beta, log_prob = 0.3, z.log_softmax(-1)
    kl = (log_prob.exp() * (log_prob - reference)).sum()
    (exact,) = torch.autograd.grad(
        (log_prob.exp() * reward).sum() - beta * kl, z, retain_graph=True
    )
    per_step = reward - beta * (log_prob - reference).detach()
    # One row for each action: weights turn the mean over rows into the expectation under π.
    weights = 5 * log_prob.exp().detach()
    surrogate = -policy_loss(log_prob - log_prob.detach(), weights * per_step, 0.2)
    (estimated,) = torch.autograd.grad(surrogate, z)
    torch.testing.assert_close(exact, estimated)


# The initial networks


def test_networks_start_orthogonal_with_zero_biases():
    agent = make_agent(size=8, actions=3)
    scales = [math.sqrt(2), math.sqrt(2), 0.01], [math.sqrt(2), math.sqrt(2), 1.0]
    for network, gains in zip((agent.actor, agent.critic), scales):
        for layer, scale in zip(network[::2], gains):
            rows, columns = layer.weight.shape
            weight = layer.weight if rows <= columns else layer.weight.T
            expected = scale**2 * torch.eye(len(weight))
            torch.testing.assert_close(weight @ weight.T, expected, rtol=0, atol=1e-4 * scale**2)
            assert not layer.bias.any()
        assert [type(layer) for layer in network[1::2]] == [torch.nn.Tanh] * 2
    assert not set(map(id, agent.actor.parameters())) & set(map(id, agent.critic.parameters()))
