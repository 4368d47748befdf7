"""The training loop: which rows count, what each flag does, one seed, the end."""

import itertools
import math

import environments
import numpy as np
import pytest
import torch
from conftest import (
    STEPS,
    column,
    load,
    make_agent,
    make_args,
    normalisation,
    outcome,
    read,
    train,
)

import ppo
import ppo_atari
import ppo_continuous

vectors = pytest.mark.parametrize("script", [ppo, ppo_continuous], indirect=True)


def numbers(batch):
    """The observations of a minibatch as numbers (B, D), also where they are pictures."""
    if "x" in batch:
        return batch["x"]
    bands = batch["obs"][:, 0, :, 0].float()
    return (bands[:, [0, 28, 56]] - 64) / 64  # of three numbers


@pytest.fixture
def played(script, monkeypatch):
    """played(): observations, actions, rewards and ends of all steps, (T, N, …) each."""
    steps, original = [], script.start_envs

    def start_envs(*args):
        envs, first = original(*args)
        before, step = [first.copy()], envs.step
        steps.clear()

        def keep(actions):
            obs, reward, terminated, truncated, info = step(actions)
            ended = terminated | truncated
            steps.append((before.pop(), actions.copy(), reward.copy(), ended))
            before.append(obs.copy())
            return obs, reward, terminated, truncated, info

        envs.step = keep
        return envs, first

    monkeypatch.setattr(script, "start_envs", start_envs)
    return lambda: [np.array(values) for values in zip(*steps)]


# Rows: the step after an episode's end only resets, also across the seam of two rollouts.


def test_rows_that_only_reset_are_dropped(script, tmp_path, record, unshuffled):
    """Time limit 4: rows 4, 9, 14, … only reset. Rollouts of 8 begin anywhere."""
    losses, gaes = record(script, "ppo_loss"), record(script, "compute_gae")
    flags = {"num_envs": 1, "num_steps": 8, "num_minibatches": 1, "update_epochs": 1}
    flags |= {"total_timesteps": 40, "gamma": 0.9, "gae_lambda": 0.8}
    flags["learning_rate"] = 0.0  # so that a state keeps its value
    if script is ppo_atari:
        flags["clip_rewards"] = False
    run_dir = train(script, tmp_path, "Ring", **flags, **normalisation(script, False))
    assert len(losses) == len(gaes) == 5
    assert {inputs[4:] for inputs, _ in gaes} == {(0.9, 0.8)}
    rewards, values, terminated, done = (
        torch.cat([inputs[i][:8, 0] for inputs, _ in gaes]) for i in range(4)
    )
    advantages = torch.cat([result[:, 0] for _, result in gaes])
    row = torch.arange(40)
    valid = row % 5 != 4
    assert torch.equal(done, row % 5 == 3) and not terminated.any()
    assert torch.equal(rewards, torch.tensor([1.0, 2.0, 3.0, 1.0, 0.0] * 8))
    returns = advantages + values
    explained = column(run_dir, "explained_variance")
    for rollout, ((_, batch, _), _) in enumerate(losses):
        states = torch.arange(8 * rollout, 8 * rollout + 9) % 5 % 3  # and the last one
        torch.testing.assert_close(gaes[rollout][0][1][:, 0], values[states])
        rows = row[8 * rollout :][:8]
        rows = rows[valid[rows]]
        unexplained = (advantages[rows].var() / returns[rows].var()).item()
        assert explained[rollout] == pytest.approx(1 - unexplained, rel=1e-3)
        rows = rows[torch.arange(8) % len(rows)]  # filled up with the first ones
        assert torch.equal(numbers(batch).argmax(-1), rows % 5 % 3)
        assert torch.equal(batch["advantages"], advantages[rows])
        assert torch.equal(batch["old_values"], values[rows])
        assert torch.equal(batch["returns"], returns[rows])


