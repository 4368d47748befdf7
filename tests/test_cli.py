"""The command line: bad input gets a line and exit status 2, and nothing is written; what a
run prints, tracks, films."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from pathlib import Path

import environments
import numpy as np
import pytest
import torch
from conftest import SMALL, STEPS, as_flags, env_id, flag, make_args, only_run, read, train
from moviepy import VideoFileClip

import ppo
import ppo_atari
import ppo_continuous

vectors = pytest.mark.parametrize("script", [ppo, ppo_continuous], indirect=True)

# {flag: lowest and highest value}; other numbers must not be negative.
RANGES = {"gamma": (0, 1), "gae_lambda": (0, 1), "num_steps": (2, math.inf)}
RANGES |= {"initial_log_std": (-10, 10), "sticky_actions": (0, 1)}
RANGES["max_episode_frames"] = (400, math.inf)
POSITIVE = ["num_envs", "num_minibatches", "update_epochs", "threads", "save_every"]
RANGES |= dict.fromkeys([*POSITIVE, "eval_episodes"], (1, math.inf))


def small(script, name="Stub", **flags):
    """The flags of a short run of a small environment."""
    settings = {"env_id": env_id(script, name), **SMALL, "total_timesteps": 2 * STEPS}
    return as_flags(settings | flags)


def contents(folder):
    """What lies in a folder: {path: bytes, or None for a folder}."""
    paths = Path(folder).rglob("*")
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def refused(call, tmp_path):
    """Runs what must be refused, with nothing written; returns the message."""

    def refused(script, *argv):
        before = contents(tmp_path)
        status, output, message = call(script, *argv)
        assert (status, output) == (2, ""), message
        assert contents(tmp_path) == before
        assert "Traceback" not in message and message.strip()
        return re.sub(r"[\s│]+", " ", message)  # without the lines of tyro's box

    return refused


# Flags


def test_numbers_out_of_range(script, refused):
    for field in dataclasses.fields(script.Args):
        if not re.search("int|float", str(field.type)) or field.name == "total_timesteps":
            continue
        low, high = RANGES.get(field.name, (0, math.inf))
        if field.name == "num_steps" and script is ppo_atari:
            low = 8
        is_float = "float" in str(field.type)
        step = 0.5 if is_float else 1
        for value in [low - step] + [high + step] * (high < math.inf) + ["nan"] * is_float:
            message = refused(script, *small(script), flag(field.name), value)
            assert flag(field.name) in message and str(value) in message
        for value in {low, high} if high < math.inf or is_float else {low}:  # are allowed
            args = make_args(script, num_minibatches=1, num_steps=32)
            args.reference = "runs/some"  # which --kl-coef needs
            script.check(dataclasses.replace(args, **{field.name: value}))


def test_flags_that_do_not_fit_together(script, refused, monkeypatch):
    """At least one iteration; minibatches of one size and of two rows or more; a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sizes = ["num-minibatches 3", "num-minibatches 32", "total-timesteps 31"]
    for bad in [*sizes, "device cuda"]:
        assert f"--{bad}" in refused(script, *small(script), *f"--{bad}".split())
    for name in ("--greedy", "--capture-video"):
        message = refused(script, *small(script), name)
        assert name in message and "--evaluate" in message
    script.check(make_args(script, total_timesteps=STEPS, num_minibatches=16))


# Environments and the place of the runs

KINDS = "MultiDiscrete-v0 FromOne-v0 SameStep-v0 Sequence-v0 Graph-v0 Pendulum-v1"
BOXES = "MultiDiscrete-v0 Integers-v0 Empty-v0 SameStepBox-v0 SequenceBox-v0 GraphBox-v0"
MISSPELT = "CartPol-v1 CartPole-v99 environments:Stubb-v0 nomodule:Env-v0"
BAD = [(ppo, name) for name in ["", *KINDS.split(), *MISSPELT.split()]]
BAD += [(ppo_continuous, name) for name in ["CartPole-v1", *BOXES.split()]]
BAD += [(ppo_atari, name) for name in ("CartPole-v1", "Brakeout", "my_module:Foo-v0")]


@pytest.mark.parametrize(("script", "name"), BAD)
def test_environments_that_do_not_fit_are_named(script, refused, name):
    message = refused(script, *small(script, env_id=name))
    assert message.startswith(f"{script.SCRIPT}: ") and name in message


def test_an_unwritable_place_for_the_runs(script, refused, tmp_path):
    (tmp_path / "file").touch()
    assert "file" in refused(script, *small(script), "--runs-dir", "file")


def test_what_an_environment_raises_keeps_its_traceback(script, call, monkeypatch):
    monkeypatch.setattr(environments.Faulty, "fails", True)
    with pytest.raises(RuntimeError, match="the environment is broken"):
        call(script, *small(script, "Faulty"))


# --resume and --evaluate


@pytest.fixture
def saved(script, tmp_path):
    """A finished run."""
    return train(script, tmp_path, learning_rate=1e-3, total_timesteps=2 * STEPS)


