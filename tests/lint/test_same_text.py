"""The scripts share no module: what does the same job in two must be the same text."""

import ast
import dataclasses
import re
import textwrap
from pathlib import Path

import pytest
from conftest import SCRIPTS

import ppo
import ppo_atari
import ppo_continuous

SECTIONS = ["Flags", "Equations", "Agent", "Training", "Evaluation", "Environments", "Runs"]
SPLIT = {"Args", "Agent", "Run"}  # classes whose methods are compared one by one

# What is another job than in ppo.py. Everything else of one name must be the same.
DIFFER = {"Agent.__init__", "Agent.act", "Agent.evaluate_actions", "run_iterations"}
DIFFER |= {"train", "evaluate", "make_envs", "load_agent", "check", "Run.log"}
ATARI = {"ppo_loss", "compute_gradient", "Agent.value", "start_envs"}
ATARI |= {"Run.__init__", "Run.open", "Run.save", "set_up_torch"}
DIFFERENT = {ppo_continuous: DIFFER, ppo_atari: DIFFER | ATARI}
MISSING = {ppo_continuous: {"load_reference"}}
MISSING[ppo_atari] = {"load_reference", "RunningStats", "scale_rewards", "mlp"}
MISSING[ppo_atari] |= {"Agent.normalize"}


def text_of(script):
    return Path(script.__file__).read_text()


def definitions(script):
    """{name: source} of the functions and classes of a script, and of the methods of those
    in SPLIT."""
    lines, found = text_of(script).splitlines(), {}

    def visit(nodes, prefix=""):
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = node.decorator_list[0] if node.decorator_list else node
                source = "\n".join(lines[first.lineno - 1 : node.end_lineno])
                found[prefix + node.name] = textwrap.dedent(source)
                if node.name in SPLIT:
                    visit(node.body, f"{node.name}.")

    visit(ast.parse("\n".join(lines)).body)
    return found


def test_sections_are_the_same_in_the_same_order():
    pattern = re.compile(r"^# -{3,} (.*?) -{3,}$", re.M)
    first, second, third = (pattern.findall(text_of(script)) for script in SCRIPTS)
    assert first == second == third and first[:7] == SECTIONS


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_the_same_job_is_the_same_text(other):
    """What may differ does: else it belongs to what must be the same."""
    first, second = definitions(ppo), definitions(other)
    assert first.keys() - second.keys() <= MISSING[other]
    common = [name for name in first if name in second]
    assert common == [name for name in second if name in first], "the order differs"
    for name in set(common) - SPLIT:
        equal = first[name] == second[name]
        assert equal != (name in DIFFERENT[other]), f"{name} of ppo.py and {other.SCRIPT}"


def fields(script):
    """{flag: (the comment above it, its type, the comment beside it)}."""
    pattern = r"((?:^    #.*\n)*)^    (\w+): (.+?) = [^#\n]+(#.*)?$"
    found = re.findall(pattern, definitions(script)["Args"], re.M)
    return {name: (above, kind, beside) for above, name, kind, beside in found}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_comment_and_the_same_in_all_scripts(script):
    flags, others = fields(script), fields(ppo)
    assert list(flags) == [field.name for field in dataclasses.fields(script.Args)]
    assert all(above or beside for above, _, beside in flags.values())
    differ = {name for name in flags.keys() & others.keys() if flags[name] != others[name]}
    allowed = {"env_id", "threads", "num_envs"} if script is ppo_atari else {"env_id"}
    assert differ <= allowed
