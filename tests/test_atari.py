"""What ppo_atari.py does differently from ppo.py: games, convolutions, several processes."""

import csv
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from moviepy import VideoFileClip

import ppo_atari as ppo

ROOT = Path(__file__).parents[1]
SMALL = {"num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2}
SMALL |= {"threads": 1, "device": "cpu"}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_run(run_dir):
    """Rows of metrics.csv, without the times, and of episodes.csv."""
    metrics = read(run_dir / "metrics.csv")
    for row in metrics:
        del row["sps"], row["seconds"]
    return metrics, read(run_dir / "episodes.csv")


def train(tmp_path, **flags):
    return ppo.train(ppo.Args(runs_dir=str(tmp_path), **SMALL | flags))


def play(env_id, steps, act, num_envs=2, **flags):
    """What `act(t)` leads to: obs (steps + 1, N, …), and reward, terminated, truncated, valid,
    new_game, lives, each (steps, N)."""
    envs, obs = ppo.start_envs(ppo.Args(env_id=env_id, num_envs=num_envs, **flags), 1)
    all_obs, rows = [obs.copy()], []
    for t in range(steps):
        obs, *row, info = envs.step(np.broadcast_to(act(t), num_envs))
        all_obs.append(obs.copy())
        rows.append([*row, info["valid"], info["new_game"], info["lives"]])
    envs.close()
    names = ["reward", "terminated", "truncated", "valid", "new_game", "lives"]
    columns = dict(zip(names, map(np.array, zip(*rows))))
    return SimpleNamespace(obs=np.array(all_obs), **columns)


def after(done):
    """Whether the step before was one of `done` (steps, N)."""
    return np.concatenate([np.zeros_like(done[:1]), done[:-1]])


def main(monkeypatch, capsys, *argv):
    """Exit status, stdout and stderr of ppo_atari.py, run in this process."""
    monkeypatch.setattr(sys, "argv", ["ppo_atari.py", *argv])
    status = 0
    try:
        ppo.main()
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


# Games.


def test_every_game_has_a_network_of_its_size(monkeypatch):
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda *args: None)  # slow
    games = [name for name in gym.registry if name.startswith("ALE/")]
    assert len(games) > 100
    sizes = {}
    for name in games:
        envs = ppo.make_envs(ppo.Args(env_id=name, num_envs=1))
        assert envs.single_observation_space.shape == (4, 84, 84)
        sizes[int(envs.single_action_space.n)] = envs
    assert len(sizes) > 5
    for actions, envs in sizes.items():
        agent = ppo.Agent(envs.single_observation_space, envs.single_action_space)
        x = agent.features(torch.zeros((3, 4, 84, 84), dtype=torch.uint8))
        assert x.shape == (3, 512) and x.dtype == torch.float32
        assert agent.actor(x).shape == (3, actions)
        assert agent.value(x).shape == agent.act(x).shape == agent.act(x, greedy=True).shape == (3,)


@pytest.mark.parametrize("name", ["Pong", "PongNoFrameskip-v4"])
def test_all_names_of_a_game_are_that_game(name):
    rewards = play(name, 300, lambda t: t % 6).reward
    assert rewards.any()
    assert (rewards == play("ALE/Pong-v5", 300, lambda t: t % 6).reward).all()


def test_breakout_plays_on_after_a_lost_life():
    """Doing nothing: without our FIRE no ball would come again, and no game would end."""
    rows = play("Breakout", 400, lambda t: 0)
    assert not rows.truncated.any()
    for n in range(2):
        lost = np.flatnonzero(rows.terminated[:, n])[:5]
        np.testing.assert_array_equal(rows.lives[lost, n], [4, 3, 2, 1, 0])
        new_game = np.flatnonzero(rows.new_game[:, n])[0]
        assert new_game == lost[4] + 1 and rows.lives[new_game, n] == 5
    np.testing.assert_array_equal(rows.valid, ~after(rows.terminated))  # FIRE is not the policy's