def test_episodes_are_logged_as_they_were_played(script, tmp_path):
    """Two environments, episodes of 4 steps and return 7, also across rollouts."""
    run_dir = train(script, tmp_path, "Ring", total_timesteps=2 * STEPS)
    ends = [2 * t for t in range(4, STEPS + 1, 5) for _ in range(2)]
    metrics, episodes = outcome(run_dir)
    assert [float(row["global_step"]) for row in episodes] == ends
    assert {tuple(row.values())[1:] for row in episodes} == {("7.0", "4")}
    names = ("episodes", "episodic_return", "episodic_length")
    for row, low in zip(metrics, (0, STEPS), strict=True):
        count = sum(low < end <= low + STEPS for end in ends)
        assert [row[name] for name in names] == [str(count), "7.0", "4.0"]
    metrics, episodes = outcome(train(script, tmp_path, "Endless", total_timesteps=STEPS))
    assert [metrics[0][name] for name in names] == ["0", "", ""] and episodes == []


def test_every_epoch_uses_all_valid_rows_about_equally_often(script, tmp_path, record):
    """Episodes of one step: of 9 rows of an environment, 5 and 4 by turns are valid."""
    losses = record(script, "ppo_loss")
    flags = {"num_envs": 2, "num_steps": 9, "num_minibatches": 2, "update_epochs": 3}
    train(script, tmp_path, "StubShort", total_timesteps=72, **flags)
    batches = [batch for (_, batch, _), _ in losses]
    assert len(batches) == 24
    assert all(len(values) == 9 for batch in batches for values in batch.values())
    for rollout, valid_rows in enumerate([10, 8, 10, 8]):
        orders, more_often = set(), set()
        for epoch in range(3):
            pair = batches[6 * rollout + 2 * epoch :][:2]
            x = torch.cat([batch.get("x", batch.get("obs")).flatten(1) for batch in pair])
            orders.add(str(x.sum(1)))
            rows, uses = x.unique(dim=0, return_counts=True)  # all observations differ
            assert len(rows) == valid_rows
            assert set(uses.tolist()) <= {18 // valid_rows, 18 // valid_rows + 1}
            more_often.add(str(rows[uses == uses.max()].float().sum(1)))
        assert len(orders) == 3 and len(more_often) > 1  # not always the same rows fill up


# The values that must be learned follow from γ and the rewards 1, 2, 3.

V0 = (1 + 0.9 * 2 + 0.81 * 3) / (1 - 0.9**3)
# A time limit does not end the world.
RING_VALUES = [V0, 2 + 0.9 * 3 + 0.81 * V0, 3 + 0.9 * V0]
TERMINAL_VALUES = [1 + 0.9 * 2 + 0.81 * 3, 2 + 0.9 * 3, 3.0]


@vectors
@pytest.mark.parametrize("name", ["Ring", "RingTerminal"])
def test_critic_learns_the_true_values(script, tmp_path, name):
    flags = {"num_envs": 4, "num_steps": 32, "total_timesteps": 6400, "gamma": 0.9}
    flags |= {"learning_rate": 1e-2, "clip_vloss": False, "max_grad_norm": math.inf}
    flags |= {"num_minibatches": 4, "update_epochs": 4}
    run_dir = train(script, tmp_path, name, **flags, **normalisation(script, False))
    values = script.load_agent(run_dir).value(torch.eye(3))
    truth = RING_VALUES if name == "Ring" else TERMINAL_VALUES
    np.testing.assert_allclose(values, truth, atol=0.1)


def test_a_time_limit_bootstraps_unless_switched_off(script, tmp_path, record):
    gaes = record(script, "compute_gae")
    for bootstrap_truncated in (True, False):
        flags = {"total_timesteps": STEPS, "bootstrap_truncated": bootstrap_truncated}
        train(script, tmp_path, "Ring", **flags)
    first, second = gaes[0][0], gaes[-1][0]
    assert first[3].sum() == 6 and not first[2].any()
    assert torch.equal(second[2], second[3]) and torch.equal(second[3], first[3])


# What the policy saw is what the update sees.


def test_first_minibatch_of_every_update_has_ratio_one(script, tmp_path, record):
    losses = record(script, "ppo_loss")
    flags = {"learning_rate": 1e-3, **normalisation(script, True)}
    train(script, tmp_path, total_timesteps=6 * STEPS, **flags)
    deviations = [logged["max_ratio_dev"].item() for _, (_, logged) in losses]
    assert len(deviations) == 6 * 4
    assert max(deviations[::4]) < 1e-5
    assert min(deviations[3::4]) > 1e-4  # the weights have changed by the last minibatch


@vectors
def test_sums_of_rewards_go_on_across_rollouts(script, tmp_path, record):
    scaled = record(script, "scale_rewards")
    train(script, tmp_path, "Endless", norm_reward=True, gamma=0.9)
    assert {inputs[3] for inputs, _ in scaled} == {0.9}
    last = [last_sum.tolist() for _, (_, last_sum) in scaled]
    for rollout, sums in enumerate(last, 1):
        expected = sum(0.9**k for k in range(16 * rollout))
        assert sums == pytest.approx([expected] * 2)


@vectors
def test_statistics_are_those_of_valid_rows(script, tmp_path, played):
    """Of observations that the policy acted on: not of the last one of an episode."""
    flags = {"total_timesteps": 32 * STEPS, "norm_obs": True, "norm_reward": True}
    run_dir = train(script, tmp_path, **flags)
    obs, _, _, ended = played()
    agent = script.load_agent(run_dir)
    resets = np.concatenate([np.zeros((1, 2), bool), ended[:-1]])
    inputs = obs[~resets].astype(np.float64)
    assert 900 < len(inputs) < 1000
    assert agent.obs_stats.count.item() == len(inputs) == agent.return_stats.count.item()
    np.testing.assert_allclose(agent.obs_stats.mean, inputs.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(agent.obs_stats.var, inputs.var(0), rtol=1e-4)


# What is logged.


def test_metrics_count_iterations_and_steps(script, tmp_path):
    rows = read(train(script, tmp_path) / "metrics.csv")
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3, 4]
    assert [int(row["global_step"]) for row in rows] == [32, 64, 96, 128]
    assert all(row["sps"].isdecimal() and float(row["seconds"]) > 0 for row in rows)
    if script is not ppo_continuous:  # all actions are almost equally probable at first
        assert float(rows[0]["entropy"]) == pytest.approx(math.log(2), abs=0.01)


def test_metrics_have_the_means_of_their_episodes(script, tmp_path):
    flags = {"num_envs": 8, "total_timesteps": 512}
    metrics, episodes = outcome(train(script, tmp_path, **flags))
    for row in metrics:
        ended, episodes = np.split(episodes, [int(row["episodes"])])
        for name in ("episodic_return", "episodic_length") if len(ended) else ():
            mean = np.mean([float(episode[name]) for episode in ended])
            assert float(row[name]) == pytest.approx(mean)
    assert len(ended) > 1 and len(episodes) == 0


def test_sps_is_the_speed_of_one_iteration(script, tmp_path, monkeypatch):
    """By a clock that goes on by a second whenever it is read."""
    clock = itertools.count()
    monkeypatch.setattr(script.time, "perf_counter", lambda: next(clock))
    run_dir = train(script, tmp_path, save_every=2)
    expected = STEPS / np.diff(column(run_dir, "seconds"))
    assert column(run_dir, "sps")[1:] == pytest.approx(expected, abs=0.5)


def test_metrics_are_means_over_minibatches(script, tmp_path, record):
    losses = record(script, "ppo_loss")
    run_dir = train(script, tmp_path, total_timesteps=2 * STEPS)
    for name in losses[0][1][1]:
        values = [float(logged[name]) for _, (_, logged) in losses]
        means = [np.mean(values[:4]), np.mean(values[4:])]
        assert column(run_dir, name) == pytest.approx(means, rel=1e-3, abs=1e-7), name


# What each flag switches.


def test_annealing_lowers_the_learning_rate_linearly(script, tmp_path):
    """From α in the first iteration to α / I in the last, of I = 4."""
    for anneal_lr, expected in ((True, [1, 0.75, 0.5, 0.25]), (False, [1] * 4)):
        run_dir = train(script, tmp_path, learning_rate=2e-4, anneal_lr=anneal_lr)
        rates = [rate / 2e-4 for rate in column(run_dir, "learning_rate")]
        assert rates == pytest.approx(expected), "annealing is wrong"
        (adam,) = load(run_dir)["optimizer"]["param_groups"]
        assert adam["lr"] == pytest.approx(2e-4 * expected[-1]) and adam["eps"] == 1e-5
        assert tuple(adam["betas"]) == (0.9, 0.999) and adam["weight_decay"] == 0


@pytest.mark.parametrize("max_grad_norm", [math.inf, 1e-3])
def test_gradients_are_clipped(script, tmp_path, monkeypatch, max_grad_norm):
    """That of each minibatch; nothing of the minibatch before is left in it."""
    losses, norms = [], []
    ppo_loss, step = script.ppo_loss, torch.optim.Adam.step

    def keep(*inputs):
        losses.append(inputs)
        return ppo_loss(*inputs)

    def spy(self):
        parameters = self.param_groups[0]["params"]
        expected = torch.autograd.grad(ppo_loss(*losses[-1])[0], parameters)
        norms.append(math.hypot(*(gradient.norm() for gradient in expected)))
        scale = min(1, max_grad_norm / norms[-1])
        for parameter, gradient in zip(parameters, expected, strict=True):
            gradient = scale * gradient
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-2, atol=1e-6)
        step(self)

    monkeypatch.setattr(script, "ppo_loss", keep)
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    flags = {"total_timesteps": STEPS, "max_grad_norm": max_grad_norm}
    run_dir = train(script, tmp_path, **flags)
    assert len(losses) == len(set(norms)) == 4 and min(norms) > 2e-3
    assert column(run_dir, "grad_norm") == pytest.approx([np.mean(norms)], rel=1e-3)


