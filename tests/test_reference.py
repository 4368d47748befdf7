"""--reference of ppo.py: fine-tuning with a KL penalty, (kl-ref)."""

import math
import shutil

import pytest
import torch
from conftest import column, equal, load, outcome, read, train
from test_resume import crash

import ppo

FLAGS = {"env_id": "Sides-v0", "norm_obs": True}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run of an agent that has learned a little, with statistics of its own."""
    flags = {"total_timesteps": 256, "learning_rate": 1e-3, "update_epochs": 4}
    return train(ppo, tmp_path_factory.mktemp("reference"), **FLAGS, **flags)


def test_drift_is_taken_off_the_rewards(tmp_path, monkeypatch, record):
    """π_old(a|s) = 0.5, π_ref(a|s) = 0.2, β = 2: the reward becomes r − 2 log 2.5, whatever
    π_θ is during the update; here 0.3."""
    gaes = record(ppo, "compute_gae")
    start = train(ppo, tmp_path / "ring", "Ring", total_timesteps=32)
    logs = {"old": math.log(0.5), "update": math.log(0.3), "reference": math.log(0.2)}

    def evaluate_actions(agent, x, action):
        frozen = not any(parameter.requires_grad for parameter in agent.parameters())
        policy = "update" if torch.is_grad_enabled() else "old"
        log_probs = torch.full(action.shape, logs["reference" if frozen else policy])
        if frozen:
            log_probs[4::5] = -9.0  # after a time limit of 4, in rows that only reset
        return log_probs + 0 * agent.value(x), 0 * agent.value(x)

    monkeypatch.setattr(ppo.Agent, "evaluate_actions", evaluate_actions)
    flags = {"num_steps": 64, "kl_coef": 2.0, "reference": str(start)}
    gaes.clear()
    run_dir = train(ppo, tmp_path, "Ring", **flags, total_timesteps=128)
    rewards = gaes[0][0][0]
    valid = torch.arange(64) % 5 != 4
    expected = torch.tensor([1.0, 2.0, 3.0, 1.0, 0.0] * 13)[:64] - 2 * math.log(2.5) * valid
    torch.testing.assert_close(rewards[:, 0], expected)
    assert column(run_dir, "kl_reference") == pytest.approx([math.log(2.5)])
    assert {row["episodic_return"] for row in read(run_dir / "episodes.csv")} == {"7.0"}


def test_without_a_coefficient_rewards_stay(tmp_path, record, reference):
    gaes = record(ppo, "compute_gae")
    # Without learning, too, the policies differ: each normalises by its own statistics.
    run_dir = train(ppo, tmp_path, **FLAGS, reference=str(reference), learning_rate=0.0)
    rewards = set(torch.stack([inputs[0] for inputs, _ in gaes]).unique().tolist())
    assert rewards == {0.0, 1.0}
    kl = column(run_dir, "kl_reference")
    assert kl[0] == 0 and all(kl[1:])
    without = read(train(ppo, tmp_path, **FLAGS) / "metrics.csv")
    assert {row["kl_reference"] for row in without} == {""}


def test_the_penalty_is_taken_off_before_rewards_are_scaled(tmp_path, record):
    start = train(ppo, tmp_path / "start", "Sides", norm_obs=True)
    scaled = record(ppo, "scale_rewards")
    flags = {"kl_coef": 5.0, "norm_reward": True, "norm_obs": True, "learning_rate": 1e-2}
    train(ppo, tmp_path, "Sides", **flags, reference=str(start))
    rewards = [inputs[0] for inputs, _ in scaled]
    assert set(rewards[0].unique().tolist()) <= {0, 1} and len(rewards[3].unique()) > 2


def test_the_reference_is_the_start_and_stays(tmp_path, record, started, reference):
    loaded, states = record(ppo, "load_agent"), started(ppo)
    saved = load(reference)["agent"]
    flags = {"learning_rate": 1e-2, "reference": str(reference), "kl_coef": 0.1}
    after = load(train(ppo, tmp_path, **FLAGS, **flags))["agent"]
    ((_, frozen),) = loaded
    assert equal(dict(frozen.state_dict()), saved) and equal(states[0], saved)
    assert not torch.equal(after["actor.4.weight"], saved["actor.4.weight"])
    assert after["obs_stats.count"] > saved["obs_stats.count"]


def test_a_relative_reference_is_found(tmp_path, monkeypatch, reference, call):
    """A run with a reference is resumed in another directory than it was started in."""
    shutil.copytree(reference, tmp_path / "here" / "agent")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    flags = {**FLAGS, "reference": "agent", "kl_coef": 0.5, "save_every": 2}
    run_dir = crash(ppo, tmp_path / "runs", 3, **flags)
    monkeypatch.chdir(tmp_path / "there")
    status, _, errors = call(ppo, "--resume", run_dir)
    assert status == 0, errors
    metrics, _ = outcome(run_dir)
    assert len(metrics) == 4 and all(float(row["kl_reference"]) != 0 for row in metrics[1:])
    # What was learned until then, not the reference, is where the resumed run starts.
    assert float(metrics[2]["kl_reference"]) != 0


def test_bad_references(tmp_path, reference):
    trained = str(reference)
    for flags, named in (
        ({"kl_coef": 0.1}, "--kl-coef"),
        ({"reference": "missing"}, "missing"),
        ({"reference": trained, "norm_obs": False}, "--norm-obs"),
        ({"reference": trained, "env_id": "CartPole-v1"}, "--reference"),
    ):
        with pytest.raises(ppo.UsageError, match=named):
            train(ppo, tmp_path / "runs", **FLAGS | flags)
    assert not (tmp_path / "runs").exists()