def test_a_lost_life_in_a_game_without_fire_costs_no_row():
    rows = play("MsPacman", 800, lambda t: t // 40 % 9)
    lost = rows.terminated & (rows.lives > 0)
    assert lost.sum() >= 4 and rows.new_game.sum() >= 1
    np.testing.assert_array_equal(rows.valid, ~rows.new_game)
    np.testing.assert_array_equal(rows.new_game, after(rows.terminated & (rows.lives == 0)))


def test_pong_has_no_lives_and_ends_all_the_same():
    rows = play("Pong", 1000, lambda t: 0)
    for n in range(2):
        end = np.flatnonzero(rows.terminated[:, n])[0]
        assert rows.reward[: end + 1, n].sum() == -21 and rows.lives[end, n] == 0
        assert rows.new_game[end + 1, n] and not rows.valid[end + 1, n]
        assert not rows.new_game[: end + 1, n].any()


def test_a_game_can_end_with_a_life_left():
    """In Adventure a dragon ends the game."""
    generator = np.random.default_rng(29)
    rows = play("Adventure", 420, lambda t: generator.integers(0, 18, 2), seed=29)
    ((step, n),) = np.argwhere(rows.terminated)
    assert rows.lives[step, n] == 1 and not rows.truncated.any()
    assert rows.new_game[step + 1, n] and rows.new_game.sum() == (~rows.valid).sum() == 1


@pytest.mark.parametrize("env_id", ["Pong", "Freeway"])  # with FIRE, without
def test_a_frame_limit_truncates(env_id):
    rows = play(env_id, 250, lambda t: 0, max_episode_frames=400)
    assert rows.truncated.sum() >= 4 and not rows.terminated.any()
    np.testing.assert_array_equal(rows.new_game, after(rows.truncated))
    np.testing.assert_array_equal(rows.valid, ~rows.new_game)


def test_the_score_of_a_game_is_the_emulators():
    """The same buttons, FIRE included, pressed without any of our rules."""
    envs, _ = ppo.start_envs(ppo.Args(num_envs=2), 1)
    pressed, step = [], envs.env.step
    envs.env.step = lambda actions: pressed.append(actions.copy()) or step(actions)
    generator, scores, running = np.random.default_rng(0), [], np.zeros(2)
    for _ in range(1000):
        _, reward, _, _, info = envs.step(generator.integers(0, 4, 2))
        scores += [(n, running[n]) for n in np.flatnonzero(info["new_game"])]
        running = np.where(info["new_game"], 0, running) + reward

    plain, expected, running = plain_breakout(life_loss_info=False), [], np.zeros(2)
    for actions in pressed:
        _, reward, terminated, _, _ = plain.step(actions)
        running += reward
        expected += [(n, running[n]) for n in np.flatnonzero(terminated)]
        running[terminated] = 0
    assert len(scores) > 6 and max(score for _, score in scores) > 1
    assert scores == expected[: len(scores)]


def breakout_seed():
    """That of start_envs(Args(num_envs=2), 1)."""
    return int(np.random.SeedSequence((1, 1)).generate_state(1)[0]) % (2**31 - 3)


def plain_breakout(**options):
    plain = {"repeat_action_probability": 0.0, "reward_clipping": False}
    envs = gym.make_vec("ALE/Breakout-v5", 2, **plain | options)
    envs.reset(seed=breakout_seed())
    return envs


def test_actions_stick_only_when_asked_to():
    actions = np.random.default_rng(0).integers(0, 4, (300, 2))
    rewards = {}
    for sticky in (0.0, 0.25):
        plain = plain_breakout(life_loss_info=True, repeat_action_probability=sticky)
        envs = ppo.AtariGames(plain)
        envs.reset(seed=breakout_seed())
        rewards[sticky] = [envs.step(row)[1].tolist() for row in actions]
    default = play("Breakout", 300, lambda t: actions[t])
    sticky = play("Breakout", 300, lambda t: actions[t], sticky_actions=0.25)
    assert rewards[0.0] == default.reward.tolist() != rewards[0.25] == sticky.reward.tolist()


# Training.


def test_training_logs_whole_games_and_learns_from_signs(tmp_path, monkeypatch):
    rewards, compute_gae = [], ppo.compute_gae
    keep = lambda *args: rewards.append(args[0].clone()) or compute_gae(*args)
    monkeypatch.setattr(ppo, "compute_gae", keep)
    flags = {"env_id": "MsPacman", "num_steps": 128, "total_timesteps": 2048, "update_epochs": 1}
    games = read(train(tmp_path, **flags) / "episodes.csv")
    assert len(games) >= 1 and all(float(game["episodic_return"]) > 50 for game in games)
    assert all(int(game["episodic_length"]) > 200 for game in games)  # three lives
    assert set(torch.cat(rewards).unique().tolist()) <= {-1, 0, 1}
    rewards.clear()
    train(tmp_path, **flags | {"clip_rewards": False, "total_timesteps": 256})
    assert torch.cat(rewards).max() >= 10


def test_invalid_rows_are_dropped_and_ends_are_where_they_were(tmp_path, monkeypatch):
    calls, compute_gae = [], ppo.compute_gae
    monkeypatch.setattr(ppo, "compute_gae", lambda *args: calls.append(args) or compute_gae(*args))
    minibatches, ppo_loss = [], ppo.ppo_loss
    keep = lambda agent, batch, args: minibatches.append(batch) or ppo_loss(agent, batch, args)
    monkeypatch.setattr(ppo, "ppo_loss", keep)
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.arange(n))
    monkeypatch.setattr(ppo.Agent, "act", lambda self, x, greedy=False: torch.zeros(len(x)).long())
    flags = {"max_episode_frames": 400, "num_steps": 256, "total_timesteps": 512}
    run_dir = train(tmp_path, **flags, update_epochs=1)

    expected = play("Breakout", 256, lambda t: 0, max_episode_frames=400)
    done = expected.terminated | expected.truncated
    assert expected.terminated.any() and expected.truncated.any()
    ((rewards, values, seen_terminated, seen_done, *_),) = calls
    np.testing.assert_array_equal(rewards, np.sign(expected.reward))
    np.testing.assert_array_equal(seen_terminated, expected.terminated)
    np.testing.assert_array_equal(seen_done, done)

    fill_up = np.arange(512) % expected.valid.sum()
    assert expected.valid.sum() < 500  # not only resets are dropped
    advantages = compute_gae(*calls[0])
    columns = {
        "obs": np.moveaxis(expected.obs[:-1], 2, -1),
        "old_values": values[:-1].numpy(),
        "advantages": advantages.numpy(),
        "returns": (advantages + values[:-1]).numpy(),
    }
    for name, column in columns.items():
        rows = torch.cat([minibatch[name] for minibatch in minibatches])
        np.testing.assert_array_equal(rows, column[expected.valid][fill_up], name)

    games, began = [], [0, 0]
    for t, n in np.argwhere(expected.new_game):
        games.append((2 * (t + 1), expected.reward[began[n] : t, n].sum(), t - began[n]))
        began[n] = t + 1  # a step that only resets belongs to no game
    assert len(games) >= 4
    logged = [tuple(map(float, game.values())) for game in read(run_dir / "episodes.csv")]
    assert sorted(games) == sorted(logged)


