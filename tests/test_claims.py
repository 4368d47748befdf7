"""The studies of claims: each variant differs from its base as it should; the rule of verdicts."""

import json
import re
import sys
from pathlib import Path

import environments  # noqa: F401, registers the environments
import numpy as np
import pytest
import torch
import tyro

import ppo
import ppo_continuous

sys.path.append(str(Path(__file__).parents[1] / "benchmark"))

import claims  # noqa: E402 (the line above finds it)
import report  # noqa: E402
import run as runner  # noqa: E402

SCRIPTS = {"ppo.py": ppo, "ppo_continuous.py": ppo_continuous}
ARMS = {(run.script, *run.label.split("--")): run for run in claims.STUDIES["claims"]}


def edited(tmp_path, script, edits):
    run = claims.Run("study", "x", 1, script, "", edits=edits)
    names = {"__name__": "edited"}
    sys.modules["edited"] = type(sys)("edited")  # where dataclasses look
    exec(compile(runner.edited_script(run, tmp_path).read_text(), "edited", "exec"), names)
    return names


@pytest.mark.parametrize("run", ARMS.values(), ids=lambda run: run.label)
def test_every_arm_can_start_and_differs_from_its_reference(tmp_path, run):
    compile(runner.edited_script(run, tmp_path).read_text(), run.script, "exec")
    args = tyro.cli(
        SCRIPTS[run.script].Args, args=f"--env-id {run.env_id} {run.flags}".split()
    )
    task, arm = run.label.split("--")
    reference = next(
        name for name in claims.REFERENCES if arm.startswith(name) or name == "base"
    )
    same = tyro.cli(
        SCRIPTS[run.script].Args,
        args=f"--env-id {task} {claims.run_of(task, reference, 1).flags}".split(),
    )
    differs = args != same or bool(run.edits)
    already = {
        (claims.LUNAR, "base"): "clip-vloss",
        (claims.HALF_CHEETAH, "base"): "no-clip-vloss",
    }
    assert differs == (arm not in (reference, already.get((task, reference))))


def test_every_claim_has_five_seeds_of_each_arm_and_twenty_of_its_reference():
    for claim in claims.CLAIMS:
        runs = claims.STUDIES[f"claims-{claim.name}"]
        assert len({run.name for run in runs}) == len(runs)
        for comparison in claim.comparisons:
            for task in comparison.tasks:
                for arm in (comparison.arm, comparison.base, comparison.reference):
                    seeds = [run.seed for run in runs if run.label == f"{task}--{arm}"]
                    count = 10 if claim.name in claims.TEN_SEEDS else 5
                    count = 20 if arm in claims.REFERENCES else count
                    assert sorted(seeds) == list(range(1, count + 1))


def test_reset_rows_are_learned_from_and_counted(tmp_path):
    """One-step episodes: every second row only resets."""
    names = edited(tmp_path, "ppo.py", claims.RESET_ROWS)
    sizes = {"num_envs": 2, "num_steps": 8, "num_minibatches": 1, "update_epochs": 1}
    flags = sizes | {"env_id": "StubShort-v0", "total_timesteps": 16}
    flags |= {"norm_obs": True, "norm_reward": True}
    counts = []
    for module in (vars(ppo), names):
        seen, loss = [], module["ppo_loss"]
        module["ppo_loss"] = lambda agent, batch, args, loss=loss, seen=seen: (
            seen.append(batch["x"]) or loss(agent, batch, args)
        )
        run_dir = module["train"](module["Args"](runs_dir=str(tmp_path / "runs"), **flags))
        module["ppo_loss"] = loss
        state = torch.load(run_dir / "checkpoint.pt")["agent"]
        (x,) = seen
        rows = [state["obs_stats.count"].item(), state["return_stats.count"].item()]
        counts.append([len(x.unique(dim=0)), *np.round(rows).astype(int)])
    assert counts == [[8, 8, 8], [16, 16, 16]]


