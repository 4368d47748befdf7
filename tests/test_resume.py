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

import numpy as np
import pytest
import torch
from conftest import (
    SMALL,
    STEPS,
    as_flags,
    column,
    env_id,
    equal,
    load,
    make_args,
    normalisation,
    only_run,
    outcome,
    read,
    train,
)

import ppo
import ppo_atari
import ppo_continuous


class Stop(Exception):
    pass


def crash(script, folder, iteration, **flags):
    """The directory of a run that stopped after this iteration."""

    def stop(agent, metrics):
        if metrics["iteration"] == iteration:
            raise Stop

    with pytest.raises(Stop):
        train(script, folder, after_iteration=stop, **flags)
    return only_run(folder)


def resume(script, run_dir):
    args, _ = script.load_run(run_dir)
    return script.train(dataclasses.replace(args, resume=str(run_dir)))


@pytest.mark.parametrize("name", ["Pole", "Sides"])  # with a time limit and without
def test_saving_changes_nothing(script, tmp_path, name):
    flags = {"total_timesteps": 6 * STEPS, **normalisation(script, True)}
    often = train(script, tmp_path, name, **flags, save_every=1)
    never = train(script, tmp_path, name, **flags, save_every=100)
    assert outcome(often) == outcome(never)
    assert len(outcome(often)[0]) == 6 and len(outcome(often)[1]) > 3
    for part in ("agent", "optimizer"):
        assert equal(load(often)[part], load(never)[part])


def test_resumed_environments_start_at_other_random_ages(tmp_path):
    """The limit is 4 steps: first episodes, which are not logged, last 4 − age."""
    flags = {"num_envs": 8, "random_start_ages": True, "total_timesteps": 512}
    run_dir = crash(ppo_continuous, tmp_path, 3, name="Ring", save_every=2, **flags)
    resume(ppo_continuous, run_dir)
    expected = []
    for iteration in (0, 2):  # of the checkpoint; each part has 32 steps
        for age in np.random.default_rng([1, iteration]).integers(4, size=8):
            expected += [16 * iteration + t for t in range(9 - age, 33, 5)]
    rows = read(run_dir / "episodes.csv")
    assert [int(row["global_step"]) for row in rows] == sorted(8 * t for t in expected)
    assert {row["episodic_length"] for row in rows} == {"4"}


def test_an_agent_saved_and_loaded_acts_identically(script, tmp_path):
    agents, keep = [], lambda agent, metrics: agents.append(agent)
    flags = {"learning_rate": 0.01, **normalisation(script, True)}
    run_dir = train(script, tmp_path, after_iteration=keep, **flags)
    trained, loaded = agents[-1], script.load_agent(run_dir)
    assert equal(dict(trained.state_dict()), dict(loaded.state_dict()))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    args = make_args(script, num_envs=3, eval_episodes=2)
    in_memory, reloaded = script.evaluate(trained, args), script.evaluate(loaded, args)
    assert in_memory.shape == (3, 2) and np.array_equal(in_memory, reloaded)
    # Evaluation changes nothing.
    assert equal(dict(trained.state_dict()), dict(loaded.state_dict()))


def test_checkpoints_are_written_as_often_as_asked_for(script, tmp_path, record):
    saved = record(script.Run, "save")
    expected = {2: [0, 2, 4, 5], 100: [0, 5], None: [0, 1, 2, 3, 4, 5]}
    for save_every, iterations in expected.items():
        saved.clear()
        train(script, tmp_path, total_timesteps=5 * STEPS, save_every=save_every)
        assert [iteration for (_, iteration, *_), _ in saved] == iterations
    run = script.Run(make_args(script, total_timesteps=1000 * STEPS))
    assert run.save_every == 50  # a twentieth of the run


