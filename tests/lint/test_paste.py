"""A file that stands alone, and parts of it that can be pasted with at most two helpers."""

import ast
import math
import re
import sys
import tomllib
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_same_text import ROOT, SCRIPTS, definitions, text_of
from torch import nn

import ppo
import ppo_atari
import ppo_continuous

LOSS = ["policy_loss", "value_loss", "normalize_advantages"]
PARTS = [("compute_gae",), ("policy_loss",), ("value_loss",), ("normalize_advantages",)]
PARTS = [(script, *part) for script in SCRIPTS for part in PARTS]
PARTS += [(script, part) for script in SCRIPTS[:2] for part in ("RunningStats", "mlp")]
PARTS += [(script, "Agent", "RunningStats", "mlp") for script in SCRIPTS[:2]]
PARTS += [(ppo_atari, "Agent", "orthogonal"), (ppo_atari, "AtariGames")]
PARTS += [(script, "compute_gradient", "ppo_loss", *LOSS) for script in SCRIPTS]


@pytest.mark.parametrize(
    ("script", "names"),
    [(script, names) for script, *names in PARTS],
    ids=lambda value: value[0] if isinstance(value, list) else value.__name__,
)
def test_what_a_part_needs(script, names):
    """Of its script, it uses these helpers and no other name; and imports."""
    tree = ast.parse("\n".join(definitions(script)[name] for name in names))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    allowed = {*names, "torch", "nn", "math", "np", "gym", "ale_py"}
    assert used & vars(script).keys() <= allowed


@pytest.mark.parametrize("script", [ppo, ppo_continuous])
def test_a_pasted_agent_and_gradient_work(script):
    pasted = {"torch": torch, "nn": nn, "math": math, "np": np}
    for name in ["RunningStats", "mlp", "Agent", *LOSS, "ppo_loss", "compute_gradient"]:
        exec(definitions(script)[name], pasted)
    box = gym.spaces.Box(-1, 1, (2,))
    actions = box if script is ppo_continuous else gym.spaces.Discrete(3)
    envs = SimpleNamespace(single_observation_space=box, single_action_space=actions)
    agent, x = pasted["Agent"](envs, script.Args()), torch.rand(6, 2)
    with torch.no_grad():
        batch = {"x": x, "actions": agent.act(x), "old_values": agent.value(x)}
        log_probs, _ = agent.evaluate_actions(x, batch["actions"])
    batch |= {"old_log_probs": log_probs, "advantages": x[:, 0], "returns": x[:, 1]}
    logged = pasted["compute_gradient"](agent, batch, script.Args())
    assert logged["max_ratio_dev"] < 1e-6
    assert all(parameter.grad is not None for parameter in agent.parameters())


@pytest.mark.parametrize("script", SCRIPTS)
def test_uv_installs_what_requirements_txt_pins(script):
    """The PEP 723 block at the end: `uv run ppo.py` works for who copied the one file."""
    text = text_of(script)
    (block,) = re.findall(r"^# /// script\n(.*?)^# ///$", text, re.M | re.S)
    assert text.count("# /// script") == 1 and text.endswith(block + "# ///\n")
    settings = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    pins = without_extras((ROOT / "requirements.txt").read_text().split())
    packages = without_extras(settings["dependencies"])
    assert packages.items() <= pins.items()
    top = {name.split(".")[0] for name in imports(text)} - set(sys.stdlib_module_names)
    assert top <= {name.replace("-", "_") for name in packages}


def without_extras(pins):
    """["gymnasium[mujoco]==1.4.0"] → {"gymnasium": "1.4.0"}"""
    pairs = (pin.split("==") for pin in pins)
    return {name.partition("[")[0]: version for name, version in pairs}


def imports(text):
    """Names of the modules that a script imports anywhere."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