def test_target_kl_stops_after_the_epoch_that_exceeds_it(script, tmp_path, record):
    losses = record(script, "ppo_loss")
    flags = {"total_timesteps": STEPS, "update_epochs": 5, "learning_rate": 1e-3}
    train(script, tmp_path, **flags)
    assert [len(batch["actions"]) for (_, batch, _), _ in losses] == [16] * 2 * 5
    kl = np.array([logged["approx_kl"].item() for _, (_, logged) in losses])
    kl = kl.reshape(5, 2).mean(1)  # of each epoch
    between = kl[:2] @ [0.25, 0.75]  # more than the mean of two epochs
    assert kl[0] < between < kl[1]
    for limit in (kl[0] * 0.99, kl[0] * 1.01, between, kl.max() * 1.01):
        epochs = next((i for i, value in enumerate(kl, 1) if value > limit), 5)
        losses.clear()
        train(script, tmp_path, **flags, target_kl=limit)
        assert len(losses) == 2 * epochs


@vectors
@pytest.mark.parametrize("switch", ["norm_obs", "norm_reward"])
def test_normalisation_is_used_only_when_asked_for(script, tmp_path, record, switch):
    """Rewards are 1, observations lie in ±1."""
    losses, gaes = record(script, "ppo_loss"), record(script, "compute_gae")
    flags = normalisation(script, False) | {switch: True}
    run_dir = train(script, tmp_path, "Stub", **flags)
    agent = script.load_agent(run_dir)
    largest = [numbers(batch).abs().max().item() for (_, batch, _), _ in losses]
    rewards = [inputs[0].max().item() for inputs, _ in gaes]
    assert max(largest[:4]) <= 1  # in the first iteration there are no statistics
    if switch == "norm_obs":
        assert max(largest) > 1.2 and set(rewards) == {1} and agent.return_stats.count == 0
    else:
        scale = agent.return_stats.var.sqrt().item()
        assert max(largest) <= 1 and agent.obs_stats.count == 0
        assert rewards[-1] == pytest.approx(1 / scale) and scale > 1.2


