"""The training loop of ppo.py: which rows count, what is learned, and that runs repeat and resume exactly."""

import csv
import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import time
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
    metrics = [{k: v for k, v in row.items() if k not in ("sps", "seconds")} for row in read(run_dir / "metrics.csv")]
    return metrics, read(run_dir / "episodes.csv")


def train(tmp_path, **flags):
    return ppo.train(ppo.Args(runs_dir=str(tmp_path), **flags))


def load_agent(run_dir, args):
    envs = ppo.make_envs(args)
    agent = ppo.Agent(envs.single_observation_space, envs.single_action_space, args)
    agent.load_state_dict(torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"])
    return agent


def record(monkeypatch, name, calls):
    """Lets ppo.<name> keep a copy of its arguments in calls."""
    original = getattr(ppo, name)

    def recording(*args):
        calls.append([x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args])
        return original(*args)

    monkeypatch.setattr(ppo, name, recording)


# Rows: the step after an episode's end is a reset, in no loss and no statistic, also across the seam of two rollouts.


def test_rows_of_a_reset_are_not_valid_and_time_limits_are_no_terminations(tmp_path, monkeypatch):
    losses, gaes, variances = [], [], []
    record(monkeypatch, "ppo_loss", losses)
    record(monkeypatch, "compute_gae", gaes)
    record(monkeypatch, "explained_variance", variances)
    monkeypatch.setattr(torch, "randperm", lambda n, device=None: torch.arange(n))
    flags = {"num_envs": 1, "num_steps": 3, "num_minibatches": 1, "update_epochs": 1, "total_timesteps": 30}
    run_dir = train(tmp_path, env_id="Ring-v0", save_every=0, **flags)
    rewards, _, terminated, done = (torch.cat([call[i] for call in gaes]) for i in range(4))
    weight = torch.cat([call[-1] for call in losses])
    rows = torch.arange(30)  # a time limit of 4, so rows 4, 9, 14, … are the resets; rollouts of 3 put seams everywhere
    assert torch.equal(weight, (rows % 5 != 4).float())
    assert torch.equal(done[:, 0], rows % 5 == 3) and not terminated.any()
    assert torch.equal(rewards[:, 0], torch.tensor([1.0, 2.0, 3.0, 1.0, 0.0] * 6))
    states = torch.cat([call[2].argmax(-1) for call in losses])
    assert states.tolist() == [0, 1, 2, 0, 1] * 6  # the row after the end is fed the true last observation, state 1
    expected = [{"global_step": str(i), "episodic_return": "7.0", "episodic_length": "4"} for i in range(4, 30, 5)]
    assert read(run_dir / "episodes.csv") == expected
    means = {(row["episodes"], row["episodic_return"], row["episodic_length"]) for row in read(run_dir / "metrics.csv")}
    assert means == {("0", "", ""), ("1", "7.0", "4.0")}
    values = torch.cat([call[1][:-1, 0] for call in gaes])
    assert torch.equal(torch.cat([call[0] for call in variances]), values[rows % 5 != 4])


RING = {
    "env_id": "Ring-v0", "num_envs": 4, "num_steps": 32, "total_timesteps": 40_000, "learning_rate": 1e-2,
    "gamma": 0.9, "clip_vloss": False, "max_grad_norm": math.inf, "save_every": 0,
}  # fmt: skip
V0 = (1 + 0.9 * 2 + 0.81 * 3) / (1 - 0.9**3)
RING_VALUES = [V0, 2 + 0.9 * 3 + 0.81 * V0, 3 + 0.9 * V0]  # a time limit ends the episode, not the world
TERMINAL_VALUES = [1 + 0.9 * 2 + 0.81 * 3, 2 + 0.9 * 3, 3.0]


def learned_values(tmp_path, **flags):
    args = ppo.Args(runs_dir=str(tmp_path), **RING | flags)
    return load_agent(ppo.train(args), args).value(torch.eye(3)).detach().numpy()


def test_critic_learns_the_true_values_under_truncation(tmp_path):
    np.testing.assert_allclose(learned_values(tmp_path), RING_VALUES, atol=1e-3)


def test_critic_learns_the_true_values_under_termination(tmp_path):
    np.testing.assert_allclose(learned_values(tmp_path, env_id="RingTerminal-v0"), TERMINAL_VALUES, atol=1e-3)


def test_critic_misses_them_when_a_time_limit_counts_as_termination(tmp_path):
    error = np.abs(learned_values(tmp_path, bootstrap_truncated=False) - RING_VALUES)
    assert error.min() > 14


@pytest.mark.parametrize(
    ("env_id", "truth", "margin"), [("Ring-v0", RING_VALUES, 3.0), ("RingTerminal-v0", TERMINAL_VALUES, 0.25)]
)
def test_critic_misses_them_when_reset_rows_are_left_in(tmp_path, monkeypatch, env_id, truth, margin):
    original = ppo.value_loss
    monkeypatch.setattr(ppo, "value_loss", lambda v, old, returns, clip, weight: original(v, old, returns, clip))
    assert np.abs(learned_values(tmp_path, env_id=env_id) - truth).max() > margin


# What the policy saw is what the update sees.


def test_first_minibatch_of_every_update_has_ratio_one(tmp_path, monkeypatch):
    deviations, original = [], ppo.ppo_loss

    def loss(*args):
        result = original(*args)
        deviations.append(result[-1].expm1().abs().max().item())
        return result

    monkeypatch.setattr(ppo, "ppo_loss", loss)
    rewards = []
    record(monkeypatch, "scale_rewards", rewards)
    train(tmp_path, env_id="Acrobot-v1", total_timesteps=3072, norm_obs=True, norm_reward=True, learning_rate=1e-3)
    first = deviations[::16]
    assert len(first) == 6 and max(first) < 1e-5
    assert min(deviations[15::16]) > 1e-3  # the last minibatch of each update is past the old policy
    # −1 in each of the 128 steps of the first rollout, discounted once more: what the second one goes on from.
    np.testing.assert_allclose(rewards[1][5], [-sum(0.99**k for k in range(1, 129))] * 4, rtol=1e-5)


def test_observation_statistics_are_those_of_the_inputs_of_valid_rows(tmp_path, monkeypatch):
    inputs = []

    class Recorder(gym.vector.VectorWrapper):
        def reset(self, **kwargs):
            self.last, info = self.env.reset(**kwargs)
            self.ended = np.zeros(self.num_envs, bool)
            return self.last, info

        def step(self, action):
            inputs.extend(self.last[~self.ended])
            self.last, reward, terminated, truncated, info = self.env.step(action)
            self.ended = terminated | truncated
            return self.last, reward, terminated, truncated, info

    original = ppo.make_envs
    monkeypatch.setattr(ppo, "make_envs", lambda *args: Recorder(original(*args)))
    run_dir = train(tmp_path, total_timesteps=2560, norm_obs=True)
    agent = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    inputs = np.array(inputs)
    assert agent["obs_stats.count"].item() == pytest.approx(len(inputs) + 1e-4, abs=1e-9)
    assert 2300 < len(inputs) < 2560  # some rows were resets
    np.testing.assert_allclose(agent["obs_stats.mean"], inputs.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(agent["obs_stats.var"], inputs.var(0), rtol=1e-4)


# Every flag that switches a detail of the algorithm does.


def test_metrics_have_the_documented_columns_and_the_annealed_learning_rate(tmp_path):
    rows = read(train(tmp_path, total_timesteps=2048) / "metrics.csv")
    expected = (
        "iteration,global_step,episodes,episodic_return,episodic_length,policy_loss,value_loss,entropy,old_approx_kl,"
        "approx_kl,clipfrac,max_ratio_dev,explained_variance,grad_norm,learning_rate,sps,seconds"
    )
    assert ",".join(rows[0]) == expected
    assert [int(row["global_step"]) for row in rows] == [512, 1024, 1536, 2048]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([2.5e-4, 1.875e-4, 1.25e-4, 0.625e-4])
    assert float(rows[0]["entropy"]) == pytest.approx(math.log(2), abs=0.01)
    assert all(row["sps"].isdecimal() and float(row["seconds"]) > 0 for row in rows)
    rows = read(train(tmp_path, total_timesteps=1024, anneal_lr=False) / "metrics.csv")
    assert [row["learning_rate"] for row in rows] == ["0.00025"] * 2


def test_adam_has_the_constants_that_the_field_agreed_on(tmp_path):
    group = torch.load(train(tmp_path, total_timesteps=512) / "checkpoint.pt", weights_only=True)["optimizer"]
    group = group["param_groups"][0]
    assert group["eps"] == 1e-5 and tuple(group["betas"]) == (0.9, 0.999) and group["weight_decay"] == 0


def test_the_gradient_is_clipped_to_the_norm_asked_for(tmp_path, monkeypatch):
    norms, step = [], torch.optim.Adam.step
    spy = lambda self: norms.append(self.param_groups[0]["params"][0].grad.norm().item()) or step(self)
    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    rows = read(train(tmp_path, total_timesteps=512, max_grad_norm=0.1) / "metrics.csv")
    assert len(norms) == 16 and max(norms) == pytest.approx(0.1, rel=1e-3)
    assert float(rows[0]["grad_norm"]) > 0.2  # what is logged is the norm before
    norms.clear()
    train(tmp_path, total_timesteps=512, max_grad_norm=math.inf)
    assert np.mean(norms) == pytest.approx(float(rows[0]["grad_norm"]), rel=0.2)


def test_target_kl_stops_after_the_epoch_that_exceeds_it(tmp_path, monkeypatch):
    losses = []
    record(monkeypatch, "ppo_loss", losses)
    train(tmp_path, total_timesteps=512, update_epochs=10, learning_rate=1e-2, target_kl=1e-9)
    assert len(losses) == 4
    losses.clear()
    train(tmp_path, total_timesteps=512, update_epochs=10, learning_rate=1e-2, target_kl=1e9)
    assert len(losses) == 40
    first, second = (torch.cat([call[5] for call in losses[i : i + 4]]) for i in (0, 4))  # the values of an epoch
    assert not torch.equal(first, second) and torch.equal(first.sort().values, second.sort().values)


def test_advantages_are_normalised_over_minibatch_batch_or_not_at_all(tmp_path, monkeypatch):
    losses = []
    record(monkeypatch, "ppo_loss", losses)
    flags = {"total_timesteps": 512, "update_epochs": 1}
    for extra in ({}, {"norm_adv_over": "batch"}, {"norm_adv": False}):
        train(tmp_path, **flags, **extra)
    moments = []
    for minibatch in losses:
        live = minibatch[-2][minibatch[-1] == 1]
        moments.append([live.mean().item(), live.std().item()])
    each, whole, off = np.split(np.array(moments), 3)
    np.testing.assert_allclose(each, [[0, 1]] * 4, atol=1e-5)
    assert np.abs(whole[:, 0]).max() > 1e-3 and abs(np.mean(whole[:, 0])) < 0.02
    assert np.abs(off[:, 0]).max() > 1


@pytest.mark.parametrize(
    "change",
    [
        {"clip_coef": math.inf}, {"clip_vloss": False}, {"norm_adv": False}, {"anneal_lr": False}, {"ent_coef": 0.1},
        {"gae_lambda": 0.5}, {"gamma": 0.9}, {"vf_coef": 1.0}, {"max_grad_norm": math.inf}, {"norm_obs": True},
        {"norm_reward": True}, {"seed": 2}, {"bootstrap_truncated": False}, {"update_epochs": 3},
        {"num_minibatches": 2}, {"norm_adv_over": "batch"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_switch_changes_the_run(tmp_path, change):
    flags = {"env_id": "Ring-v0", "total_timesteps": 1024, "learning_rate": 1e-2}
    assert outcome(train(tmp_path, **flags))[0] != outcome(train(tmp_path, **flags, **change))[0]


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Taxi-v4", "Blackjack-v1", "Mixed-v0", "environments:Ring-v0"])
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
    assert outcome(train(tmp_path, **flags, vectorization_mode=mode)) == outcome(train(tmp_path, **flags))


@pytest.mark.parametrize(
    ("env_id", "mode"), [("CartPole-v1", "auto"), ("Acrobot-v1", "async"), ("environments:Walker-v0", "sync")]
)
def test_a_killed_run_resumes_exactly(tmp_path, env_id, mode):
    flags = [f"--env-id={env_id}", f"--vectorization-mode={mode}", "--total-timesteps=12288", "--save-every=4"]
    flags += ["--norm-obs", "--norm-reward"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}

    def start(name, *more):
        command = [sys.executable, str(ROOT / "ppo.py"), *more]
        command += [*flags, f"--runs-dir={tmp_path / name}"] if name else []
        return subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    whole, killed = start("whole"), start("killed")
    while not (found := list((tmp_path / "killed").glob("*/checkpoint.pt"))):
        time.sleep(0.01)
    checkpoint = found[0]
    first = checkpoint.stat().st_ino
    while checkpoint.stat().st_ino == first and killed.poll() is None:  # a checkpoint after training steps
        time.sleep(0.002)
    time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert whole.communicate() and whole.returncode == 0
    done = torch.load(checkpoint, weights_only=True)["iteration"]
    assert 4 <= done < 24
    resumed = start(None, "--resume", str(checkpoint.parent))
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors.decode()
    expected = next((tmp_path / "whole").iterdir())
    assert len(outcome(expected)[0]) == 24
    assert outcome(checkpoint.parent) == outcome(expected)


def test_every_stretch_between_checkpoints_has_worlds_and_noise_of_its_own():
    (_, first), numbers = ppo.new_worlds(ppo.Args(), 1), torch.rand(3)
    (_, second), others = ppo.new_worlds(ppo.Args(), 2), torch.rand(3)
    assert not np.isclose(first, second).any() and not torch.isclose(numbers, others).any()
    assert np.array_equal(ppo.new_worlds(ppo.Args(), 1)[1], first) and torch.equal(torch.rand(3), numbers)


def test_a_run_that_is_being_trained_is_not_trained_by_another_process_too(tmp_path):
    flags = ["--total-timesteps=100000000", "--save-every=10", f"--runs-dir={tmp_path}"]
    running = subprocess.Popen([sys.executable, str(ROOT / "ppo.py"), *flags], stdout=subprocess.DEVNULL)
    while not (found := list(tmp_path.glob("*/checkpoint.pt"))):
        time.sleep(0.01)
    args = ppo.Args(total_timesteps=100_000_000, save_every=10, resume=str(found[0].parent))
    with pytest.raises(ppo.UsageError, match="--resume .* is being trained by another process"):
        ppo.train(args)
    running.kill()
    running.communicate()
    iterations = [int(row["iteration"]) for row in read(found[0].parent / "metrics.csv")]
    assert iterations == list(range(1, 1 + len(iterations)))


def test_a_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path, capsys):
    flags = {"total_timesteps": 6144, "save_every": 4}
    whole = train(tmp_path, **flags)
    with pytest.MonkeyPatch.context() as patch:
        original = ppo.Logger.log

        def crash(self, name, *row):
            original(self, name, *row)
            if name == "metrics.csv" and row[0] == 10:
                raise SystemExit

        patch.setattr(ppo.Logger, "log", crash)
        with pytest.raises(SystemExit):
            train(tmp_path / "crashed", **flags)
    run_dir = next((tmp_path / "crashed").iterdir())
    assert len(read(run_dir / "metrics.csv")) == 10
    capsys.readouterr()
    ppo.train(ppo.Args(runs_dir=str(tmp_path / "crashed"), resume=str(run_dir), **flags))
    assert outcome(run_dir) == outcome(whole)
    seconds = [float(row["seconds"]) for row in read(run_dir / "metrics.csv")]
    assert seconds == sorted(seconds)  # of the whole training, not since it was resumed
    step, shown = re.search(r"^step ([\d,]+) of .*?return ([\d.]+)", capsys.readouterr().out, re.M).groups()
    rows = [row for row in read(run_dir / "episodes.csv") if int(row["global_step"]) <= 9 * 512]
    returns = [float(row["episodic_return"]) for row in rows[-100:]]  # most of them before the checkpoint
    assert (step, shown) == (f"{9 * 512:,}", f"{np.mean(returns):.2f}")


def test_an_agent_saved_and_loaded_acts_identically(tmp_path, capsys):
    args = ppo.Args(runs_dir=str(tmp_path), env_id="Acrobot-v1", total_timesteps=2048, norm_obs=True)
    agents, original = [], ppo.Agent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "Agent", lambda *spaces: agents.append(original(*spaces)) or agents[-1])
        run_dir = ppo.train(args)
    saved, loaded = agents[0], load_agent(run_dir, args)
    obs, noise = torch.randn(1000, 6), saved.noise(1000)
    with torch.no_grad():
        x = saved.normalize(obs)
        assert torch.equal(x, loaded.normalize(obs)) and not torch.equal(x, obs)
        assert torch.equal(saved.actor(x), loaded.actor(x)) and torch.equal(saved.value(x), loaded.value(x))
        assert torch.equal(saved.act(x, noise), loaded.act(x, noise))
    args = dataclasses.replace(args, evaluate=str(run_dir), eval_episodes=2, num_envs=3)
    in_memory, reloaded = (ppo.evaluate(args, agent.state_dict()) for agent in (saved, loaded))
    assert in_memory.shape == (3, 2) and np.array_equal(in_memory, reloaded)
    after = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    assert all(torch.equal(after[name], value) for name, value in saved.state_dict().items())


def test_evaluation_plays_whole_episodes_as_many_in_each_environment():
    args = ppo.Args(env_id="Ring-v0", num_envs=3, eval_episodes=4)
    envs = ppo.make_envs(args)
    state = ppo.Agent(envs.single_observation_space, envs.single_action_space, args).state_dict()
    assert ppo.evaluate(args, state).tolist() == [[1 + 2 + 3 + 1] * 4] * 3


def test_compiled_training_equals_eager_and_compiles_once(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # other tests of this process count too
    eager = read(train(tmp_path, total_timesteps=2048) / "metrics.csv")
    compiled = read(train(tmp_path, total_timesteps=2048, compile=True) / "metrics.csv")
    for one, other in zip(eager, compiled):
        assert float(one["value_loss"]) == pytest.approx(float(other["value_loss"]), rel=1e-3)
        assert float(one["entropy"]) == pytest.approx(float(other["entropy"]), rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # check_compiler's and the loss


def test_cartpole_is_learned(tmp_path):
    episodes = read(train(tmp_path, total_timesteps=100_000) / "episodes.csv")
    returns = [float(row["episodic_return"]) for row in episodes]
    assert np.mean(returns[:20]) < 40
    assert np.mean(returns[-50:]) > 180