def test_the_penalty_takes_the_place_of_the_clip(tmp_path):
    names = edited(tmp_path, "ppo_continuous.py", claims.kl_penalty(3))
    agent = type("Agent", (), {})()
    log_ratio = torch.tensor([0.5, -0.5])
    agent.evaluate_actions = lambda x, actions: (log_ratio, torch.zeros(2))
    agent.value = lambda x: torch.zeros(2)
    columns = {"advantages": torch.tensor([1.0, 2.0]), "old_log_probs": torch.zeros(2)}
    batch = columns | dict.fromkeys(
        ["x", "actions", "old_values", "returns"], torch.zeros(2)
    )
    args = names["Args"](norm_adv=False)
    _, logged = names["ppo_loss"](agent, batch, args)
    ratio = np.exp([0.5, -0.5])
    expected = (3 * (ratio - 1 - [0.5, -0.5]) - ratio * [1, 2]).mean()
    assert logged["policy_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_each_epoch_has_columns_of_its_own(tmp_path):
    names = edited(tmp_path, "ppo_continuous.py", claims.EPOCHS)
    sizes = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "total_timesteps": 16}
    flags = sizes | {"update_epochs": 100, "target_kl": None, "env_id": "Pendulum-v1"}
    run_dir = names["train"](names["Args"](runs_dir=str(tmp_path / "runs"), **flags))
    row = np.genfromtxt(run_dir / "metrics.csv", delimiter=",", names=True)
    assert row["approx_kl_in_epoch_100"] > row["approx_kl_in_epoch_1"] > 0
    assert 0 <= row["clipfrac_in_epoch_1"] <= row["clipfrac_in_epoch_100"]


def test_the_policy_head_begins_large(tmp_path):
    names = edited(tmp_path, "ppo_continuous.py", claims.HEAD_GAIN["ppo_continuous.py"])
    envs = names["make_envs"](names["Args"](env_id="Pendulum-v1"))
    agent = names["Agent"](
        envs.single_observation_space, envs.single_action_space, True, 0, True
    )
    assert agent.actor[-1].weight.norm().item() == pytest.approx(1)


def test_effects_and_verdicts():
    rng = np.random.default_rng(0)
    base, better, worse = np.full(20, 110.0), np.full(5, 160.0), np.full(5, 60.0)
    returns = {"a": 10.0, "b": 10.0}
    effects = claims.bootstrap({"a": (better, base, base)}, returns, rng)
    assert effects == {"a": (0.5, 0.5, 0.5), "pooled": (0.5, 0.5, 0.5)}
    assert claims.verdict(effects) == "matters"
    both = {"a": (better, base, base), "b": (worse, base, base)}
    effects = claims.bootstrap(both, returns, rng)
    assert effects["pooled"][0] == 0 and claims.verdict(effects) == "depends on the task"
    other = {"a": (better, worse, base)}  # the scale is that of the reference
    assert claims.bootstrap(other, returns, rng)["a"][0] == 1
    noisy = np.array([0.0, 220.0] * 10)
    effects = claims.bootstrap({"a": (noisy[:5] + 1, noisy, noisy)}, returns, rng)
    assert claims.verdict(effects).startswith("not settled (± ")
    small = claims.bootstrap({"a": (base[:5] + 2, base, base)}, returns, rng)
    assert claims.verdict(small) == "does not matter"  # 2 %, whatever the interval


def test_the_same_seeds_are_compared_one_by_one():
    """Good seeds and bad ones: with each the change costs a tenth of what is learned."""
    rng = np.random.default_rng(0)
    base = np.array([110.0] * 5 + [60.0] * 15)
    scores = {"a": (base[:5] - 10, base, base)}
    effect, low, high = claims.same_seeds(scores, {"a": 10.0}, rng)["a"]
    assert effect == pytest.approx(-0.1) and low == pytest.approx(-0.1) == high
    assert claims.bootstrap(scores, {"a": 10.0}, rng)["a"][0] == pytest.approx(27.5 / 62.5)
    lost = np.where(
        np.arange(20) % 2, 10.0, 15.0
    )  # nearly all is lost: the scale is drawn too
    base = np.where(np.arange(20) % 2, 110.0, 60.0)
    effect, low, high = claims.same_seeds({"a": (lost, base, base)}, {"a": 10.0}, rng)["a"]
    assert effect == pytest.approx(-72.5 / 75) and -1 <= low < effect < high <= -0.9


def test_a_verdict_names_the_tasks_that_it_rests_on():
    clear, open_, pooled = (-0.5, -0.6, -0.4), (0.0, -0.1, 0.1), (-0.25, -0.3, -0.2)
    assert (
        report.rests_on({"a": clear, "b": open_, "pooled": pooled}) == ", shown on a only"
    )
    assert report.rests_on({"a": clear, "b": clear, "pooled": clear}) == ""
    assert (
        report.rests_on({"a": clear, "b": open_, "pooled": open_}) == ""
    )  # does not matter


