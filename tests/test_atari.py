"""What ppo_atari.py does differently from ppo.py: the games, the convolutions, several processes."""

import csv
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import environments  # noqa: F401, registers the environments
import gymnasium as gym
import numpy as np
import pytest
import torch

import ppo_atari as ppo

ROOT = Path(__file__).parents[1]
SMALL = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2, "threads": 1}
FLAGS = ["--num-envs=2", "--num-steps=16", "--num-minibatches=2", "--update-epochs=2", "--threads=1"]
GAMES = sorted(name for name in gym.registry if name.startswith("ALE/"))


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def outcome(run_dir):
    metrics = [{k: v for k, v in row.items() if k not in ("sps", "seconds")} for row in read(run_dir / "metrics.csv")]
    return metrics, read(run_dir / "episodes.csv")


def train(tmp_path, **flags):
    return ppo.train(ppo.Args(runs_dir=str(tmp_path), **{**SMALL, **flags}))


def play(env_id, steps, act, seed=1, num_envs=2, **flags):
    """Rows (reward, terminated, truncated, valid, new_game, lives), each (steps, N), of what `act(t)` does."""
    envs, _ = ppo.new_worlds(ppo.Args(env_id=env_id, num_envs=num_envs, seed=seed, **flags), 1)
    rows = []
    for t in range(steps):
        _, *row, info = envs.step(np.broadcast_to(act(t), num_envs))
        rows.append([*row, info["valid"], info["new_game"], info["lives"]])
    envs.close()
    return SimpleNamespace(
        **dict(zip(("reward", "terminated", "truncated", "valid", "new_game", "lives"), map(np.array, zip(*rows))))
    )


def after(done):
    """Whether the row before was one of `done` (steps, N)."""
    return np.concatenate([np.zeros_like(done[:1]), done[:-1]])


def main(monkeypatch, capsys, *argv):
    """The exit status of ppo_atari.py in this process, and the lines on its stderr."""
    monkeypatch.setattr(sys, "argv", ["ppo_atari.py", *argv])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as stop:
        ppo.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return stop.value.code, capsys.readouterr().err.splitlines()


def test_every_game_of_ale_has_a_network_of_its_size(monkeypatch):
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda *args: None)  # it takes its time
    assert len(GAMES) > 100
    sizes = {}
    for name in GAMES:
        envs = ppo.make_envs(ppo.Args(env_id=name, num_envs=1))
        assert envs.single_observation_space.shape == (4, 84, 84)
        sizes.setdefault(int(envs.single_action_space.n), envs)
    assert len(sizes) > 5
    for actions, envs in sizes.items():
        agent = ppo.Agent(envs.single_observation_space, envs.single_action_space, ppo.Args(env_id=name))
        x = agent.features(torch.zeros((2, 3, 4, 84, 84), dtype=torch.uint8))
        assert x.shape == (2, 3, 512) and x.dtype == torch.float32
        assert agent.actor(x).shape == agent.noise(2, 3).shape == (2, 3, actions)
        assert agent.value(x).shape == agent.act(x, 0).shape == (2, 3)


@pytest.mark.parametrize("name", ["Pong", "ALE/Pong-v5", "PongNoFrameskip-v4", "Pong-v4", "PongDeterministic-v0"])
def test_all_names_of_a_game_are_that_game(name):
    rewards = play(name, 300, lambda t: t % 6).reward
    assert rewards.any() and (rewards == play("ALE/Pong-v5", 300, lambda t: t % 6).reward).all()


def test_breakout_plays_on_after_a_lost_life_and_fire_is_not_the_policys():
    """Doing nothing: without FIRE after a lost life the ball would never come again, and no game would end."""
    rows = play("Breakout", 400, lambda t: 0)
    assert not rows.truncated.any() and rows.new_game.sum() >= 2
    for n in range(2):
        terminated, new_game = np.flatnonzero(rows.terminated[:, n]), np.flatnonzero(rows.new_game[:, n])
        np.testing.assert_array_equal(rows.lives[terminated[:5], n], [4, 3, 2, 1, 0])  # five lives, one game
        assert new_game[0] == terminated[4] + 1 and rows.lives[new_game[0], n] == 5
    np.testing.assert_array_equal(rows.valid, ~after(rows.terminated))