def frames_and_agent(steps=64):
    """A minibatch of real frames, an agent and its flags."""
    args = ppo.Args(num_envs=4)
    generator = np.random.default_rng(0)
    obs = play("Breakout", steps - 1, lambda t: generator.integers(0, 4, 4), num_envs=4).obs
    obs = torch.from_numpy(np.moveaxis(obs, 2, -1)).flatten(0, 1)
    envs = ppo.make_envs(args)
    torch.manual_seed(1)
    agent = ppo.Agent(envs.single_observation_space, envs.single_action_space)
    actions = torch.randint(0, 4, (len(obs),))
    with torch.no_grad():
        x = agent.features(obs.movedim(-1, 1))
        log_probs, _ = agent.evaluate_actions(x, actions)
        old_values = agent.value(x) + 0.1 * torch.randn(len(obs))  # some are clipped
    advantages, returns = torch.randn(2, len(obs))
    batch = {"obs": obs, "actions": actions, "old_log_probs": log_probs, "old_values": old_values}
    return batch | {"advantages": advantages, "returns": returns}, agent, args


def test_bf16_is_close_to_fp32():
    batch, agent, args = frames_and_agent()
    parameters = ppo.flat_parameters(agent)
    losses, gradients = [], []
    for agent.bf16 in (False, True):
        parameters.grad.zero_()
        loss, logged = ppo.ppo_loss(agent, batch, args)
        loss.backward()
        losses.append(loss.item())
        gradients.append(parameters.grad.clone())
    assert 0 < abs(losses[1] - losses[0]) < 0.01 * abs(losses[0])
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    assert logged["max_ratio_dev"] < 0.01


