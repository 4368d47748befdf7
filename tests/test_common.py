"""The scripts share no module, so what does the same job in two of them must be the same text.

They are to be read as a whole and pasted in parts, so their size and order are tested, too.
"""

import ast
import dataclasses
import difflib
import functools
import math
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
SCRIPTS = ["ppo.py", "ppo_continuous.py", "ppo_atari.py"]
SIZES = {  # at most so many lines, characters, and lines of train
    "ppo.py": (567, 29_085, 131),  # 20 of them for --reference
    "ppo_continuous.py": (577, 29_925, 127),
    "ppo_atari.py": (622, 31_300, 140),
}
SECTIONS = ["Flags", "Environments", "Agent", "Equations", "Training", "Evaluation", "Runs"]
SECTIONS += ["Command line"]

SPLIT = {"Args", "Agent", "Logger"}  # classes whose methods are compared one by one

# What differs from ppo.py, beside the flags; everything else of one name has one text.
DIFFER = {
    "SCRIPT",
    "Args.__post_init__",
    "make_envs",
    "Agent.__init__",
    "Agent.act",
    "Agent.evaluate_actions",
    "train",
    "evaluate",
    "load_agent",
}
ATARI = {"start_envs", "Agent.value", "flat_parameters", "ppo_loss", "open_run"}
ATARI |= {"save_checkpoint", "Logger.__init__", "Logger.log"}
DIFFERENT = {"ppo_continuous.py": DIFFER, "ppo_atari.py": DIFFER | ATARI}
MISSING = {
    "ppo_continuous.py": set(),
    "ppo_atari.py": {"RunningStats", "mlp", "Agent.normalize", "scale_rewards"},
}
LINES = {"ppo_continuous.py": 29, "ppo_atari.py": 98}  # of train that differ, on either side

ONLY_HERE = {
    "ppo_continuous.py": {"initial_log_std", "rescale_actions", "recompute_advantages"},
    "ppo_atari.py": {"clip_rewards", "episodic_life", "sticky_actions", "max_episode_frames"},
}
ONLY_HERE["ppo_atari.py"] |= {"bf16"}
NOT_HERE = {"ppo_continuous.py": {"reference", "kl_coef"}}
NOT_HERE["ppo_atari.py"] = {"vectorization_mode", "norm_obs", "norm_reward", "reference", "kl_coef"}


def read(script):
    return (ROOT / script).read_text()


@functools.cache
def definitions(script):
    """{name: source} of the functions, classes and constants of a script, and of the methods of
    those in SPLIT."""
    text = read(script)
    found = {}

    def visit(nodes, prefix=""):
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[prefix + node.name] = ast.get_source_segment(text, node)
                if node.name in SPLIT:
                    visit(node.body, f"{node.name}.")
            elif isinstance(node, ast.Assign):
                found[node.targets[0].id] = ast.get_source_segment(text, node)

    visit(ast.parse(text).body)
    return found


# Size and order


@pytest.mark.parametrize("script", SCRIPTS)
def test_size(script):
    text = read(script)
    lines = text.splitlines()
    sizes = len(lines), len(text), len(definitions(script)["train"].splitlines())
    assert all(size <= limit for size, limit in zip(sizes, SIZES[script])), sizes
    assert max(map(len, lines)) <= 100
    assert "fmt: skip" not in text and "fmt: off" not in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections(script):
    assert re.findall(r"^# -{3,}.*", read(script), re.M) == [
        f"# ---------- {title} ----------" for title in SECTIONS
    ]


# The same job, the same text


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_the_same_job_is_the_same_text(other):
    first, second = definitions("ppo.py"), definitions(other)
    common = (first.keys() & second.keys()) - SPLIT
    assert {name for name in common if first[name] != second[name]} == DIFFERENT[other]
    assert first.keys() - second.keys() == MISSING[other]


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_little_of_the_training_loop_differs(other):
    sources = definitions("ppo.py")["train"], definitions(other)["train"]
    first, second = ([line.strip() for line in source.splitlines()] for source in sources)
    matched = difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    differing = len(first) + len(second) - 2 * sum(block.size for block in matched)
    assert differing == LINES[other], "if you mean it, change LINES"