@pytest.mark.parametrize("script", [ppo], indirect=True)
@pytest.mark.parametrize(
    "env_id", ["FrozenLake-v1", "Taxi-v4", "Blackjack-v1", "Mixed-v0", "Matrix-v0"]
)
def test_every_space_that_flattens_trains(script, tmp_path, env_id):
    assert len(column(train(script, tmp_path, env_id=env_id), "iteration")) == 4


# One seed decides everything, and who looks on changes nothing.


def test_one_seed_decides_everything(script, tmp_path):
    flags = normalisation(script, True)
    first = outcome(train(script, tmp_path, **flags))
    torch.rand(3)  # whatever happened before
    assert first == outcome(train(script, tmp_path, **flags))
    assert len(first[0]) == 4 and len(first[1]) > 1
    assert first != outcome(train(script, tmp_path, **flags, seed=2))


@vectors
def test_vectorization_mode_does_not_change_the_run(script, tmp_path):
    mode = lambda name: outcome(train(script, tmp_path, vectorization_mode=name))
    assert mode("sync") == mode("async") == mode(None)


@vectors
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vectorization_mode_is_used(script, mode):
    envs = script.make_envs(make_args(script, vectorization_mode=mode))
    assert type(envs.unwrapped).__name__ == f"{mode.title()}VectorEnv"
    envs.close()