def test_a_life_lost_in_a_game_without_fire_costs_no_row():
    rows = play("MsPacman", 800, lambda t: t // 40 % 9)
    lost = rows.terminated & (rows.lives > 0)
    assert lost.sum() >= 4 and rows.new_game.sum() >= 1
    assert (after(lost) & rows.valid == after(lost)).all()
    np.testing.assert_array_equal(rows.valid, ~rows.new_game)
    np.testing.assert_array_equal(rows.new_game, after(rows.terminated & (rows.lives == 0)))


def test_pong_has_no_lives_and_ends_all_the_same():
    rows = play("Pong", 1000, lambda t: 0)
    for n in range(2):
        (end,) = np.flatnonzero(rows.terminated[:, n])[:1]
        assert rows.reward[: end + 1, n].sum() == -21 and rows.lives[end, n] == 0
        assert rows.new_game[end + 1, n] and not rows.valid[end + 1, n] and rows.new_game[: end + 1, n].sum() == 0


def test_a_game_that_ends_with_a_life_left():
    """In Adventure a dragon's meal ends the game."""
    generator = np.random.default_rng(0)
    rows = play("Adventure", 2210, lambda t: generator.integers(0, 18, 8), num_envs=8)
    ((step, n),) = np.argwhere(rows.terminated)
    assert rows.lives[step, n] == 1 and not rows.truncated.any()
    assert rows.new_game[step + 1, n] and rows.new_game.sum() == 1 and (~rows.valid).sum() == 1


@pytest.mark.parametrize("env_id", ["Pong", "Freeway"])  # with FIRE, without
def test_a_frame_limit_truncates(env_id):
    rows = play(env_id, 250, lambda t: 0, max_episode_frames=400)
    assert rows.truncated.sum() >= 4 and not rows.terminated.any()
    np.testing.assert_array_equal(rows.new_game, after(rows.truncated))
    np.testing.assert_array_equal(rows.valid, ~rows.new_game)


def test_the_score_of_a_game_is_the_emulators():
    """The same buttons, FIRE included, pressed without any of our rules."""
    args = ppo.Args(env_id="Breakout", num_envs=2)
    envs, _ = ppo.new_worlds(args, 1)
    pressed, raw_step = [], envs.env.step
    envs.env.step = lambda actions: pressed.append(actions.copy()) or raw_step(actions)
    generator, running, scores = np.random.default_rng(0), np.zeros(2), []
    for _ in range(1500):
        _, reward, _, _, info = envs.step(generator.integers(0, 4, 2))
        scores += [(n, running[n]) for n in np.flatnonzero(info["new_game"])]
        running = np.where(info["new_game"], 0, running) + reward
    seed = int(np.random.SeedSequence((1, 1)).generate_state(1)[0]) % (2**31 - 3)
    plain = gym.make_vec("ALE/Breakout-v5", 2, repeat_action_probability=0.0, reward_clipping=False)
    plain.reset(seed=seed)
    running, expected = np.zeros(2), []
    for actions in pressed:
        _, reward, terminated, _, _ = plain.step(actions)
        running += reward
        expected += [(n, running[n]) for n in np.flatnonzero(terminated)]
        running[terminated] = 0
    assert len(scores) > 6 and max(scores, key=lambda pair: pair[1])[1] > 1
    assert scores == expected[: len(scores)]


def test_training_logs_whole_games_and_learns_from_signs(tmp_path, monkeypatch):
    rewards, original = [], ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda *args: rewards.append(args[0].clone()) or original(*args))
    flags = {"env_id": "MsPacman", "num_steps": 128, "total_timesteps": 2048, "save_every": 0}
    episodes = read(train(tmp_path, **flags) / "episodes.csv")
    assert len(episodes) >= 1 and all(float(row["episodic_return"]) > 50 for row in episodes)
    assert all(int(row["episodic_length"]) > 200 for row in episodes)  # three lives
    assert set(torch.cat(rewards).unique().tolist()) <= {-1, 0, 1}
    rewards.clear()
    train(tmp_path, **flags | {"clip_rewards": False})
    assert torch.cat(rewards).max() >= 10


