"""A file that stands alone, and parts of it that can be pasted with at most two helpers."""

import ast
import re
import sys
import tomllib

import pytest
from conftest import ROOT, SCRIPTS
from test_same_text import definitions, text_of

import ppo_atari

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
    imported = re.findall(r"^ *(?:import|from(?= [\w.]+ import)) (\w+)", text, re.M)
    others = set(imported) - set(sys.stdlib_module_names)
    assert len(others) > 5 and others <= {name.replace("-", "_") for name in packages}


def without_extras(pins):
    """["gymnasium[mujoco]==1.4.0"] → {"gymnasium": "1.4.0"}"""
    pairs = (pin.split("==") for pin in pins)
    return {name.partition("[")[0]: version for name, version in pairs}