def fields(script):
    """{flag: its type and comment}, without the default."""
    lines = re.findall(r"^    (\w+): (.+) = .+?  # (.+)$", definitions(script)["Args"], re.M)
    return {name: (annotation, comment) for name, annotation, comment in lines}


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_flags_of_one_name_have_one_text(other):
    first, second = fields("ppo.py"), fields(other)
    assert second.keys() - first.keys() == ONLY_HERE[other]
    assert first.keys() - second.keys() == NOT_HERE[other]
    differ = [name for name in first if name in second and first[name] != second[name]]
    assert differ == ["env_id"] + ["threads"] * (other == "ppo_atari.py")  # None: torch's own


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_comment(script):
    module = __import__(script.removesuffix(".py"))
    assert set(fields(script)) == {field.name for field in dataclasses.fields(module.Args)}


# Each part can be pasted


def paste(script, *names):
    """What a file defines that has some imports and these definitions of a script."""
    file = {"torch": torch, "nn": nn, "math": math, "np": np, "gym": gym, "ale_py": ale_py}
    for name in names:
        exec(definitions(script)[name], file)
    return SimpleNamespace(**file)


def test_paste_equations():
    rewards, zeros = torch.ones(3, 1), torch.zeros(4, 1)
    done = torch.tensor([[False], [True], [False]])
    compute_gae = paste("ppo.py", "compute_gae").compute_gae
    advantages = compute_gae(rewards, zeros, done, done, 0.5, 1.0)
    assert advantages.flatten().tolist() == [1.5, 1, 1]

    policy_loss = paste("ppo.py", "policy_loss").policy_loss
    loss = policy_loss(torch.tensor([2.0]).log(), torch.ones(1), 0.25)
    assert loss.item() == -1.25

    value_loss = paste("ppo.py", "value_loss").value_loss
    values, old_values, returns = torch.tensor([[1.0], [0.0], [2.0]])
    assert value_loss(values, old_values, returns, 0.5).item() == 1.5**2 / 2
    assert value_loss(values, old_values, returns, None).item() == 0.5

    normalize_advantages = paste("ppo.py", "normalize_advantages").normalize_advantages
    normalized = normalize_advantages(torch.tensor([1.0, 2.0, 3.0]))
    assert normalized.tolist() == pytest.approx([-1, 0, 1])


def test_paste_parts_of_the_agent():
    stats = paste("ppo.py", "RunningStats").RunningStats(2)
    stats.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    assert stats.mean.tolist() == pytest.approx([2, 0], abs=1e-3)
    assert stats.var.tolist() == pytest.approx([1, 0], abs=1e-3)

    network = paste("ppo.py", "mlp").mlp(3, 64, 2, 0.0)
    assert network(torch.ones(5, 3)).tolist() == [[0, 0]] * 5

    flat_parameters = paste("ppo.py", "flat_parameters").flat_parameters
    layer = nn.Linear(2, 1)
    vector = flat_parameters(layer)
    vector.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    layer(torch.tensor([10.0, 100.0])).backward()
    assert layer(torch.tensor([10.0, 100.0])).item() == 213
    assert vector.grad.tolist() == [10, 100, 1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_paste_agent(script):
    box = gym.spaces.Box(-1, 1, (2,))
    discrete = gym.spaces.Discrete(3)
    images = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    helpers, spaces, further = {
        "ppo.py": (["RunningStats", "mlp"], (box, discrete), [True]),
        "ppo_continuous.py": (["RunningStats", "mlp"], (box, box), [True, -0.5, True]),
        "ppo_atari.py": (["orthogonal"], (images, discrete), []),
    }[script]
    agent = paste(script, *helpers, "Agent").Agent(*spaces, *further)
    obs = torch.as_tensor(np.stack([spaces[0].sample() for _ in range(5)]))
    x = agent.features(obs) if script == "ppo_atari.py" else agent.normalize(obs)
    actions = agent.act(x)
    log_probs, entropy = agent.evaluate_actions(x, actions)
    assert agent.value(x).shape == log_probs.shape == entropy.shape == (5,)
    if script == "ppo_continuous.py":
        actions = agent.env_action(actions.detach().numpy())
    assert all(spaces[1].contains(action) for action in np.asarray(actions))


def test_paste_atari_games():
    AtariGames = paste("ppo_atari.py", "AtariGames").AtariGames
    envs = AtariGames(gym.make_vec("ALE/Breakout-v5", 2))
    envs.reset(seed=1)
    obs, _, _, _, info = envs.step(np.zeros(2, np.int64))
    envs.close()
    assert obs.shape == (2, 4, 84, 84)
    assert info["valid"].all() and not info["new_game"].any()


# A file that stands alone


@pytest.mark.parametrize("script", SCRIPTS)
def test_uv_installs_what_requirements_txt_pins(script):
    """The PEP 723 block at the end: `uv run ppo.py` works for someone who copied the one file."""
    text = read(script)
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
