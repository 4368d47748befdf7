"""Whatever cannot work is refused before anything is done: one line that names flag, value and what would work."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import environments  # noqa: F401
import pytest
import torch

import ppo
from ppo import Args

SMALL = ["--env-id", "Stub-v0", "--num-envs", "2", "--num-steps", "16", "--total-timesteps", "64"]
COUNTS = ["total_timesteps", "num_envs", "num_steps", "num_minibatches", "update_epochs", "eval_episodes"]
FLOATS = [field.name for field in dataclasses.fields(Args) if "float" in str(field.type)]
UNBOUNDED = ["clip_coef", "max_grad_norm"]


def flag(name):
    return "--" + name.replace("_", "-")


def contents(folder):
    """What lies in a folder: {path: bytes}."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs the command line in this process; returns exit status and stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["ppo.py", *map(str, argv)])
        status = 0
        try:
            ppo.main()
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().err

    monkeypatch.chdir(tmp_path)  # the default of --runs-dir is beside it
    yield call
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(call, tmp_path):
    """Asserts that a command line is refused in one line like `ppo.py: --flag value: advice`, with nothing written."""

    def refused(flag, value, advice, *argv):
        before = contents(tmp_path)
        status, message = call(*(argv or (flag, value)))
        assert status == 2
        assert message.count("\n") == 1 and message.startswith(f"ppo.py: {flag} {value}"), message
        assert re.search(advice, message.partition(f"{flag} {value}")[2]), message
        assert contents(tmp_path) == before
        assert not (tmp_path / "runs").exists()

    return refused


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    args = Args("Stub-v0", num_envs=2, num_steps=16, total_timesteps=64, learning_rate=1e-3)
    return ppo.train(dataclasses.replace(args, runs_dir=str(tmp_path_factory.mktemp("finished"))))


@pytest.fixture
def saved(finished_run, tmp_path):
    """A copy of a finished run, to be damaged."""
    return Path(shutil.copytree(finished_run, tmp_path / "saved"))


# Environments


@pytest.mark.parametrize(
    ("env_id", "advice"),
    [
        ("CartPol-v1", "nearest is CartPole-v1"),
        ("cartpole-v1", "nearest is CartPole-v1"),
        ("CartPole-v99", "nearest is CartPole-v1"),
        ("environments:Stubb-v0", "nearest is Stub-v0"),
        ("Cart Pole-v1", "Malformed"),
        ("", "Malformed"),
        ("nomodule:Env-v0", "No module named 'nomodule'"),
        ("Pendulum-v1", r"continuous.* ppo_continuous\.py"),
        ("StubImages-v0", r"images.* ppo_atari\.py"),
        ("ALE/Pong-v5", r"ppo_atari\.py"),
        ("StubMultiDiscrete-v0", r"MultiDiscrete\(\[2 3\]\).*Discrete space is needed"),
        ("StubSequence-v0", "Sequence.*flatten"),
        ("StubGraph-v0", "Graph.*flatten"),
        ("StubSameStep-v0", "SAME_STEP.*NEXT_STEP is needed"),
    ],
)
def test_environment(refused, env_id, advice):
    refused("--env-id", env_id, advice)


def test_no_native_vector_environment(refused):
    argv = ["--env-id", "Acrobot-v1", "--vectorization-mode", "vector_entry_point"]
    refused("--vectorization-mode", "vector_entry_point", "Acrobot-v1.*Use sync or async", *argv)


def test_an_environment_that_cannot_be_filmed(refused):
    refused("--capture-video", "True", "Stub-v0 cannot be filmed", *SMALL, "--capture-video")


def test_films_need_moviepy(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "moviepy", None)
    refused("--capture-video", "True", "moviepy", "--capture-video")


# Numbers


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_positive(refused, name, value):
    refused(flag(name), value, r"1 or more|\[1, ")


