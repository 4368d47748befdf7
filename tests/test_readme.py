"""What the README says is so."""

import json
import re
from pathlib import Path

import report

import ppo
import ppo_atari
import ppo_continuous

README = Path(__file__).parents[1] / "README.md"


def test_every_table_of_results_follows_from_the_raw_data():
    assert report.render(README.read_text()) == README.read_text()


def test_every_flag_that_the_readme_names_exists():
    flags = set(re.findall(r"--(?:no-)?([a-z][a-z0-9-]+)", README.read_text()))
    known = {"help", "index_url", "nproc_per_node", "check"}  # pip, torchrun, ruff
    known |= {*vars(ppo.Args()), *vars(ppo_continuous.Args()), *vars(ppo_atari.Args())}
    assert len(flags) > 10
    assert {flag.replace("-", "_") for flag in flags} - known == set()


def test_the_results_are_of_todays_defaults():
    # The former scripts made them. Their flags exp_name and norm_adv_over are gone; threads 0 and
    # save_every 0 have no meaning any more, but no result used them.
    for module, run, but in (
        (ppo, "ppo/CartPole-v1-1", {}),
        (ppo_continuous, "continuous/HalfCheetah-v5-1", {"compile": True}),
        (ppo_atari, "atari/Breakout-10M-1", {"env_id": "Breakout", "threads": 2}),
    ):
        args = json.loads((report.RESULTS / f"{run}.args.json").read_text())
        args.pop("exp_name", None)
        assert args.pop("norm_adv_over", "minibatch") == "minibatch"
        today = {"script": module.SCRIPT, **vars(module.Args()), "threads": 1, **but}
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


def test_the_example_of_using_a_trained_agent_runs(tmp_path):
    run_dir = ppo.train(ppo.Args(total_timesteps=512, runs_dir=str(tmp_path)))
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names = {}
    exec(example.replace("runs/DIR", str(run_dir)), names)
    assert names["action"].shape == (4,) and set(names["action"]) <= {0, 1}