MODES = ["--resume", "--evaluate"]
DAMAGES = {
    "no checkpoint": lambda run: (run / "checkpoint.pt").unlink(),
    "broken checkpoint": lambda run: os.truncate(run / "checkpoint.pt", 5000),
    "no flags": lambda run: (run / "args.json").unlink(),
    "broken flags": lambda run: (run / "args.json").write_text("{"),
    "of another script": lambda run: (run / "args.json").write_text('{"colour": 1}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run(script, refused, saved, damage):
    DAMAGES[damage](saved)
    for mode in MODES:
        assert str(saved) in refused(script, mode, saved)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_checkpoint_cannot_run_code(script, refused, saved):
    checkpoint = torch.load(saved / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"agent": Harmful()}, saved / "checkpoint.pt")
    for mode in MODES:
        assert str(saved) in refused(script, mode, saved)


def test_what_is_no_run(script, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for mode, name in itertools.product(MODES, ["no", "empty", "file", ""]):
        assert f"'{name}'" in refused(script, mode, name)
    with pytest.raises(ValueError, match="'no'"):  # when imported
        script.load_agent("no")


def test_flags_that_differ_from_the_run(script, refused, saved):
    changes = {"learning_rate": 0.00025, "env_id": "CartPole-v1", "num_steps": 64}
    for mode in MODES:
        for name, value in changes.items():
            message = refused(script, mode, saved, flag(name), value)
            assert f"{flag(name)} {value}" in message
    for name, value in ("--num-envs", 4), ("--seed", 2), ("--eval-episodes", 3):
        assert f"{name} {value}" in refused(script, "--resume", saved, name, value)
    assert "--greedy" in refused(script, "--resume", saved, "--greedy")
    assert "--evaluate" in refused(script, "--resume", saved, "--evaluate", saved)


def test_flags_that_may_differ(script, call, saved, monkeypatch):
    """The run is from a machine with a GPU."""
    flags = json.loads((saved / "args.json").read_text())
    (saved / "args.json").write_text(json.dumps(flags | {"device": "cuda"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["--device=cpu", "--num-envs=8", "--seed=2", "--eval-episodes=3", "--greedy"]
    status, output, _ = call(script, "--evaluate", saved, *flags)
    assert status == 0 and len(output.splitlines()[-1].split()) == 8 * 3
    assert call(script, "--resume", saved, "--device", "cpu", "--threads", 2)[0] == 0
    assert torch.get_num_threads() == 2


# Evaluation


def evaluation(output):
    """What --evaluate prints: the mean, the deviation and each return."""
    first, second = output.splitlines()
    mean, deviation = re.findall(r"-?\d[\d.e+-]*\d|\d", first)
    return float(mean), float(deviation), [float(value) for value in second.split()]


@pytest.mark.parametrize("gpu", [True, False])
def test_a_gpu_is_used_if_there_is_one(script, monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    kinds = {"auto": "cuda" if gpu else "cpu", "cpu": "cpu"} | (
        {"cuda": "cuda"} if gpu else {}
    )
    for device, kind in kinds.items():
        assert script.set_up_torch(make_args(script, device=device)).type == kind


def test_evaluation_prints_every_return(script, call, saved, monkeypatch):
    argv = ["--evaluate", saved, "--num-envs", 3, "--eval-episodes", 4]
    status, output, progress = call(script, *argv)
    mean, deviation, returns = evaluation(output)
    assert status == 0 and "12 of 12" in progress
    assert len(returns) == 12 and len(set(returns)) > 1 and min(returns) >= 8
    assert (mean, deviation) == pytest.approx((np.mean(returns), np.std(returns)), rel=1e-5)
    assert call(script, *argv)[1] == output != call(script, *argv, "--seed", 7)[1]
    assert evaluation(call(script, *argv, "--greedy")[1])[2] != returns
    monkeypatch.setattr(script, "evaluate", lambda agent, args: np.array([[5e-9, 6e-9]]))
    assert evaluation(call(script, *argv)[1])[2] == [5e-9, 6e-9]  # not 0.00


@vectors
def test_evaluation_films_the_first_environment(script, call, tmp_path, monkeypatch):
    """Each of its episodes, without any other effect; former films stay."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    argv = ["--evaluate", train(script, tmp_path), "--num-envs", 2, "--eval-episodes", 2]
    _, output, _ = call(script, *argv)
    for _ in range(2):
        assert call(script, *argv, "--capture-video")[:2] == (0, output)
    films = sorted(tmp_path.glob("*/videos/*/*.mp4"))
    steps = evaluation(output)[2][:2]  # those of environment 0
    for film, length in zip(films, steps * 2, strict=True):
        with VideoFileClip(str(film)) as clip:
            assert clip.reader.n_frames == pytest.approx(length + 1, abs=1)
            assert list(clip.size) == [600, 400]  # one CartPole


@vectors
@pytest.mark.parametrize("name", ["Stub", "Ring"])  # has no render mode, or knows none
def test_what_cannot_be_rendered_cannot_be_filmed(script, refused, tmp_path, name):
    run_dir = train(script, tmp_path, name)
    message = refused(script, "--evaluate", run_dir, "--capture-video")
    assert message.startswith(f"{script.SCRIPT}: ") and env_id(script, name) in message


# Progress and run directories


@pytest.mark.parametrize("name", ["ALE/Pong-v5", "../../Env-v0", "module.sub:space/Env-v0"])
def test_run_directories_have_plain_names_of_their_own(script, tmp_path, name):
    args = make_args(script, env_id=name, runs_dir=str(tmp_path / "runs"))
    folders = {script.make_directory(args) for _ in range(3)}  # in one second
    assert folders == set((tmp_path / "runs").iterdir()) and len(folders) == 3
    assert all(re.fullmatch(r"[\w.-]+", folder.name) for folder in folders)
    assert json.loads((folders.pop() / "args.json").read_text()) == vars(args)


def test_progress_without_a_terminal_is_plain_lines(script, call, tmp_path):
    status, _, message = call(script, *small(script, total_timesteps=12 * STEPS - 1))
    assert status == 0
    lines = [line.strip() for line in message.split("\n") if line.strip()]
    assert all(re.match(r"\d+ of 352 steps", line) for line in lines), message
    assert lines[-1].startswith("352 of 352 steps, return 5, ") and len(lines) < 11
    assert len(read(only_run(tmp_path / "runs") / "metrics.csv")) == 11


@pytest.mark.parametrize("script", [ppo], indirect=True)
def test_in_a_terminal_a_bar_and_no_question(script, start, tmp_path):
    """Weights & Biases would ask for a key there; without one, it records offline."""
    output = []

    def keep():
        with contextlib.suppress(OSError):  # which is how a terminal ends
            while data := os.read(terminal, 4096):
                output.append(data)

    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 80))  # without a size, tqdm draws no bar
    argv = small(script, env_id="environments:Stub-v0")
    program = start(script, *argv, "--track", stdin=end, stdout=end, stderr=end)
    os.close(end)
    reader = threading.Thread(target=keep)
    reader.start()
    assert program.wait(timeout=120) == 0
    reader.join()
    text = b"".join(output).decode()
    assert "wandb sync runs/" in text
    run_dir = only_run(tmp_path / "runs")
    assert len(list(run_dir.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert re.search(r"\r100%\|[^|]+\| 64/64 .*return 5\b", text)


# Weights & Biases


@pytest.mark.parametrize("variable", [None, "disabled"])
@pytest.mark.parametrize("login", [True, False])
def test_metrics_are_tracked(
    script, call, tmp_path, fake_wandb, monkeypatch, login, variable
):
    """Mode None: as the variable WANDB_MODE says, or online."""
    fake_wandb.credentials = login
    mode = None if login or variable else "offline"
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert call(script, *small(script), "--track")[0] == 0
    run_dir = only_run(tmp_path / "runs")
    (settings,) = fake_wandb.started
    assert settings["mode"] == mode and settings["config"]["num_steps"] == 16
    assert settings["name"] == settings["id"] == run_dir.name
    steps, tracked = zip(*fake_wandb.tracked)
    as_text = lambda row: {key: "" if x is None else str(x) for key, x in row.items()}
    assert [as_text(row) for row in tracked] == read(run_dir / "metrics.csv")
    assert steps == (STEPS, 2 * STEPS)
    assert call(script, *small(script))[0] == 0 and len(fake_wandb.started) == 1


# The real program


@pytest.mark.parametrize("script", [ppo, ppo_continuous])
def test_bad_input_of_the_real_program(tmp_path, finish, script):
    name = "Pendulum-v1" if script is ppo else "CartPole-v1"
    argv = ["--env-id", name, "--vectorization-mode", "async"]
    status, output, errors = finish(script, *argv)
    assert status == 2 and output == "" and name in errors and "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_help_in_an_ascii_console(finish, script):
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    status, output, errors = finish(script, "--help", variables=ascii_only)
    assert status == 0, errors
    text = output.replace("_", "-")
    for field in dataclasses.fields(script.Args):
        assert flag(field.name) in text or flag(f"no_{field.name}") in text


@pytest.mark.parametrize("rank", ["1", ""])
def test_variables_of_another_launcher_are_ignored(tmp_path, rank):
    """Nothing but torchrun makes several processes of ppo_atari.py."""
    code = "import ppo_atari as ppo; print(ppo.RANK, ppo.LOCAL_RANK, ppo.WORLD_SIZE)"
    environment = os.environ | {"RANK": rank, "WORLD_SIZE": "0"}
    options = {"cwd": Path(ppo_atari.__file__).parent, "env": environment, "text": True}
    assert subprocess.check_output([sys.executable, "-c", code], **options) == "0 0 1\n"
