"""Saving changes nothing, and a resumed run has all that was learned."""

import contextlib
import dataclasses
import os
import random
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    STEPS,
    as_flags,
    column,
    env_id,
    equal,
    load,
    make_args,
    only_run,
    outcome,
    read,
    train,
)

import ppo
import ppo_atari
import ppo_continuous

vectors = pytest.mark.parametrize("script", [ppo, ppo_continuous], indirect=True)


class Stop(Exception):
    pass


def stop_after(iteration):
    """An after_iteration that ends the run, as a crash would."""

    def after_iteration(agent, metrics):
        if metrics["iteration"] == iteration:
            raise Stop

    return after_iteration


def crash(script, folder, iteration, **flags):
    """The directory of a run that stopped after this iteration."""
    with pytest.raises(Stop):
        train(script, folder, after_iteration=stop_after(iteration), **flags)
    return only_run(folder)


def resume(script, run_dir):
    args, _ = script.load_run(run_dir)
    return script.train(dataclasses.replace(args, resume=str(run_dir)))


def normalised(script):
    return {} if script is ppo_atari else {"norm_obs": True, "norm_reward": True}


def test_saving_changes_nothing(script, tmp_path):
    flags = {"total_timesteps": 6 * STEPS, **normalised(script)}
    often = train(script, tmp_path, **flags, save_every=1)
    never = train(script, tmp_path, **flags, save_every=100)
    assert outcome(often) == outcome(never)
    assert len(outcome(often)[0]) == 6 and len(outcome(often)[1]) > 3
    for part in ("agent", "optimizer"):
        assert equal(load(often)[part], load(never)[part])


def test_checkpoints_are_written_as_often_as_asked_for(script, tmp_path, monkeypatch):
    saved, save = [], script.Run.save
    spy = lambda run, iteration, *more: (
        saved.append(iteration) or save(run, iteration, *more)
    )
    monkeypatch.setattr(script.Run, "save", spy)
    for save_every, expected in (
        (2, [0, 2, 4, 5]),
        (100, [0, 5]),
        (None, [0, 1, 2, 3, 4, 5]),
    ):
        saved.clear()
        train(script, tmp_path, total_timesteps=5 * STEPS, save_every=save_every)
        assert saved == expected
    run = script.Run(make_args(script, total_timesteps=1000 * STEPS))
    assert run.save_every == 50  # a twentieth of the run


def test_a_resumed_run_has_all_that_was_learned(script, tmp_path, started):
    flags = {"total_timesteps": 6 * STEPS, "save_every": 2, **normalised(script)}
    run_dir = crash(script, tmp_path, 5, **flags)
    saved, states = load(run_dir), started(script)
    assert saved["iteration"] == 4 and len(read(run_dir / "metrics.csv")) == 5
    resume(script, run_dir)
    ((agent, optimizer),) = states
    assert equal(agent, saved["agent"]) and equal(optimizer, saved["optimizer"])
    if script is not ppo_atari:
        assert agent["obs_stats.count"] > 100 and agent["return_stats.count"] > 100
    assert load(run_dir)["iteration"] == 6
    assert not equal(load(run_dir)["agent"], saved["agent"])


@pytest.mark.parametrize(("save_every", "crash_at"), [(2, 5), (100, 3)])
def test_a_resumed_log_begins_as_the_uninterrupted_ones_and_is_whole(
    script, tmp_path, save_every, crash_at
):
    """Also without any checkpoint but the one before the first iteration."""
    flags = {"total_timesteps": 8 * STEPS, "save_every": save_every}
    whole = outcome(train(script, tmp_path / "whole", **flags))
    run_dir = crash(script, tmp_path / "crashed", crash_at, **flags)
    kept = load(run_dir)["iteration"]
    assert kept == (crash_at - 1) // save_every * save_every
    assert resume(script, run_dir) == run_dir
    metrics, episodes = outcome(run_dir)
    assert metrics[:kept] == whole[0][:kept]
    assert [int(row["iteration"]) for row in metrics] == list(range(1, 9))
    rates = [row["learning_rate"] for row in metrics]
    assert rates == [row["learning_rate"] for row in whole[0]]
    first = [row for row in whole[1] if int(row["global_step"]) <= kept * STEPS]
    assert episodes[: len(first)] == first
    steps = [int(row["global_step"]) for row in episodes]
    assert steps == sorted(steps) and len(steps) > len(first)
    assert sum(column(run_dir, "episodes")) == len(steps)
    seconds = column(run_dir, "seconds")
    assert seconds == sorted(seconds)  # of the whole training, not since it was resumed


