"""ppo.py --reference: the objective of RLHF, (kl-ref)."""

import csv
import math

import environments  # noqa: F401, registers the environments
import pytest
import torch

import ppo

SMALL = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2}


def train(tmp_path, **flags):
    return ppo.train(ppo.Args(runs_dir=str(tmp_path), **flags))


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run directory of an agent that has learned a little, with statistics of its own."""
    flags = {"total_timesteps": 2048, "learning_rate": 2e-3, "norm_obs": True}
    return train(tmp_path_factory.mktemp("reference"), env_id="Bandit-v0", **flags)


def bandit_policy(run_dir):
    agent = ppo.load_agent(run_dir)
    return agent.actor(agent.normalize(torch.ones(1, 1))).softmax(-1)[0]


def test_drift_is_taken_off_the_rewards(tmp_path, monkeypatch):
    """π_old(a|s) = 0.5, π_ref(a|s) = 0.2, β = 2: the reward becomes r − 2 log 2.5, whatever π_θ is
    during the update; here 0.3."""
    learned, original = [], ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda *x: learned.append(x[0]) or original(*x))
    logs = {"old": math.log(0.5), "update": math.log(0.3), "reference": math.log(0.2)}

    def evaluate_actions(agent, x, action):
        frozen = not any(parameter.requires_grad for parameter in agent.parameters())
        policy = "update" if torch.is_grad_enabled() else "old"
        log_probs = torch.full(action.shape, logs["reference" if frozen else policy])
        return log_probs + 0 * agent.value(x), 0 * agent.value(x)

    monkeypatch.setattr(ppo.Agent, "evaluate_actions", evaluate_actions)
    flags = {"env_id": "Ring-v0", "total_timesteps": 128, "kl_coef": 2.0, **SMALL}
    monkeypatch.setattr(ppo, "load_agent", lambda run_dir: frozen_ring())
    (tmp_path / "ring").mkdir()
    run_dir = train(tmp_path, reference=str(tmp_path / "ring"), **flags)
    steps = torch.cat(learned)[:, 0]
    valid = torch.arange(len(steps)) % 5 != 4  # a time limit of 4, then a row that only resets
    penalty = 2 * math.log(2.5)
    expected = torch.tensor([1.0, 2.0, 3.0, 1.0, 0.0] * 7)[: len(steps)] - penalty * valid
    torch.testing.assert_close(steps, expected)
    rows = read(run_dir / "metrics.csv")
    assert [float(row["kl_reference"]) for row in rows] == pytest.approx([math.log(2.5)] * 2)
    assert {row["episodic_return"] for row in read(run_dir / "episodes.csv")} == {"7.0"}


def frozen_ring():
    envs = ppo.make_envs(ppo.Args(env_id="Ring-v0"))
    agent = ppo.Agent(envs.single_observation_space, envs.single_action_space)
    return agent.requires_grad_(False)


def test_without_a_coefficient_the_rewards_are_the_environments_own(
    tmp_path, monkeypatch, reference
):
    learned, original = [], ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda *x: learned.append(x[0]) or original(*x))
    flags = {"env_id": "Bandit-v0", "total_timesteps": 256, "norm_obs": True, **SMALL}
    run_dir = train(tmp_path, reference=str(reference), **flags)
    rewards = {round(reward, 4) for reward in torch.cat(learned).flatten().tolist()}
    assert rewards <= {0.0, *(round(r, 4) for r in environments.Bandit.rewards)}
    assert all(float(row["kl_reference"]) != 0 for row in read(run_dir / "metrics.csv")[1:])
    without = read(train(tmp_path, **flags) / "metrics.csv")
    assert {row["kl_reference"] for row in without} == {""}


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_a_bandit_ends_at_the_closed_form(tmp_path, reference, beta):
    """π*(a) ∝ π_ref(a) exp(R(a)/β) maximises E[R] − β KL(π ‖ π_ref)."""
    flags = {"env_id": "Bandit-v0", "total_timesteps": 60_000, "ent_coef": 0.0, "norm_obs": True}
    flags |= {"num_envs": 16, "num_steps": 64, "learning_rate": 3e-3, "gae_lambda": 1.0}
    run_dir = train(tmp_path, reference=str(reference), kl_coef=beta, **flags)
    optimum = bandit_policy(reference) * torch.exp(torch.tensor(environments.Bandit.rewards) / beta)
    optimum /= optimum.sum()
    distance = 0.5 * (bandit_policy(run_dir) - optimum).abs().sum().item()
    start = 0.5 * (bandit_policy(reference) - optimum).abs().sum().item()
    assert distance < 0.02 < start


def test_the_reference_is_the_start_and_stays_as_it_is(tmp_path, monkeypatch, reference):
    agents, original = [], ppo.flat_parameters

    def keep(agent):
        agents.append({name: value.clone() for name, value in agent.state_dict().items()})
        return original(agent)

    loaded, load_agent = [], ppo.load_agent
    monkeypatch.setattr(
        ppo, "load_agent", lambda path: loaded.append(load_agent(path)) or loaded[-1]
    )
    monkeypatch.setattr(ppo, "flat_parameters", keep)
    flags = {"env_id": "Bandit-v0", "total_timesteps": 1024, "learning_rate": 1e-2, **SMALL}
    run_dir = train(tmp_path, reference=str(reference), kl_coef=0.1, **flags)
    saved = torch.load(reference / "checkpoint.pt", weights_only=True)["agent"]
    for name, value in saved.items():
        assert torch.equal(agents[0][name], value), name
        assert torch.equal(loaded[0].state_dict()[name], value), name
    after = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    assert not torch.equal(after["actor.4.weight"], saved["actor.4.weight"])
    assert after["obs_stats.count"] > saved["obs_stats.count"]
    assert ppo.load_run(run_dir)[0].norm_obs  # the reference's, though the default is off


def test_a_run_with_a_reference_resumes_exactly(tmp_path, monkeypatch, reference):
    outcome = lambda path: [
        {k: v for k, v in row.items() if k not in ("sps", "seconds")}
        for row in read(path / "metrics.csv")
    ]
    flags = {"env_id": "Bandit-v0", "total_timesteps": 512, "save_every": 2, "norm_obs": True}
    flags |= {"reference": str(reference), "kl_coef": 0.5, **SMALL}
    whole = train(tmp_path / "whole", **flags)
    log, rows = ppo.Logger.log, []

    def crash(logger, metrics, *rollout):
        log(logger, metrics, *rollout)
        rows.append(metrics)
        if len(rows) == 5:
            raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(ppo.Logger, "log", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train(tmp_path / "crashed", **flags)
    (run_dir,) = (tmp_path / "crashed").iterdir()
    ppo.train(ppo.Args(resume=str(run_dir), runs_dir=str(tmp_path / "crashed"), **flags))
    assert outcome(run_dir) == outcome(whole)
    assert ppo.load_agent(run_dir).actor[0].weight.isfinite().all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"kl_coef": 0.1}, "--kl-coef needs --reference"),
        ({"kl_coef": -0.1}, "--kl-coef -0.1"),
        ({"reference": "missing"}, "missing is not a run directory"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ppo.UsageError, match=message):
        train(tmp_path / "runs", **flags)
    assert not (tmp_path / "runs").exists()


def test_other_spaces_are_refused(tmp_path, reference):
    with pytest.raises(ppo.UsageError, match="other spaces"):
        train(tmp_path / "runs", env_id="CartPole-v1", reference=str(reference))
    assert not (tmp_path / "runs").exists()