def test_the_gradient_is_right():
    """Against differences of the loss along random directions, in double precision."""
    batch, agent, args = frames_and_agent(2)
    agent.double()
    agent.features = lambda obs: agent.network(obs.double() / 255)
    batch = {
        name: rows.double() if rows.is_floating_point() else rows for name, rows in batch.items()
    }
    parameters = ppo.flat_parameters(agent)
    # Black pixels and zero biases meet at the kink of ReLU.
    parameters.data += 1e-3 * torch.randn_like(parameters)
    ppo.ppo_loss(agent, batch, args)[0].backward()
    for _ in range(3):
        direction, losses = torch.randn_like(parameters), []
        for step in (1e-8, -1e-8):
            parameters.data += step * direction
            losses.append(ppo.ppo_loss(agent, batch, args)[0].item())
            parameters.data -= step * direction
        slope = (losses[0] - losses[1]) / 2e-8
        assert slope == pytest.approx((parameters.grad @ direction).item(), rel=1e-4)


@pytest.mark.parametrize(("bf16", "tolerance"), [("off", 1e-5), ("on", 0.02)])
def test_the_first_minibatch_of_every_update_has_ratio_one(tmp_path, monkeypatch, bf16, tolerance):
    deviations, ppo_loss = [], ppo.ppo_loss

    def keep(*args):
        loss, logged = ppo_loss(*args)
        deviations.append(logged["max_ratio_dev"].item())
        return loss, logged

    monkeypatch.setattr(ppo, "ppo_loss", keep)
    train(tmp_path, total_timesteps=96, bf16=bf16)
    firsts = deviations[::4]
    assert len(firsts) == 3 and max(firsts) < tolerance < max(deviations)


class Sides(gym.vector.VectorEnv):
    """Learned within seconds: the lit side of the newest frame is the action that pays 1."""

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    single_observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    single_action_space = gym.spaces.Discrete(2)

    def __init__(self, args):
        self.num_envs = args.num_envs

    def observe(self):
        self.side = self.generator.integers(0, 2, self.num_envs)
        frames = np.zeros((self.num_envs, 4, 84, 84), np.uint8)
        for frame, side in zip(frames[:, 3], self.side):
            frame[:, 42 * side : 42 * (side + 1)] = 255
        return frames

    def reset(self, *, seed=None, options=None):
        self.generator, self.steps = np.random.default_rng(seed), np.zeros(self.num_envs, int)
        return self.observe(), {}

    def step(self, actions):
        new_game = self.steps == 10
        reward = np.where(new_game, 0, actions == self.side).astype(np.int32)
        self.steps = np.where(new_game, 0, self.steps + 1)
        terminated = self.steps == 10
        info = {"new_game": new_game, "valid": ~new_game}
        return self.observe(), reward, terminated, np.zeros_like(terminated), info


def test_it_learns_from_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "make_envs", lambda args, for_film=False: Sides(args))
    flags = {"num_envs": 4, "num_steps": 32, "num_minibatches": 2, "update_epochs": 4}
    run_dir = train(tmp_path, total_timesteps=4096, learning_rate=1e-3, **flags)
    scores = [float(game["episodic_return"]) for game in read(run_dir / "episodes.csv")]
    assert np.mean(scores[:20]) < 7 and np.mean(scores[-20:]) > 9
    args = ppo.Args(num_envs=4, eval_episodes=2, greedy=True, evaluate=str(run_dir))
    np.testing.assert_array_equal(ppo.evaluate(ppo.load_agent(run_dir), args), np.full((4, 2), 10))


