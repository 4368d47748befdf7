"""What the README says is so."""

import json
import re
from pathlib import Path

import pytest
import report

import ppo
import ppo_atari
import ppo_continuous

LABELS = {  # label: the definition, or part of train, that cites it
    "td": "compute_gae",
    "gae": "compute_gae",
    "norm": "normalize_advantages",
    "ratio": "policy_loss",
    "clip": "policy_loss",
    "vf": "value_loss",
    "vf-clip": "value_loss",
    "total": "ppo_loss",
    "valid": "advantages",
    "obs-norm": "Agent",
    "rew-norm": "scale_rewards",
    "kl-ref": "train",
}
README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("file", report.TABLES)
def test_tables_and_line_numbers_are_those_of_today(file):
    assert report.render(file) == (README.parent / file).read_text()


@pytest.mark.parametrize("file", report.TABLES)
def test_every_relative_link_leads_somewhere(file):
    path = README.parent / file
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    assert len(links) > 5
    for link in links:
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor and not re.fullmatch(r"L\d+-L\d+", anchor):
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            kept = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert anchor in kept, link


def test_labels_stand_at_the_lines_that_the_readme_links_to():
    """The definition of each label is followed by a link to the lines of code that cite it."""
    text = README.read_text()
    for label, name in LABELS.items():
        place = text.index(f"**({label})**")
        found = re.compile(rf"\[`?{name}`?\]\((ppo\w*\.py)#L(\d+)-L(\d+)\)").search(text, place)
        assert found, label
        script, first, last = found.groups()
        lines = (README.parent / script).read_text().splitlines()[int(first) - 1 : int(last)]
        assert f"({label})" in "\n".join(lines), label


def test_the_readme_stays_short():
    """Code, maths, tables and links may be longer than 120 columns."""
    text = README.read_text()
    assert len(text.splitlines()) <= 450
    assert len(text.split()) <= 6000
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    links = re.compile(r"\[[^]]*\]\(http[^)]*\)|\]\([^)]*\)")
    written = [line for line in links.sub("", prose).splitlines() if line[:1] != "|"]
    by_report = [links.sub("", line) for line in (*report.below(), *report.speed_line())]
    assert [line for line in written if len(line) > 120 and line not in by_report] == []


def test_every_column_of_the_metrics_is_explained(tmp_path):
    run_dir = ppo.train(ppo.Args(total_timesteps=512, runs_dir=str(tmp_path)))
    header = (run_dir / "metrics.csv").read_text().splitlines()[0]
    table = README.read_text().split("| column | meaning |")[1].split("\n\n")[0]
    explained = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row[:70])]
    columns = header.split(",")
    assert len(columns) > 15 and set(columns) <= set(explained)


def test_every_flag_that_the_readme_names_exists():
    flags = set(re.findall(r"--(?:no-)?([a-z][a-z0-9-]+)", README.read_text()))
    known = {"help", "index_url", "nproc_per_node", "check"}  # pip, torchrun, ruff
    known |= {*vars(ppo.Args()), *vars(ppo_continuous.Args()), *vars(ppo_atari.Args())}
    assert len(flags) > 10
    assert {flag.replace("-", "_") for flag in flags} - known == set()


def test_the_results_are_of_todays_defaults():
    # The former scripts made them. Some of their flags are gone; threads 0 and save_every 0 have no
    # meaning any more, but no result used them.
    for module, run, but in (
        (ppo, "ppo/CartPole-v1-1", {}),
        (ppo_continuous, "continuous/HalfCheetah-v5-6", {"compile": True, "seed": 6}),
        (ppo_atari, "atari/Breakout-10M-1", {"env_id": "Breakout", "threads": 2}),
    ):
        args = json.loads((report.RESULTS / f"{run}.args.json").read_text())
        args.pop("exp_name", None)
        args.pop("script", None)
        assert args.pop("norm_adv_over", "minibatch") == "minibatch"
        today = {**vars(module.Args()), "threads": 1, **but}
        args.pop("wandb_project_name", None)
        if args.get("vectorization_mode") == "auto":  # the former name of None
            args["vectorization_mode"] = None
        assert args == {name: today[name] for name in args}  # not the flags that are newer


def test_every_equation_of_the_scripts_is_explained():
    text, here = README.read_text(), Path(__file__).parent
    all_three = "ratio clip vf vf-clip entropy total td gae return norm valid lr k1 k3 clipfrac"
    only = {
        "ppo.py": "categorical obs-norm rew-norm kl-ref",
        "ppo_continuous.py": "gaussian action-map obs-norm rew-norm",
        "ppo_atari.py": "categorical",
    }
    for name, more in only.items():
        script = (here.parent / name).read_text()
        for label in f"{all_three} {more}".split():
            assert f"({label})" in script and f"**({label})**" in text, label


def test_the_command_of_the_tests_is_what_ci_runs():
    line = next(line for line in README.read_text().splitlines() if "pytest tests" in line)
    assert all(f"{command} && " in line for command in ("ruff check", "ruff format --check"))
    pins = (Path(__file__).parent / "requirements.txt").read_text()
    assert re.search(r"^ruff==[\d.]+$", pins, re.M)


def example(part):
    """The one example in Python that holds this text."""
    found = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    (code,) = [code for code in found if part in code]
    return code


def test_the_example_of_using_a_trained_agent_runs(tmp_path):
    run_dir = ppo.train(ppo.Args(total_timesteps=512, runs_dir=str(tmp_path)))
    names = {}
    exec(example("load_agent").replace("runs/DIR", str(run_dir)), names)
    assert names["action"].shape == (4,) and set(names["action"]) <= {0, 1}


def test_the_example_of_an_environment_is_learned(tmp_path, monkeypatch):
    (tmp_path / "corridor.py").write_text(example("class Corridor"))
    monkeypatch.syspath_prepend(tmp_path)
    flags = {"env_id": "corridor:Corridor-v0", "total_timesteps": 20_480}
    run_dir = ppo.train(ppo.Args(runs_dir=str(tmp_path), learning_rate=1e-3, **flags))
    rows = (run_dir / "episodes.csv").read_text().splitlines()
    assert all(row.split(",")[2] == "10" for row in rows[-3:])  # straight to the end


def test_the_example_of_an_environment_can_have_continuous_actions(tmp_path, monkeypatch):
    code = example("class Corridor").replace("action == 1", "action[0] > 0")
    code = code.replace("gym.spaces.Discrete(2)", "gym.spaces.Box(-1, 1, (1,), np.float32)")
    (tmp_path / "corridor_continuous.py").write_text(code.replace("Corridor-v0", "CorridorBox-v0"))
    monkeypatch.syspath_prepend(tmp_path)
    flags = {"env_id": "corridor_continuous:CorridorBox-v0", "total_timesteps": 20_480}
    run_dir = ppo_continuous.train(ppo_continuous.Args(runs_dir=str(tmp_path), **flags))
    rows = (run_dir / "episodes.csv").read_text().splitlines()
    assert all(float(row.split(",")[2]) < 30 for row in rows[-3:])


def test_the_example_of_plotting_draws_every_run(tmp_path, monkeypatch):
    for seed in (1, 2):
        flags = {"total_timesteps": 5120, "seed": seed, "runs_dir": str(tmp_path / "runs")}
        ppo.train(ppo.Args(**flags))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example("genfromtxt"), names)
    assert len(names["plt"].gca().lines) == 2 and (tmp_path / "returns.png").stat().st_size > 5000
    names["plt"].close()
