"""What ppo_atari.py does differently: network, games, films, several processes."""

import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import as_flags, make_args, only_run, outcome, read, train
from moviepy import VideoFileClip
from test_equations import assert_orthogonal
from test_resume import wait_for_rows
from torch import nn

import ppo_atari as ppo


def play(env_id, steps, act, num_envs=2, **flags):
    """What `act(t)` leads to: obs (steps + 1, N, …), and reward, terminated, truncated,
    valid, new_game, lives, each (steps, N)."""
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


def make_agent(env_id="Breakout"):
    args = make_args(ppo, env_id=env_id, num_envs=1)
    envs = ppo.make_envs(args)
    torch.manual_seed(1)
    agent = ppo.Agent(envs, args)
    envs.close()
    return agent


# The network


def test_the_network_for_pixels():
    """Convolutions of Mnih et al. 2015, a ReLU after every layer; gains √2, policy 0.01,
    value 1, zero biases."""
    agent = make_agent()
    layers = [layer for layer in agent.network if not isinstance(layer, nn.Flatten)]
    assert [type(layer) for layer in layers[1::2]] == [nn.ReLU] * 4
    shapes = [tuple(layer.weight.shape) for layer in layers[::2]]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 64 * 7 * 7)]
    strides = [layer.stride for layer in layers[:6:2]]
    assert strides == [(4, 4), (2, 2), (1, 1)]
    assert {layer.padding for layer in layers[:6:2]} == {(0, 0)}
    for layer in layers[::2]:
        assert_orthogonal(layer, math.sqrt(2))
    assert_orthogonal(agent.actor, 0.01)
    assert_orthogonal(agent.critic, 1.0)
    assert agent.actor.weight.shape == (4, 512) and agent.critic.weight.shape == (1, 512)


def test_features_are_those_of_pixels_between_0_and_1():
    agent = make_agent()
    obs = torch.randint(256, (5, 4, 84, 84), dtype=torch.uint8)
    x = obs.double() / 255
    for layer in agent.network.double():
        x = layer(x)
    agent.float()
    assert x.min() == 0 < x.max()  # the last layer has a ReLU, too
    torch.testing.assert_close(agent.features(obs).double(), x, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
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
        agent = ppo.Agent(envs, ppo.Args())
        x = agent.features(torch.zeros((3, 4, 84, 84), dtype=torch.uint8))
        assert x.shape == (3, 512) and x.dtype == torch.float32
        assert agent.actor(x).shape == (3, actions)
        assert agent.value(x).shape == agent.act(x).shape == (3,)
        assert agent.act(x, greedy=True).shape == (3,)


def frames_and_agent(steps=64):
    """A minibatch of real frames, an agent and its flags."""
    generator = np.random.default_rng(0)
    obs = play("Breakout", steps - 1, lambda t: generator.integers(0, 4, 4), num_envs=4).obs
    obs = torch.from_numpy(obs).flatten(0, 1)
    agent = make_agent()
    actions = torch.randint(0, 4, (len(obs),))
    with torch.no_grad():
        x = agent.features(obs)
        log_probs, _ = agent.evaluate_actions(x, actions)
        old_values = agent.value(x) + 0.1 * torch.randn(len(obs))  # some are clipped
    advantages, returns = torch.randn(2, len(obs))
    batch = {"obs": obs, "actions": actions, "old_log_probs": log_probs}
    batch |= {"old_values": old_values, "advantages": advantages, "returns": returns}
    return batch, agent, ppo.Args(num_envs=4)


def test_bf16_is_close_to_fp32():
    batch, agent, args = frames_and_agent()
    losses, gradients = [], []
    for agent.bf16 in (False, True):
        agent.zero_grad()
        loss, logged = ppo.ppo_loss(agent, batch, args)
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in agent.parameters()]))
    assert 0 < abs(losses[1] - losses[0]) < 0.01 * abs(losses[0])
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    assert logged["max_ratio_dev"] < 0.01


def test_bf16_is_used_when_asked_for(tmp_path, record):
    features = record(ppo.Agent, "features")
    for bf16 in ("on", "off"):
        features.clear()
        train(ppo, tmp_path, env_id="Pong", total_timesteps=32, bf16=bf16)
        assert {agent.bf16 for (agent, _), _ in features} == {bf16 == "on"}
    cpu = torch.device("cpu")
    assert isinstance(ppo.choose_bf16(ppo.Args(), cpu), bool)