def test_each_start_has_environments_and_randomness_of_its_own(script):
    """Of every seed and iteration, and of each environment."""
    firsts, draws = [], []
    for seed, iteration in itertools.product((1, 2), (0, 1, 2)):
        envs, obs = script.start_envs(make_args(script, seed=seed), iteration)
        firsts += [obs[0].tobytes(), obs[1].tobytes()]
        draws.append(torch.rand(1).item())
        envs.close()
    assert len(set(firsts)) == 12 and len(set(draws)) == 6
    again = script.start_envs(make_args(script, seed=2), 2)[1]
    assert [obs.tobytes() for obs in again] == firsts[-2:]
    assert torch.rand(1).item() == draws[-1]


def test_evaluating_on_the_way_changes_no_metric(script, tmp_path):
    args = make_args(script, eval_episodes=1, num_envs=3, seed=5)
    scores, rows = [], []

    def look(agent, metrics):
        scores.append(script.evaluate(agent, args))
        rows.append({name: "" if x is None else str(x) for name, x in metrics.items()})

    looked_at = train(script, tmp_path, after_iteration=look)
    assert outcome(looked_at) == outcome(train(script, tmp_path))
    assert rows == read(looked_at / "metrics.csv") and len(rows) == 4
    assert [score.shape for score in scores] == [(3, 1)] * 4


def test_evaluating_on_the_way_draws_no_bar(script, tmp_path, capsys):
    args = make_args(script, eval_episodes=1)
    train(script, tmp_path, after_iteration=lambda agent, _: script.evaluate(agent, args))
    assert " of 2 " not in capsys.readouterr().err


@pytest.mark.parametrize("greedy", [False, True])
def test_evaluation_plays_whole_episodes_in_each_environment(script, played, greedy):
    flags = {"num_envs": 4, "eval_episodes": 3, "greedy": greedy}
    args = make_args(script, **flags, **normalisation(script, True))
    torch.manual_seed(1)
    agent = script.Agent(script.make_envs(args), args)
    if script is not ppo_atari:
        agent.obs_stats.mean.fill_(0.1)
        agent.obs_stats.var.fill_(0.01)
    scores = script.evaluate(agent, args)
    obs, actions, rewards, ended = played()
    for n in range(4):  # the first three, also where more were played
        ends = np.flatnonzero(ended[:, n])[:3]
        assert np.array_equal(scores[n], np.diff(rewards[:, n].cumsum()[ends], prepend=0))
    assert ended.sum(0).min() == 3 and (greedy or ended.sum(0).max() > 3)
    obs = torch.tensor(obs).flatten(0, 1)
    x = agent.features(obs) if script is ppo_atari else agent.normalize(obs)
    expected = agent.act(x, greedy=True).detach().numpy()
    if script is ppo_continuous:
        expected = agent.env_action(expected)
    assert np.allclose(actions, expected.reshape(actions.shape), atol=1e-6) == greedy