@pytest.mark.parametrize("name", ["threads", "save_every", *(name for name in FLOATS if name not in UNBOUNDED)])
def test_negative(refused, name):
    refused(flag(name), "-1", r"or more|\[")


@pytest.mark.parametrize("name", UNBOUNDED)
@pytest.mark.parametrize("value", ["-1", "0"])
def test_unbounded_floats_are_positive(refused, name, value):
    refused(flag(name), value, "1e-12")


@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
def test_above_one(refused, name):
    refused(flag(name), "1.01", r"in \[0, 1\]")


@pytest.mark.parametrize("name", FLOATS)
def test_nan(refused, name):
    refused(flag(name), "nan", "or more|in ")


@pytest.mark.parametrize("name", [name for name in FLOATS if name not in UNBOUNDED])
def test_infinity(refused, name):
    refused(flag(name), "inf", r"\[.*\]|finite|less")  # "0 or more" would be no advice


@pytest.mark.parametrize("name", UNBOUNDED)
def test_infinity_where_it_has_a_meaning(name):
    Args(**{name: math.inf}).check()


@pytest.mark.parametrize(("seed", "advice"), [(-1, r"0 or more|\[0, "), (2**32, r"4294967295\]|2\^32\)")])
def test_seed(refused, seed, advice):
    refused("--seed", seed, advice)


def test_minibatches_divide_the_batch(refused):
    refused("--num-minibatches", 3, "divide num_envs .* num_steps = 512")


def test_at_least_one_rollout(refused):
    refused("--total-timesteps", 511, "512")


# The machine


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_device(refused, device):
    refused("--device", device, "use one of: auto, cpu")


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_runs_dir_is_a_file(refused, tmp_path, below):
    (tmp_path / "file").touch()
    runs = tmp_path / "file" / below
    refused("--runs-dir", runs, "name a directory", *SMALL, "--runs-dir", runs)


def test_exp_name_too_long_for_a_directory(refused):
    refused("--exp-name", "x" * 101, "at most 100 characters")


# --resume and --evaluate


def damage(saved, how):
    checkpoint, settings, log = saved / "checkpoint.pt", saved / "args.json", saved / "metrics.csv"
    if how == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    elif how == "garbage":
        checkpoint.write_bytes(b"garbage")
    elif how == "empty":
        checkpoint.write_bytes(b"")
    elif how == "missing":
        checkpoint.unlink()
    elif how == "incomplete":
        torch.save({"agent": {}}, checkpoint)
    elif how == "settings":
        settings.write_text("{")
    elif how == "unknown flag":
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"nonsense": 1}))
    elif how.startswith("wrong"):
        wrong = {"num_envs": "2", "num_steps": 16.5, "gamma": None, "norm_adv_over": "rollout", "greedy": 1.0}
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {how[6:]: wrong[how[6:]]}))
    elif how == "no iteration":
        torch.save({k: v for k, v in torch.load(checkpoint).items() if k != "iteration"}, checkpoint)
    elif how == "no object":
        settings.write_text("[]")
    elif how == "log":
        os.truncate(log, log.stat().st_size - 1)


@pytest.mark.parametrize("mode", ["--resume", "--evaluate"])
@pytest.mark.parametrize(
    ("how", "advice"),
    [
        ("truncated", "damaged.*name another"),
        ("garbage", "damaged"),
        ("empty", "damaged"),
        ("missing", "damaged|missing"),
        ("incomplete", "damaged"),
        ("settings", "damaged"),
        ("unknown flag", "damaged.*nonsense"),
        ("wrong num_envs", "damaged.*num_envs is '2'"),
        ("wrong num_steps", "damaged.*num_steps is 16.5"),
        ("wrong gamma", "damaged.*gamma is None"),
        ("wrong norm_adv_over", "damaged.*norm_adv_over is 'rollout'"),
        ("wrong greedy", "damaged.*greedy is 1.0"),
        ("no iteration", "damaged.*missing"),
        ("no object", "damaged"),
        ("log", "metrics.csv is shorter"),
    ],
)
def test_damaged_run(refused, saved, mode, how, advice):
    damage(saved, how)
    refused(mode, saved, advice)