def test_two_resumes_of_one_checkpoint_are_the_same(script, tmp_path):
    """And their environments do not begin as the run did."""
    flags = {"total_timesteps": 6 * STEPS, "save_every": 3, **normalised(script)}
    first = crash(script, tmp_path, 4, **flags)
    second = Path(shutil.copytree(first, tmp_path / "second"))
    assert outcome(resume(script, first)) == outcome(resume(script, second))
    assert equal(load(first)["agent"], load(second)["agent"])
    metrics = outcome(first)[0]
    assert len(metrics) == 6 and metrics[3]["policy_loss"] != metrics[0]["policy_loss"]


def test_a_finished_run_that_is_resumed_stays_as_it_is(script, tmp_path):
    run_dir = train(script, tmp_path)
    before, weights = outcome(run_dir), load(run_dir)["agent"]
    resume(script, run_dir)
    assert outcome(run_dir) == before and equal(load(run_dir)["agent"], weights)


@vectors
def test_long_episodes_without_a_registered_limit_reach_their_end(script, tmp_path, record):
    """Episodes of 1,700 steps, checkpoints every 160: their last reward is learned."""
    losses = record(script, "ppo_loss")
    flags = {"num_envs": 1, "num_steps": 80, "total_timesteps": 1600, "gamma": 0.9}
    flags |= {"num_minibatches": 1, "update_epochs": 1}
    flags |= {"norm_obs": False, "norm_reward": False}
    run_dir = train(script, tmp_path, "Marathon", **flags | {"total_timesteps": 44 * 80})
    episodes = [
        (row["episodic_return"], row["episodic_length"]) for row in outcome(run_dir)[1]
    ]
    assert episodes == [("7.0", "1700")] * 2
    last = [batch["returns"][batch["x"][:, 0] == 1] for (_, batch, _), _ in losses]
    assert torch.cat(last).unique().tolist() == pytest.approx([7.0])


# A log that has lost rows, or is missing


@pytest.mark.parametrize("name", ["metrics.csv", "episodes.csv"])
@pytest.mark.parametrize("how", ["shorter", "missing"])
def test_a_run_that_lost_rows_is_refused(script, tmp_path, call, name, how):
    run_dir = train(script, tmp_path)
    log = run_dir / name
    if how == "missing":
        log.unlink()
    else:
        log.write_bytes(log.read_bytes()[:-5])
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    status, output, message = call(script, "--resume", run_dir)
    assert status == 2 and not output and name in message and message.count("\n") == 1
    assert before == {path: path.read_bytes() for path in run_dir.iterdir()}


# The real program


def wait_for_rows(program, folder, count):
    """Waits until the one run in folder has so many rows; returns its directory."""
    while program.poll() is None:
        with contextlib.suppress(OSError, ValueError):  # there is no run or no row yet
            if len(read(only_run(folder) / "metrics.csv")) >= count:
                break
        time.sleep(0.01)
    assert program.poll() is None, program.communicate()
    return only_run(folder)


def check_whole(run_dir, iterations, kept):
    """No row is missing or double; rows up to the checkpoint are still the same."""
    metrics, episodes = outcome(run_dir)
    assert [int(row["iteration"]) for row in metrics] == list(range(1, iterations + 1))
    assert metrics[: len(kept)] == kept
    assert sum(column(run_dir, "episodes")) == len(episodes) > 0
    assert load(run_dir)["iteration"] == iterations


def slow(*values, **options):
    return pytest.param(*values, marks=pytest.mark.slow)


REAL = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2}
PONG = {"env_id": "Pong", "max_episode_frames": 400, "bf16": "off", "num_steps": 64}