# The end of a run, good or bad.


def test_everything_is_closed_at_the_end(script, tmp_path, monkeypatch, record, fake_wandb):
    """After an error in the environment, too."""
    opened, bars = record(script, "start_envs"), record(script, "progress_bar")
    files, open_run = [], script.Run.open

    def keep(run, *args):
        open_run(run, *args)
        files.extend([run.metrics_file, run.episodes_file])
        assert run.bar.disable is False

    monkeypatch.setattr(script.Run, "open", keep)
    monkeypatch.setattr(environments.Faulty, "fails", True)
    monkeypatch.setattr(environments.Faulty, "good_steps", 100)
    train(script, tmp_path, "Stub", track=True)
    with pytest.raises(RuntimeError, match="the environment is broken"):
        train(script, tmp_path, "Faulty", track=True)
    assert [envs.unwrapped.closed for _, (envs, _) in opened] == [True] * 2
    assert [bar.disable for _, bar in bars] == [True] * 2  # as tqdm says that it is closed
    assert [file.closed for file in files] == [True] * 4 and fake_wandb.finished == 2


def test_nothing_is_saved_that_is_not_finite(script, tmp_path, monkeypatch):
    # With five steps an episode, 3 × 27 steps are played in three iterations.
    monkeypatch.setattr(environments.Faulty, "good_steps", 90)
    with pytest.raises(FloatingPointError, match="^iteration 4: "):
        train(script, tmp_path, "Faulty", total_timesteps=6 * STEPS, save_every=1)
    (run_dir,) = tmp_path.iterdir()
    checkpoint = load(run_dir)
    assert checkpoint["iteration"] == 3 == len(read(run_dir / "metrics.csv"))
    assert all(value.isfinite().all() for value in checkpoint["agent"].values())


@vectors
def test_statistics_that_are_not_finite_are_noticed(script):
    agent = make_agent(script, norm_obs=True)
    script.check_finite(agent, 3)
    agent.obs_stats.mean.fill_(np.inf)
    with pytest.raises(FloatingPointError, match="^iteration 3: "):
        script.check_finite(agent, 3)


# --compile


@pytest.mark.slow
def test_compiled_training_equals_eager_and_compiles_once(script, tmp_path):
    """One graph for the gradient, though the learning rate changes and rows are dropped."""
    dynamo = torch._dynamo
    dynamo.reset()
    dynamo.utils.counters.clear()  # other tests of this process count too
    eager = outcome(train(script, tmp_path))[0]
    graphs = []

    def count(agent, metrics):
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])

    with dynamo.config.patch(error_on_recompile=True):
        run_dir = train(script, tmp_path, after_iteration=count, compile=True)
    compiled = outcome(run_dir)[0]
    for one, other in zip(eager, compiled, strict=True):
        for name in ("policy_loss", "value_loss", "entropy", "grad_norm", "approx_kl"):
            expected = pytest.approx(float(one[name]), rel=1e-3, abs=1e-5)
            assert float(other[name]) == expected, name
    assert len(set(column(run_dir, "learning_rate"))) == 4
    assert graphs == [2 if script is ppo_atari else 1] * 4  # Atari's rollout has another
    assert not dynamo.utils.counters["graph_break"]


# It learns.


@pytest.mark.slow
def test_the_best_actions_are_learned(script, tmp_path):
    """Ten steps with a reward of 1 for the action that fits the state."""
    flags = {"num_envs": 4, "num_steps": 32, "total_timesteps": 6400, "update_epochs": 4}
    run_dir = train(script, tmp_path, "Sides", **flags, learning_rate=1e-3)
    scores = [float(row["episodic_return"]) for row in read(run_dir / "episodes.csv")]
    assert np.mean(scores[:20]) < 7 and np.mean(scores[-20:]) > 9
    args = make_args(script, "Sides", num_envs=4, eval_episodes=2, greedy=True)
    assert script.evaluate(script.load_agent(run_dir), args).mean() == 10
