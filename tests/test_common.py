"""The scripts share no module, so what does the same job in two of them must be the same text in both."""

import ast
import dataclasses
import difflib
import functools
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ["ppo.py", "ppo_continuous.py", "ppo_atari.py"]
SAME = [
    "UsageError", "reject", "first_line", "Args.check", "flat_parameters", "masked_mean",
    "compute_gae", "policy_loss", "value_loss", "normalize_advantages", "diagnostics", "explained_variance",
    "new_run_dir", "load_agent", "check_compiler", "save_checkpoint", "fits", "load_run", "start_tracking", "Logger",
    "LIMITS", "MAY_DIFFER", "HEADERS", "CPU_THREADS", "STOP_SIGNALS",
]  # fmt: skip
SAME_AS_PPO = {  # besides
    "ppo_continuous.py": [
        "check_renderer", "new_worlds", "setup_device", "RunningStats", "mlp", "Agent.normalize", "Agent.value",
        "scale_rewards", "ppo_loss", "evaluate", "exit_if_stopped", "main",
    ],
    "ppo_atari.py": [],
}  # fmt: skip
ONLY_HERE = {
    "ppo_continuous.py": {"initial_log_std", "rescale_actions", "recompute_advantages"},
    "ppo_atari.py": {"clip_rewards", "episodic_life", "sticky_actions", "max_episode_frames", "bf16"},
}
NOT_HERE = {"ppo_atari.py": {"vectorization_mode", "norm_obs", "norm_reward"}}
LINES = {"ppo_continuous.py": 20, "ppo_atari.py": 150}  # of train that differ, on either side, moved ones too


@functools.cache
def definitions(script):
    """{name: source} of the functions, classes, methods and constants of a script."""
    text = (ROOT / script).read_text()
    found = {}

    def visit(nodes, prefix=""):
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[prefix + node.name] = ast.get_source_segment(text, node)
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[prefix + node.targets[0].id] = ast.get_source_segment(text, node)

    visit(ast.parse(text).body)
    return found


@pytest.mark.parametrize(("other", "name"), [(s, n) for s in SCRIPTS[1:] for n in SAME + SAME_AS_PPO[s]])
def test_the_same_job_is_the_same_text(other, name):
    assert definitions(SCRIPTS[0])[name] == definitions(other)[name]


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_flags_of_one_name_have_one_text(other):
    first, second = (fields(script) for script in (SCRIPTS[0], other))
    assert second.keys() - first.keys() == ONLY_HERE[other]
    assert first.keys() - second.keys() == NOT_HERE.get(other, set())
    differ = [name for name in first if name in second and first[name] != second[name]]
    assert differ == ["env_id"]  # discrete, continuous, Atari


def fields(script):
    """{flag: its type and comment}, without the default."""
    lines = re.findall(r"^    (\w+): (.+) = .+?  # (.+)$", definitions(script)["Args"], re.M)
    return {name: (annotation, comment) for name, annotation, comment in lines}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_text(script):
    module = __import__(script.removesuffix(".py"))
    assert set(fields(script)) == {field.name for field in dataclasses.fields(module.Args)}


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_little_of_the_training_loop_differs(other):
    first, second = ([line.strip() for line in definitions(name)["train"].splitlines()] for name in (SCRIPTS[0], other))
    matched = difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    differing = len(first) + len(second) - 2 * sum(block.size for block in matched)
    assert differing == LINES[other], "if you mean it, change LINES"


@pytest.mark.parametrize("script", SCRIPTS)
def test_uv_installs_what_requirements_txt_pins(script):
    """The PEP 723 block at the end of a script: `uv run ppo.py` works for someone who copied the one file."""
    text = (ROOT / script).read_text()
    (block,) = re.findall(r"^# /// script\n(.*?)^# ///$", text, re.M | re.S)
    assert text.count("# /// script") == 1 and text.endswith(block + "# ///\n")
    settings = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().split())
    pins = {name.partition("[")[0]: version for name, version in pins.items()}
    packages = dict(dependency.split("==") for dependency in settings["dependencies"])
    assert {name.partition("[")[0]: version for name, version in packages.items()}.items() <= pins.items()
    top = {node.split(".")[0] for node in imports(text)} - set(sys.stdlib_module_names)
    installed = {name.partition("[")[0].replace("-", "_") for name in packages}
    assert top <= installed


def imports(text):
    """Names of the modules that a script imports anywhere."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
