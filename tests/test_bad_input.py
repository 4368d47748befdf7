"""Bad input ends with a message that says what is wrong and exit status 2; nothing is written."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import environments
import gymnasium as gym
import pytest
import torch

import ppo
from ppo import Args

gym.register(
    "StubFromOne-v0", environments.Stub, kwargs={"actions": gym.spaces.Discrete(2, start=1)}
)

SIZES = {"num_envs": 2, "num_steps": 16, "num_minibatches": 4, "total_timesteps": 64}
RUN = {"env_id": "Stub-v0", **SIZES, "learning_rate": 1e-3}  # what the run in `saved` was made with
RANGES = {
    "num_envs": (1, math.inf),
    "num_steps": (2, math.inf),
    "seed": (0, 2**32 - 1),
    "learning_rate": (0, math.inf),
    "gamma": (0, 1),
    "gae_lambda": (0, 1),
    "num_minibatches": (1, math.inf),
    "update_epochs": (1, math.inf),
    "clip_coef": (0, math.inf),
    "ent_coef": (0, math.inf),
    "vf_coef": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "target_kl": (0, math.inf),
    "kl_coef": (0, math.inf),
    "threads": (1, math.inf),
    "save_every": (1, math.inf),
    "eval_episodes": (1, math.inf),
}
SHORT = ["--total-timesteps", 4 * 128]  # one rollout, should the input not be refused
FLOATS = [field.name for field in dataclasses.fields(Args) if "float" in str(field.type)]


def flag(name):
    return "--" + name.replace("_", "-")


def contents(folder):
    """What lies in a folder: {path: bytes, or None for a folder}."""
    paths = Path(folder).rglob("*")
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs the command line in this process; returns exit status, stdout and stderr."""
    threads = torch.get_num_threads()

    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["ppo.py", *map(str, argv)])
        status = 0
        try:
            ppo.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)  # the default of --runs-dir is runs/ beside it
    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def refused(call, tmp_path):
    """Runs a command line that must be refused, with nothing written; returns the message."""

    def refused(*argv):
        before = contents(tmp_path)
        status, output, message = call(*argv)
        assert (status, output) == (2, "")
        assert contents(tmp_path) == before
        return message

    return refused


@pytest.fixture
def refused_flag(refused):
    """The same for a flag that tyro or Args refuses: without the lines of tyro's box."""
    return lambda *argv: re.sub(r"[\s│]+", " ", refused(*argv))


@pytest.fixture
def refused_line(refused):
    """The same for what is refused later, in one line; returns it without the script's name."""

    def refused_line(*argv):
        message = refused(*argv)
        assert message.startswith("ppo.py: ") and message.endswith("\n"), message
        assert message.count("\n") == 1, message
        assert not message.strip().endswith(":"), message  # a reason is given
        return message.removeprefix("ppo.py: ").strip()

    return refused_line


# Flags


def test_the_table_has_all_numbers():
    types = {field.name: str(field.type) for field in dataclasses.fields(Args)}
    numbers = {name for name, kind in types.items() if "float" in kind or "int" in kind}
    assert RANGES.keys() == numbers - {"total_timesteps"}


def test_total_timesteps(refused_flag):
    message = "--total-timesteps 511: must be >= 512"
    assert message in refused_flag("--total-timesteps", 511)
    Args(total_timesteps=512)


@pytest.mark.parametrize("name", RANGES)
def test_number_out_of_range(refused_flag, name):
    low, high = RANGES[name]
    step = 0.5 if name in FLOATS else 1
    values = [low - step] + [high + step] * (high < math.inf) + ["nan"] * (name in FLOATS)
    for value in values:
        message = f"{flag(name)} {value}: must be in [{low}, {high}]"
        assert message in refused_flag(flag(name), value)
    needed = {"reference": "DIR"} if name == "kl_coef" else {}
    Args(**{name: low}, **needed)
    if high < math.inf or name in FLOATS:
        Args(**{name: high}, **needed)


@pytest.mark.parametrize("number", [3, 512])  # 512 minibatches would have one step each
def test_minibatches(refused_flag, number):
    message = f"--num-minibatches {number}: must divide 512, >= 2 rows each"
    assert message in refused_flag("--num-minibatches", number)
    Args(num_minibatches=256)


@pytest.mark.parametrize("name", ["greedy", "capture_video"])
def test_flags_of_evaluation(refused_flag, name):
    assert "--greedy and --capture-video need --evaluate" in refused_flag(flag(name), *SHORT)


