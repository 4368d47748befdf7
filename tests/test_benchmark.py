"""benchmark/: what is declared, run, stored; statistics and verdicts; patches; report."""

import csv
import importlib
import shutil
import subprocess
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import claims
import estimates
import findings
import numpy as np
import pandas as pd
import pytest
import report
import results
import run as runner
import studies
import tables
from conftest import load_variation, only_run, read
from studies import CHEETAH, LUNAR, STUDIES, Arm, Block, Run, Study

import ppo

ROOT = Path(__file__).parents[1]
SIZES = "--num-envs 2 --num-steps 16 --num-minibatches 2 --update-epochs 2"
POLE = "CartPole-v1"
PATCHES = sorted((ROOT / "benchmark" / "variations").glob("*.patch"))
TASKS = {"action_masks": "environments:Locks-v0", "images": "environments:Drift-v0"}


def clear():
    for module in (results, tables, claims):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """An empty folder for results."""
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    clear()
    yield tmp_path / "results"
    clear()


def write(study, scores, lower=0.0):
    """Made-up rows: {(task, arm): {seed: last_quarter}}; the score is lower by that."""
    arms = pd.DataFrame(scores).rename_axis("seed").unstack().dropna().rename("score")
    table = arms.rename_axis(["task", "arm", "seed"]).reset_index()
    table = table.assign(study=study, steps=1000, last_quarter=table.score)
    table["score"] -= lower
    table.reindex(columns=results.COLUMNS).to_csv(
        results.RESULTS / f"{study}.csv", index=False
    )
    clear()


# ---------- What is declared ----------
def test_a_study_is_tasks_times_arms_times_seeds(monkeypatch):
    arms = {"base": Arm(), "short": Arm("--gamma 0.9", "spo")}
    tasks = {"A-v0": "ppo.py", "B-v0": "ppo.py --num-envs 2"}
    monkeypatch.setitem(STUDIES, "study", Study([Block(tasks, arms, range(1, 3))]))
    found = studies.runs("study")
    assert len(set(found)) == 8 and [run.seed for run in found] == [1] * 4 + [2] * 4
    flags = "--num-envs 2 --gamma 0.9"
    assert Run("study", "B-v0", "short", 1, "ppo.py", "spo", flags) in found


def test_every_declared_flag_and_patch_exists():
    for script, variation, flags in {run[4:] for x in STUDIES for run in studies.runs(x)}:
        text = (ROOT / script).read_text()
        if variation:
            name = f"benchmark/variations/{variation}.{Path(script).stem}.patch"
            text += (ROOT / name).read_text()
        for flag in [word for word in flags.split() if word.startswith("--")]:
            name = flag.removeprefix("--no-").removeprefix("--").replace("-", "_")
            assert f" {name}: " in text or f'"{flag}"' in text, flag


def test_what_claims_compare_is_known_and_what_has_been_run_is_declared_once():
    first = results.load("claims")
    known = {*zip(first.task, first.arm), *(run[1:3] for run in studies.runs("claims-2"))}
    for row in claims.TABLE.itertuples():
        assert {(x, y) for x in row.tasks.split() for y in (row.arm, row.base)} <= known
    for study in STUDIES:
        rows = results.load(study)
        keys = list(zip(rows.task, rows.arm, rows.seed))
        assert len(set(keys)) == len(keys)
        assert set(keys) <= {run[1:4] for run in studies.runs(study)}


# ---------- What is stored ----------
def append_many(folder, name):
    results.RESULTS = folder
    for i in range(200):
        results.append("study.csv", ["name", "i", "text"], [[name, i, "x" * 500]] * 2)


def test_two_processes_append_at_once(stored):
    context = get_context("spawn")
    jobs = [context.Process(target=append_many, args=(stored, name)) for name in "ab"]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    with open(stored / "study.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", "i", "text"]
    assert len(rows) == 800 and all(len(row[2]) == 500 for row in rows)
    assert [int(i) for name, i, _ in rows if name == "a"][::2] == list(range(200))


def execute(tasks, tmp_path, monkeypatch, *more):
    """Runs a study of one arm and one seed; returns its rows."""
    study = Study([Block(tasks, {"a": Arm()}, [1])], ("entropy",), 10, 20)
    monkeypatch.setitem(STUDIES, "study", study)
    arguments = ["study", "--jobs", "1", "--work", str(tmp_path / "work"), *more]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    clear()
    runner.main()
    clear()
    return results.load("study")


