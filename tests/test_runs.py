"""Runs from the outside: tracking, signals, failures, run directories, evaluation and films."""

import contextlib
import csv
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import environments
import numpy as np
import pytest
import torch

import ppo
from ppo import Args

BATCH = 32
SMALL = ["--num-envs", "2", "--num-steps", "16", "--num-minibatches", "2"]  # BATCH steps in an iteration


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs the command line in this process with runs in tmp_path/runs; returns exit status, stdout and stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
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
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def start(tmp_path):
    """Starts the real program in tmp_path, where its runs lie in runs/, as the leader of its own process group."""
    started = []

    def start(*argv, variables=None, **options):
        clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        clean |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        command = [sys.executable, ppo.__file__, *map(str, argv)]
        environment = clean | (variables or {})
        program = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, start_new_session=True, **options)
        started.append(program)
        return program

    yield start
    for program in started:
        if program.poll() is None:
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


def slow(iterations=20, **variables):
    """The arguments of `start` for a run with a checkpoint every second iteration and time to stop it between."""
    argv = [*SMALL, "--env-id", "environments:Slow-v0", "--total-timesteps", iterations * BATCH, "--save-every", 2]
    return argv, {"SLOW": "0.015", **variables}


def interrupt(program, tmp_path, send):
    """Sends a signal once the first scheduled checkpoint is there; returns stderr."""
    while program.poll() is None:
        if any(load(path.parent)["iteration"] for path in tmp_path.glob("runs/*/checkpoint.pt")):
            break
        time.sleep(0.02)
    time.sleep(0.2)  # into the next rollout, where workers are at work
    send(program.pid)
    return program.communicate(timeout=60)[1]


# Weights & Biases: it must not wait, ask or end a run


def offline_records(run_dir):
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))


def test_every_row_of_both_files_is_tracked(tmp_path, monkeypatch):
    tracked, ends = [], []
    tracker = SimpleNamespace(log=tracked.append, finish=lambda: ends.append(len(tracked)))
    monkeypatch.setattr(ppo, "start_tracking", lambda args, run_dir: tracker)
    sizes = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 2 * BATCH}
    run_dir = ppo.train(Args("environments:Stub-v0", **sizes, runs_dir=str(tmp_path), track=True))
    assert ends == [len(tracked)] and len(rows(run_dir, "episodes.csv")) > 4
    for name in ("episodes.csv", "metrics.csv"):
        expected = [{k: float(v) for k, v in row.items()} for row in rows(run_dir, name)]
        sent = [{k.removeprefix(f"{name[:-4]}/"): v for k, v in row.items()} for row in tracked]
        assert [row for row in sent if row.keys() == expected[0].keys()] == expected


def test_tracking_without_a_key_asks_nothing(start, tmp_path):
    output = []

    def read():
        with contextlib.suppress(OSError):  # which is how a terminal ends
            while data := os.read(terminal, 4096):
                output.append(data)

    terminal, end = pty.openpty()  # W&B would ask in a terminal only
    argv = [*SMALL, "--env-id", "environments:Stub-v0", "--total-timesteps", BATCH, "--track"]
    program = start(*argv, stdin=end, stdout=end, stderr=end)
    os.close(end)
    reader = threading.Thread(target=read)
    reader.start()
    assert program.wait(timeout=60) == 0
    reader.join()
    assert b"wandb sync runs/" in b"".join(output)
    assert len(rows(only_run(tmp_path))) == len(offline_records(only_run(tmp_path))) == 1


def test_a_resumed_run_continues_its_record(start, tmp_path):
    argv, variables = slow(WANDB_MODE="offline")
    program = start(*argv, "--track", variables=variables)
    interrupt(program, tmp_path, lambda pid: os.kill(pid, signal.SIGTERM))
    assert program.returncode == 143
    name = (only_run(tmp_path) / "wandb_id").read_text()
    program = start("--resume", only_run(tmp_path), "--track", variables={"WANDB_MODE": "offline"})
    program.communicate(timeout=60)
    assert program.returncode == 0 and len(rows(only_run(tmp_path))) == 20
    assert (only_run(tmp_path) / "wandb_id").read_text() == name
    assert [path.name for path in offline_records(only_run(tmp_path))] == [f"run-{name}.wandb"] * 2


@pytest.mark.parametrize("mode", ["online", "disabled"])
def test_a_server_that_never_answers(start, tmp_path, mode):
    with socket.create_server(("127.0.0.1", 0)) as server:  # connections wait in its queue
        variables = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}
        argv = [*SMALL, "--env-id", "environments:Stub-v0", "--total-timesteps", BATCH, "--track"]
        program = start(*argv, variables=variables | {"WANDB_MODE": mode})
        output, _ = program.communicate(timeout=60)
    assert program.returncode == 0 and len(rows(only_run(tmp_path))) == 1
    assert ("wandb sync" in output) == (mode == "online")
    assert bool(offline_records(only_run(tmp_path))) == (mode == "online")