PLAIN = {"bf16": "off", "total_timesteps": 256, "num_steps": 64, "max_episode_frames": 400}


@functools.cache
def plain_run(env_id):
    with tempfile.TemporaryDirectory() as folder:
        return read_run(train(folder, **PLAIN, env_id=env_id))


def test_one_seed_decides_everything(tmp_path):
    run = read_run(train(tmp_path, **PLAIN, env_id="Breakout"))
    assert run == plain_run("Breakout")
    assert run[0] != read_run(train(tmp_path, **PLAIN, seed=2))[0]
    assert [float(row["learning_rate"]) for row in run[0]] == [2.5e-4, 1.25e-4]


SWITCHES = [
    {"clip_rewards": False, "env_id": "MsPacman"},
    {"episodic_life": False},
    {"sticky_actions": 0.25},
    {"bf16": "on"},
    {"bootstrap_truncated": False},
    {"anneal_lr": False},
    {"norm_adv": False},
    {"clip_vloss": False},
    {"max_grad_norm": float("inf")},
]


@pytest.mark.parametrize("change", SWITCHES, ids=lambda change: next(iter(change)))
def test_every_switch_changes_the_run(tmp_path, change):
    metrics, _ = read_run(train(tmp_path, **PLAIN | change))
    compared = ["policy_loss", "value_loss", "entropy"]
    plain, _ = plain_run(change.get("env_id", "Breakout"))
    assert [[row[key] for key in compared] for row in metrics] != [
        [row[key] for key in compared] for row in plain
    ]


def test_weights_that_are_not_finite_end_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="iteration 1: "):
        train(tmp_path, total_timesteps=64, learning_rate=float("inf"))
    (checkpoint,) = tmp_path.glob("*/checkpoint.pt")
    assert torch.load(checkpoint)["iteration"] == 0


def test_compiled_training_equals_eager(tmp_path, monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # other tests of this process count too
    rows, randperm = [], torch.randperm
    keep = lambda n, device=None: rows.append(n) or randperm(n, device=device)
    monkeypatch.setattr(torch, "randperm", keep)
    flags = {"total_timesteps": 384, "num_steps": 64, "max_episode_frames": 400, "bf16": "off"}
    eager = read(train(tmp_path, **flags) / "metrics.csv")
    compiled = read(train(tmp_path, **flags, compile=True) / "metrics.csv")
    assert len(set(rows)) > 1, "nothing was dropped"
    for one, other in zip(eager, compiled, strict=True):
        for name in ("policy_loss", "value_loss", "entropy", "grad_norm"):
            assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-3, abs=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # features and the loss


# Films.


class FakeWriter:
    film = []

    def __init__(self, path, size, fps):
        assert path.endswith(".mp4") and size == (160, 210) and fps == 15

    def write_frame(self, picture):
        self.film.append(picture.copy())

    def close(self):
        pass


def test_a_film_shows_what_the_agent_sees_and_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "FFMPEG_VideoWriter", FakeWriter)
    flags = {"env_id": "Pong", "num_envs": 2, "eval_episodes": 2, "max_episode_frames": 800}
    args = ppo.Args(**flags, evaluate=str(tmp_path))
    envs = ppo.make_envs(args)
    agent = ppo.Agent(envs.single_observation_space, envs.single_action_space)
    returns = ppo.evaluate(agent, args)
    assert returns.shape == (2, 2) and returns.any() and not FakeWriter.film

    seen, features = [], agent.features
    agent.features = lambda obs: seen.append(obs[0, -1].numpy().copy()) or features(obs)
    args.capture_video = True
    np.testing.assert_array_equal(returns, ppo.evaluate(agent, args))
    film = FakeWriter.film
    assert 360 <= len(film) <= 402 and len(film) < len(seen)  # two games of at most 200 steps
    assert film[100].shape == (210, 160, 3)
    assert (film[100].max(2) > film[100].min(2)).any()  # in colour
    for picture, obs in zip(film, seen[1:]):
        grey = picture @ [0.299, 0.587, 0.114]  # shrinking to 84 × 84 keeps the means of tiles
        means = grey.reshape(42, 5, 4, 40).mean((1, 3))
        np.testing.assert_allclose(obs.reshape(42, 2, 4, 21).mean((1, 3)), means, atol=2)


