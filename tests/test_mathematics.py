"""Every equation of ppo.py, pinned to numbers; the labels are those of the README."""

import itertools
import math

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


# (ratio), (pg), (cpi), (clip)


def test_ratio_is_one_at_the_old_policy_and_worked_number_1():
    assert policy_loss(torch.zeros(3), torch.tensor([1.0, 2.0, 6.0]), 0.2).item() == pytest.approx(-3.0)
    log_ratio = torch.tensor([math.log(0.5 / 0.2)])
    assert policy_loss(log_ratio, torch.tensor([2.0]), math.inf).item() == pytest.approx(-5.0)
    assert policy_loss(log_ratio, torch.tensor([2.0]), 0.2).item() == pytest.approx(-2.4)
    assert policy_loss(torch.tensor([math.log(0.22 / 0.2)]), torch.tensor([2.0]), 0.2).item() == pytest.approx(-2.2)


def test_policy_gradient_and_unclipped_surrogate_have_one_gradient_at_the_old_policy():
    torch.manual_seed(0)
    logits, advantages = torch.randn(64, 5, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    actions = torch.randint(5, (64, 1))
    gradients = []
    for surrogate in ("pg", "cpi", "clip"):
        z = logits.clone().requires_grad_()
        log_prob = torch.log_softmax(z, -1).gather(1, actions).squeeze(1)
        if surrogate == "pg":
            loss = -(log_prob * advantages).mean()
        else:
            loss = policy_loss(log_prob - log_prob.detach(), advantages, math.inf if surrogate == "cpi" else 0.2)
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
    eps = 0.02  # small steps: KL is about half the mean squared deviation of the ratio
    old = torch.tensor([0.5, 0.5], dtype=torch.float64)
    new = old * torch.tensor([1 + eps, 1 - eps], dtype=torch.float64)
    _, k3, _, _ = ppo.diagnostics((new / old).log()[None], torch.ones(1, 2), 0.2)
    assert k3 == pytest.approx(0.5 * eps**2, rel=1e-3)
    assert 0.5 * 0.2**2 == pytest.approx(0.02)


# (vf), (vf-clip), (entropy), (total), (categorical)


def test_value_loss_unclipped_is_half_the_mean_square():
    values, returns = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 5.0])
    assert value_loss(values, torch.zeros(2), returns, None).item() == pytest.approx(0.5 * (1 + 4) / 2)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),
    [
        (1.1, 1.0, 2.0, 0.5 * 0.9**2, -0.9),  # inside the interval: as unclipped
        (1.5, 1.0, 2.0, 0.5 * 0.8**2, 0.0),  # moved towards the target by more than ε: the clipped error is larger
        (0.5, 1.0, 2.0, 0.5 * 1.5**2, -1.5),  # moved away: the unclipped error is larger and pulls back
    ],
)
def test_value_loss_clipped(value, old, target, loss, slope):
    v = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    result = value_loss(v, torch.tensor([old]), torch.tensor([target]), 0.2)
    result.backward()
    assert result.item() == pytest.approx(loss)
    assert v.grad.item() == pytest.approx(slope)


def make_agent(size=4, actions=4, start=0, norm_obs=False):
    torch.manual_seed(1)
    spaces = gym.spaces.Box(-1, 1, (size,)), gym.spaces.Discrete(actions, start=start)
    return ppo.Agent(*spaces, Args(norm_obs=norm_obs))


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


def test_sampling_follows_the_probabilities_and_zero_noise_is_greedy():
    agent, x = make_agent(), torch.randn(4)
    with torch.no_grad():
        agent.actor[-1].weight.mul_(300)
        actions = agent.act(x.expand(200_000, 4), agent.noise(200_000))
        probabilities = torch.softmax(agent.actor(x), -1)
        shares = torch.bincount(actions, minlength=4) / len(actions)
        assert probabilities.max() - probabilities.min() > 0.2
        torch.testing.assert_close(shares, probabilities, atol=0.006, rtol=0)
        assert agent.act(x, torch.zeros(4)) == probabilities.argmax()


def test_total_loss_is_the_weighted_sum():
    agent, args = make_agent(), Args(vf_coef=0.3, ent_coef=0.07)
    x, action = torch.randn(8, 4), torch.randint(4, (8,))
    minibatch = (x, action, torch.full((8,), -1.5), torch.zeros(8), torch.randn(8), torch.randn(8), torch.ones(8))
    loss, policy, value, entropy, log_ratio = ppo.ppo_loss(agent, args, *minibatch)
    assert loss.item() == pytest.approx((policy + 0.3 * value - 0.07 * entropy).item(), rel=1e-6)
    torch.testing.assert_close(log_ratio, agent.evaluate_actions(x, action)[0].detach() + 1.5)
    live = torch.arange(8) % 3 > 0
    assert ppo.ppo_loss(agent, args, *minibatch[:-1], live.float())[0].item() == pytest.approx(
        ppo.ppo_loss(agent, args, *(tensor[live] for tensor in minibatch))[0].item(), rel=1e-5
    )


