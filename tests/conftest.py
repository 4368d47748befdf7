"""What several test files use: helpers to import, and fixtures."""

import contextlib
import csv
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import environments
import gymnasium as gym
import pytest
import run as runner
import torch

import ppo
import ppo_atari
import ppo_continuous

ROOT = Path(__file__).parents[1]
SCRIPTS = [ppo, ppo_continuous, ppo_atari]

# Iterations of 32 steps in two minibatches, twice.
SMALL = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2}
STEPS = 32


def env_id(script, name):
    """The id of one of our small environments with the script's kind of actions."""
    return f"{name}Box-v0" if script is ppo_continuous else f"{name}-v0"


def make_args(script, name="Pole", **flags):
    """Args of a small run that repeats exactly. name: one of our environments."""
    settings = {"env_id": env_id(script, name), **SMALL, "total_timesteps": 4 * STEPS}
    settings |= {"device": "cpu", "threads": 1}
    if script is ppo_atari:
        settings["bf16"] = "off"
    if script is ppo_continuous:
        settings |= {"target_kl": None, "random_start_ages": False}
    return script.Args(**settings | flags)


def train(script, folder, name="Pole", after_iteration=None, **flags):
    args = make_args(script, name, runs_dir=str(folder), **flags)
    return script.train(args, after_iteration)


def normalisation(script, on):
    """The flags that switch it on or off, where there is any."""
    return {} if script is ppo_atari else {"norm_obs": on, "norm_reward": on}


def make_agent(script, inputs=4, actions=4, **flags):
    """An untrained agent for so many inputs; actions: how many, or their space."""
    torch.manual_seed(1)
    box = lambda size: gym.spaces.Box(-1, 1, (size,))
    if isinstance(actions, int):
        actions = box(actions) if script is ppo_continuous else gym.spaces.Discrete(actions)
    spaces = {"single_observation_space": box(inputs), "single_action_space": actions}
    return script.Agent(SimpleNamespace(**spaces), script.Args(**flags))


def load_variation(variation, folder, script="ppo"):
    """A script with a patch of benchmark/variations/, as a module."""
    path = runner.patched(f"{script}.py", variation, folder / "patched")
    spec = importlib.util.spec_from_file_location(script, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def only_run(folder):
    (run_dir,) = Path(folder).iterdir()
    return run_dir


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def outcome(run_dir):
    """The rows of metrics.csv, without what depends on the time, and of episodes.csv."""
    metrics = read(run_dir / "metrics.csv")
    for row in metrics:
        del row["sps"], row["seconds"]
    return metrics, read(run_dir / "episodes.csv")


def column(run_dir, name):
    """A column of metrics.csv, as numbers."""
    return [float(row[name]) for row in read(run_dir / "metrics.csv")]


def load(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def copy(value):
    if isinstance(value, dict):
        return {name: copy(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return tuple(copy(item) for item in value)
    return value.detach().clone() if torch.is_tensor(value) else value


def equal(first, second):
    """Whether nested dicts and tensors are equal, bit for bit."""
    if isinstance(first, dict):
        same = first.keys() == second.keys()
        return same and all(equal(first[key], second[key]) for key in first)
    return torch.equal(first, second) if torch.is_tensor(first) else first == second


def flag(name):
    return "--" + name.replace("_", "-")


def as_flags(settings):
    """{"num_envs": 2} → ["--num-envs=2"]"""
    return [f"{flag(name)}={value}" for name, value in settings.items()]


def make_pictures(args, in_colour=False):
    """In place of ppo_atari.make_envs: the small environments as pictures."""
    envs = ppo.make_envs(ppo.Args(args.env_id, num_envs=args.num_envs))
    return environments.Pictures(envs)


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.__name__)
def script(request, monkeypatch):
    """Each script; ppo_atari.py plays the small environments as pictures."""
    monkeypatch.setattr(ppo_atari, "make_envs", make_pictures)
    return request.param


@pytest.fixture
def record(monkeypatch):
    """record(owner, name): a list that will hold copies of the arguments and of the result
    of each call of owner.name."""

    def record(owner, name):
        calls, original = [], getattr(owner, name)

        def recording(*args, **options):
            inputs = copy(args)
            result = original(*args, **options)
            calls.append((inputs, copy(result)))
            return result

        monkeypatch.setattr(owner, name, recording)
        return calls

    return record


@pytest.fixture
def started(monkeypatch):
    """started(script): a list of what agent and optimizer hold when a run begins."""

    def started(script):
        states, original = [], script.Run.open

        def opening(run, *parts):
            original(run, *parts)
            states.extend(copy(dict(part.state_dict())) for part in parts)

        monkeypatch.setattr(script.Run, "open", opening)
        return states

    return started


@pytest.fixture
def unshuffled(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n, device=None: torch.arange(n))


@pytest.fixture(autouse=True)
def one_thread():
    """Two are slower for networks this small; train sets the number for this process."""
    torch.set_num_threads(1)


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(script, *argv) runs the command line in this process, in tmp_path; returns exit
    status, stdout, stderr."""

    def call(script, *argv):
        monkeypatch.setattr(sys, "argv", [script.SCRIPT, *map(str, argv)])
        capsys.readouterr()  # what came before
        status = 0
        try:
            script.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    return call


@pytest.fixture
def start(tmp_path):
    """start(script, *argv) starts the real program in tmp_path, with its runs in runs/, as
    the leader of a process group, without credentials for Weights & Biases."""
    started = []

    def start(script, *argv, launcher=(), variables=None, **streams):
        clean = {name: value for name, value in os.environ.items() if "WANDB" not in name}
        clean |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "tests")}
        clean |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        pipes = {"stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe}
        program = subprocess.Popen(
            [sys.executable, *launcher, script.__file__, *map(str, argv)],
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
        program.communicate()


@pytest.fixture
def finish(start):
    """finish(script, *argv): exit status, stdout and stderr of the real program."""

    def finish(*command, **options):
        program = start(*command, **options)
        output, errors = program.communicate(timeout=300)
        return program.returncode, output, errors

    return finish


@pytest.fixture
def fake_wandb(monkeypatch):
    """Takes the place of the module; remembers what init, log and finish were given."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    calls = SimpleNamespace(credentials=True, started=[], tracked=[], finished=0)

    def finish():
        calls.finished += 1

    def init(**settings):
        assert len(calls.started) == calls.finished, "the run before was not finished"
        calls.started.append(settings)
        log = lambda row, step: calls.tracked.append((step, row))
        return SimpleNamespace(log=log, finish=finish)

    login = lambda prompt: calls.credentials
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(login=login, init=init))
    return calls