@pytest.mark.parametrize(("save_every", "crash_at"), [(2, 5), (100, 3)])
def test_a_resumed_run_goes_on(script, tmp_path, started, save_every, crash_at):
    """With all that was learned until its checkpoint; no row is missing or double. Also
    without any checkpoint but the one before the first iteration."""
    flags = {"total_timesteps": 8 * STEPS, **normalisation(script, True)}
    flags["save_every"] = save_every
    whole = outcome(train(script, tmp_path / "whole", **flags))
    run_dir = crash(script, tmp_path / "crashed", crash_at, **flags)
    twin = shutil.copytree(run_dir, tmp_path / "twin")
    saved, states = load(run_dir), started(script)
    kept = saved["iteration"]
    assert kept == (crash_at - 1) // save_every * save_every
    assert len(read(run_dir / "metrics.csv")) == crash_at

    assert resume(script, run_dir) == run_dir
    assert equal(states[0], saved["agent"]) and equal(states[1], saved["optimizer"])
    metrics, episodes = outcome(run_dir)
    assert metrics[:kept] == whole[0][:kept]
    assert [int(row["iteration"]) for row in metrics] == list(range(1, 9))
    rates = [row["learning_rate"] for row in metrics]
    assert rates == [row["learning_rate"] for row in whole[0]]
    first = [row for row in whole[1] if int(row["global_step"]) <= kept * STEPS]
    steps = [int(row["global_step"]) for row in episodes]
    assert episodes[: len(first)] == first and steps == sorted(steps)
    assert sum(column(run_dir, "episodes")) == len(steps) > len(first)
    seconds = column(run_dir, "seconds")
    assert seconds == sorted(seconds)  # of the whole training, not since it was resumed

    # Two resumed runs are the same, and their environments do not begin as the run did.
    assert outcome(resume(script, twin)) == (metrics, episodes)
    assert equal(load(run_dir)["agent"], load(twin)["agent"])
    assert kept == 0 or metrics[kept]["policy_loss"] != metrics[0]["policy_loss"]


def test_a_run_killed_while_it_saves_keeps_its_checkpoint(script, tmp_path, monkeypatch):
    save = torch.save

    def killed(checkpoint, path):
        if checkpoint["iteration"] == 2:
            Path(path).write_bytes(b"half of it")
            raise Stop
        save(checkpoint, path)

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(Stop):
        train(script, tmp_path, save_every=1)
    assert load(only_run(tmp_path))["iteration"] == 1