def test_invalid_rows_have_weight_zero_and_ends_are_where_they_were(tmp_path, monkeypatch):
    calls, original = [], ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda *args: calls.append(args) or original(*args))
    weights, loss = [], ppo.ppo_loss
    monkeypatch.setattr(ppo, "ppo_loss", lambda *args: weights.append(args[-1]) or loss(*args))
    monkeypatch.setattr(torch, "randperm", lambda n, device=None: torch.arange(n))
    monkeypatch.setattr(ppo.Agent, "act", lambda self, x, noise: torch.zeros(len(x), dtype=torch.int64))
    flags = {"env_id": "Breakout", "max_episode_frames": 400, "num_steps": 256}
    run_dir = train(tmp_path, **flags, total_timesteps=512, update_epochs=1)
    ((_, _, terminated, done, *_),) = calls
    expected = play("Breakout", 256, lambda t: 0, max_episode_frames=400)
    assert expected.terminated.any() and expected.truncated.any()
    np.testing.assert_array_equal(terminated.numpy(), expected.terminated)
    np.testing.assert_array_equal(done.numpy(), expected.terminated | expected.truncated)
    np.testing.assert_array_equal(torch.cat(weights).view(256, 2).numpy(), expected.valid)
    games, began = [], [0, 0]
    for t, n in np.argwhere(expected.new_game):
        games.append((2.0 * (t + 1), expected.reward[began[n] : t, n].sum(), t - began[n]))
        began[n] = t + 1  # a row that only resets belongs to no game
    assert len(games) >= 4
    assert sorted(games) == [tuple(map(float, row.values())) for row in read(run_dir / "episodes.csv")]


def test_actions_stick_only_when_asked_to():
    def scores(**flags):
        generator = np.random.default_rng(0)
        return play("Breakout", 300, lambda t: generator.integers(0, 4, 2), **flags).reward.cumsum(0).tolist()

    options = {"reward_clipping": False, "life_loss_info": True}
    for sticky, flags in ((0.0, {}), (0.25, {"sticky_actions": 0.25})):
        envs = ppo.AtariGames(gym.make_vec("ALE/Breakout-v5", 2, repeat_action_probability=sticky, **options))
        envs.reset(seed=int(np.random.SeedSequence((1, 1)).generate_state(1)[0]) % (2**31 - 3))
        generator = np.random.default_rng(0)
        rewards = np.array([envs.step(generator.integers(0, 4, 2))[1] for _ in range(300)])
        assert rewards.cumsum(0).tolist() == scores(**flags)
    assert scores() != scores(sticky_actions=0.25)


def rollout(steps=64):
    """An agent and a minibatch of real frames."""
    args = ppo.Args(num_envs=4, bf16="off")
    envs, _ = ppo.new_worlds(args, 1)
    generator = np.random.default_rng(0)
    frames = torch.from_numpy(np.concatenate([envs.step(generator.integers(0, 4, 4))[0] for _ in range(steps)]))
    agent = ppo.Agent(envs.single_observation_space, envs.single_action_space, args)
    action = torch.randint(0, 4, (len(frames),))
    with torch.no_grad():
        old = agent.evaluate_actions(agent.features(frames), action)[0]
    advantages, returns = torch.randn(2, len(frames))
    return agent, args, [frames, action, old, torch.zeros_like(old), returns, advantages, torch.ones_like(old)]