def test_the_gradient_is_right():
    """Against differences of the loss along random directions, in double precision."""
    batch, agent, args = frames_and_agent(2)
    agent.double()
    agent.features = lambda obs: agent.network(obs.double() / 255)
    for name, rows in batch.items():
        batch[name] = rows.double() if rows.is_floating_point() else rows
    parameters = list(agent.parameters())
    # Black pixels and zero biases meet at the kink of ReLU.
    move = lambda size, direction: torch._foreach_add_(parameters, direction, alpha=size)
    random = lambda: [torch.randn_like(parameter) for parameter in parameters]
    with torch.no_grad():
        move(1e-3, random())
    ppo.compute_gradient(agent, batch, args)
    for _ in range(3):
        direction, losses = random(), []
        with torch.no_grad():
            for step in (1e-8, -1e-8):
                move(step, direction)
                losses.append(ppo.ppo_loss(agent, batch, args)[0].item())
                move(-step, direction)
        slope = (losses[0] - losses[1]) / 2e-8
        expected = sum((p.grad * d).sum().item() for p, d in zip(parameters, direction))
        assert slope == pytest.approx(expected, rel=1e-4)


# Games


@pytest.mark.parametrize("name", ["Pong", "PongNoFrameskip-v4"])
def test_all_names_of_a_game_are_that_game(name):
    rewards = play(name, 300, lambda t: t % 6).reward
    assert rewards.any()
    assert (rewards == play("ALE/Pong-v5", 300, lambda t: t % 6).reward).all()


def test_observations_are_the_last_four_frames():
    obs = play("Breakout", 20, lambda t: 1).obs
    assert obs.shape == (21, 2, 4, 84, 84) and obs.dtype == np.uint8
    np.testing.assert_array_equal(obs[1:, :, :3], obs[:-1, :, 1:])
    assert (obs[10:, :, 3] != obs[10:, :, 2]).any()


def test_games_begin_with_no_ops_and_a_step_has_four_frames():
    envs = ppo.make_envs(ppo.Args(env_id="Freeway", num_envs=16))
    _, info = envs.reset(seed=1)
    frames = info["episode_frame_number"]
    assert len(set(frames)) > 5 and 20 < max(frames) < 30
    for t in range(1, 4):
        *_, info = envs.step(np.zeros(16, int))
        np.testing.assert_array_equal(info["episode_frame_number"], frames + 4 * t)
    envs.close()


def test_breakout_plays_on_after_a_lost_life():
    """Doing nothing: without our FIRE no ball would come again, and no game would end."""
    rows = play("Breakout", 400, lambda t: 0)
    assert not rows.truncated.any()
    for n in range(2):
        lost = np.flatnonzero(rows.terminated[:, n])[:5]
        np.testing.assert_array_equal(rows.lives[lost, n], [4, 3, 2, 1, 0])
        new_game = np.flatnonzero(rows.new_game[:, n])[0]
        assert new_game == lost[4] + 1 and rows.lives[new_game, n] == 5
    # FIRE is not the policy's.
    np.testing.assert_array_equal(rows.valid, ~after(rows.terminated))


def test_a_lost_life_is_no_end_without_episodic_life():
    """Then nobody presses FIRE either, and a policy that does nothing waits."""
    rows = play("Breakout", 400, lambda t: 0, episodic_life=False)
    assert not rows.terminated.any() and rows.valid.all() and rows.lives.min() == 4


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
    generator = np.random.default_rng(0)
    rows = play("Adventure", 420, lambda t: generator.integers(0, 18, 2), seed=0)
    ((step, n),) = np.argwhere(rows.terminated)
    assert rows.lives[step, n] == 1 and not rows.truncated.any()
    assert rows.new_game[step + 1, n] and rows.new_game.sum() == (~rows.valid).sum() == 1


@pytest.mark.parametrize("env_id", ["Pong", "Freeway"])  # with FIRE, without
def test_a_frame_limit_truncates(env_id):
    rows = play(env_id, 250, lambda t: 0, max_episode_frames=400)
    assert rows.truncated.sum() >= 4 and not rows.terminated.any()
    np.testing.assert_array_equal(rows.new_game, after(rows.truncated))
    np.testing.assert_array_equal(rows.valid, ~rows.new_game)