def test_the_table_of_a_claim(tmp_path, monkeypatch):
    """Made-up scores: without normalised advantages half of what was learned is lost."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    returns = dict.fromkeys(claims.TASKS, 10.0)
    (tmp_path / "claims-random.json").write_text(json.dumps(returns))
    (tmp_path / "claims").mkdir()
    claim = next(claim for claim in claims.CLAIMS if claim.name == "norm-adv")
    assert report.claim_effects(claim) == {}

    def write(task, arm, score, seeds):
        for seed in range(1, seeds + 1):
            summary = json.dumps({"score": score, "mean_return": 0.0})
            (tmp_path / "claims" / f"{task}--{arm}-{seed}.json").write_text(summary)

    for task in claims.TWO:
        write(task, "base", 110.0, 20)
        write(task, "no-norm-adv", 60.0, 9)
    assert report.claim_effects(claim) == {}  # too few seeds
    write(claims.LUNAR, "no-norm-adv", 60.0, 10)
    effects, missing = report.claim_effects(claim)["advantages not normalised"]
    assert effects == {claims.LUNAR: (-0.5, -0.5, -0.5), "pooled": (-0.5, -0.5, -0.5)}
    assert missing == 1
    row = next(line for line in report.claims() if line.startswith("| advantages not"))
    assert "**−50 % [−50 %, −50 %]** | unfinished, missing runs: 1 |" in row
    for task in claims.MUJOCO:
        write(task, "no-norm-adv", 60.0, 10)
    row = next(line for line in report.claims() if line.startswith("| advantages not"))
    assert row.endswith("**−50 % [−50 %, −50 %]** | matters |")
    write(claims.HALF_CHEETAH, "base", 60.0, 10)  # these seeds are bad ones for both
    row = next(line for line in report.claims() if line.startswith("| advantages not"))
    assert (
        "HalfCheetah-v5: 0 % [0 %, 0 %]; LunarLander-v3: −50 % [−50 %"
        in row.split(" | ")[2]
    )
    text = "\n".join(report.claims())
    assert "reaches 60 with seeds 1 to 5, 93 with seeds 6 to 20." in text


ODD = {  # arm: score, where it is not 110; the random policy has 10
    "plain-no-clip": 100.0,
    "plain-no-details": 60.0,
    "clip-vloss": 112.0,
    "no-norm-adv": 60.0,
    "plain-epochs-1": 30.0,
    "ent-0.01": 150.0,
    "lambda-0": 40.0,
    "lambda-1": 40.0,
    "no-norm-obs": 20.0,  # but not no-norm-reward: claim 13 does not hold
    "plain-kl-penalty-1": 112.0,
    "plain-kl-penalty-3": 50.0,
    "ladder-0": 60.0,
}
HOLD = {"clip", "value-clip", "norm-adv", "epochs", "hundred-epochs", "entropy", "lambda"}
HOLD |= {"kl-penalty", "clip-kl"}


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    returns = dict.fromkeys(claims.TASKS, 10.0)
    (tmp_path / "claims-random.json").write_text(json.dumps(returns))
    (tmp_path / "claims").mkdir()
    for run in claims.STUDIES["claims"]:
        arm = run.label.split("--")[1]
        score = ODD.get(arm, 110.0)
        clip = (
            float(arm.removeprefix("plain-clip-")) if arm.startswith("plain-clip-") else 0.2
        )
        metrics = {"approx_kl": [0.6 * clip**2] * 50, "entropy": [1.0] * 50}
        for epoch in (1, 2, 5, 10, 20, 50, 100):
            for name in ("approx_kl", "clipfrac", "max_ratio_dev"):
                metrics[f"{name}_in_epoch_{epoch}"] = [min(epoch, 20) / 100] * 50
        summary = {"score": score, "mean_return": score, "metrics": metrics}
        (tmp_path / "claims" / f"{run.name}.json").write_text(json.dumps(summary))
    return tmp_path


def test_every_claim_is_decided_and_drawn(made_up):
    decided = {claim.name: report.decision(claim) for claim in claims.CLAIMS}
    figures, word = decided.pop("ladder")
    assert "mean return 60 → 110" in figures
    assert word == "largest measured step: time limits bootstrapped, +50 [+50, +50]"
    assert {name for name, (_, word) in decided.items() if word == "holds"} == HOLD
    assert {word for _, word in decided.values()} == {"holds", "does not hold"}
    assert decided["norm-adv"][0] == "advantages not normalised: −50 % [−50 %, −50 %]"
    assert decided["kl-penalty"][0] == "best KL penalty: +2 % [+2 %, +2 %]"
    assert decided["clip-kl"][0] == "mean KL: 1.20 to 1.20 times ½ε²"
    assert decided["normalisation"][0].startswith("observations not normalised: −90 %")
    report.claims_figure()
    report.claim_figures()
    drawn = {path.stem.removeprefix("claim-") for path in made_up.glob("claim-*.svg")}
    assert drawn == {
        "clip-kl",
        "epochs",
        "entropy",
        "hundred-epochs",
        "kl-penalty",
        "ladder",
    } | {
        "lambda",
        "overfit",
    }
    assert len(report.does_it_matter()) == 2 + 16


def test_the_interval_of_a_step_holds_the_seeds_of_both_its_rows(made_up):
    """Five seeds, 10 apart: standard error of their mean √(200 / 5) = 6.3, times 1.96: 12."""
    for seed, score in enumerate((90, 100, 110, 120, 130), 1):
        path = made_up / "claims" / f"{claims.HALF_CHEETAH}--ladder-1-{seed}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"score": score}))
    before, after, *others = report.ladder()[1].values()
    assert before == pytest.approx((50, 38, 62), abs=1)
    assert after == pytest.approx((0, -12, 12), abs=1)
    assert set(others) == {(0, 0, 0)}


def test_a_claim_is_decided_on_the_tasks_that_have_all_runs(made_up):
    claim = next(claim for claim in claims.CLAIMS if claim.name == "norm-adv")
    (made_up / "claims" / f"{claims.HALF_CHEETAH}--base-20.json").unlink()
    figures = "advantages not normalised: −50 % [−50 %, −50 %] (only LunarLander-v3)"
    assert report.decision(claim) == (figures, "holds")
    (made_up / "claims" / f"{claims.LUNAR}--no-norm-adv-5.json").unlink()
    assert report.decision(claim) is None


def test_a_comparison_with_fewer_tasks_than_its_claim_is_complete(made_up):
    claim = next(claim for claim in claims.CLAIMS if claim.name == "start")
    assert "only" not in report.decision(claim)[0]  # log σ = 0 needs HalfCheetah alone


def test_the_best_penalty_of_a_task_waits_for_all_its_penalties(made_up):
    """β = 0.3 is not the best one here, but could be as long as a run is missing."""
    claim = next(claim for claim in claims.CLAIMS if claim.name == "kl-penalty")
    (made_up / "claims" / f"{claims.HALF_CHEETAH}--plain-kl-penalty-0.3-5.json").unlink()
    effects, missing = report.claim_effects(claim)["best KL penalty"]
    assert set(effects) == {claims.LUNAR, "pooled"} and missing == 1
    assert (
        report.decision(claim)[0]
        == "best KL penalty: +2 % [+2 %, +2 %] (only LunarLander-v3)"
    )


def test_a_claim_about_mujoco_is_not_decided_without_it(made_up):
    claim = next(claim for claim in claims.CLAIMS if claim.name == "normalisation")
    (made_up / "claims" / f"{claims.HALF_CHEETAH}--no-norm-obs-5.json").unlink()
    assert report.decision(claim) is None


def test_a_claim_with_a_further_condition(made_up):
    """λ = 0.9 is better than 0.95 here; and one epoch loses less than half."""
    arms = [(task, "lambda-0.9", 150) for task in claims.TWO]
    arms += [(task, "plain-epochs-1", 70) for task in claims.TWO]
    for task, arm, score in arms:
        summary = json.dumps({"score": score, "mean_return": score})
        for seed in range(1, 6):
            (made_up / "claims" / f"{task}--{arm}-{seed}.json").write_text(summary)
    of_name = {claim.name: claim for claim in claims.CLAIMS}
    for name in ("lambda", "epochs"):
        assert report.decision(of_name[name])[1] == "does not hold"


def test_effects_with_opposite_signs_are_shown_and_not_their_mean(made_up):
    claim = next(claim for claim in claims.CLAIMS if claim.name == "norm-adv")
    for seed in range(1, 11):  # elsewhere it loses half
        summary = json.dumps({"score": 150, "mean_return": 150})
        path = made_up / "claims" / f"{claims.HALF_CHEETAH}--no-norm-adv-{seed}.json"
        path.write_text(summary)
    figures, word = report.decision(claim)
    assert figures == (
        "advantages not normalised: HalfCheetah-v5: +40 % [+40 %, +40 %]; "
        "LunarLander-v3: −50 % [−50 %, −50 %]"
    )
    assert word == "depends on the task"


def test_every_verdict_is_put_in_words_that_agree_with_it():
    for claim in claims.CLAIMS:
        if decided := report.decision(claim):
            assert report.in_words(claim, decided[1]), claim.name


def test_every_claim_names_what_others_found():
    text = (Path(__file__).parents[1] / "benchmark" / "README.md").read_text()
    assert claims.SOURCES.keys() == {claim.name for claim in claims.CLAIMS}
    for source in claims.SOURCES.values():
        for name in re.findall(r"\[(.+?)\]", source):
            assert f"\n[{name}]: https://" in text


def test_a_claim_about_mujoco_says_what_is_shown_there():
    claim = next(claim for claim in claims.CLAIMS if claim.name == "normalisation")
    _, word = report.decision(claim)
    assert word == "holds; on MuJoCo shown only for: observations not normalised"