# Signals


@pytest.mark.parametrize(
    ("mode", "number", "send", "status"),
    [
        ("sync", signal.SIGTERM, os.kill, 143),
        ("async", signal.SIGINT, os.killpg, 130),  # a terminal sends Ctrl-C to the whole process group,
        ("async", signal.SIGTERM, os.killpg, 143),  # and so does what `timeout` and batch systems send
        ("sync", signal.SIGKILL, os.kill, -9),
    ],
)
def test_a_stopped_run_goes_on(start, call, tmp_path, mode, number, send, status):
    argv, variables = slow()
    program = start(*argv, "--vectorization-mode", mode, variables=variables)
    message = interrupt(program, tmp_path, lambda pid: send(pid, number))
    assert program.returncode == status
    run_dir = only_run(tmp_path)
    step = load(run_dir)["iteration"] * BATCH
    assert 0 < step < 20 * BATCH
    expected = f"stopped; `python ppo.py --resume runs/{run_dir.name}` continues from step {step:,}"
    assert message.strip() == (expected if number != signal.SIGKILL else "")

    status, output, _ = call("--resume", f"runs/{run_dir.name}", "--threads", 2)  # as if another machine went on
    assert status == 0 and " 2 thread(s)" in output and f"step {20 * BATCH:,} of {20 * BATCH:,}" in output
    assert [int(row["iteration"]) for row in rows(run_dir)] == list(range(1, 21))
    assert load(run_dir)["iteration"] == 20


# Failures


def test_a_loss_that_is_not_finite(call, tmp_path, monkeypatch):
    monkeypatch.setattr(environments.NanReward, "good_steps", 300)
    argv = [*SMALL, "--env-id", "NanReward-v0", "--total-timesteps", 20 * BATCH, "--save-every", 4]
    status, _, message = call(*argv)
    assert status == 1
    pattern = r"ppo.py: stopped: iteration (\d+): a loss or a weight is not finite; (.*) keeps the checkpoint of "
    pattern += r"iteration (\d+)\n"
    iteration, run_dir, saved = re.fullmatch(pattern, message).groups()
    checkpoint = load(Path(run_dir))
    assert checkpoint["iteration"] == int(saved) and int(saved) < int(iteration) <= int(saved) + 4
    assert all(value.isfinite().all() for value in checkpoint["agent"].values())
    monkeypatch.setattr(environments.NanReward, "good_steps", 10**6)
    assert call("--resume", run_dir)[0] == 0 and len(rows(Path(run_dir))) == 20


def test_a_worker_that_is_killed(start, tmp_path):
    argv, variables = slow()
    program = start(*argv, "--vectorization-mode", "async", variables=variables)
    kill_worker = lambda pid: os.kill(int(children(pid)[-1]), signal.SIGKILL)  # as one does that wants its memory
    children = lambda pid: Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    how_to_go_on, why = interrupt(program, tmp_path, kill_worker).strip().splitlines()
    assert program.returncode == 1 and f"--resume {only_run(tmp_path).relative_to(tmp_path)}`" in how_to_go_on
    assert why == "ppo.py: stopped: a worker of the environments is gone"


def test_a_full_disk(start, call, tmp_path):
    limit = 80_000  # bytes in a file: enough for the first checkpoint, not for one with the state of Adam
    argv = [*SMALL, "--env-id", "environments:Stub-v0", "--total-timesteps", 4 * BATCH, "--save-every", 1]
    program = start(*argv, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, message = program.communicate(timeout=60)
    assert program.returncode == 1
    how_to_go_on, why = message.strip().splitlines()
    assert why.startswith("ppo.py: stopped: [Errno 27] File too large"), message
    assert f"--resume {only_run(tmp_path).relative_to(tmp_path)}` continues from step 0" in how_to_go_on
    assert load(only_run(tmp_path))["iteration"] == 0
    assert call("--resume", only_run(tmp_path))[0] == 0
    assert load(only_run(tmp_path))["iteration"] == len(rows(only_run(tmp_path))) == 4


# Run directories


def test_two_runs_of_the_same_second(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    folders = {ppo.new_run_dir(Args(runs_dir=str(tmp_path))) for _ in range(3)}
    assert folders == set(tmp_path.iterdir()) and len(folders) == 3


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "module:Env-v0", "../../Env-v0", "module.sub:space/Env-v0"])
def test_names_of_run_directories_are_safe(tmp_path, env_id):
    run_dir = ppo.new_run_dir(Args(env_id, exp_name="a/b c", runs_dir=str(tmp_path / "runs")))
    assert run_dir == only_run(tmp_path)
    assert re.fullmatch(r"[\w.-]+", run_dir.name)


