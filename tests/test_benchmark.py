"""The runner of the studies: replacements in the source, summaries, interrupted and failed runs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ppo

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmark"))

import report  # noqa: E402 (the line above finds it)
import run as runner  # noqa: E402
import studies  # noqa: E402

EDITED = {run.edits: run for runs in studies.STUDIES.values() for run in runs if run.edits}
FLAGS = (
    "--num-envs 4 --num-steps 32 --num-minibatches 2 --total-timesteps 1280 --save-every 2"
)
SMALL = studies.Run("study", "CartPole", 1, "ppo.py", "CartPole-v1", FLAGS)


@pytest.mark.parametrize("run", EDITED.values(), ids=lambda run: run.label)
def test_replacements_fit_todays_scripts(tmp_path, run):
    text = runner.edited_script(run, tmp_path).read_text()
    compile(text, run.script, "exec")
    assert all(text.count(new) == 1 for _, new in run.edits)


@pytest.mark.parametrize("old", ["no such line", "import"])
def test_a_replacement_must_fit_exactly_once(tmp_path, old):
    run = studies.Run("study", "x", 1, "ppo.py", "CartPole-v1", edits=((old, "new"),))
    with pytest.raises(ValueError, match="not once"):
        runner.edited_script(run, tmp_path)


def edited_module(tmp_path, edits):
    run = studies.Run("study", "x", 1, "ppo_continuous.py", "Pendulum-v1", edits=edits)
    names = {"__name__": "edited"}
    sys.modules["edited"] = type(sys)("edited")  # where dataclasses look
    exec(compile(runner.edited_script(run, tmp_path).read_text(), "edited", "exec"), names)
    return names


@pytest.mark.parametrize(("edits", "units"), [((), 256), (studies.NARROW_CRITIC, 64)])
def test_the_critic_has_256_units_or_64(tmp_path, edits, units):
    names = edited_module(tmp_path, edits)
    args = names["Args"](env_id="Pendulum-v1")
    envs = names["make_envs"](args)
    agent = names["Agent"](
        envs.single_observation_space, envs.single_action_space, True, 0, True
    )
    assert [layer.out_features for layer in agent.critic[::2]] == [units, units, 1]
    assert [layer.out_features for layer in agent.actor[::2]] == [64, 64, 1]


def test_the_deviation_of_actions_stays_above_its_floor(tmp_path):
    names = edited_module(tmp_path, (studies.SIGMA_FLOOR,))
    flags = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "total_timesteps": 32}
    args = names["Args"](
        env_id="Pendulum-v1", initial_log_std=-5, runs_dir=str(tmp_path / "runs"), **flags
    )
    state = torch.load(names["train"](args) / "checkpoint.pt")["agent"]
    assert state["log_std"].min().item() == pytest.approx(-2, abs=0.01)


def test_advantages_are_divided_by_no_less_than_their_running_deviation(tmp_path):
    names = edited_module(tmp_path, studies.ADVANTAGE_FLOOR)
    small = torch.tensor([0.1, -0.1])
    assert torch.equal(
        names["normalize_advantages"](small), small
    )  # divided by 1, not by 0.14
    large = torch.tensor([10.0, -10.0])
    torch.testing.assert_close(
        names["normalize_advantages"](large), ppo.normalize_advantages(large)
    )


def test_a_shorter_time_limit_ends_episodes_in_training(tmp_path):
    names = edited_module(tmp_path, (studies.SHORT_EPISODES,))
    envs, _ = names["start_envs"](names["Args"](env_id="Pendulum-v1", num_envs=2), 0)
    ended = [envs.step(envs.action_space.sample())[3].tolist() for _ in range(100)]
    assert ended == [[False, False]] * 99 + [[True, True]]


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_a_summary_holds_what_the_tables_need(tmp_path, results):
    run_dir = ppo.train(ppo.Args(total_timesteps=10_240, gamma=0.9, runs_dir=str(tmp_path)))
    kept = runner.summary(SMALL, run_dir)
    episodes = np.genfromtxt(run_dir / "episodes.csv", delimiter=",", names=True)
    assert kept["score"] == pytest.approx(
        episodes["episodic_return"][-100:].mean(), rel=1e-4
    )
    assert kept["last_lengths"] == episodes["episodic_length"][-100:].astype(int).tolist()
    last_part = episodes["global_step"] > 10_240 * 199 / 200
    if last_part.any():
        mean = episodes["episodic_return"][last_part].mean()
        assert kept["curve"][-1] == pytest.approx(mean, rel=1e-4)
    assert len(kept["curve"]) == 200 and kept["flags"] == {
        "total_timesteps": 10_240,
        "gamma": 0.9,
    }
    losses = np.genfromtxt(run_dir / "metrics.csv", delimiter=",", names=True)["value_loss"]
    halves = [part for part in kept["metrics"]["value_loss"] if part is not None]
    assert halves == pytest.approx(losses.tolist(), rel=1e-3)  # 20 iterations: no means
    assert len(json.dumps(kept)) < 10_000


def test_an_interrupted_run_is_continued(tmp_path, results, monkeypatch):
    log, whole = ppo.Logger.log, runner.train(SMALL, tmp_path / "whole", resume=False)

    def interrupted_log(logger, metrics, *rollout):
        if metrics["iteration"] == 6:
            raise KeyboardInterrupt
        log(logger, metrics, *rollout)

    monkeypatch.setattr(ppo.Logger, "log", interrupted_log)
    runs_dir = tmp_path / "part/study/CartPole-1/runs"
    sizes = {"num_envs": 4, "num_steps": 32, "num_minibatches": 2, "total_timesteps": 1280}
    with pytest.raises(KeyboardInterrupt):
        ppo.train(ppo.Args(**sizes, save_every=2, runs_dir=str(runs_dir)))
    (interrupted,) = runs_dir.iterdir()
    assert runner.train(SMALL, tmp_path / "part", resume=True) == interrupted
    texts = [(run_dir / "episodes.csv").read_text() for run_dir in (whole, interrupted)]
    assert texts[0] == texts[1]


def test_after_short_episodes_the_finished_agent_plays_whole_ones(tmp_path, results):
    edits = (studies.SHORT_EPISODES,)
    kind = ("double-pendulum", "x", 1, "ppo_continuous.py", "Pendulum-v1")
    flags = FLAGS.replace("--save-every 2", "--save-every 10")  # 320 steps without a reset
    runner.execute(studies.Run(*kind, flags, edits), tmp_path, resume=False)
    kept = json.loads((results / "double-pendulum/x-1.json").read_text())
    # Every step of Pendulum costs something: 200 steps cost about twice as much as 100.
    assert kept["evaluation"] < 1.5 * kept["score"] < 0


def test_a_failed_run_is_reported_and_the_others_are_done(
    tmp_path, results, monkeypatch, capfd
):
    bad = studies.Run("study", "bad", 1, "ppo.py", "NoSuchGame-v0", FLAGS)
    monkeypatch.setitem(runner.STUDIES, "study", [bad, SMALL])
    argv = ["run.py", "study", "--jobs", "1", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="failed: bad-1"):
        runner.main()
    output = capfd.readouterr().out
    assert "[1/2, 1 failed;" in output and "NoSuchGame" in output
    assert "CartPole-1: done" in output
    assert [path.name for path in (results / "study").iterdir()] == ["CartPole-1.json"]
    monkeypatch.setattr(sys, "argv", [*argv, "--dry-run"])
    runner.main()  # only the one that failed is left
    expected = "python benchmark/run.py study --jobs 1 --resume --only bad-1\n"
    assert capfd.readouterr().out == expected


def test_evaluations_on_the_way_do_not_disturb_training(tmp_path):
    flags = ["--env-id", "InvertedPendulum-v5", "--total-timesteps", "20480"]
    outcomes = []
    for name in ("benchmark/train_and_evaluate.py", "ppo_continuous.py"):
        runs_dir = tmp_path / Path(name).name
        command = [sys.executable, ROOT / name, *flags, "--runs-dir", runs_dir]
        subprocess.run(command, check=True, capture_output=True, timeout=100)
        outcomes.append(next(runs_dir.iterdir()))
    evaluated, plain = outcomes
    texts = [(run_dir / "episodes.csv").read_text() for run_dir in outcomes]
    assert texts[0] == texts[1]
    evaluations = np.genfromtxt(evaluated / "evaluations.csv", delimiter=",", names=True)
    assert (
        evaluations["global_step"].tolist()
        == np.repeat(2048 * np.arange(1, 11), 10).tolist()
    )
    assert (
        evaluations["episodic_return"][-10:].mean()
        > evaluations["episodic_return"][:10].mean()
    )
    assert len((evaluated / "reloaded.csv").read_text().splitlines()) == 21
    assert not (plain / "evaluations.csv").exists()


def test_tuned_flags_are_chosen_on_some_seeds_and_reported_on_others(tmp_path, monkeypatch):
    """Made-up runs: the score of seed s is 10 s for one candidate of Swimmer, else s."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    missing = "Swimmer-v5, InvertedDoublePendulum-v5, Pendulum-v1, BipedalWalker-v3"
    assert report.tuned() == [f"Missing runs: {missing}."]
    monkeypatch.setitem(studies.TUNED_CHOSEN, "Swimmer-v5", "gamma-0.9999")
    runs = [*studies.tuned(), *studies.double_pendulum()]
    runs += [run for run in studies.selection() if run.label.endswith("critic-256-32x64")]
    for run in runs:
        score = run.seed * (10 if "gamma" in run.label else 1)
        made_up = {
            "score": score,
            "evaluation": score + 7,
            "curve": [None, score, 0],
            "last_lengths": [29] * 25 + [30] * 75,
        }
        made_up["metrics"] = {"entropy": [0.5 * np.log(2 * np.pi * np.e)]}
        (tmp_path / run.study).mkdir(exist_ok=True)
        (tmp_path / run.study / f"{run.name}.json").write_text(json.dumps(made_up))
    rows = [row for row in report.tuned() if "Swimmer" in row]
    assert "| `default` |  | 3.0 ± 1.6 |  |  |" in rows[0]
    assert (
        "| `--gamma 0.9999` | 30.0 ± 15.8 | **80.0 ± 15.8** | 281.6 ± 9.7 (rl-zoo3) |"
        in rows[1]
    )
    assert "| 3.0 ± 1.6 |  |  |" in rows[2]
    fresh = sorted(run["score"] for run in report.tuned_runs("Swimmer-v5"))
    assert fresh == [60, 70, 80, 90, 100]
    (row,) = [row for row in report.double_pendulum() if "`slow`" in row]
    assert row.endswith(
        "| `--learning-rate 1e-4` | 3.0 ± 1.6 | 10.0 ± 1.6 | 3 | 25 % | 1.000 |"
    )
    (row,) = [row for row in report.tuned() if "short-episodes" in row]
    assert "| 10.0 ± 1.6 |" in row  # by what the finished agent scores


@pytest.mark.parametrize("score", [282, 281])
def test_the_second_count_names_the_tasks_that_tuned_flags_win(score, monkeypatch):
    fresh = {"Swimmer-v5": [{"score": score - 50}, {"score": score + 50}]}
    monkeypatch.setattr(report, "tuned_runs", lambda task: fresh.get(task, []))
    (line,) = report.below()
    assert "Swimmer-v5" in line.split(". ")[0]  # behind with default flags: the first count
    assert line.endswith("level or ahead on Swimmer-v5.") == (score == 282)
