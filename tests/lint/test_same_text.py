"""The scripts share no module: what does the same job in two must be the same text."""

import ast
import dataclasses
import re
import textwrap
from pathlib import Path

import pytest

import ppo
import ppo_atari
import ppo_continuous

ROOT = Path(__file__).parents[2]
SCRIPTS = [ppo, ppo_continuous, ppo_atari]
SECTIONS = ["Flags", "Equations", "Agent", "Training", "Evaluation", "Environments", "Runs"]
SPLIT = {"Args", "Agent", "Run"}  # classes whose methods are compared one by one

# What is another job than in ppo.py. Everything else of one name must be the same.
DIFFER = {"Agent.__init__", "Agent.act", "Agent.evaluate_actions", "run_iterations"}
DIFFER |= {"evaluate", "make_envs", "load_agent", "check"}
ATARI = {"ppo_loss", "compute_gradient", "Agent.value", "train", "start_envs"}
ATARI |= {"Run.__init__", "Run.open", "Run.log", "Run.save", "set_up_torch"}
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
    titles = [
        re.findall(r"^# -{3,} (.*?) -{3,}$", text_of(script), re.M) for script in SCRIPTS
    ]
    assert titles[0] == titles[1] == titles[2]
    assert titles[0][:7] == SECTIONS and titles[0][-1] == "Command line"


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_the_same_job_is_the_same_text(other):
    first, second = definitions(ppo), definitions(other)
    assert first.keys() - second.keys() <= MISSING[other]
    for name in (first.keys() & second.keys()) - SPLIT - DIFFERENT[other]:
        assert first[name] == second[name], f"{name} of ppo.py and {other.SCRIPT} differ"


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_what_may_differ_does(other):
    """Else it belongs to what must be the same."""
    first, second = definitions(ppo), definitions(other)
    common = DIFFERENT[other] & first.keys() & second.keys()
    assert {name for name in common if first[name] == second[name]} == set()


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_methods_and_functions_stand_in_the_same_order(other):
    first, second = list(definitions(ppo)), list(definitions(other))
    common = set(first) & set(second)
    assert [name for name in first if name in common] == [n for n in second if n in common]


def fields(script):
    """{flag: its type and comment, on its line or above it}, without the default."""
    lines, found, above = definitions(script)["Args"].splitlines(), {}, []
    for line in lines:
        if line.strip().startswith("#"):
            above.append(line.strip())
        elif field := re.match(r" +(\w+): (.+?) = [^#]+(#.*)?$", line):
            name, annotation, beside = field.groups()
            found[name] = (annotation, " ".join([*above, beside or ""]).strip())
            above = []
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_comment(script):
    names = [field.name for field in dataclasses.fields(script.Args)]
    assert list(fields(script)) == names
    assert [name for name, (_, comment) in fields(script).items() if not comment] == []


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_flags_of_one_name_have_one_text(other):
    first, second = fields(ppo), fields(other)
    common = [name for name in first if name in second]
    assert common == [name for name in second if name in first]  # the same order
    differ = {name for name in common if first[name] != second[name]}
    assert differ <= {"env_id"} | ({"threads", "num_envs"} if other is ppo_atari else set())
