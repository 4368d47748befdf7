"""Runs from the outside: tracking, signals, failures, run directories, progress, evaluation."""

import contextlib
import csv
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import environments
import numpy as np
import pytest
import torch
from moviepy import VideoFileClip

import ppo
from ppo import Args

BATCH = 32  # steps in an iteration of these runs:
SIZES = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2}
SMALL = ["--num-envs", 2, "--num-steps", 16, "--num-minibatches", 2]
STUB = [*SMALL, "--env-id", "environments:Stub-v0", "--total-timesteps", 2 * BATCH]
SLOW = [*SMALL, "--env-id", "environments:Slow-v0", "--total-timesteps", 15 * BATCH]
SLOW += ["--save-every", 5]


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs the command line in this process, in tmp_path; returns exit status, stdout, stderr."""
    threads = torch.get_num_threads()

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["ppo.py", *map(str, argv)])
        status = 0
        try:
            ppo.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def start(tmp_path):
    """Starts the real program in tmp_path, where its runs lie in runs/, as the leader of its own
    process group, without credentials for Weights & Biases."""
    started = []

    def start(*argv, variables=None, **streams):
        clean = {name: value for name, value in os.environ.items() if "WANDB" not in name}
        clean |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent)}
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        program = subprocess.Popen(
            [sys.executable, ppo.__file__, *map(str, argv)],
            cwd=tmp_path,
            env=clean | (variables or {}),
            text=True,
            start_new_session=True,
            # A shell's background job ignores Ctrl-C, and its children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **pipes | streams,
        )
        started.append(program)
        return program

    yield start
    for program in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
        program.wait()


def only_run(tmp_path):
    (run_dir,) = (tmp_path / "runs").iterdir()
    return run_dir


def rows(run_dir, name="metrics.csv"):
    with open(run_dir / name, newline="") as file:
        return list(csv.DictReader(file))


def load(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def wait_for_iteration_7(program, tmp_path):
    """Waits until a run with SLOW is between the checkpoints after iterations 5 and 10."""
    while program.poll() is None:
        with contextlib.suppress(OSError, ValueError):  # there is no run or no row yet
            if len(rows(only_run(tmp_path))) >= 7:
                break
        time.sleep(0.02)
    time.sleep(0.05)  # into the next rollout


# Weights & Biases


@pytest.fixture
def fake_wandb(monkeypatch):
    """Takes the place of the module; remembers what init and log were given."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    calls = SimpleNamespace(credentials=True, started=[], tracked=[])

    def init(**settings):
        calls.started.append(settings)
        return SimpleNamespace(log=lambda row, step: calls.tracked.append((step, row)))

    login = lambda prompt: calls.credentials
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=login, init=init))
    return calls


@pytest.mark.parametrize("credentials", [True, False])
def test_rows_of_metrics_are_tracked(call, tmp_path, fake_wandb, credentials):
    fake_wandb.credentials = credentials
    assert call(*STUB, "--track")[0] == 0
    run_dir = only_run(tmp_path)
    (settings,) = fake_wandb.started
    assert settings["mode"] == ("online" if credentials else "offline")
    assert settings["name"] == settings["id"] == run_dir.name
    assert settings["config"]["num_steps"] == 16
    steps, tracked = zip(*fake_wandb.tracked)
    as_text = lambda row: {key: "" if value is None else str(value) for key, value in row.items()}
    assert [as_text(row) for row in tracked] == rows(run_dir) and steps == (BATCH, 2 * BATCH)

    assert call("--resume", run_dir, "--track")[0] == 0
    resumed = fake_wandb.started[1]
    assert (resumed["id"], resumed["resume"]) == (run_dir.name, "allow")
    assert call(*STUB)[0] == 0 and len(fake_wandb.started) == 2  # without --track


