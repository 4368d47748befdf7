"""What the READMEs say is so: links, flags, examples, columns, labels."""

import ast
import re
import shutil
from pathlib import Path

import gymnasium as gym
import pytest
from conftest import ROOT, SCRIPTS, read, train

import ppo
import ppo_atari
import ppo_continuous

README = (ROOT / "README.md").read_text()
FILES = [ROOT / "README.md", ROOT / "benchmark" / "README.md", ROOT / "tests" / "README.md"]

# Each label marks the same equation in a script and in the README.
LABELS = "ratio clip vf vf-clip entropy total td gae return norm valid lr k1 k3 clipfrac "
LABELS = {
    ppo: LABELS + "ev categorical obs-norm rew-norm kl-ref",
    ppo_continuous: LABELS + "ev gaussian action-map obs-norm rew-norm",
    ppo_atari: LABELS + "ev categorical",
}


def anchors(path):
    """Those that GitHub gives to the headings of a file."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", title) for title in titles]
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in plain}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.S | re.M)
    links = re.findall(r'\]\(([^)\s]+)\)|(?:src|href|srcset)="([^"]+)"', text)
    for link in map("".join, links):
        if re.match(r"\w+:", link):  # https:, mailto:
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link
        elif lines := re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor):
            last = max(int(line) for line in lines.groups() if line)
            assert last <= len(target.read_text().splitlines()), link


def test_every_flag_that_the_readme_names_exists():
    """Where it is our script that a line calls, or where the line is prose."""
    others = r"^.*\b(pip|ruff|pytest|torchrun|git|patch|uv|report\.py|run\.py)\b.*$"
    prose = re.sub(others, "", README, flags=re.M)
    flags = set(re.findall(r"--(?:no-)?([a-z][a-z0-9-]+)", prose))
    known = {"help"}.union(*(vars(script.Args()) for script in SCRIPTS))
    assert len(flags) > 10
    assert {flag.replace("-", "_") for flag in flags} - known == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_equation_of_a_script_is_explained(script):
    text = Path(script.__file__).read_text()
    for label in LABELS[script].split():
        assert f"({label})" in text and f"({label})" in README, label


def test_every_column_of_the_metrics_is_explained(script, tmp_path):
    """In a row of a table, at its beginning."""
    columns = read(train(script, tmp_path) / "metrics.csv")[0]
    rows = re.findall(r"^\| ([^|]*) \|", README, re.M)
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(columns) > 15 and set(columns) - explained == set()


def test_the_command_of_the_tests_is_the_one_that_runs_here():
    """.ci/run runs this line."""
    (line,) = re.findall(r"^.*pytest tests.*$", README, re.M)
    commands = line.split(" && ")
    assert commands[0] == "pip install -r tests/requirements.txt"
    assert commands[1:3] == ["ruff check", "ruff format --check"]
    assert commands[3] == 'pytest tests -n 2 -m "not slow"'


def test_tests_and_functions_that_the_table_of_details_names_exist():
    text = (ROOT / "tests" / "README.md").read_text()
    files = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(named) > 20 and [name for name in named if f"def {name}(" not in files] == []
    scripts = "\n".join(Path(script.__file__).read_text() for script in SCRIPTS)
    for cell in re.findall(r"^\| [^|]+ \| `([\w.]+)`", text, re.M):
        name = cell.split(".")[-1]
        assert re.search(rf"(def|class) {name}\b", scripts), cell


# Examples in Python


def without_docstrings(tree):
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.FunctionDef) and isinstance(body[0], ast.Expr):
            body[:1] = []
    return ast.unparse(tree)


def functions(text):
    """{name: code without comments and docstring} of the functions of a module."""
    nodes = ast.parse(text).body
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return {node.name: without_docstrings(node) for node in functions}


EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
OURS = functions(Path(ppo.__file__).read_text())
SHOWN = [code for code in EXAMPLES if functions(code).keys() & OURS.keys()]
RUN = [code for code in EXAMPLES if code not in SHOWN]


def test_functions_that_the_readme_shows_are_those_of_the_scripts():
    for code in SHOWN:
        for name, text in functions(code).items():
            assert text == OURS[name], name


@pytest.fixture
def beside_runs(tmp_path, monkeypatch):
    """A directory with two runs, of which one is called DIR."""
    for _ in range(2):
        run_dir = train(ppo, tmp_path / "runs", env_id="CartPole-v1")
    shutil.move(run_dir, tmp_path / "runs" / "DIR")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return tmp_path


@pytest.mark.parametrize("code", RUN, ids=lambda code: code.split("\n")[0])
def test_the_examples_run(beside_runs, code):
    """As a program beside runs/. An environment that one registers is learned."""
    known = set(gym.registry)
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})
    for env_id in set(gym.registry) - known:
        envs = gym.make_vec(env_id)
        discrete = isinstance(envs.single_action_space, gym.spaces.Discrete)
        script = ppo if discrete else ppo_continuous
        settings = script.Args(env_id, total_timesteps=20_480, learning_rate=1e-3)
        settings.runs_dir = str(beside_runs / "learned")
        episodes = read(script.train(settings) / "episodes.csv")
        returns = [float(row["episodic_return"]) for row in episodes]
        third = len(returns) // 3
        assert sum(returns[-third:]) > sum(returns[:third])


def test_there_are_examples():
    """Of using an agent, writing an environment, plotting."""
    assert len(RUN) >= 3