@pytest.mark.parametrize("sticky", [0.0, 0.25])
def test_the_score_of_a_game_is_the_emulators(sticky):
    """The same buttons, FIRE included, pressed without any of our rules."""
    actions = np.random.default_rng(0).integers(0, 4, (1000, 2))
    envs = ppo.make_envs(ppo.Args(num_envs=2, sticky_actions=sticky))
    envs.reset(seed=5)
    pressed, step = [], envs.env.step
    envs.env.step = lambda actions: pressed.append(actions.copy()) or step(actions)
    scores, running = [], np.zeros(2)
    for row in actions:
        _, reward, _, _, info = envs.step(row)
        scores += [(n, running[n]) for n in np.flatnonzero(info["new_game"])]
        running = np.where(info["new_game"], 0, running) + reward

    plain = {"repeat_action_probability": sticky, "reward_clipping": False}
    envs = gym.make_vec("ALE/Breakout-v5", 2, **plain, life_loss_info=False)
    envs.reset(seed=5)
    expected, running = [], np.zeros(2)
    for row in pressed:
        _, reward, terminated, _, _ = envs.step(row)
        running += reward
        expected += [(n, running[n]) for n in np.flatnonzero(terminated)]
        running[terminated] = 0
    assert len(scores) > 6 and max(score for _, score in scores) > 1
    assert scores == expected[: len(scores)]
    assert (np.array(pressed) != actions).sum() > 10  # FIRE


def test_actions_stick_only_when_asked_to():
    actions = np.random.default_rng(0).integers(0, 4, (300, 2))
    default, off, on = (
        play("Breakout", 300, lambda t: actions[t], **flags).reward.tolist()
        for flags in ({}, {"sticky_actions": 0.0}, {"sticky_actions": 0.25})
    )
    assert default == off != on


# Training


def test_training_logs_whole_games_and_learns_from_signs(tmp_path, record):
    gaes = record(ppo, "compute_gae")
    flags = {"env_id": "MsPacman", "num_steps": 128, "update_epochs": 1}
    games = read(train(ppo, tmp_path, **flags, total_timesteps=2048) / "episodes.csv")
    assert len(games) >= 1 and all(float(game["episodic_return"]) > 50 for game in games)
    assert all(int(game["episodic_length"]) > 200 for game in games)  # three lives
    rewards = lambda: torch.cat([inputs[0].flatten() for inputs, _ in gaes])
    assert set(rewards().tolist()) == {0, 1}
    gaes.clear()
    train(ppo, tmp_path, **flags, total_timesteps=256, clip_rewards=False)
    assert rewards().max() >= 10


def test_invalid_rows_are_dropped_and_ends_are_where_they_were(
    tmp_path, record, unshuffled, monkeypatch
):
    gaes, losses = record(ppo, "compute_gae"), record(ppo, "ppo_loss")
    monkeypatch.setattr(
        ppo.Agent, "act", lambda self, x, greedy=False: torch.zeros(len(x)).long()
    )
    seeded = ppo.start_envs  # the same games in play
    monkeypatch.setattr(ppo, "start_envs", lambda args, iteration: seeded(args, 1))
    flags = {"max_episode_frames": 400, "num_steps": 256, "total_timesteps": 512}
    run_dir = train(ppo, tmp_path, **flags, env_id="Breakout", update_epochs=1)

    expected = play("Breakout", 256, lambda t: 0, max_episode_frames=400)
    done = expected.terminated | expected.truncated
    assert expected.terminated.any() and expected.truncated.any()
    ((inputs, advantages),) = gaes
    rewards, values, seen_terminated, seen_done, *_ = inputs
    np.testing.assert_array_equal(rewards, np.sign(expected.reward))
    np.testing.assert_array_equal(seen_terminated, expected.terminated)
    np.testing.assert_array_equal(seen_done, done)

    fill_up = np.arange(512) % expected.valid.sum()
    assert expected.valid.sum() < 500  # not only resets are dropped
    columns = {
        "obs": expected.obs[:-1],
        "old_values": values[:-1].numpy(),
        "advantages": advantages.numpy(),
        "returns": (advantages + values[:-1]).numpy(),
    }
    for name, column in columns.items():
        rows = torch.cat([batch[name] for (_, batch, _), _ in losses])
        np.testing.assert_array_equal(rows, column[expected.valid][fill_up], name)

    games, began = [], [0, 0]
    for t, n in np.argwhere(expected.new_game):
        games.append((2 * (t + 1), expected.reward[began[n] : t, n].sum(), t - began[n]))
        began[n] = t + 1  # a step that only resets belongs to no game
    assert len(games) >= 4
    logged = [tuple(map(float, game.values())) for game in read(run_dir / "episodes.csv")]
    assert sorted(games) == sorted(logged)