@pytest.mark.parametrize("mode", ["--resume", "--evaluate"])
def test_an_environment_that_has_changed_since(refused, saved, mode):
    settings = json.loads((saved / "args.json").read_text())
    (saved / "args.json").write_text(json.dumps(settings | {"env_id": "CartPole-v1", "total_timesteps": 96}))
    refused(mode, saved, "other spaces than CartPole-v1")


@pytest.mark.parametrize("mode", ["--resume", "--evaluate"])
def test_no_run(refused, saved, tmp_path, mode):
    (tmp_path / "empty").mkdir()
    refused(mode, '""', "must name a run directory", mode, "")
    refused(mode, tmp_path / "missing", "does not exist; runs are in")
    refused(mode, tmp_path / "empty", "is no run directory")
    refused(mode, saved / "args.json", "is no run directory|does not exist")
    settings = json.loads((saved / "args.json").read_text())
    (saved / "args.json").write_text(json.dumps({**settings, "script": "ppo_atari.py"}))
    refused(mode, saved, r"ppo_atari\.py: use that script")


@pytest.mark.parametrize(
    ("name", "value", "saved_value"),
    [("num_envs", 4, 2), ("learning_rate", 0.00025, 0.001), ("env_id", "CartPole-v1", "Stub-v0")],  # all defaults
)
def test_flags_that_contradict_the_run(refused, saved, name, value, saved_value):
    advice = f"contradicts the run of --resume, which has {saved_value}"
    refused(flag(name), value, advice, "--resume", saved, flag(name), value)


def test_evaluate_refuses_another_environment(refused, saved):
    refused("--env-id", "CartPole-v1", "contradicts", "--evaluate", saved, "--env-id", "CartPole-v1")


def test_resume_together_with_evaluate(refused, saved):
    refused("--evaluate", saved, "--resume", "--resume", saved, "--evaluate", saved)


# The real exit status, and the import


def refused_by_program(folder, start, *argv, **variables):
    variables |= os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, ppo.__file__, *argv]
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and result.stderr.startswith(start), result.stderr
    assert result.stdout == "" and not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "start"),
    [
        (["--num-envs", "0"], "ppo.py: --num-envs 0: must be"),
        (["--env-id", "LunarLander-v2"], "ppo.py: --env-id LunarLander-v2: "),  # gymnasium warns of it, too
        (["--env-id", "Pendulum-v1", "--vectorization-mode", "async"], "ppo.py: --env-id Pendulum-v1: "),
    ],
)
def test_exit_status_and_one_line(tmp_path, argv, start):
    refused_by_program(tmp_path, start, *argv)


def test_no_compiler(tmp_path):
    variables = {"CXX": "/missing", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    refused_by_program(tmp_path, "ppo.py: --compile True: cannot work here: ", "--compile", **variables)


def test_runs_dir_is_a_dangling_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    refused_by_program(tmp_path, "ppo.py: --runs-dir link: ", "--runs-dir", "link", "--total-timesteps", "512")


@pytest.mark.parametrize(
    ("function", "flags", "message"),
    [
        (ppo.train, {"num_envs": 0}, "--num-envs 0"),
        (ppo.train, {"gamma": math.nan}, "--gamma nan"),
        (ppo.train, {"env_id": "Pendulum-v1"}, "ppo_continuous"),
        (ppo.train, {"resume": "missing"}, "--resume missing: does not exist"),
        (partial(ppo.load_run, "evaluate"), {"evaluate": "missing"}, "--evaluate missing: does not exist"),
    ],
)
def test_imported_functions_raise_value_error(tmp_path, monkeypatch, function, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        function(Args(**flags))
    assert not list(tmp_path.iterdir())