def test_in_a_terminal_a_bar_and_no_question(start, tmp_path):
    output = []

    def read():
        with contextlib.suppress(OSError):  # which is how a terminal ends
            while data := os.read(terminal, 4096):
                output.append(data)

    terminal, end = pty.openpty()  # W&B would ask in a terminal only
    termios.tcsetwinsize(end, (24, 80))  # without a size, tqdm draws no bar
    program = start(*STUB, "--track", stdin=end, stdout=end, stderr=end)
    os.close(end)
    reader = threading.Thread(target=read)
    reader.start()
    assert program.wait(timeout=60) == 0
    reader.join()
    text = b"".join(output).decode()
    assert "wandb sync runs/" in text
    assert len(list(only_run(tmp_path).glob("wandb/offline-run-*/*.wandb"))) == 1
    assert re.search(r"\r100%\|[^|]+\| 64/64 .*return 5\.0\]", text)


def test_a_resumed_run_continues_its_record(start, tmp_path):
    program = start(*SLOW, "--track", variables={"WANDB_MODE": "offline", "SLOW": "0.005"})
    wait_for_iteration_7(program, tmp_path)
    program.kill()
    program.communicate(timeout=60)
    run_dir = only_run(tmp_path)
    program = start("--resume", run_dir, "--track", variables={"WANDB_MODE": "offline"})
    program.communicate(timeout=60)
    assert program.returncode == 0 and len(rows(run_dir)) == 15
    records = [path.name for path in run_dir.glob("wandb/offline-run-*/*.wandb")]
    assert records == [f"run-{run_dir.name}.wandb"] * 2


def test_wandb_mode_disabled(start, tmp_path):
    program = start(*STUB, "--track", variables={"WANDB_MODE": "disabled"})
    program.communicate(timeout=60)
    assert program.returncode == 0 and len(rows(only_run(tmp_path))) == 2
    assert not list(only_run(tmp_path).glob("wandb/*"))


# Signals and failures


def workers(program):
    path = Path(f"/proc/{program.pid}/task/{program.pid}/children")
    return [Path("/proc", pid, "stat") for pid in path.read_text().split()]


def is_running(stat):
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize(
    ("mode", "number", "send"),
    [
        ("sync", signal.SIGINT, os.kill),
        ("async", signal.SIGINT, os.killpg),  # as Ctrl-C in a terminal does
        ("async", signal.SIGTERM, os.kill),
        ("sync", signal.SIGKILL, os.kill),
    ],
)
def test_a_stopped_run_goes_on(start, call, tmp_path, mode, number, send):
    pause = "0.01" if mode == "async" else "0.005"  # two environments pause in turn, or at once
    program = start(*SLOW, "--vectorization-mode", mode, variables={"SLOW": pause})
    wait_for_iteration_7(program, tmp_path)
    processes = workers(program)
    assert len(processes) == (2 if mode == "async" else 0)
    send(program.pid, number)
    output, message = program.communicate(timeout=60)
    run_dir = only_run(tmp_path)
    run = f"runs/{run_dir.name}"
    assert output == f"Training in {run}. To continue: python ppo.py --resume {run}\n"
    assert program.returncode == -number
    while any(is_running(process) for process in processes):
        time.sleep(0.02)
    done = load(run_dir)["iteration"]
    assert done in (5, 10)

    status, _, message = call(*output.split("ppo.py ")[1].split(), "--device", "cpu")
    assert status == 0
    assert message.lstrip().startswith(f"{done * BATCH} of {15 * BATCH} steps, ")
    assert [int(row["iteration"]) for row in rows(run_dir)] == list(range(1, 16))
    assert load(run_dir)["iteration"] == 15


def test_a_reward_that_is_not_a_number(call, tmp_path, monkeypatch):
    # With five steps an episode, four iterations play 108 steps, and 84 more end in the twelfth.
    monkeypatch.setattr(environments.NanReward, "good_steps", 300)
    argv = [*SMALL, "--env-id", "NanReward-v0", "--total-timesteps", 20 * BATCH]
    with pytest.raises(FloatingPointError, match="^iteration 12: the agent has a nan or infinity$"):
        call(*argv, "--save-every", 4)
    run_dir = only_run(tmp_path)
    checkpoint = load(run_dir)
    assert checkpoint["iteration"] == 8 and len(rows(run_dir)) == 11
    assert all(value.isfinite().all() for value in checkpoint["agent"].values())
    monkeypatch.setattr(environments.NanReward, "good_steps", 10**6)
    assert call("--resume", run_dir)[0] == 0 and len(rows(run_dir)) == 20