def test_steps_are_rounded_down(call, tmp_path):
    status, output, _ = call(*SMALL, "--env-id", "Stub-v0", "--total-timesteps", 3 * BATCH - 1)
    assert status == 0 and "95 steps are rounded down to 2 iterations of 32" in output
    assert len(rows(only_run(tmp_path))) == 2
    assert "rounded" not in call(*SMALL, "--env-id", "Stub-v0", "--total-timesteps", 2 * BATCH)[1]


def test_checkpoints_that_cut_many_episodes_are_warned_of(call):
    argv = [*SMALL, "--total-timesteps", 4 * BATCH]  # an episode of CartPole can take 500 steps
    assert "warning: --save-every 1 " in call(*argv, "--save-every", 1)[2]
    assert call(*argv)[2] == call(*argv, "--save-every", 0)[2] == ""


def test_resuming_a_finished_run(call, tmp_path):
    call(*SMALL, "--env-id", "Stub-v0", "--total-timesteps", BATCH)
    before = {path: path.read_bytes() for path in only_run(tmp_path).iterdir()}
    status, output, message = call("--resume", only_run(tmp_path))
    assert status == 0 and "is finished" in output and message == ""
    assert {path: path.read_bytes() for path in only_run(tmp_path).iterdir()} == before


# Evaluation


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    sizes = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "total_timesteps": 2 * BATCH}
    return ppo.train(Args(**sizes, vectorization_mode="sync", runs_dir=str(tmp_path_factory.mktemp("runs"))))


def evaluation(output):
    """What --evaluate prints: the mean, the deviation, the number of episodes and each return."""
    summary = re.search(r"mean return (\S+), standard deviation (\S+), (\d+) episodes:\n(.*)\n", output).groups()
    return [float(value) for value in summary[:3]], [float(value) for value in summary[3].split()]


def test_evaluation_prints_mean_deviation_and_every_return(call, cartpole, monkeypatch):
    argv = ["--evaluate", cartpole, "--num-envs", 3, "--eval-episodes", 4]
    status, output, message = call(*argv)
    (mean, deviation, number), returns = evaluation(output)
    assert status == 0 and message == ""
    assert number == len(returns) == 12 and len(set(returns)) > 1 and min(returns) >= 8
    assert (mean, deviation) == pytest.approx((np.mean(returns), np.std(returns)), abs=0.01)
    assert call(*argv)[1] == output != call(*argv, "--seed", 7)[1]
    assert evaluation(call(*argv, "--greedy")[1])[1] != returns
    noises, act = [], ppo.Agent.act
    spy = lambda agent, x, noise: noises.append(noise.abs().max().item()) or act(agent, x, noise)
    monkeypatch.setattr(ppo.Agent, "act", spy)
    assert call(*argv)[1] == output and min(noises) > 0
    noises.clear()
    assert call(*argv, "--greedy")[0] == 0 and max(noises) == 0
    assert call(*argv, "--threads", 2)[1] == output and torch.get_num_threads() == 2
    assert call(*argv, "--threads", 1)[1] == output and torch.get_num_threads() == 1


def test_evaluation_films_every_episode(call, cartpole, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    argv = ["--evaluate", cartpole, "--num-envs", 2, "--eval-episodes", 2]
    status, output, _ = call(*argv, "--capture-video")
    films = list(cartpole.glob("videos/*/*/*.mp4"))
    assert status == 0 and len(evaluation(output)[1]) == len(films) == 4
    assert all(film.read_bytes()[4:8] == b"ftyp" for film in films)
    assert evaluation(output) == evaluation(call(*argv)[1])  # filming changes nothing
    assert call("--evaluate", cartpole, "--eval-episodes", 1, "--capture-video")[0] == 0
    assert len(list(cartpole.glob("videos/*/*/*.mp4"))) == 4 + 1  # of one environment


def test_training_films_an_episode_at_every_checkpoint(call, tmp_path, monkeypatch):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    argv = [*SMALL, "--total-timesteps", 2 * BATCH, "--save-every", 1]
    assert call(*argv)[0] == 0
    plain = only_run(tmp_path).rename(tmp_path / "plain")
    assert call(*argv, "--capture-video")[0] == 0
    assert len(list(only_run(tmp_path).glob("videos/*/*/*.mp4"))) == 2
    agents = load(plain)["agent"], load(only_run(tmp_path))["agent"]
    assert all(torch.equal(value, agents[1][name]) for name, value in agents[0].items())  # filming changes nothing