def test_a_lost_life_and_a_time_limit_bootstrap_as_they_should(tmp_path, record):
    """Frame limits are bootstrapped unless switched off; lost lives never."""
    gaes = record(ppo, "compute_gae")
    flags = {"env_id": "Pong", "max_episode_frames": 400, "num_steps": 128}
    for bootstrap in (True, False):
        train(ppo, tmp_path, **flags, total_timesteps=256, bootstrap_truncated=bootstrap)
    (_, _, first, done, *_), (_, _, second, _, *_) = (inputs for inputs, _ in gaes)
    assert done.sum() == 2 and not first.any() and torch.equal(second, done)


@pytest.mark.parametrize(("bf16", "tolerance"), [("off", 1e-5), ("on", 0.02)])
def test_the_first_minibatch_of_every_update_has_ratio_one(
    tmp_path, record, bf16, tolerance
):
    losses = record(ppo, "ppo_loss")
    train(
        ppo, tmp_path, env_id="Breakout", total_timesteps=96, bf16=bf16, learning_rate=1e-3
    )
    deviations = [logged["max_ratio_dev"].item() for _, (_, logged) in losses]
    firsts = deviations[::4]
    assert len(firsts) == 3 and max(firsts) < tolerance < max(deviations)


def test_one_seed_decides_everything_in_real_games(tmp_path):
    flags = {"env_id": "Breakout", "max_episode_frames": 400, "num_steps": 64}
    flags["total_timesteps"] = 256
    run = outcome(train(ppo, tmp_path, **flags))
    assert run == outcome(train(ppo, tmp_path, **flags)) and len(run[0]) == 2


class Sides(gym.vector.VectorEnv):
    """The lit side of the newest frame is the action that pays 1."""

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
        self.generator = np.random.default_rng(seed)
        self.steps = np.zeros(self.num_envs, int)
        return self.observe(), {}

    def step(self, actions):
        new_game = self.steps == 10
        reward = np.where(new_game, 0, actions == self.side).astype(np.int32)
        self.steps = np.where(new_game, 0, self.steps + 1)
        terminated = self.steps == 10
        info = {"new_game": new_game, "valid": ~new_game}
        return self.observe(), reward, terminated, np.zeros_like(terminated), info


@pytest.mark.slow
def test_it_learns_from_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo, "make_envs", lambda args, in_colour=False: Sides(args))
    flags = {"num_envs": 4, "num_steps": 32, "num_minibatches": 2, "update_epochs": 4}
    flags |= {"learning_rate": 1e-3, "total_timesteps": 4096}
    run_dir = train(ppo, tmp_path, **flags)
    scores = [float(game["episodic_return"]) for game in read(run_dir / "episodes.csv")]
    assert np.mean(scores[:20]) < 7 and np.mean(scores[-20:]) > 9
    args = make_args(ppo, num_envs=4, eval_episodes=2, greedy=True)
    np.testing.assert_array_equal(
        ppo.evaluate(ppo.load_agent(run_dir), args), np.full((4, 2), 10)
    )


# Films


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
    args = make_args(ppo, **flags, evaluate=str(tmp_path))
    agent = make_agent("Pong")
    returns = ppo.evaluate(agent, args)
    assert returns.shape == (2, 2) and returns.any() and not FakeWriter.film

    seen, features = [], agent.features
    agent.features = lambda obs: seen.append(obs[0, -1].numpy().copy()) or features(obs)
    args.capture_video = True
    np.testing.assert_array_equal(returns, ppo.evaluate(agent, args))
    film = FakeWriter.film
    assert 360 <= len(film) <= 402 and len(film) < len(seen)  # two games of up to 200 steps
    assert film[100].shape == (210, 160, 3)
    assert (film[100].max(2) > film[100].min(2)).any()  # in colour
    for picture, obs in zip(film, seen[1:]):
        grey = picture @ [0.299, 0.587, 0.114]
        means = grey.reshape(42, 5, 4, 40).mean((1, 3))  # of tiles: shrinking keeps them
        np.testing.assert_allclose(obs.reshape(42, 2, 4, 21).mean((1, 3)), means, atol=2)


def test_evaluate_writes_a_film(tmp_path, call):
    run_dir = train(
        ppo, tmp_path, env_id="Pong", total_timesteps=32, max_episode_frames=400
    )
    flags = ["--capture-video", "--eval-episodes=2", "--num-envs=3"]
    status, output, errors = call(ppo, "--evaluate", run_dir, *flags)
    assert status == 0 and len(output.splitlines()[1].split()) == 6, errors
    (path,) = (run_dir / "videos").iterdir()
    film = VideoFileClip(str(path))
    assert path.suffix == ".mp4" and film.size == [160, 210] and film.fps == 15
    assert 180 <= film.n_frames <= 202  # two games of at most 100 steps
    film.close()


