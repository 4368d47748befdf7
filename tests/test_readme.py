"""What the READMEs say is so: links, flags, examples, columns, labels."""

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
FILES = "README.md benchmark/README.md benchmark/claims.md tests/README.md".split()
FILES = [ROOT / name for name in FILES]

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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_begins_with_a_comment_and_goes_on(path):
    """GitHub shows the rest of such a line as it stands, without Markdown."""
    assert re.findall(r"^ *<!--.*-->.*[^\s>].*$", path.read_text(), re.M) == []


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


def test_the_table_of_metrics_has_their_columns(script, tmp_path):
    table = README.partition("| column |")[2].partition("\n\n")[0]
    names = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| ([^|]*) \|", table, re.M)))
    if script is not ppo:
        names.remove("kl_reference")
    assert list(read(train(script, tmp_path) / "metrics.csv")[0]) == names


def test_tests_and_functions_that_the_table_of_details_names_exist():
    text = (ROOT / "tests" / "README.md").read_text()
    tests, functions = r"`(test_\w+)`", r"^\| [^|]+ \| `(?:\w+\.)?(\w+)`"
    names = re.findall(tests, text) + re.findall(functions, text, re.M)
    files = [*(ROOT / "tests").glob("test_*.py"), *(script.__file__ for script in SCRIPTS)]
    code = "\n".join(Path(file).read_text() for file in files)
    assert len(names) > 40
    assert [name for name in names if not re.search(rf"(def|class) {name}\b", code)] == []


# Examples in Python; functions of ours that the README shows are filled in by report.py.

EXAMPLES = re.findall(r"(?<!-->)\n```python\n(.*?)^```", README, re.S | re.M)
assert len(EXAMPLES) == 3  # using an agent, writing an environment, plotting


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


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.split("\n")[0])
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