def test_a_finished_run_is_a_row_with_curves(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(runner.shutil, "rmtree", lambda path: None)  # keep its directory
    tasks = {POLE: f"ppo.py {SIZES} --total-timesteps 9600"}
    row = execute(tasks, tmp_path, monkeypatch).iloc[0]
    (path,) = (tmp_path / "work/study").glob("*/runs/*/episodes.csv")
    episodes, metrics = pd.read_csv(path), pd.read_csv(path.with_name("metrics.csv"))
    returns, curves = episodes.episodic_return, results.load_curves("study")
    assert (row.task, row.arm, row.seed, row.steps, row.threads) == (POLE, "a", 1, 9600, 1)
    assert row.score == pytest.approx(returns[-100:].mean())
    assert row.mean_return == pytest.approx(returns.mean())
    assert row.last_quarter == pytest.approx(returns[episodes.global_step > 7200].mean())
    assert row.episodes == len(returns) and row.played == 20
    agent, (args, _) = ppo.load_agent(path.parent), ppo.load_run(path.parent)
    args = replace(args, num_envs=20, eval_episodes=1)
    assert row.sampled == pytest.approx(ppo.evaluate(agent, args).mean())
    greedy = ppo.evaluate(agent, replace(args, greedy=True)).mean()
    assert row.greedy == pytest.approx(greedy) != row.sampled
    assert "gamma=0.99" in row["flags"] and row.commit and row.torch and row.cpu
    assert curves[POLE, "a", 1, "return"][-1] == pytest.approx(row.score, rel=1e-4)
    entropy = metrics.entropy.to_numpy().reshape(100, 3).mean(1)
    assert curves[POLE, "a", 1, "entropy"] == pytest.approx(entropy, rel=1e-3)
    assert len(curves[POLE, "a", 1, "evaluations"]) == 10 and runner.missing("study") == []


def test_an_interrupted_run_is_continued(stored, tmp_path, monkeypatch):
    flags = f"{SIZES} --total-timesteps 3200 --save-every 10"
    folder = tmp_path / f"work/study/{POLE}--a-1/runs"
    command = [sys.executable, ROOT / "benchmark/train.py", ROOT / "ppo.py", "10", "0"]
    command += [*f"--env-id {POLE} --seed 1 {flags}".split(), "--runs-dir", folder]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (folder / "evaluation.json").exists() and process.poll() is None:
        pass
    process.kill()
    process.wait()
    (run_dir,) = folder.glob("*/")
    rows = execute({POLE: f"ppo.py {flags}"}, tmp_path, monkeypatch, "--resume")
    assert rows.steps.tolist() == [3200] and not run_dir.exists()  # it went on there
    assert len(results.load_curves("study")[POLE, "a", 1, "evaluations"]) == 10


def test_a_failed_run_does_not_stop_the_others(stored, tmp_path, monkeypatch, capsys):
    tasks = {"NoSuch-v0": "ppo.py", POLE: f"ppo.py {SIZES} --total-timesteps 640"}
    with pytest.raises(SystemExit, match="failed: NoSuch-v0--a-1"):
        execute(tasks, tmp_path, monkeypatch)
    assert "NoSuch" in capsys.readouterr().out
    assert execute(tasks, tmp_path, monkeypatch, "--dry-run").task.tolist() == [POLE]
    expected = "python benchmark/run.py study --jobs 1 --resume --only 'NoSuch-v0--a-1'\n"
    assert capsys.readouterr().out == expected


def test_a_random_policy_plays_many_steps(stored):
    """Each episode of Ring has 4 steps and pays 1, 2, 3, 1."""
    runner.play_randomly("Ring-v0")
    (row,) = read(stored / "random.csv")
    assert row == {"task": "Ring-v0", "episodes": "5000", "mean": "7.0"}


# ---------- Statistics and verdicts ----------
def test_intervals_against_worked_numbers():
    assert estimates.iqm(np.array([0, 10, 20, 1000])) == 15
    half = 2.4375 * 1.05**0.5  # t at 6.097 degrees of freedom, times the standard error
    found = estimates.welch((10, 2, 5), (8, 1, 4))
    assert found == pytest.approx((2 - half, 2 + half), abs=1e-3)
    scores = {"a": (np.array([12.0, 14, 13]), np.array([10.0, 11, 12]))}
    half = 4.3027 * 0.1 / 3**0.5  # t at 2 degrees of freedom; the base gains 10
    found = estimates.paired_effects(scores, {"a": 1.0})["a"]
    assert found == pytest.approx((0.2, 0.2 - half, 0.2 + half), abs=1e-4)
    base, arm = np.array([90.0, 110.0] * 10), np.array([55.0, 65.0] * 5)
    arms = {"arm": arm, "base": base}
    effects = estimates.drawn_effects({"a": ("arm", "base", "base", arms)}, {"a": 0.0})
    effect, low, high = effects["a"]
    assert effect == pytest.approx(-0.4) == effects["all"][0]
    assert -0.46 < low < -0.42 and -0.38 < high < -0.34  # standard error 0.02


def test_only_what_is_asked_for_is_run(stored, monkeypatch, capsys):
    study = Study([Block({"A-v0": "ppo.py", "B-v0": "ppo.py"}, {"a": Arm()}, [1, 2])])
    monkeypatch.setitem(STUDIES, "study", study)
    argv = ["run.py", "study", "--dry-run", "--seeds", "2", "--only", "A*"]
    monkeypatch.setattr("sys.argv", argv)
    runner.main()
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize("task", [POLE, CHEETAH, "Breakout"])
def test_the_defaults_are_those_that_the_results_were_made_with(task):
    run = tables.final_runs(task).iloc[-1]
    recorded = dict(word.split("=", 1) for word in run["flags"].split())
    del recorded["compile"]  # which is for speed only
    args = vars(importlib.import_module(Path(run.script).stem).Args())
    assert {name: str(args[name]) for name in recorded} == recorded


def test_verdicts_of_the_first_round():
    clear, none, wide = (-0.5, -0.6, -0.4), (0.0, -0.1, 0.1), (-0.2, -0.4, 0.1)
    verdict = claims.first_verdict
    assert verdict({"a": clear, "b": none, "all": clear}) == ("matters", ("a",), None)
    assert verdict({"a": wide, "b": wide, "all": clear}).word == "not settled"
    found = verdict({"a": clear, "b": (0.5, 0.4, 0.6), "all": none})
    assert found.word == "depends on the task"
    assert verdict({"a": none, "all": none}).word == "does not matter"
    assert verdict({"a": wide, "all": wide}) == ("not settled", (), None)


def made_up_claim(stored, effects, last=80):
    """Runs of claim 3 in which its arm changes what is learned by effects, in the first
    round by half of that in the other direction."""
    shutil.copy(ROOT / "benchmark/results/random.csv", stored)
    fresh = range(21, last + 1)
    for study, seeds, share in (("claims", range(1, 21), -0.5), ("claims-2", fresh, 1)):
        scores = {}
        for task, effect in zip((CHEETAH, LUNAR), effects):
            change = share * effect * (110 - claims.random_returns()[task])
            scores[task, "base"] = {seed: 110 + np.sin(seed) for seed in seeds}
            arm = {seed: 110 + np.sin(seed) + change for seed in seeds}
            scores[task, "no-norm-adv"] = arm
        write(study, scores, lower=0 if study == "claims" else 50)


@pytest.mark.parametrize(
    ("means", "halves", "word"),  # of two tasks' effects: mean, half of the 95 % interval
    [
        ((-0.10, 0.0), (0.07, 0.01), "not settled"),  # only once widened for two tasks
        ((-0.12, 0.0), (0.07, 0.01), "matters"),
        ((-0.05, 0.0), (0.035, 0.01), "does not matter"),  # not 0, but less than 2.5 %
        ((0.0, 0.0), (0.16, 0.01), "not settled"),  # one task beyond 15 %
        ((-0.035, -0.035), (0.11, 0.11), "not settled"),  # all tasks beyond 10 %
        ((-0.01, -0.01), (0.11, 0.11), "does not matter"),
    ],
)
def test_the_limits_of_the_second_rounds_rule(means, halves, word):
    noise = np.linspace(-1, 1, 20)
    noise /= 2.0930 * noise.std(ddof=1) / 20**0.5  # t at 19 degrees of freedom
    base = np.full(20, 100.0)
    arms = [base + 100 * (mean + half * noise) for mean, half in zip(means, halves)]
    scores = {"a": (arms[0], base), "b": (arms[1], base)}
    assert claims.second_verdict(scores, {"a": 0.0, "b": 0.0}).word == word


@pytest.mark.parametrize(
    ("effects", "expected"),
    [
        ((-0.3, -0.3), "holds"),
        ((0.3, 0.3), "does not hold"),
        ((0.01, -0.01), "does not hold"),  # it does not matter
        ((-0.3, 0.3), "depends on the task"),
        ((-0.3, 0.0), "holds on HalfCheetah-v5"),
    ],
)
def test_verdicts_of_the_second_round(stored, effects, expected):
    made_up_claim(stored, effects)
    assert findings.verdict("norm-adv") == expected
    comparison = "advantages not normalised"
    first = findings.effect("norm-adv", comparison, CHEETAH)
    second = findings.effect("norm-adv", f"{comparison}, second round", CHEETAH)
    assert first.startswith(findings.percent(-effects[0] / 2))
    assert second.startswith(findings.percent(effects[0]))
    seeds = list(findings.effects("norm-adv").seeds)  # of arm and base, HalfCheetah first
    assert seeds == ["20, 20", "60, 60; 40, 40"]


def test_claim_12_is_turned_round_in_the_second_round(stored):
    shutil.copy(ROOT / "benchmark/results/random.csv", stored)
    scores = {seed: 3000 + 900 * np.sin(seed) for seed in range(1, 141)}
    write("claims", {(CHEETAH, arm): scores for arm in ("no-recompute", "base")})
    assert findings.verdict("recompute").startswith("not settled")
    more = {seed: 1.3 * score for seed, score in scores.items()}
    write("claims-2", {(CHEETAH, "base"): scores, (CHEETAH, "recompute"): more})
    assert findings.verdict("recompute") == "holds on HalfCheetah-v5"


def test_small_effects_show_on_which_side_of_0_they_are():
    found = [findings.percent(x) for x in (-0.124, -0.002, 0.0001)]
    assert found == ["−12\u00a0%", "−0.2\u00a0%", "0\u00a0%"]


def test_the_second_round_decides_when_it_is_complete(stored):
    made_up_claim(stored, (-0.3, -0.3), last=79)
    assert claims.second_scores("norm-adv", "advantages not normalised")[1] == 1
    assert "missing pairs: 1" in findings.effects("norm-adv").to_string()
    assert findings.verdict("norm-adv") == "does not hold"  # as by the first round
    rng = np.random.default_rng(0)
    base = rng.normal(100, 40, 20)
    verdict = claims.second_verdict({"a": (base + rng.normal(0, 40, 20), base)}, {"a": 0.0})
    assert verdict.word == "not settled" and 0.15 < verdict.bound < 0.6


def test_scores_are_compared_by_protocol(stored):
    write("results", {(POLE, "default"): dict.fromkeys(range(21, 31), 450.0)})
    rows = ["task,env_version,steps,protocol,mean,spread,seeds,source,address,note"]
    rows += [f"{POLE},x,1000,training,400,10,5,A,u,", f"{POLE},x,900,greedy,500,,1,B,u,"]
    rows += [f"{POLE},x,5000,training,499,1,5,C,u,"]  # more steps than ours
    (stored / "published.csv").write_text("\n".join(rows))
    found = tables.compared()[["protocol", "ours is"]].to_numpy().tolist()
    assert found == [["training", "ahead"]]
    assert tables.counts("default").ahead.tolist() == [f"1: {POLE}"]


def test_candidates_for_the_defaults_are_compared_seed_by_seed(stored):
    """Swimmer doubles, another task is halved; odd seeds gain 10 %, even ones lose as much.
    The half interval of logarithms: t at 9 degrees of freedom, times log(1.1) / √9."""
    scores, seeds = {}, range(11, 21)
    for task, factor in zip([studies.SWIMMER, "A", "B", "C"], (2, 0.5, 1, 1)):
        for arm in studies.DEFAULTS:
            scores[task, arm] = {seed: 100.0 * seed for seed in seeds}
        arm = {seed: 100 * seed * factor * 1.1 ** (-1) ** seed for seed in seeds}
        scores[task, "no-recompute"] = arm
    write("defaults", scores)
    found = tables.defaults().set_index("ratio").loc["no-recompute / default"].tolist()
    assert found[:2] == [10, "1.000 [0.931, 1.075]"]
    assert found[2].startswith("1.130 ")  # 4.5 / 4 times the mean of 1.1 and 1 / 1.1
    assert found[3] == "0.794 [0.739, 0.853]"  # the cube root of 0.5
    assert sorted(found[4:])[::3] == ["0.500 [0.465, 0.537]", "2.000 [1.861, 2.149]"]


# ---------- Patches and report ----------
@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_a_patch_applies_and_trains(patch, tmp_path, call):
    variation, name, _ = patch.name.split(".")
    subprocess.run(["git", "apply", "--check", patch], cwd=ROOT, check=True)
    script = load_variation(variation, tmp_path, name)
    task = TASKS.get(variation, POLE if name == "ppo" else "Pendulum-v1")
    flags = f"--env-id {task} --total-timesteps 96 {SIZES}"
    assert call(script, *flags.split())[0] == 0
    assert len(read(only_run(tmp_path / "runs") / "metrics.csv")) == 3


def test_texts_and_figures_are_those_of_the_results(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    report.main()  # exits with what is out of date


def test_a_changed_number_and_a_changed_figure_are_detected():
    text = (ROOT / "benchmark" / "README.md").read_text()
    before, after = text.split("<!-- results -->")
    changed = f"{before}<!-- results -->{after.replace('**500**', '**501**', 1)}"
    assert changed != text and report.render(changed) == text
    figures = [report.figures.panels(1, (2, 2)) for _ in range(2)]
    for points, (_, (axis,)) in zip(([1, 2], [1, 3]), figures):
        axis.plot(points)
    assert len({report.fingerprint(figure) for figure, _ in figures}) == 2