def test_evaluate_prints_returns_and_writes_a_film(tmp_path, monkeypatch, capsys):
    run_dir = train(tmp_path, env_id="Pong", total_timesteps=32, max_episode_frames=400)
    capsys.readouterr()
    flags = ["--capture-video", "--eval-episodes=2", "--num-envs=3"]
    status, out, _ = main(monkeypatch, capsys, "--evaluate", str(run_dir), *flags)
    summary, returns = out.splitlines()
    returns = np.array(returns.split(), float)
    assert status == 0 and len(returns) == 6
    assert f"{returns.mean():.2f}" in summary and f"{returns.std():.2f}" in summary
    (path,) = (run_dir / "videos").iterdir()
    film = VideoFileClip(str(path))
    assert path.suffix == ".mp4" and film.size == [160, 210] and film.fps == 15
    assert 180 <= film.n_frames <= 202  # two games of at most 100 steps
    film.close()


# Interrupted runs and several processes.

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
CPU = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(*command):
    pipe = subprocess.PIPE
    command = [sys.executable, *command]
    return subprocess.Popen(command, cwd=ROOT, env=CPU, stdout=pipe, stderr=pipe, text=True)


def run(*command):
    """Exit status and stderr."""
    process = start(*command)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_resumes_exactly(tmp_path, processes):
    """What it logged after its last checkpoint, the resumed run logs again. By default checkpoints
    are two games apart: here, games have 150 steps, three iterations."""
    script = ["ppo_atari.py"] if processes == 1 else [*TORCHRUN, "ppo_atari.py"]
    flags = [*FLAGS, "--env-id=Pong", "--num-steps=100", "--max-episode-frames=600"]
    flags += [f"--total-timesteps={8 * 200 * processes}", f"--runs-dir={tmp_path}"]
    killed = start(*script, *flags)
    while not (found := list(tmp_path.glob("*/metrics.csv"))) or len(read(found[0])) < 5:
        assert killed.poll() is None
        time.sleep(0.01)
    victim = killed.pid
    if processes == 2:  # the second one: torchrun ends the first
        victim = Path(f"/proc/{victim}/task/{victim}/children").read_text().split()[-1]
    os.kill(int(victim), signal.SIGKILL)
    killed.communicate(timeout=120)
    assert killed.returncode != 0

    run_dir = found[0].parent
    assert torch.load(run_dir / "checkpoint.pt")["iteration"] in (3, 6)
    metrics, games = read_run(run_dir)
    status, errors = run(*script, "--resume", str(run_dir), "--device=cpu")
    assert status == 0, errors
    all_metrics, all_games = read_run(run_dir)
    assert metrics == all_metrics[: len(metrics)] and games == all_games[: len(games)]
    assert [int(row["iteration"]) for row in all_metrics] == list(range(1, 9))
    steps = [int(row["global_step"]) for row in all_games]
    assert len(steps) >= 6 and steps == sorted(steps)