@pytest.mark.parametrize(
    ("script", "mode"),
    [
        (ppo, "sync"),
        slow(ppo, "async"),
        slow(ppo_continuous, "sync"),
        slow(ppo_atari, None),
    ],
)
def test_a_run_killed_at_a_random_moment_goes_on(tmp_path, start, finish, script, mode):
    """By the command that it printed. Rows up to its checkpoint are as in any such run."""
    flags = {"env_id": f"environments:{env_id(script, 'Pole')}", **REAL, "save_every": 3}
    flags |= PONG if script is ppo_atari else {"vectorization_mode": mode}
    flags["total_timesteps"] = 30 * flags["num_envs"] * flags["num_steps"]
    whole = start(script, *as_flags(flags), "--runs-dir=whole")
    killed = start(script, *as_flags(flags), "--runs-dir=killed runs")
    run_dir = wait_for_rows(killed, tmp_path / "killed runs", 5)
    time.sleep(random.random() * 0.1)
    killed.send_signal(signal.SIGKILL)
    output, _ = killed.communicate()
    assert whole.wait(timeout=300) == 0
    done = load(run_dir)["iteration"]
    kept = outcome(only_run(tmp_path / "whole"))[0][:done]
    assert outcome(run_dir)[0][:done] == kept and done % 3 == 0 and done >= 3

    command = shlex.split(output.split("To continue: ")[1])
    assert command[:2] == ["python", script.SCRIPT] and "killed runs" in command[3]
    status, _, errors = finish(script, *command[2:])
    assert status == 0, errors
    metrics, episodes = outcome(run_dir)
    assert [int(row["iteration"]) for row in metrics] == list(range(1, 31))
    assert metrics[:done] == kept
    assert sum(column(run_dir, "episodes")) == len(episodes) > 0
    assert load(run_dir)["iteration"] == 30


@pytest.mark.parametrize(
    ("script", "mode"),
    [(ppo, "sync"), (ppo, "async"), slow(ppo_continuous, "async"), slow(ppo_atari, None)],
)
def test_ctrl_c_ends_a_run_quietly_with_status_130(tmp_path, start, script, mode):
    """In a terminal it reaches the workers of async environments, too. None stays."""
    flags = {"env_id": f"environments:{env_id(script, 'Slow')}", **REAL}
    flags |= PONG if script is ppo_atari else {"vectorization_mode": mode}
    program = start(script, *as_flags(flags), variables={"SLOW": "0.005"})
    run_dir = wait_for_rows(program, tmp_path / "runs", 2)
    os.killpg(program.pid, signal.SIGINT)
    output, errors = program.communicate(timeout=60)
    assert program.returncode == 130
    assert f'{script.SCRIPT}", line' not in errors, errors
    if mode != "async":  # gymnasium may tell how a worker ended
        assert "Traceback" not in errors, errors
    assert load(run_dir)["iteration"] >= 0
    with pytest.raises(ProcessLookupError):  # the group is empty in the end
        while True:
            os.killpg(program.pid, 0)
            time.sleep(0.01)


def test_workers_end_when_their_run_is_killed(tmp_path, start):
    flags = {"env_id": "environments:Slow-v0", **REAL, "vectorization_mode": "async"}
    program = start(ppo, *as_flags(flags), variables={"SLOW": "0.005"})
    wait_for_rows(program, tmp_path / "runs", 1)
    os.kill(program.pid, signal.SIGKILL)
    program.communicate(timeout=60)  # which waits until no worker has the pipes open
    assert program.returncode == -signal.SIGKILL


def test_a_run_can_be_resumed_as_soon_as_it_says_how(script, tmp_path, capsys, monkeypatch):
    """Also where what comes next fails, as a login without a network can."""
    monkeypatch.setattr(script, "progress_bar", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(script, tmp_path)
    assert f"--resume {only_run(tmp_path)}" in capsys.readouterr().out
    monkeypatch.undo()
    if script is not ppo_atari:
        assert len(outcome(resume(script, only_run(tmp_path)))[0]) == 4


def test_a_tracked_run_goes_on_under_its_name(
    script, tmp_path, monkeypatch, fake_wandb, call
):
    """Also when resumed from within its directory."""
    run_dir = crash(script, tmp_path / "runs", 3, track=True, save_every=2)
    monkeypatch.chdir(run_dir)
    status, _, errors = call(script, "--resume", ".", "--track")
    assert status == 0, errors
    assert [run["id"] for run in fake_wandb.started] == [run_dir.name] * 2
    assert {run["resume"] for run in fake_wandb.started} == {"allow"}
    steps = [step for step, _ in fake_wandb.tracked]
    assert steps == [STEPS, 2 * STEPS, 3 * STEPS, 3 * STEPS, 4 * STEPS]