def test_bf16_is_close_to_fp32():
    agent, args, minibatch = rollout()
    parameters = ppo.flat_parameters(agent)
    results = []
    for agent.bf16 in (False, True):
        parameters.grad.zero_()
        loss, *_, log_ratio = ppo.ppo_loss(agent, args, *minibatch)
        loss.backward()
        results.append((loss.item(), log_ratio, parameters.grad.clone()))
    (full, _, gradient), (half, log_ratio, half_gradient) = results
    assert 0 < abs(half - full) < 0.01 * abs(full)
    assert torch.cosine_similarity(gradient, half_gradient, dim=0) > 0.99
    assert log_ratio.abs().max() < 0.01


def test_the_gradient_is_right():
    """Against differences of the loss along random directions, in double precision."""
    agent, args, minibatch = rollout(2)
    agent.double()
    agent.features = lambda obs: agent.network(obs.double() / 255)
    minibatch = [minibatch[0], minibatch[1], *(tensor.double() for tensor in minibatch[2:])]
    parameters = ppo.flat_parameters(agent)
    parameters.data += 1e-3 * torch.randn_like(parameters)  # black pixels and zero biases meet at the kink of ReLU
    ppo.ppo_loss(agent, args, *minibatch)[0].backward()
    for seed in range(3):
        direction = torch.randn(len(parameters), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        losses = []
        for step in (1e-8, -1e-8):
            parameters.data += step * direction
            losses.append(ppo.ppo_loss(agent, args, *minibatch)[0].item())
            parameters.data -= step * direction
        slope = (losses[0] - losses[1]) / 2e-8
        assert slope == pytest.approx((parameters.grad @ direction).item(), rel=1e-4)


@pytest.mark.parametrize(("bf16", "tolerance"), [("off", 1e-5), ("on", 0.02)])
def test_first_minibatch_of_every_update_has_ratio_one(tmp_path, monkeypatch, bf16, tolerance):
    ratios, original = [], ppo.ppo_loss

    def keep(*args):
        result = original(*args)
        ratios.append(result[-1].expm1().abs().max().item())
        return result

    monkeypatch.setattr(ppo, "ppo_loss", keep)
    train(tmp_path, total_timesteps=96, bf16=bf16)
    firsts = ratios[::4]
    assert len(firsts) == 3 and max(firsts) < tolerance < max(ratios)


class Sides(gym.vector.VectorEnv):
    """Pixels to learn from within seconds: the lit side of the newest frame is the action that pays 1, for 10 steps."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    single_observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    single_action_space = gym.spaces.Discrete(2)
    spec = SimpleNamespace(max_episode_steps=10)

    def __init__(self, num_envs):
        self.num_envs = num_envs

    def observe(self):
        self.side = self.generator.integers(0, 2, self.num_envs)
        frames = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        for frame, side in zip(frames[:, 3], self.side):
            frame[:, 42 * side : 42 * (side + 1)] = 255
        return frames

    def reset(self, *, seed=None, options=None):
        self.generator, self.steps = np.random.default_rng(seed), np.full(self.num_envs, 0)
        return self.observe(), {}

    def step(self, actions):
        new_game = self.steps == 10
        reward = np.where(new_game, 0, actions == self.side).astype(np.int32)
        self.steps = np.where(new_game, 0, self.steps + 1)
        terminated = self.steps == 10
        return self.observe(), reward, terminated, np.zeros_like(terminated), {"new_game": new_game, "valid": ~new_game}


def test_it_learns_from_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "make_envs", lambda args, video_dir=None: Sides(args.num_envs))
    flags = {"num_envs": 4, "num_steps": 32, "num_minibatches": 2, "update_epochs": 4}
    run_dir = train(tmp_path, total_timesteps=4096, learning_rate=1e-3, **flags)
    scores = [float(row["episodic_return"]) for row in read(run_dir / "episodes.csv")]
    assert np.mean(scores[:20]) < 7 and np.mean(scores[-20:]) > 9.5
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    assert ppo.evaluate(ppo.Args(num_envs=4, eval_episodes=2, greedy=True), state).min() == 10


def test_one_seed_decides_everything(tmp_path):
    flags = {"total_timesteps": 256, "num_envs": 4}
    first = outcome(train(tmp_path, **flags))
    assert first == outcome(train(tmp_path, **flags))
    assert first[0] != outcome(train(tmp_path, seed=2, **flags))[0]


@pytest.mark.parametrize(
    "change",
    [{"clip_rewards": False, "env_id": "MsPacman"}, {"episodic_life": False}, {"sticky_actions": 0.25},
     {"bf16": "on"}, {"norm_adv": False}, {"clip_vloss": False}, {"norm_adv_over": "batch"}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_switch_changes_the_run(tmp_path, change):
    assert plain_run(change.get("env_id", "Breakout")) != outcome(train(tmp_path, **PLAIN | change))[0]


PLAIN = {"env_id": "Breakout", "bf16": "off", "total_timesteps": 256, "num_steps": 64}


@functools.cache
def plain_run(env_id):
    with tempfile.TemporaryDirectory() as folder:
        return outcome(train(folder, **PLAIN | {"env_id": env_id}))[0]


def program(*flags, script=("ppo_atari.py",), **options):
    command = [sys.executable, *script, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_a_killed_run_resumes_exactly(tmp_path):
    flags = [*FLAGS, "--env-id=Pong", "--num-steps=64", "--save-every=2", "--max-episode-frames=400"]
    flags += ["--total-timesteps=768"]
    killed = subprocess.Popen(
        [sys.executable, "ppo_atari.py", *flags, f"--runs-dir={tmp_path / 'killed'}"], cwd=ROOT, stdout=subprocess.PIPE
    )
    while not (found := list((tmp_path / "killed").glob("*/checkpoint.pt"))):
        time.sleep(0.01)
    first = found[0].stat().st_ino
    while found[0].stat().st_ino == first and killed.poll() is None:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert 2 <= torch.load(found[0], weights_only=True)["iteration"] < 6
    assert program(*flags, f"--runs-dir={tmp_path / 'whole'}").returncode == 0
    assert program("--resume", str(found[0].parent)).returncode == 0
    metrics, games = outcome(found[0].parent)
    assert (metrics, games) == outcome(next((tmp_path / "whole").iterdir()))
    assert len(metrics) == len(games) == 6  # in every environment one game of 100 steps between two checkpoints


class FakeWriter:
    films = {}

    def __init__(self, path, size, fps):
        assert size == (160, 210) and fps == 15
        self.film = self.films.setdefault(path, [])

    def write_frame(self, picture):
        self.film.append(picture.copy())

    def close(self):
        pass


def test_a_film_is_in_colour_shows_what_the_agent_sees_and_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "FFMPEG_VideoWriter", FakeWriter)
    args = ppo.Args(env_id="Pong", num_envs=2, eval_episodes=2, max_episode_frames=1200, bf16="off")
    envs = ppo.make_envs(args)
    agent = ppo.Agent(envs.single_observation_space, envs.single_action_space, args)
    scores = ppo.evaluate(args, agent.state_dict())
    seen, features = [], ppo.Agent.features
    monkeypatch.setattr(ppo.Agent, "features", lambda self, obs: seen.append(obs[:, -1].numpy()) or features(self, obs))
    np.testing.assert_array_equal(scores, ppo.evaluate(args, agent.state_dict(), tmp_path))
    assert set(FakeWriter.films) == {f"{tmp_path}/env-{n}/game-{game}.mp4" for n in range(2) for game in range(2)}
    for film in FakeWriter.films.values():
        assert 290 <= len(film) <= 301
        assert film[100].shape == (210, 160, 3) and (film[100].max(2) > film[100].min(2)).any()
    for n in range(2):
        for picture, obs in zip(FakeWriter.films[f"{tmp_path}/env-{n}/game-0.mp4"], seen[1:]):
            grey = picture @ [0.299, 0.587, 0.114]  # shrinking to 84 × 84 leaves the means of 42 × 4 tiles as they are
            means = grey.reshape(42, 5, 4, 40).mean((1, 3))
            np.testing.assert_allclose(obs[n].reshape(42, 2, 4, 21).mean((1, 3)), means, atol=2)


def test_a_film_is_written(tmp_path):
    run_dir = train(tmp_path, env_id="Pong", total_timesteps=32, max_episode_frames=400, capture_video=True)
    (film,) = (run_dir / "videos").glob("iteration-1/env-0/*.mp4")
    assert film.stat().st_size > 1000


def test_compiled_training_equals_eager(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # other tests of this process count too
    flags = {"total_timesteps": 64, "bf16": "off"}
    eager = read(train(tmp_path, **flags) / "metrics.csv")
    compiled = read(train(tmp_path, **flags, compile=True) / "metrics.csv")
    for one, other in zip(eager, compiled):
        assert float(one["value_loss"]) == pytest.approx(float(other["value_loss"]), rel=1e-3)
        assert float(one["entropy"]) == pytest.approx(float(other["entropy"]), rel=1e-4)
        assert float(one["grad_norm"]) == pytest.approx(float(other["grad_norm"]), rel=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # check_compiler's, features' and the loss


# Several processes.

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
GLOO = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two processes kept of a run of three iterations, 2 epochs × 2 minibatches, and the run directory."""
    folder = tmp_path_factory.mktemp("ranks")
    flags = [*FLAGS, "--total-timesteps=1536", "--bf16=off", f"--runs-dir={folder / 'runs'}", "--save-every=1"]
    flags += ["--num-steps=128", "--target-kl=4.5", "--max-episode-frames=400"]
    result = program(f"{folder}/rank", *flags, script=(*TORCHRUN, "tests/ranks.py"), env=GLOO, timeout=120)
    assert result.returncode == 0, result.stderr
    (run_dir,) = (folder / "runs").iterdir()  # one process alone writes
    return [torch.load(f"{folder}/rank-{rank}") for rank in range(2)], run_dir


def test_parameters_stay_equal_and_worlds_differ(two_ranks):
    (first, second), _ = two_ranks
    for mine, other in zip(first["parameters"], second["parameters"]):
        assert torch.equal(mine, other)
    assert not torch.equal(first["parameters"][0], first["parameters"][-1])
    assert not torch.equal(first["minibatches"][0][0], second["minibatches"][0][0])


def test_early_stopping_goes_by_the_mean_kl_of_all_processes(two_ranks):
    """Of (0, 2), (0, 4), …, (0, 10) the mean exceeds 4.5 after the first epoch of the third iteration."""
    (first, second), run_dir = two_ranks
    assert len(first["minibatches"]) == len(second["minibatches"]) == 4 + 4 + 2
    assert [float(row["approx_kl"]) for row in read(run_dir / "metrics.csv")] == [2, 4, 5]


def test_the_averaged_gradient_is_that_of_the_rows_of_both(two_ranks):
    """One process, given both ranks' rows, each rank's normalised by itself."""
    (first, second), _ = two_ranks
    args = ppo.Args(bf16="off")
    envs = ppo.make_envs(replace(args, num_envs=1))
    agent = ppo.Agent(envs.single_observation_space, envs.single_action_space, args)
    agent.load_state_dict(first["initial"])
    parameters = ppo.flat_parameters(agent)
    loss = sum(ppo.ppo_loss(agent, args, *rank["minibatches"][0])[0] for rank in (first, second)) / 2
    loss.backward()
    torch.testing.assert_close(first["gradients"][0], parameters.grad, rtol=1e-4, atol=1e-7)
    assert torch.equal(first["gradients"][0], second["gradients"][0])


def test_the_gradient_that_is_clipped_is_the_averaged_one(two_ranks):
    (first, _), run_dir = two_ranks
    norms = [gradient.norm().item() for gradient in first["gradients"][:4]]
    assert float(read(run_dir / "metrics.csv")[0]["grad_norm"]) == pytest.approx(np.mean(norms), rel=1e-4)


def test_steps_and_games_of_all_processes_are_counted(two_ranks):
    _, run_dir = two_ranks
    metrics, games = read(run_dir / "metrics.csv"), read(run_dir / "episodes.csv")
    assert [int(row["global_step"]) for row in metrics] == [512, 1024, 1536]
    assert [int(row["episodes"]) for row in metrics] == [4, 4, 4]  # of 100 steps, one in each environment
    for row, game in zip(np.repeat(metrics, 4), games, strict=True):
        before = int(game["global_step"]) - (int(row["global_step"]) - 512)
        assert before == 4 * (int(game["episodic_length"]) + 1)  # in the row that reset
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["world_size"] == 2


def test_another_number_of_processes_is_refused(two_ranks):
    result = program("--resume", str(two_ranks[1]), env=GLOO)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and "--resume" in line and "by 2 process" in line and "torchrun" in line


def test_a_stopped_run_of_two_processes_resumes_exactly(tmp_path):
    flags = [*FLAGS, "--env-id=Pong", "--num-steps=64", "--max-episode-frames=400", "--save-every=2"]
    flags += ["--total-timesteps=1536"]
    run = (*TORCHRUN, "ppo_atari.py")
    stopped = subprocess.Popen(
        [sys.executable, *run, *flags, f"--runs-dir={tmp_path / 'stopped'}"],
        cwd=ROOT, env=GLOO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (found := list((tmp_path / "stopped").glob("*/checkpoint.pt"))):
        time.sleep(0.01)
    first = found[0].stat().st_ino
    while found[0].stat().st_ino == first and stopped.poll() is None:
        time.sleep(0.002)
    children = Path(f"/proc/{stopped.pid}/task/{stopped.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGTERM)  # to one of the processes alone: all of them end together
    _, errors = stopped.communicate()
    (step,) = re.findall(r"stopped; `torchrun --nnodes 1 --nproc-per-node 2 .* continues from step ([\d,]+)", errors)
    assert stopped.returncode != 0 and 512 <= int(step.replace(",", "")) < 1536
    assert program(*flags, f"--runs-dir={tmp_path / 'whole'}", script=run, env=GLOO).returncode == 0
    assert program("--resume", str(found[0].parent), script=run, env=GLOO).returncode == 0
    metrics, games = outcome(found[0].parent)
    assert (metrics, games) == outcome(next((tmp_path / "whole").iterdir()))
    assert len(metrics) == 6 and len(games) == 12


def test_two_machines_train_together_and_stop_with_the_command_that_resumes(tmp_path):
    """Two launchers on this machine, which meet at a port, as two machines would."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint".split()
    command = [sys.executable, *command, f"127.0.0.1:{port}", "ppo_atari.py", *FLAGS, "--total-timesteps=64000"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    machines = [subprocess.Popen([*command, f"--runs-dir={tmp_path}"], cwd=ROOT, env=GLOO, **pipe) for _ in range(2)]
    while not list(tmp_path.glob("*/checkpoint.pt")) and all(machine.poll() is None for machine in machines):
        time.sleep(0.01)
    machines[1].send_signal(signal.SIGTERM)  # to one of the machines
    errors = "".join(machine.communicate(timeout=120)[1] for machine in machines)
    (run_dir,) = tmp_path.iterdir()  # of process 0, on whichever machine
    assert f"stopped; `torchrun --nnodes 2 --nproc-per-node 1 ppo_atari.py --resume {run_dir}`" in errors
    assert torch.load(run_dir / "checkpoint.pt", weights_only=True)["world_size"] == 2


def test_what_stops_one_process_alone_gets_one_line(tmp_path):
    (tmp_path / "file").touch()
    flags = [*FLAGS, "--total-timesteps=128", f"--runs-dir={tmp_path / 'file'}"]
    result = program(*flags, script=(*TORCHRUN, "ppo_atari.py"), env=GLOO)
    assert result.returncode != 0
    assert result.stderr.count("ppo_atari.py: --runs-dir") == 1
    assert 'ppo_atari.py", line' not in result.stderr  # no traceback of the process that waited for the other


def test_weights_that_are_not_finite_end_all_processes_with_one_line(tmp_path):
    flags = [*FLAGS, "--total-timesteps=128", f"--runs-dir={tmp_path}", "--learning-rate=1e12"]
    result = program(*flags, script=(*TORCHRUN, "ppo_atari.py"), env=GLOO, timeout=120)
    assert result.returncode != 0 and 'ppo_atari.py", line' not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "not finite" in line]
    assert line.startswith("ppo_atari.py: stopped: iteration 1:") and "keeps the checkpoint of iteration 0" in line


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert ppo.setup_device(ppo.Args()) == torch.device("cuda", 0)
    monkeypatch.setattr(ppo, "LOCAL_WORLD_SIZE", 2)
    with pytest.raises(ppo.UsageError, match="has 1 GPU.*--nproc-per-node"):  # also in process 0, which speaks
        ppo.setup_device(ppo.Args())


def test_a_failed_save_does_not_count(tmp_path, monkeypatch, capsys):
    original = ppo.save_checkpoint

    def full_disk(*args, iteration, **progress):
        if iteration == 2:
            raise OSError(28, "No space left on device")
        original(*args, iteration=iteration, **progress)

    monkeypatch.setattr(ppo, "save_checkpoint", full_disk)
    with pytest.raises(OSError, match="No space"):
        train(tmp_path, total_timesteps=96, save_every=1)
    assert "continues from step 32" in capsys.readouterr().err


def test_variables_like_those_of_torchrun_mean_nothing_without_it(tmp_path):
    result = program("--num-envs=0", env=GLOO | {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "x"})
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("ppo_atari.py: --num-envs 0")


def test_memory_that_is_not_there_gets_one_line(tmp_path):
    result = program("--num-steps=1000000000", "--total-timesteps=8000000000", f"--runs-dir={tmp_path / 'runs'}")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and line.startswith("ppo_atari.py: stopped: Unable to allocate")


def test_memory_that_is_not_on_the_gpu_gets_one_line(monkeypatch, capsys):
    def full_gpu(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    monkeypatch.setattr(ppo, "train", full_gpu)
    status, (line,) = main(monkeypatch, capsys)
    assert status == 1 and line == "ppo_atari.py: stopped: CUDA out of memory. Tried to allocate 1 GiB."


def test_checkpoints_are_two_of_the_longest_games_apart(tmp_path, capsys):
    train(tmp_path, total_timesteps=64, save_every=1, max_episode_frames=800, update_epochs=1)
    assert "warning: --save-every 1 cuts many games short; 25 is enough" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "advice"),
    [
        (["--env-id", "CartPole-v1"], "use ppo.py"),
        (["--env-id", "HalfCheetah-v5"], "use ppo_continuous.py"),
        (["--env-id", "Brakeout"], "The nearest is Breakout"),
        (["--env-id", "breakout"], "The nearest is Breakout"),
        (["--env-id", "ALE/Breakout-v99"], "The nearest is ALE/Breakout-v5"),
        (["--env-id", "Blackjack-v1"], "use ppo.py"),  # there is an Atari game Blackjack, too
        (["--sticky-actions", "1.5"], "must be in [0, 1]"),
        (["--max-episode-frames", "10"], "must be in"),
        (["--num-minibatches", "3"], "must divide"),
        (["--total-timesteps", "1023"], "at least one rollout, 1024"),
        (["--env-id", "CarRacing-v3"], "no script here trains on its images"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, monkeypatch, capsys, argv, advice):
    monkeypatch.chdir(tmp_path)
    status, (line,) = main(monkeypatch, capsys, *argv)
    assert status == 2 and argv[0] in line and argv[1] in line and advice in line
    assert not list(tmp_path.iterdir())
