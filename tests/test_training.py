"""The training loop of ppo.py: which rows count, what is learned, exact repeats and resumes."""

import csv
import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import environments  # noqa: F401, registers the environments
import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo

ROOT = Path(__file__).parents[1]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def outcome(run_dir):
    """Everything in metrics.csv and episodes.csv but the columns of time."""
    metrics = read(run_dir / "metrics.csv")
    for row in metrics:
        del row["sps"], row["seconds"]
    return metrics, read(run_dir / "episodes.csv")


def train(tmp_path, script=ppo, **flags):
    return script.train(script.Args(runs_dir=str(tmp_path), **flags))


def copy(value):
    if isinstance(value, dict):
        return {name: copy(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(copy(item) for item in value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def record(monkeypatch, name):
    """A list that will hold copies of the arguments and the result of each call of ppo.<name>."""
    calls, original = [], getattr(ppo, name)

    def recording(*args):
        inputs = copy(args)
        result = original(*args)
        calls.append((inputs, copy(result)))
        return result

    monkeypatch.setattr(ppo, name, recording)
    return calls


class Recorder(gym.vector.VectorWrapper):
    """Keeps the observations, actions, rewards and ends of all steps, (T, N) each."""

    last = None  # the one made last

    def __init__(self, envs):
        super().__init__(envs)
        self.steps = []
        Recorder.last = self

    def reset(self, **kwargs):
        self.obs, info = self.env.reset(**kwargs)
        return self.obs, info

    def step(self, action):
        before = self.obs
        self.obs, reward, terminated, truncated, info = self.env.step(action)
        self.steps.append((before.copy(), action.copy(), reward.copy(), terminated | truncated))
        return self.obs, reward, terminated, truncated, info

    def recorded(self):
        return [np.array(values) for values in zip(*self.steps)]


@pytest.fixture
def recorder(monkeypatch):
    original = ppo.make_envs
    monkeypatch.setattr(ppo, "make_envs", lambda args: Recorder(original(args)))
    return Recorder


@pytest.fixture
def unshuffled(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n, device=None: torch.arange(n))


# Rows: the step after an episode's end only resets, also across the seam of two rollouts.

TINY = {"env_id": "Ring-v0", "num_envs": 1, "num_minibatches": 1, "update_epochs": 1}


def test_rows_that_only_reset_are_dropped(tmp_path, monkeypatch, unshuffled):
    """Time limit 4: rows 4, 9, 14, … only reset. Rollouts of 3 rows put the seams anywhere."""
    losses, gaes = record(monkeypatch, "ppo_loss"), record(monkeypatch, "compute_gae")
    run_dir = train(tmp_path, **TINY, num_steps=3, total_timesteps=30, save_every=100)
    rewards, values, terminated, done = (
        torch.cat([inputs[i][:3, 0] for inputs, _ in gaes]) for i in range(4)
    )
    advantages = torch.cat([result[:, 0] for _, result in gaes])
    row = torch.arange(30)
    valid = row % 5 != 4
    assert torch.equal(done, row % 5 == 3) and not terminated.any()
    assert torch.equal(rewards, torch.tensor([1.0, 2.0, 3.0, 1.0, 0.0] * 6))
    returns = advantages + values
    metrics = read(run_dir / "metrics.csv")
    assert len(losses) == 10
    for rollout, ((_, batch, _), _) in enumerate(losses):
        rows = row[3 * rollout :][:3]
        rows = rows[valid[rows]]
        explained, variance = metrics[rollout]["explained_variance"], returns[rows].var()  # (ev)
        if variance > 0:
            unexplained = (returns - values)[rows].var() / variance
            assert float(explained) == pytest.approx(1 - unexplained.item(), rel=1e-3)
        else:
            assert explained == ""
        rows = rows[torch.arange(3) % len(rows)]  # filled up with the first ones
        assert torch.equal(batch["x"].argmax(-1), rows % 5 % 3)
        assert torch.equal(batch["advantages"], advantages[rows])
        assert torch.equal(batch["old_values"], values[rows])
        assert torch.equal(batch["returns"], returns[rows])
    episode = {"episodic_return": "7.0", "episodic_length": "4"}
    expected = [{"global_step": str(step)} | episode for step in range(4, 30, 5)]
    assert read(run_dir / "episodes.csv") == expected
    names = ("episodes", "episodic_return", "episodic_length")
    means = {tuple(row[name] for name in names) for row in metrics}
    assert means == {("0", "", ""), ("1", "7.0", "4.0")}


@pytest.mark.parametrize(
    ("num_steps", "save_every", "states", "ends"),
    [(4, 1, [0, 1, 2, 0] * 3, [4, 8, 12]), (3, 2, [0, 1, 2, 0, 0, 0] * 2, [4, 10])],
    ids=["right after an episode", "in the middle of an episode"],
)
def test_nothing_is_carried_past_a_checkpoint(
    tmp_path, monkeypatch, unshuffled, num_steps, save_every, states, ends
):
    """New environments: their first row is no reset; scores and sums of rewards begin at 0."""
    losses, scaled = record(monkeypatch, "ppo_loss"), record(monkeypatch, "scale_rewards")
    flags = {"num_steps": num_steps, "save_every": save_every, "norm_reward": True}
    run_dir = train(tmp_path, **TINY, **flags, total_timesteps=12)
    assert torch.cat([batch["x"].argmax(-1) for (_, batch, _), _ in losses]).tolist() == states
    assert [int(episode["global_step"]) for episode in read(run_dir / "episodes.csv")] == ends
    assert {episode["episodic_return"] for episode in read(run_dir / "episodes.csv")} == {"7.0"}
    assert {episode["episodic_length"] for episode in read(run_dir / "episodes.csv")} == {"4"}
    sums = [last_sum.item() for (*_, last_sum), _ in scaled]
    assert [total == 0 for total in sums] == [i % save_every == 0 for i in range(12 // num_steps)]


def test_every_epoch_uses_all_valid_rows_about_equally_often(tmp_path, monkeypatch):
    """Episodes of one step: of 5 rows of an environment, 3 and 2 by turns are valid."""
    losses = record(monkeypatch, "ppo_loss")
    flags = {"num_envs": 2, "num_steps": 5, "num_minibatches": 2, "update_epochs": 3}
    train(tmp_path, env_id="StubShort-v0", total_timesteps=40, **flags)
    batches = [batch for (_, batch, _), _ in losses]
    assert len(batches) == 24
    assert all(len(column) == 5 for batch in batches for column in batch.values())
    for rollout, valid_rows in enumerate([6, 4, 6, 4]):
        orders, more_often = set(), set()
        for epoch in range(3):
            first, second = batches[6 * rollout + 2 * epoch :][:2]
            x = torch.cat([first["x"], second["x"]])
            orders.add(str(x))
            rows, uses = x.unique(dim=0, return_counts=True)  # all observations differ
            assert len(rows) == valid_rows
            assert set(uses.tolist()) <= {10 // valid_rows, 10 // valid_rows + 1}
            more_often.add(str(rows[uses == uses.max()]))
        assert len(orders) == 3 and len(more_often) > 1  # not always the same rows fill up


RING = {
    "env_id": "Ring-v0", "num_envs": 4, "num_steps": 32, "total_timesteps": 12_800,
    "learning_rate": 1e-2, "gamma": 0.9, "clip_vloss": False, "max_grad_norm": math.inf,
    "save_every": 10_000,
}  # fmt: skip
V0 = (1 + 0.9 * 2 + 0.81 * 3) / (1 - 0.9**3)
RING_VALUES = [V0, 2 + 0.9 * 3 + 0.81 * V0, 3 + 0.9 * V0]  # a time limit does not end the world
TERMINAL_VALUES = [1 + 0.9 * 2 + 0.81 * 3, 2 + 0.9 * 3, 3.0]


def learned_values(tmp_path, script=ppo, **flags):
    run_dir = train(tmp_path, script, **RING | flags)
    return ppo.load_agent(run_dir).value(torch.eye(3)).detach().numpy()


def test_critic_learns_the_true_values_under_truncation(tmp_path):
    np.testing.assert_allclose(learned_values(tmp_path), RING_VALUES, atol=1e-3)


def test_critic_learns_the_true_values_under_termination(tmp_path):
    values = learned_values(tmp_path, env_id="RingTerminal-v0")
    np.testing.assert_allclose(values, TERMINAL_VALUES, atol=1e-3)


def test_critic_misses_them_when_a_time_limit_counts_as_termination(tmp_path):
    error = np.abs(learned_values(tmp_path, bootstrap_truncated=False) - RING_VALUES)
    assert error.min() > 14


@pytest.mark.parametrize(
    ("env_id", "truth", "margin"),
    [("Ring-v0", RING_VALUES, 3.0), ("RingTerminal-v0", TERMINAL_VALUES, 0.25)],
)
def test_critic_misses_them_when_reset_rows_are_left_in(tmp_path, env_id, truth, margin):
    source = (ROOT / "ppo.py").read_text()
    assert source.count("column[~resets]") == 1
    variant = types.ModuleType("variant")
    exec(source.replace("column[~resets]", "column.flatten(0, 1)"), vars(variant))
    assert np.abs(learned_values(tmp_path, variant, env_id=env_id) - truth).max() > margin


# What the policy saw is what the update sees.


def test_first_minibatch_of_every_update_has_ratio_one(tmp_path, monkeypatch):
    losses, scaled = record(monkeypatch, "ppo_loss"), record(monkeypatch, "scale_rewards")
    flags = {"norm_obs": True, "norm_reward": True, "learning_rate": 1e-3, "save_every": 3}
    train(tmp_path, env_id="Acrobot-v1", total_timesteps=3072, **flags)
    deviations = [logged["max_ratio_dev"].item() for _, (_, logged) in losses]
    first = deviations[::16]
    assert len(first) == 6 and max(first) < 1e-5
    assert min(deviations[15::16]) > 1e-3  # the weights have changed by the last minibatch
    # After 128 steps with reward −1. No episode has ended yet.
    (*_, last_sum), _ = scaled[1]
    np.testing.assert_allclose(last_sum, [-sum(0.99**k for k in range(128))] * 4, rtol=1e-5)


def test_statistics_are_those_of_valid_rows(tmp_path, recorder):
    """Of observations: those that the policy acted on; the last of an episode is none of them."""
    run_dir = train(tmp_path, total_timesteps=2560, norm_obs=True, norm_reward=True)
    obs, _, _, ended = recorder.last.recorded()
    agent = ppo.load_agent(run_dir)
    resets = np.concatenate([np.zeros((1, 4), bool), ended[:-1]])
    inputs = obs[~resets].astype(np.float64)
    assert 2300 < len(inputs) < 2560
    assert agent.obs_stats.count.item() == pytest.approx(len(inputs) + 1e-4, abs=1e-9)
    assert agent.return_stats.count.item() == pytest.approx(len(inputs) + 1e-4, abs=1e-9)
    np.testing.assert_allclose(agent.obs_stats.mean, inputs.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(agent.obs_stats.var, inputs.var(0), rtol=1e-4)


# Every flag that switches a detail of the algorithm does.


def test_metrics_have_the_documented_columns_and_the_annealed_learning_rate(tmp_path):
    rows = read(train(tmp_path, total_timesteps=2048) / "metrics.csv")
    expected = (
        "iteration,global_step,policy_loss,value_loss,entropy,old_approx_kl,approx_kl,clipfrac,"
        "max_ratio_dev,grad_norm,explained_variance,kl_reference,learning_rate,sps,seconds,"
        "episodes,episodic_return,episodic_length"
    )
    assert ",".join(rows[0]) == expected
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3, 4]
    assert [int(row["global_step"]) for row in rows] == [512, 1024, 1536, 2048]
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx([2.5e-4, 1.875e-4, 1.25e-4, 0.625e-4])
    assert float(rows[0]["entropy"]) == pytest.approx(math.log(2), abs=0.01)
    assert all(row["sps"].isdecimal() and float(row["seconds"]) > 0 for row in rows)
    rows = read(train(tmp_path, total_timesteps=1024, anneal_lr=False) / "metrics.csv")
    assert [row["learning_rate"] for row in rows] == ["0.00025"] * 2


def test_metrics_are_means_over_minibatches(tmp_path, monkeypatch):
    losses = record(monkeypatch, "ppo_loss")
    rows = read(train(tmp_path, total_timesteps=1024) / "metrics.csv")
    for i, row in enumerate(rows):
        logged = [result[1] for _, result in losses[16 * i : 16 * (i + 1)]]
        for name in logged[0]:
            values = [float(minibatch[name]) for minibatch in logged]
            assert float(row[name]) == pytest.approx(np.mean(values), rel=1e-3, abs=1e-7)


def test_adam_has_the_constants_that_the_field_agreed_on(tmp_path):
    _, checkpoint = ppo.load_run(train(tmp_path, total_timesteps=512))
    group = checkpoint["optimizer"]["param_groups"][0]
    assert group["eps"] == 1e-5 and tuple(group["betas"]) == (0.9, 0.999)
    assert group["weight_decay"] == 0


def test_the_gradient_is_clipped_to_the_norm_asked_for(tmp_path, monkeypatch):
    norms, step = [], torch.optim.Adam.step

    def spy(self):
        norms.append(self.param_groups[0]["params"][0].grad.norm().item())
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    rows = read(train(tmp_path, total_timesteps=512, max_grad_norm=0.1) / "metrics.csv")
    assert len(norms) == 16 and max(norms) == pytest.approx(0.1, rel=1e-3)
    assert float(rows[0]["grad_norm"]) > 0.2  # the norm before the clip
    norms.clear()
    rows = read(train(tmp_path, total_timesteps=512, max_grad_norm=math.inf) / "metrics.csv")
    assert np.mean(norms) == pytest.approx(float(rows[0]["grad_norm"]), rel=1e-4)


def test_target_kl_stops_after_the_epoch_that_exceeds_it(tmp_path, monkeypatch):
    losses = record(monkeypatch, "ppo_loss")
    flags = {"total_timesteps": 512, "update_epochs": 10, "learning_rate": 1e-2}
    train(tmp_path, **flags)
    kl = np.array([logged["approx_kl"].item() for _, (_, logged) in losses])
    kl = kl.reshape(10, 4).mean(1)  # of each epoch
    for limit in (kl[0] * 0.99, kl[1] * 0.99, kl.max() * 1.01):
        epochs = next((i for i, value in enumerate(kl, 1) if value > limit), 10)
        losses.clear()
        train(tmp_path, **flags, target_kl=limit)
        assert len(losses) == 4 * epochs


def test_advantages_are_normalised_over_each_minibatch_or_not_at_all(tmp_path, monkeypatch):
    losses = record(monkeypatch, "policy_loss")
    for norm_adv in (True, False):
        train(tmp_path, total_timesteps=512, update_epochs=1, norm_adv=norm_adv)
    means = [advantages.mean().item() for (_, advantages, _), _ in losses]
    deviations = [advantages.std().item() for (_, advantages, _), _ in losses]
    np.testing.assert_allclose(means[:4] + deviations[:4], [0] * 4 + [1] * 4, atol=1e-5)
    assert min(means[4:]) > 1 and min(deviations[4:]) > 1.1


@pytest.mark.parametrize(
    "change",
    [
        {"clip_coef": math.inf}, {"clip_vloss": False}, {"norm_adv": False}, {"anneal_lr": False},
        {"ent_coef": 0.1}, {"gae_lambda": 0.5}, {"gamma": 0.9}, {"vf_coef": 1.0},
        {"max_grad_norm": math.inf}, {"norm_obs": True}, {"norm_reward": True}, {"seed": 2},
        {"bootstrap_truncated": False}, {"update_epochs": 3}, {"num_minibatches": 2},
        {"target_kl": 1e-9}, {"save_every": 1},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_switch_changes_the_run(tmp_path, change):
    flags = {"env_id": "Ring-v0", "total_timesteps": 1024, "learning_rate": 1e-2, "save_every": 9}
    changed = train(tmp_path, **flags | change)
    assert outcome(changed)[0] != outcome(train(tmp_path, **flags))[0]


@pytest.mark.parametrize(
    "env_id", ["FrozenLake-v1", "Taxi-v4", "Blackjack-v1", "Mixed-v0", "environments:Ring-v0"]
)
def test_every_space_that_flattens_trains(tmp_path, env_id):
    rows = read(train(tmp_path, env_id=env_id, total_timesteps=1024) / "metrics.csv")
    assert len(rows) == 2 and int(rows[1]["episodes"]) > 0


# Runs repeat, resume and load exactly.


def test_one_seed_decides_everything(tmp_path):
    flags = {"total_timesteps": 4096, "norm_obs": True, "norm_reward": True}
    first = outcome(train(tmp_path, **flags))
    assert first == outcome(train(tmp_path, **flags))
    assert len(first[0]) == 8 and len(first[1]) > 50


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vectorization_mode_does_not_change_the_run(tmp_path, mode):
    flags = {"env_id": "Acrobot-v1", "total_timesteps": 2048}
    changed = train(tmp_path, **flags, vectorization_mode=mode)
    assert outcome(changed) == outcome(train(tmp_path, **flags))


def test_every_stretch_between_checkpoints_has_environments_and_randomness_of_its_own():
    (_, first), numbers = ppo.start_envs(ppo.Args(), 1), torch.rand(3)
    (_, second), others = ppo.start_envs(ppo.Args(), 2), torch.rand(3)
    assert not np.isclose(first, second).any() and not torch.isclose(numbers, others).any()
    assert np.array_equal(ppo.start_envs(ppo.Args(), 1)[1], first)
    assert torch.equal(torch.rand(3), numbers)


@pytest.mark.parametrize(
    ("env_id", "mode"),
    [("CartPole-v1", None), ("Acrobot-v1", "async"), ("environments:Walker-v0", "sync")],
)
def test_a_killed_run_resumes_exactly(tmp_path, env_id, mode):
    flags = {"env_id": env_id, "vectorization_mode": mode, "total_timesteps": 12288}
    flags |= {"save_every": 4, "norm_obs": True, "norm_reward": True}

    def start(*more):
        environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
        return subprocess.Popen([sys.executable, str(ROOT / "ppo.py"), *more], env=environment)

    options = [f"--{name}={value}" for name, value in flags.items() if value is not True]
    killed = start(*options, "--norm-obs", "--norm-reward", f"--runs-dir={tmp_path / 'killed'}")
    while not (found := list(tmp_path.glob("killed/*/checkpoint.pt"))):
        assert killed.poll() is None
        time.sleep(0.01)
    checkpoint = found[0]
    first = checkpoint.stat().st_ino
    while checkpoint.stat().st_ino == first and killed.poll() is None:  # until the next one
        time.sleep(0.002)
    time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    run_dir = checkpoint.parent
    assert 4 <= ppo.load_run(run_dir)[1]["iteration"] < 24
    resumed = start("--resume", str(run_dir))
    whole = outcome(train(tmp_path, **flags))
    assert resumed.wait() == 0
    assert len(whole[0]) == 24 and len(whole[1]) > 0
    assert outcome(run_dir) == whole


@pytest.mark.parametrize(("save_every", "crash_at"), [(4, 10), (100, 3)])
def test_a_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path, save_every, crash_at):
    """Also without any checkpoint but the one before the first iteration."""
    flags = {"total_timesteps": 6144, "save_every": save_every}
    with pytest.MonkeyPatch.context() as patch:
        original = ppo.Logger.log

        def crash(self, metrics, *rollout):
            original(self, metrics, *rollout)
            if metrics["iteration"] == crash_at:
                raise SystemExit

        patch.setattr(ppo.Logger, "log", crash)
        with pytest.raises(SystemExit):
            train(tmp_path / "crashed", **flags)
    run_dir = next((tmp_path / "crashed").iterdir())
    assert len(read(run_dir / "metrics.csv")) == crash_at
    args, checkpoint = ppo.load_run(run_dir)
    assert checkpoint["iteration"] == (crash_at - 1) // save_every * save_every
    assert ppo.train(dataclasses.replace(args, resume=str(run_dir))) == run_dir
    whole = outcome(train(tmp_path, **flags))
    assert len(whole[0]) == 12 and outcome(run_dir) == whole
    seconds = [float(row["seconds"]) for row in read(run_dir / "metrics.csv")]
    assert seconds == sorted(seconds)  # of the whole training, not since it was resumed


def test_an_agent_saved_and_loaded_acts_identically(tmp_path, monkeypatch):
    agents, original = [], ppo.Agent
    monkeypatch.setattr(
        ppo, "Agent", lambda *spaces: agents.append(original(*spaces)) or agents[-1]
    )
    args = ppo.Args("Acrobot-v1", runs_dir=str(tmp_path), total_timesteps=2048, norm_obs=True)
    run_dir = ppo.train(args)
    saved, loaded = agents[0], ppo.load_agent(run_dir)
    obs = torch.randn(1000, 6)
    with torch.no_grad():
        x = saved.normalize(obs)
        assert torch.equal(x, loaded.normalize(obs)) and not torch.equal(x, obs)
        assert torch.equal(saved.actor(x), loaded.actor(x))
        assert torch.equal(saved.value(x), loaded.value(x))
        assert torch.equal(saved.act(x, greedy=True), loaded.act(x, greedy=True))
    args = dataclasses.replace(args, evaluate=str(run_dir), eval_episodes=2, num_envs=3)
    in_memory, reloaded = ppo.evaluate(saved, args), ppo.evaluate(loaded, args)
    assert in_memory.shape == (3, 2) and np.array_equal(in_memory, reloaded)
    after = ppo.load_agent(run_dir).state_dict()  # evaluation changes nothing
    assert all(torch.equal(after[name], value) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(("env_id", "greedy"), [("CartPole-v1", False), ("Ring-v0", True)])
def test_evaluation_plays_whole_episodes_as_many_in_each_environment(recorder, env_id, greedy):
    args = ppo.Args(env_id, num_envs=8, eval_episodes=4, evaluate="runs/some", greedy=greedy)
    envs = ppo.make_envs(args)
    torch.manual_seed(1)
    agent = ppo.Agent(envs.single_observation_space, envs.single_action_space)
    returns = ppo.evaluate(agent, args)
    obs, actions, rewards, ended = recorder.last.recorded()
    for n in range(8):  # the first four, also where more were played
        ends = np.flatnonzero(ended[:, n])[:4]
        assert np.array_equal(returns[n], np.diff(rewards[:, n].cumsum()[ends], prepend=0))
    if env_id == "Ring-v0":
        assert returns.tolist() == [[1 + 2 + 3 + 1] * 4] * 8  # the time limit is 4
    else:
        assert ended.sum(0).max() > 4
    most_probable = agent.act(torch.as_tensor(obs, dtype=torch.float32), True).numpy()
    assert np.array_equal(actions, most_probable) == greedy


def test_compiled_training_equals_eager_and_compiles_once(tmp_path, monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # other tests of this process count too
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    eager = read(train(tmp_path, total_timesteps=2048) / "metrics.csv")
    compiled = read(train(tmp_path, total_timesteps=2048, compile=True) / "metrics.csv")
    assert len({row["episodes"] for row in compiled}) > 1  # rollouts differ in valid rows
    for one, other in zip(eager, compiled):
        assert float(one["value_loss"]) == pytest.approx(float(other["value_loss"]), rel=1e-3)
        assert float(one["entropy"]) == pytest.approx(float(other["entropy"]), rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_cartpole_is_learned(tmp_path):
    episodes = read(train(tmp_path, total_timesteps=50_000) / "episodes.csv")
    returns = [float(row["episodic_return"]) for row in episodes]
    assert np.mean(returns[:20]) < 40
    assert np.mean(returns[-50:]) > 150