def test_device(refused_flag, monkeypatch):
    assert "'tpu' for argument '--device'" in refused_flag("--device", "tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: torch finds no GPU" in refused_flag("--device", "cuda", *SHORT)


# Environments and the place of the runs


@pytest.mark.parametrize(
    ("env_id", "reason"),
    [
        ("CartPol-v1", "Did you mean: `CartPole`"),
        ("CartPole-v99", "`v99` .* doesn't exist"),
        ("environments:Stubb-v0", "Did you mean: `Stub`"),
        ("", "Malformed environment ID"),
        ("nomodule:Env-v0", "No module named 'nomodule'"),
        ("Pendulum-v1", r"needs Discrete actions from 0; Box: ppo_continuous\.py"),
        ("StubMultiDiscrete-v0", "needs Discrete"),
        ("StubFromOne-v0", r"needs Discrete actions from 0"),
        ("StubSameStep-v0", r"must reset in the step after an episode \(NEXT_STEP\)"),
    ],
)
def test_environment(refused_line, env_id, reason):
    assert re.match(f"(--env-id )?{env_id}: .*{reason}", refused_line("--env-id", env_id, *SHORT))


def test_runs_dir(refused_line, tmp_path):
    (tmp_path / "file").touch()
    assert "--runs-dir file: " in refused_line("--runs-dir", "file", *SHORT)


# --resume and --evaluate


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return ppo.train(Args(**RUN, runs_dir=str(tmp_path_factory.mktemp("runs"))))


@pytest.fixture
def saved(finished, tmp_path):
    """A copy of a finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "saved"))


def damage(run_dir, how):
    checkpoint, flags = run_dir / "checkpoint.pt", run_dir / "args.json"
    read_flags = json.loads(flags.read_text())
    match how:
        case "truncated":
            checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
        case "garbage" | "":
            checkpoint.write_text(how)
        case "no checkpoint":
            checkpoint.unlink()
        case "no flags":
            flags.unlink()
        case "broken flags":
            flags.write_text("{")
        case "other script":
            flags.write_text(json.dumps(read_flags | {"bf16": "auto"}))
        case "bad flag":
            flags.write_text(json.dumps(read_flags | {"gamma": 2}))


@pytest.mark.parametrize("mode", ["--resume", "--evaluate"])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated", ""),
        ("garbage", ""),
        ("", ""),
        ("no checkpoint", "No such file"),
        ("no flags", "No such file"),
        ("broken flags", ""),
        ("other script", "unexpected keyword argument 'bf16'"),
        ("bad flag", "--gamma 2: must be in [0, 1]"),
    ],
)
def test_damaged_run(refused_line, saved, mode, how, reason):
    damage(saved, how)
    line = refused_line(mode, saved)
    assert line.startswith(f"{saved} is not a run directory of ppo.py: ") and reason in line


@pytest.mark.parametrize("mode", ["--resume", "--evaluate"])
def test_no_run(refused_line, tmp_path, mode):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name in ["missing", "empty", "file"]:
        line = refused_line(mode, name)
        assert line.startswith(f"{name} is not a run directory of ppo.py: "), line
    assert "is not a run directory of ppo.py: " in refused_line(mode, "")


@pytest.mark.parametrize("mode", ["--resume", "--evaluate"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 0.00025), ("env_id", "CartPole-v1"), ("num_steps", 32)],
)
def test_flags_that_differ_from_the_run(refused_line, saved, mode, name, value):
    line = refused_line(mode, saved, flag(name), value)
    assert line == f"{flag(name)} {value}: must stay {RUN[name]}"


def test_flags_that_may_differ(call, refused_line, refused_flag, saved):
    evaluation = ["--num-envs", 8, "--seed", 2, "--eval-episodes", 3]  # 8: not one rollout in a run
    status, output, _ = call("--evaluate", saved, *evaluation, "--greedy")
    assert status == 0 and len(output.splitlines()[-1].split()) == 8 * 3
    for name, value in ("--num-envs", 4), ("--seed", 2), ("--eval-episodes", 3):
        assert refused_line("--resume", saved, name, value).startswith(f"{name} {value}: must stay")
    assert "--greedy" in refused_flag("--resume", saved, "--greedy")
    assert call("--resume", saved, "--device", "cpu", "--threads", 2)[0] == 0
    assert torch.get_num_threads() == 2


def test_a_run_from_a_machine_with_a_gpu(call, saved, monkeypatch):
    flags = json.loads((saved / "args.json").read_text())
    (saved / "args.json").write_text(json.dumps(flags | {"device": "cuda"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call("--evaluate", saved)[0] == call("--resume", saved, "--device", "cpu")[0] == 0


def test_resume_together_with_evaluate(refused_flag):
    message = "--resume and --evaluate exclude each other"
    assert message in refused_flag("--resume", "runs", "--evaluate", "runs")


# The real program, and the import


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gamma", "nan"], "--gamma nan: must be in [0, 1]"),
        (["--env-id", "LunarLander-v2"], "ppo.py: --env-id LunarLander-v2: "),
        (
            ["--env-id", "Pendulum-v1", "--vectorization-mode", "async"],
            "ppo.py: Pendulum-v1: needs Discrete",
        ),
        (["--evaluate", "missing"], "ppo.py: missing is not a run directory"),
    ],
)
def test_real_program(tmp_path, argv, message):
    command = [sys.executable, ppo.__file__, *argv]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_imported_functions_raise_value_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--num-envs 0"):
        Args(num_envs=0)
    with pytest.raises(ValueError, match="Pendulum-v1: needs Discrete"):
        ppo.train(Args("Pendulum-v1"))
    with pytest.raises(ValueError, match="missing is not a run directory"):
        ppo.load_agent("missing")
    assert not list(tmp_path.iterdir())