# (td), (gae), (n-step), (return)


def test_worked_number_2():
    rewards, values, end = worked_example()
    deltas = compute_gae(rewards, values, end, end, 0.9, 0.0)
    torch.testing.assert_close(deltas.flatten(), torch.tensor([2.35, 2.3, -2.1, 2.0], dtype=torch.float64))
    advantages = compute_gae(rewards, values, end, end, 0.9, 0.8)
    expected = torch.tensor([3.663856, 1.8248, -0.66, 2.0], dtype=torch.float64)
    torch.testing.assert_close(advantages.flatten(), expected, rtol=0, atol=1e-12)


def test_a_time_limit_keeps_the_bootstrap_and_cuts_the_trace():
    rewards, values, _ = worked_example()
    done = torch.tensor([[False], [True], [False], [False]])
    none = torch.zeros(4, 1)
    advantages = compute_gae(rewards, values, none, done, 0.9, 0.8)
    assert advantages[1].item() == pytest.approx(2 + 0.9 * 2.0 - 1.5)  # its own δ, with V(s_2), and nothing after it
    assert compute_gae(rewards, values, done, done, 0.9, 0.8)[1].item() == pytest.approx(2 - 1.5)


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
    buffer = RolloutBuffer(steps, space, space, device="cpu", gae_lambda=lam, gamma=gamma, n_envs=envs)
    # Its buffer knows no truncation: the value to bootstrap from is added to the reward, as its collect_rollouts does.
    truncated = done & ~terminated
    buffer.rewards[:] = (rewards + gamma * values[1:] * truncated).numpy()
    buffer.values[:] = values[:-1].numpy()
    buffer.episode_starts[1:] = done[:-1].numpy()
    buffer.compute_returns_and_advantage(values[-1].float(), done[-1].numpy())
    ours = compute_gae(rewards, values, terminated, done, gamma, lam)
    np.testing.assert_allclose(buffer.advantages, ours.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(buffer.returns, (ours + values[:-1]).numpy(), rtol=1e-4, atol=1e-5)


def test_gae_accepts_bool_and_float_flags():
    rewards, values, terminated, done = random_rollout()
    as_bool = compute_gae(rewards, values, terminated, done, 0.99, 0.95)
    assert torch.equal(as_bool, compute_gae(rewards, values, terminated.double(), done.double(), 0.99, 0.95))


# (norm), (valid), (obs-norm), (rew-norm), (lr)


def test_rows_of_weight_zero_do_not_count():
    torch.manual_seed(0)
    log_ratio, advantages, values, returns = torch.randn(4, 20)
    weight = (torch.rand(20) < 0.6).float()
    live = weight.bool()
    for clip in (0.2, math.inf):
        expected = policy_loss(log_ratio[live], advantages[live], clip)
        torch.testing.assert_close(policy_loss(log_ratio, advantages, clip, weight), expected)
    expected = value_loss(values[live], 0 * values[live], returns[live], 0.2)
    torch.testing.assert_close(value_loss(values, 0 * values, returns, 0.2, weight), expected)
    normalized = ppo.normalize_advantages(advantages, weight)[live]
    torch.testing.assert_close(normalized, (advantages[live] - advantages[live].mean()) / advantages[live].std())
    assert policy_loss(log_ratio, advantages, 0.2, 0 * weight).item() == 0.0


def test_fewer_than_two_valid_rows_are_not_normalised():
    advantages = torch.tensor([[3.0, 7.0], [3.0, 7.0], [3.0, 7.0]])
    weight = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    root = math.sqrt(0.5)
    expected = torch.tensor([[-root, root], [3.0, 7.0], [3.0, 7.0]])  # every minibatch by itself, unbiased deviation
    torch.testing.assert_close(ppo.normalize_advantages(advantages, weight), expected)


@pytest.mark.parametrize("sizes", [[300], [1, 299], [100, 0, 50, 150]])
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
    assert torch.equal(plain.normalize(torch.tensor([[1000.0, 7.0]])), torch.tensor([[1000.0, 7.0]]))


def test_reward_scaling_restarts_with_every_episode_and_spans_rollouts():
    rng, gamma, steps = np.random.default_rng(0), 0.9, 30
    rewards = rng.normal(2, 1, steps).astype(np.float32)
    done = np.zeros(steps, bool)
    done[[6, 17]] = True  # rows 7 and 18 are the resets: reward 0, not valid
    valid = np.ones(steps, bool)
    valid[[7, 18]] = False
    rewards[~valid] = 0
    discounted, sums = 0.0, []
    for t in range(steps):
        discounted = rewards[t] + gamma * discounted * (t > 0 and not done[t - 1])
        sums.append(discounted)
    stats, carry, scaled = ppo.RunningStats(), torch.zeros(1), []
    for part in (slice(0, 7), slice(7, 30)):  # the first rollout ends with the episode
        tensors = (torch.tensor(x[part])[:, None] for x in (rewards, done, valid))
        result, carry = ppo.scale_rewards(*tensors, stats, gamma, carry)
        scaled.append(result)
    sums = np.array(sums)[valid]
    assert stats.var.item() == pytest.approx(sums.var(), rel=1e-3)
    torch.testing.assert_close(scaled[1][:, 0], torch.tensor(rewards[7:]) / math.sqrt(sums.var()), rtol=1e-3, atol=0)
    huge = torch.tensor([[1.0], [-1.0]]) * 1e6
    flags = torch.zeros(2, 1, dtype=torch.bool), torch.ones(2, 1, dtype=torch.bool)
    fixed = ppo.RunningStats()
    fixed.count.fill_(1e30)  # as if variance 1 were long known
    assert ppo.scale_rewards(huge, *flags, fixed, gamma, torch.zeros(1))[0].flatten().tolist() == [10.0, -10.0]


# (k1), (k3), (clipfrac), (ev), (kl-ref)


def test_diagnostics():
    log_ratio = torch.tensor([[1.3, 1.1], [0.7, 1.0]]).log()
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    k1, k3, clipfrac, deviation = ppo.diagnostics(log_ratio, weight, 0.2)
    first = -math.log(1.3)
    second = -(math.log(0.7) + 0.0) / 2
    assert k1 == pytest.approx((first + second) / 2, rel=1e-5)
    assert k3 == pytest.approx((0.3 + first + (-0.3 - math.log(0.7)) / 2) / 2, rel=1e-5)
    assert clipfrac == pytest.approx((1 + 0.5) / 2)
    assert deviation == pytest.approx(0.3, rel=1e-5)


def test_k1_and_k3_estimate_the_same_divergence():
    torch.manual_seed(0)
    old, new = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    new = (0.7 * old + 0.3 * new).log_softmax(-1)
    divergence = (old.exp() * (old - new)).sum().item()
    log_ratio = (new - old)[torch.multinomial(old.exp(), 400_000, replacement=True)]
    k1, k3, _, _ = ppo.diagnostics(log_ratio[None], torch.ones(1, len(log_ratio)), 0.2)
    assert k1 == pytest.approx(divergence, rel=0.05)
    assert k3 == pytest.approx(divergence, rel=0.02)
    assert (log_ratio.expm1() - log_ratio).min() >= 0
    assert (log_ratio.expm1() - log_ratio).std() < log_ratio.std()  # the lower variance that (k3) is for


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert ppo.explained_variance(returns, returns) == 1.0
    assert ppo.explained_variance(torch.zeros(4), returns) == 0.0
    assert ppo.explained_variance(torch.tensor([1.0, 2.0, 3.0, 3.0]), returns) == pytest.approx(1 - 0.1875 / 1.25)
    assert ppo.explained_variance(returns, torch.ones(4)) == ""


def test_fine_tuning_reward_gives_the_gradient_of_reward_minus_kl():
    """(kl-ref): maximising E[R − β log(π/π_ref)] by the policy gradient is maximising E[R] − β KL(π ‖ π_ref)."""
    torch.manual_seed(0)
    z = torch.randn(5, dtype=torch.float64, requires_grad=True)
    reference, reward, beta = torch.randn(5, dtype=torch.float64).log_softmax(-1), torch.randn(5).double(), 0.3
    log_prob = z.log_softmax(-1)
    objective = (log_prob.exp() * reward).sum() - beta * (log_prob.exp() * (log_prob - reference)).sum()
    (exact,) = torch.autograd.grad(objective, z, retain_graph=True)
    per_step = reward - beta * (log_prob - reference).detach()
    surrogate = -policy_loss(log_prob - log_prob.detach(), per_step, 0.2, weight=log_prob.exp().detach())
    (estimated,) = torch.autograd.grad(surrogate, z)
    torch.testing.assert_close(exact, estimated)


# The initial networks, and the learning rate


def test_networks_start_orthogonal_with_zero_biases():
    agent = make_agent(size=8, actions=3)
    scales = [math.sqrt(2), math.sqrt(2), 0.01], [math.sqrt(2), math.sqrt(2), 1.0]
    for network, expected in zip((agent.actor, agent.critic), scales):
        for layer, scale in zip(network[::2], expected):
            weight = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
            torch.testing.assert_close(weight @ weight.T, scale**2 * torch.eye(len(weight)), rtol=0, atol=1e-4)
            assert not layer.bias.any()
        assert [type(layer) for layer in network[1::2]] == [torch.nn.Tanh] * 2
    assert not set(map(id, agent.actor.parameters())) & set(map(id, agent.critic.parameters()))


def test_actions_count_from_the_start_of_the_space():
    assert make_agent(actions=3, start=5).env_action(torch.tensor([0, 2])).tolist() == [5, 7]