def test_a_run_from_a_gpu_is_loaded_without_one(script, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        run_dir = train(script, tmp_path)
    assert next(script.load_agent(run_dir).parameters()).device.type == "cpu"
    resume(script, run_dir)


def test_the_bar_of_a_resumed_run_begins_where_it_stopped(script, tmp_path, capsys):
    run_dir = crash(script, tmp_path, 3, save_every=2)
    capsys.readouterr()
    resume(script, run_dir)
    assert "128 of 128 steps" in capsys.readouterr().err


def test_a_resumed_run_can_be_tracked(script, tmp_path, fake_wandb, call):
    run_dir = crash(script, tmp_path / "runs", 3, save_every=2)
    status, _, errors = call(script, "--resume", run_dir, "--track")
    assert status == 0, errors
    assert [step for step, _ in fake_wandb.tracked] == [3 * STEPS, 4 * STEPS]


def test_a_finished_run_that_is_resumed_stays_as_it_is(script, tmp_path):
    run_dir = train(script, tmp_path)
    before, weights = outcome(run_dir), load(run_dir)["agent"]
    resume(script, run_dir)
    assert outcome(run_dir) == before and equal(load(run_dir)["agent"], weights)


# A log that has lost rows, or is missing


@pytest.mark.parametrize("name", ["metrics.csv", "episodes.csv"])
@pytest.mark.parametrize("how", ["shorter", "missing"])
def test_a_run_that_lost_rows_is_refused(script, tmp_path, call, name, how):
    run_dir = train(script, tmp_path)
    log, whole = run_dir / name, (run_dir / name).read_bytes()
    log.unlink() if how == "missing" else log.write_bytes(whole[:-5])
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


def cases(*fast):
    """Each script with its modes; all but the fast ones are marked as slow."""
    modes = [(ppo, "sync"), (ppo, "async"), (ppo_continuous, "async"), (ppo_atari, None)]
    marks = [() if case in fast else pytest.mark.slow for case in modes]
    cases = [pytest.param(*case, marks=mark) for case, mark in zip(modes, marks)]
    return pytest.mark.parametrize(("script", "mode"), cases)


def real_flags(script, mode, name, iterations=12):
    """Of a run by the real program; ppo_atari.py plays a real game."""
    flags = {"env_id": f"environments:{env_id(script, name)}", "vectorization_mode": mode}
    flags |= SMALL | {"save_every": 3, "total_timesteps": iterations * STEPS}
    if script is ppo_atari:
        del flags["vectorization_mode"]
        flags |= {"env_id": "Pong", "max_episode_frames": 400, "bf16": "off"}
        flags |= {"num_steps": 64, "total_timesteps": iterations * 128}
    return flags


@cases((ppo, "sync"))
def test_a_run_killed_at_a_random_moment_goes_on(tmp_path, start, finish, script, mode):
    """By the command that it printed. Rows up to its checkpoint are as in any such run."""
    flags = real_flags(script, mode, "Pole")
    killed = start(script, *as_flags(flags), "--runs-dir=killed runs")
    run_dir = wait_for_rows(killed, tmp_path / "killed runs", 4)
    time.sleep(random.random() * 0.1)
    killed.kill()
    output, _ = killed.communicate()
    if script is ppo_continuous:
        flags["random_start_ages"] = True  # as by default
    done, whole = load(run_dir)["iteration"], outcome(train(script, tmp_path, **flags))[0]
    assert outcome(run_dir)[0][:done] == whole[:done] and done % 3 == 0 and done >= 3

    command = shlex.split(output.split("To continue: ")[1])
    assert command[:2] == ["python", script.SCRIPT] and "killed runs" in command[3]
    status, _, errors = finish(script, *command[2:])
    assert status == 0, errors
    metrics, episodes = outcome(run_dir)
    assert [int(row["iteration"]) for row in metrics] == list(range(1, 13))
    assert metrics[:done] == whole[:done]
    assert sum(column(run_dir, "episodes")) == len(episodes) > 0
    assert load(run_dir)["iteration"] == 12


@cases((ppo, "sync"), (ppo, "async"))
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_worker(tmp_path, start, script, mode, number):
    """Ctrl-C ends it without a traceback, with status 130. In a terminal it reaches the
    workers of async environments, too."""
    flags = real_flags(script, mode, "Stub", iterations=1000)
    program = start(script, *as_flags(flags), variables={"SLOW": "0.005"})
    wait_for_rows(program, tmp_path / "runs", 2)
    os.killpg(program.pid, number) if number == signal.SIGINT else program.kill()
    _, errors = program.communicate(timeout=60)  # when nobody has the pipes open any more
    assert program.returncode == (130 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert f'{script.SCRIPT}", line' not in errors, errors
        # Gymnasium may tell how a worker ended.
        assert "Traceback" not in errors or mode == "async", errors


def test_a_run_can_be_resumed_as_soon_as_it_says_how(script, tmp_path, capsys, monkeypatch):
    """Also where what comes next fails, as a login without a network can."""
    monkeypatch.setattr(script, "progress_bar", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(script, tmp_path)
    assert f"--resume {only_run(tmp_path)}" in capsys.readouterr().out
    monkeypatch.undo()
    if script is not ppo_atari:
        assert len(outcome(resume(script, only_run(tmp_path)))[0]) == 4


def test_a_tracked_run_keeps_its_name(script, tmp_path, monkeypatch, fake_wandb, call):
    """Also when resumed from within its directory."""
    run_dir = crash(script, tmp_path / "runs", 3, track=True, save_every=2)
    monkeypatch.chdir(run_dir)
    status, _, errors = call(script, "--resume", ".", "--track")
    assert status == 0, errors
    assert [run["id"] for run in fake_wandb.started] == [run_dir.name] * 2
    assert {run["resume"] for run in fake_wandb.started} == {"allow"}
    steps = [step for step, _ in fake_wandb.tracked]
    assert steps == [STEPS, 2 * STEPS, 3 * STEPS, 3 * STEPS, 4 * STEPS]