# Run directories and progress


@pytest.mark.parametrize(
    "env_id", ["ALE/Pong-v5", "module:Env-v0", "../../Env-v0", "module.sub:space/Env-v0"]
)
def test_run_directories(tmp_path, env_id):
    args = Args(env_id, runs_dir=str(tmp_path / "runs"))
    folders = {ppo.open_run(args, None, None)[0] for _ in range(3)}
    assert folders == set((tmp_path / "runs").iterdir()) and len(folders) == 3  # of one second
    assert all(re.fullmatch(r"[\w.-]+", folder.name) for folder in folders)


def test_progress_without_a_terminal_is_plain_lines(call, tmp_path):
    argv = [*SMALL, "--env-id", "Stub-v0", "--total-timesteps", 40 * BATCH - 1]  # 39 iterations
    status, _, message = call(*argv)
    assert status == 0
    lines = message.split("\n")
    pattern = r"(\r\d+ of 1248 steps(, return 5\.0)?, \S+ steps/s, \S+ left)?"
    assert all(re.fullmatch(pattern, line) for line in lines), message
    assert "1248 of 1248 steps, return 5.0, " in message
    assert len(lines) < 20  # not one an iteration
    assert len(rows(only_run(tmp_path))) == 39


# Evaluation


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    args = Args(**SIZES, total_timesteps=2 * BATCH, vectorization_mode="sync")
    args.runs_dir = str(tmp_path_factory.mktemp("runs"))
    return ppo.train(args)


def evaluation(output):
    """What --evaluate prints: the mean, the deviation and each return."""
    first, second = output.splitlines()
    pattern = r"mean return (\S+), standard deviation (\S+):"
    mean, deviation = re.fullmatch(pattern, first).groups()
    return float(mean), float(deviation), [float(value) for value in second.split()]


def test_evaluation_prints_mean_deviation_and_every_return(call, cartpole, monkeypatch):
    argv = ["--evaluate", cartpole, "--num-envs", 3, "--eval-episodes", 4]
    status, output, message = call(*argv)
    mean, deviation, returns = evaluation(output)
    assert status == 0 and message == ""
    assert len(returns) == 12 and len(set(returns)) > 1 and min(returns) >= 8
    assert (mean, deviation) == pytest.approx((np.mean(returns), np.std(returns)), abs=0.01)
    assert call(*argv)[1] == output != call(*argv, "--seed", 7)[1]

    greedy, act = set(), ppo.Agent.act
    monkeypatch.setattr(ppo.Agent, "act", lambda *a: greedy.add(a[2]) or act(*a))
    assert call(*argv)[1] == output and greedy == {False}
    greedy.clear()
    assert evaluation(call(*argv, "--greedy")[1])[2] != returns
    assert greedy == {True}


def test_evaluation_films_the_first_environment(call, cartpole, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    argv = ["--evaluate", cartpole, "--num-envs", 2, "--eval-episodes", 2]
    status, output, _ = call(*argv, "--capture-video")
    films = sorted(cartpole.glob("videos/*/*.mp4"))
    assert status == 0 and len(films) == 2
    for film, steps in zip(films, evaluation(output)[2]):  # the first two: environment 0
        with VideoFileClip(str(film)) as clip:
            assert clip.reader.n_frames == pytest.approx(steps + 1, abs=1)
            assert list(clip.size) == [600, 400]  # one CartPole
    assert evaluation(output) == evaluation(call(*argv)[1])  # filming changes nothing
    assert call(*argv, "--capture-video")[0] == 0
    assert len(list(cartpole.glob("videos/*/*.mp4"))) == 4  # the former films are still there
