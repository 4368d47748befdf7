"""Probes: the right answers, what is printed, and that each mistake is found."""

import functools
import re

import adapters
import gymnasium as gym
import numpy as np
import pytest
from conftest import load_variation
from probes import PROBES, main, run

VALUES = [name for name, probe in PROBES.items() if probe.reads == "value"]
VALUES.remove("seed")


def play(probe, steps=4000):
    """Steps (state, reward, next state, terminated, ended, first state after the end)."""
    env = gym.make(f"probe_environments:Probe{probe.environment}-v0")
    obs, _ = env.reset(seed=1)
    for step in range(steps):
        next_obs, reward, terminated, truncated, _ = env.step(step % 2)
        ended = terminated or truncated
        first = env.reset()[0] if ended else next_obs
        yield obs.argmax(), reward, next_obs.argmax(), terminated, ended, first.argmax()
        obs = first


@pytest.mark.parametrize("name", VALUES)
def test_the_right_values_solve_bellmans_equation(name):
    """On average: V(s) = r + γ V(s'). And what is learned from a row that only resets,
    V(last) = 0 + γ V(first), is right as well, but in the probe for that mistake."""
    probe, targets, resets = PROBES[name], {}, {}
    value = lambda state: probe.expected.get(state, 0)
    for state, reward, following, terminated, ended, first in play(probe):
        target = reward + probe.gamma * value(following) * (not terminated)
        targets.setdefault(state, []).append(target)
        if ended:
            resets.setdefault(following, []).append(probe.gamma * value(first))
    for state, found in targets.items():
        assert np.mean(found) == pytest.approx(value(state), abs=0.01), state
    for state, found in resets.items():
        right = np.mean(found) == pytest.approx(value(state), abs=0.05)
        assert right == (name != "reset row"), state


def pretend(wrong, env_id, gamma, num_envs, steps, seed, continuous):
    """An adapter that knows the answers to the value probes, with an error in one."""
    environment = re.search(r":Probe(\w+?)(Box)?-", env_id)[1]
    found = [name for name in VALUES if PROBES[name].environment == environment]
    expected = PROBES[found[0]].expected if found else {}
    error = 0.5 * (found == [wrong])
    return lambda obs: np.array([expected.get(obs.argmax(), 0) + error]), None


def test_what_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(adapters, "pretend", functools.partial(pretend, "limit"), False)
    monkeypatch.setattr("sys.argv", ["probes.py", "adapters:pretend", "--seeds", "2"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line.split()[:2] for line in lines if "FAIL" in line]
    assert failed.count(["limit", "discrete"]) == failed.count(["limit", "continuous"]) == 2
    assert {name for name, _ in failed} == {"limit", "seed"}  # this one ignores its seed
    assert sum("→" in line for line in lines) == 4
    assert all("not probed" in line for line in lines if line.startswith(("far", "bounds")))
    expected = f"{'limit':12} {'discrete':11} {'value(2)':25} {2:6}  FAIL  2.50 2.50"
    assert expected in lines


def test_one_seed_that_fails_fails_the_probe(monkeypatch, capsys):
    adapter = lambda *settings: pretend("limit" if settings[4] == 2 else "", *settings)
    monkeypatch.setattr(adapters, "pretend", adapter, raising=False)
    argv = "probes.py adapters:pretend --seeds 2 --only limit --actions discrete"
    monkeypatch.setattr("sys.argv", argv.split())
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line[-15:] for line in lines if "value(2)" in line] == ["FAIL  2.00 2.50"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBES)
def test_each_mistake_is_found(name, tmp_path):
    """A copy of the script with the mistake fails the probe, the script itself passes."""
    variation = "broken_" + name.replace(" ", "_")
    if name == "reset row":
        variation = "reset_rows"  # which a claim needs, too
    script = "ppo_continuous" if name == "bounds" else "ppo"
    patched = load_variation(variation, tmp_path, script)
    broken = functools.partial(adapters.ours, script=patched)
    assert 0 in [row[4] for row in run(name, broken, 1, name == "bounds")]
    assert {row[4] for row in run(name, adapters.ours, 1, name == "bounds")} == {1}