def test_two_processes_train_one_agent(tmp_path, monkeypatch, capsys):
    """See ranks.py. Three iterations of 2 epochs and 2 minibatches; all games have 100 steps."""
    flags = [*FLAGS, "--env-id=Freeway", "--num-steps=128", "--max-episode-frames=400"]
    flags += ["--total-timesteps=1536", "--bf16=off", "--save-every=1", "--target-kl=4.5"]
    flags += ["--max-grad-norm=0.01", f"--runs-dir={tmp_path / 'runs'}"]
    status, errors = run(*TORCHRUN, "tests/ranks.py", str(tmp_path / "rank"), *flags)
    assert status == 0, errors
    first, second = (torch.load(tmp_path / f"rank-{rank}", weights_only=False) for rank in range(2))
    (run_dir,) = (tmp_path / "runs").iterdir()  # process 0 alone writes
    metrics, games = read(run_dir / "metrics.csv"), read(run_dir / "episodes.csv")

    # Weights are equal although they began differently; games and permutations are not.
    assert first["weights"] == second["weights"] and len(set(first["weights"])) == 10
    first_obs = [obs.tobytes() for obs in first["first_obs"] + second["first_obs"]]
    assert len(first_obs) == len(set(first_obs)) == 12
    for one, other in zip(first["orders"], second["orders"], strict=True):
        assert one.shape == other.shape and not torch.equal(one, other)

    # The gradient is that of the rows of both; its norm is taken and clipped after averaging.
    args = ppo.Args(env_id="Freeway", num_envs=1)
    envs = ppo.make_envs(args)
    agent = ppo.Agent(envs.single_observation_space, envs.single_action_space)
    agent.load_state_dict(first["agent"])
    parameters = ppo.flat_parameters(agent)
    losses = [ppo.ppo_loss(agent, rank["minibatch"], args)[0] for rank in (first, second)]
    torch.stack(losses).mean().backward()
    torch.testing.assert_close(first["gradient"], parameters.grad, rtol=1e-4, atol=1e-7)
    norm = parameters.grad.norm()
    assert norm > 0.02
    expected = first["gradient"] * 0.01 / norm
    for rank in (first, second):
        torch.testing.assert_close(rank["clipped_gradient"], expected, rtol=1e-4, atol=1e-7)
    assert float(metrics[0]["grad_norm"]) == pytest.approx(
        np.mean(first["grad_norms"][:4]), rel=1e-4
    )

    # The mean KL of an epoch is 0.75, 1.75, …, 4.75, which ends the third iteration; the second
    # process alone would have stopped in the second iteration, the first never.
    assert first["minibatches"] == second["minibatches"] == 4 + 4 + 2

    # Steps of all processes, games of process 0.
    assert [int(row["global_step"]) for row in metrics] == [512, 1024, 1536]
    assert [int(row["episodes"]) for row in metrics] == [2, 2, 2]
    for i, game in enumerate(games):
        step = 512 * (i // 2) + 4 * (int(game["episodic_length"]) + 1)  # the step that reset
        assert int(game["global_step"]) == step
    assert len(games) == 6

    status, _, errors = main(monkeypatch, capsys, "--resume", str(run_dir))
    assert status == 2 and errors.count("\n") == 1
    assert f"--resume {run_dir}: " in errors and "2 processes" in errors


# Bad input.


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--env-id=CartPole-v1"], "CartPole-v1` doesn't exist in namespace ALE"),
        (["--env-id=Brakeout"], "Did you mean: `Breakout`?"),
        (["--env-id=my_module:Foo-v0"], "my_module"),
        (["--resume=nothing"], "nothing is not a run directory of ppo_atari.py"),
        (["--evaluate=nothing"], "nothing is not a run directory of ppo_atari.py"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    status, out, errors = main(monkeypatch, capsys, *argv)
    assert status == 2 and not out and errors.count("\n") == 1
    assert errors.startswith("ppo_atari.py: ") and message in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("--sticky-actions=1.5", "[0, 1]"),
        ("--max-episode-frames=10", "[400, inf]"),
        ("--num-minibatches=3", "1024"),
        ("--total-timesteps=1023", "must be >= 1024"),
        ("--num-steps=1", "[2, inf]"),
        ("--capture-video", "--evaluate"),
    ],
)
def test_bad_flags_are_named(tmp_path, monkeypatch, capsys, flag, advice):
    monkeypatch.chdir(tmp_path)
    status, _, errors = main(monkeypatch, capsys, flag)
    text = " ".join(errors.replace("│", " ").split())  # lines of a box, joined
    assert status == 2 and flag.replace("=", " ") in text and advice in text
    assert not list(tmp_path.iterdir())