# Several processes

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TWO = {
    "num_envs": 2,
    "num_minibatches": 2,
    "update_epochs": 2,
    "threads": 1,
    "device": "cpu",
}


@pytest.mark.slow
def test_a_killed_torchrun_resumes(tmp_path, start, finish):
    flags = TWO | {"env_id": "Pong", "num_steps": 100, "max_episode_frames": 600}
    flags |= {"total_timesteps": 8 * 400, "save_every": 3}
    killed = start(ppo, *as_flags(flags), launcher=TORCHRUN)
    run_dir = wait_for_rows(killed, tmp_path / "runs", 5)
    # The second process: torchrun ends the first.
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed.communicate(timeout=120)
    assert killed.returncode != 0

    done = torch.load(run_dir / "checkpoint.pt")["iteration"]
    metrics, _ = outcome(run_dir)
    status, _, errors = finish(ppo, "--resume", run_dir, launcher=TORCHRUN)
    assert status == 0 and done >= 3, errors
    all_metrics, games = outcome(run_dir)
    assert metrics[:done] == all_metrics[:done]
    assert [int(row["iteration"]) for row in all_metrics] == list(range(1, 9))
    steps = [int(row["global_step"]) for row in games]
    assert len(steps) >= 6 and steps == sorted(steps)
    status, _, errors = finish(ppo, "--evaluate", run_dir, launcher=TORCHRUN)
    assert status != 0 and "--evaluate" in errors


@pytest.mark.slow
def test_two_processes_train_one_agent(tmp_path, finish, call):
    """See ranks.py. Three iterations of two epochs, two minibatches; games of 100 steps."""
    flags = TWO | {"env_id": "Freeway", "num_steps": 128, "max_episode_frames": 400}
    flags |= {"total_timesteps": 1536, "bf16": "off", "save_every": 1, "target_kl": 4.5}
    flags |= {"max_grad_norm": 0.01, "runs_dir": tmp_path / "runs"}
    program = SimpleNamespace(__file__=str(Path(__file__).parent / "ranks.py"))
    status, _, errors = finish(
        program, tmp_path / "rank", *as_flags(flags), launcher=TORCHRUN
    )
    assert status == 0, errors
    first, second = (
        torch.load(tmp_path / f"rank-{rank}", weights_only=False) for rank in (0, 1)
    )
    run_dir = only_run(tmp_path / "runs")  # process 0 alone writes
    metrics, games = read(run_dir / "metrics.csv"), read(run_dir / "episodes.csv")

    # Weights are equal although they began differently; games and permutations are not.
    assert first["weights"] == second["weights"] and len(set(first["weights"])) == 10
    first_obs = [obs.tobytes() for obs in first["first_obs"] + second["first_obs"]]
    assert len(first_obs) == len(set(first_obs)) == 4
    for one, other in zip(first["orders"], second["orders"], strict=True):
        assert one.shape == other.shape and not torch.equal(one, other)

    # The gradient is that of the rows of both, and it is clipped after averaging.
    agent = make_agent("Freeway")
    agent.load_state_dict(first["agent"])
    args = make_args(ppo, env_id="Freeway")
    losses = [ppo.ppo_loss(agent, rank["minibatch"], args)[0] for rank in (first, second)]
    torch.stack(losses).mean().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in agent.parameters()])
    norm = gradient.norm()
    assert norm > 0.02
    for rank in (first, second):
        clipped = rank["clipped_gradients"][0]
        torch.testing.assert_close(clipped, gradient * 0.01 / norm, rtol=1e-3, atol=1e-7)
    assert torch.equal(first["clipped_gradients"][-1], second["clipped_gradients"][-1])

    # The mean KL of an epoch is 0.75, 1.75, …, 4.75, which ends the third iteration; the
    # second process alone would have stopped in the second iteration, the first never.
    assert first["minibatches"] == second["minibatches"] == 4 + 4 + 2

    # Steps of all processes, games of process 0.
    assert [int(row["global_step"]) for row in metrics] == [512, 1024, 1536]
    ends = [4 * 101 * i for i in (1, 1, 2, 2, 3, 3)]  # 100 steps and one that resets
    assert [int(game["global_step"]) for game in games] == ends

    status, _, errors = call(ppo, "--resume", run_dir)
    assert status == 2 and errors.count("\n") == 1 and "2 processes" in errors
