"""What ppo_atari.py does differently: network, games, films, several processes."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SMALL, as_flags, make_agent, make_args, only_run, outcome, read, train
from moviepy import VideoFileClip
from test_equations import assert_orthogonal
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


# The network


def test_the_network_for_pixels():
    """Convolutions of Mnih et al. 2015, a ReLU after every layer; gains √2, policy 0.01,
    value 1, zero biases."""
    agent = make_agent(ppo)
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
    agent = make_agent(ppo)
    obs = torch.randint(256, (5, 4, 84, 84), dtype=torch.uint8)
    x = obs.double() / 255
    for layer in agent.network.double():
        x = layer(x)
    agent.float()
    assert x.min() == 0 < x.max()  # the last layer has a ReLU, too
    torch.testing.assert_close(agent.features(obs).double(), x, rtol=1e-3, atol=1e-5)


def test_bf16_is_close_to_fp32():
    generator = np.random.default_rng(0)
    obs = play("Breakout", 31, lambda t: generator.integers(0, 4, 4), num_envs=4).obs
    agent, args = make_agent(ppo), ppo.Args()
    batch = {"obs": torch.from_numpy(obs).flatten(0, 1)}
    batch["actions"] = torch.randint(0, 4, (len(batch["obs"]),))
    with torch.no_grad():
        x = agent.features(batch["obs"])
        batch["old_log_probs"], _ = agent.evaluate_actions(x, batch["actions"])
    for name in ("old_values", "advantages", "returns"):
        batch[name] = torch.randn(len(x))
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


# Games


@pytest.mark.parametrize(("found", "expected"), [("avx512_bf16", True), ("avx2", False)])
def test_bf16_is_used_where_it_is_supported(monkeypatch, found, expected):
    capabilities = {found: True, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert ppo.choose_bf16(ppo.Args(bf16="auto"), torch.device("cpu")) is expected


@pytest.mark.parametrize("part", ["policy", "value"])
def test_policy_and_value_both_train_the_shared_network(part):
    agent = make_agent(ppo)
    obs = torch.randint(256, (8, 4, 84, 84), dtype=torch.uint8)
    batch = {"obs": obs, "actions": torch.randint(4, (8,)), "old_log_probs": torch.zeros(8)}
    batch |= {name: torch.randn(8) for name in ("old_values", "advantages", "returns")}
    flags = {"ent_coef": 0.0, "vf_coef": float(part == "value")}
    if part == "value":
        batch["advantages"] = torch.zeros(8)
    ppo.ppo_loss(agent, batch, ppo.Args(**flags))[0].backward()
    assert all(p.grad.abs().max() > 1e-6 for p in agent.network.parameters())


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for rank in (0, 1):
        monkeypatch.setattr(ppo, "LOCAL_RANK", rank)
        ppo.set_up_torch(ppo.Args())
    assert chosen == [0, 1]
    monkeypatch.setattr(ppo, "LOCAL_RANK", 2)
    with pytest.raises(ppo.UsageError, match="more processes than GPUs"):
        ppo.set_up_torch(ppo.Args())


def test_all_names_of_a_game_are_that_game():
    names = ["ALE/Pong-v5", "Pong", "PongNoFrameskip-v4"]
    first, *others = (play(name, 200, lambda t: t % 6).reward for name in names)
    assert first.any() and all((rewards == first).all() for rewards in others)


def test_the_beginning_of_a_game():
    """No-ops, up to 29; a step has four frames; observations are those of four steps."""
    envs = ppo.make_envs(ppo.Args(env_id="Freeway", num_envs=16))
    obs, info = envs.reset(seed=1)
    frames = info["episode_frame_number"]
    assert obs.shape == (16, 4, 84, 84) and obs.dtype == np.uint8
    assert len(set(frames)) > 5 and 20 < max(frames) < 30
    for t in range(1, 4):
        before = obs
        obs, *_, info = envs.step(np.zeros(16, int))
        np.testing.assert_array_equal(info["episode_frame_number"], frames + 4 * t)
        np.testing.assert_array_equal(obs[:, :3], before[:, 1:])
        assert (obs[:, 3] != obs[:, 2]).any()
    envs.close()


def test_a_step_shows_the_maximum_of_its_last_two_frames():
    colour = {"grayscale": False, "img_height": 210, "img_width": 160, "stack_num": 1}
    steps = ppo.make_envs(ppo.Args(env_id="Freeway", num_envs=1), in_colour=True)
    frames = gym.make_vec("ALE/Freeway-v5", 1, **colour, frameskip=1, maxpool=False)
    for envs in (steps, frames):
        envs.reset(seed=1)
    shown = steps.step(np.zeros(1, int))[0]
    last = [frames.step(np.zeros(1, int))[0].copy() for _ in range(4)]
    np.testing.assert_array_equal(shown, np.maximum(last[2], last[3]))
    assert (shown != last[3]).any()


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


def test_a_game_can_end_with_a_life_left():
    """In Adventure a dragon ends the game. In Pong there are no lives."""
    generator = np.random.default_rng(0)
    rows = play("Adventure", 420, lambda t: generator.integers(0, 18, 2), seed=0)
    ((step, n),) = np.argwhere(rows.terminated)
    assert rows.lives[step, n] == 1 and not rows.truncated.any()
    assert rows.new_game[step + 1, n] and rows.new_game.sum() == (~rows.valid).sum() == 1
    rows = play("Pong", 1000, lambda t: 0)
    for n in range(2):
        end = np.flatnonzero(rows.terminated[:, n])[0]
        assert rows.reward[: end + 1, n].sum() == -21 and rows.lives[end, n] == 0
        assert np.flatnonzero(rows.new_game[:, n])[0] == end + 1
        assert not rows.valid[end + 1, n]


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
    gaes.clear()
    train(ppo, tmp_path, **flags | {"env_id": "Pong"}, total_timesteps=512)
    assert set(rewards().tolist()) == {-1, 0}  # the other side scores


@pytest.mark.parametrize(("bf16", "tolerance"), [("off", 1e-5), ("on", 0.02)])
def test_training_on_a_real_game(tmp_path, record, unshuffled, bf16, tolerance):
    """It repeats, begins with ratio 1, and drops the rows of FIRE."""
    losses, features = record(ppo, "ppo_loss"), record(ppo.Agent, "features")
    gaes = record(ppo, "compute_gae")
    flags = {"env_id": "Breakout", "bf16": bf16, "learning_rate": 1e-3}
    flags |= {"num_steps": 64, "total_timesteps": 256}
    first, second = (outcome(train(ppo, tmp_path, **flags)) for _ in range(2))
    deviations = [logged["max_ratio_dev"].item() for _, (_, logged) in losses]
    assert max(deviations[::4]) < tolerance < max(deviations)
    assert first == second and len(first[0]) == 2
    assert {agent.bf16 for (agent, _), _ in features} == {bf16 == "on"}
    (_, _, _, done, *_), advantages = gaes[0]
    valid = ~after(done.numpy())  # no game ends so early, but lives are lost
    rows = torch.cat([batch["advantages"] for (_, batch, _), _ in losses[:2]])
    assert valid.sum() < 128 and torch.equal(rows[: valid.sum()], advantages[valid])


# Films


def test_a_film_shows_what_the_agent_sees_and_changes_nothing(tmp_path, call, monkeypatch):
    class Writer(ppo.FFMPEG_VideoWriter):
        def write_frame(self, picture):
            film.append(picture.copy())
            super().write_frame(picture)

    film, seen, features = [], [], ppo.Agent.features
    keep = lambda agent, obs: seen.append(obs[0, -1].numpy().copy()) or features(agent, obs)
    monkeypatch.setattr(ppo, "FFMPEG_VideoWriter", Writer)
    monkeypatch.setattr(ppo.Agent, "features", keep)
    run_dir = train(ppo, tmp_path, env_id="Pong", max_episode_frames=600)
    flags = ["--evaluate", run_dir, "--num-envs=2", "--eval-episodes=2"]
    status, output, _ = call(ppo, *flags)
    assert status == 0 and not film
    seen.clear()
    assert call(ppo, *flags, "--capture-video")[:2] == (0, output)
    assert 270 <= len(film) <= 302 and len(film) < len(seen)  # two games of up to 150 steps
    assert (film[100].max(2) > film[100].min(2)).any()  # in colour
    for picture, obs in zip(film, seen[1:]):
        grey = picture @ [0.299, 0.587, 0.114]
        means = grey.reshape(42, 5, 4, 40).mean((1, 3))  # of tiles: shrinking keeps them
        np.testing.assert_allclose(obs.reshape(42, 2, 4, 21).mean((1, 3)), means, atol=2)

    (path,) = (run_dir / "videos").iterdir()
    with VideoFileClip(str(path)) as clip:
        assert path.suffix == ".mp4" and clip.size == [160, 210] and clip.fps == 15
        assert clip.n_frames == pytest.approx(len(film), abs=1)


# Several processes

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.slow
def test_two_processes_train_one_agent(tmp_path, finish, call):
    """See ranks.py. Three iterations of two epochs, two minibatches; games of 100 steps."""
    flags = SMALL | {"env_id": "Freeway", "num_steps": 128, "max_episode_frames": 400}
    flags |= {"threads": 1, "device": "cpu"}
    flags |= {"total_timesteps": 1536, "bf16": "off", "save_every": 1, "target_kl": 4.5}
    flags |= {"max_grad_norm": 0.01, "runs_dir": tmp_path / "runs"}
    program = SimpleNamespace(__file__=str(Path(__file__).parent / "ranks.py"))
    argv = [tmp_path / "rank", *as_flags(flags)]
    status, _, errors = finish(program, *argv, launcher=TORCHRUN)
    assert status == 0, errors
    first, second = (torch.load(tmp_path / f"rank-{rank}") for rank in (0, 1))
    run_dir = only_run(tmp_path / "runs")  # process 0 alone writes
    metrics, games = read(run_dir / "metrics.csv"), read(run_dir / "episodes.csv")

    # Weights are equal although they began differently; games and permutations are not.
    assert first["weights"] == second["weights"] and len(set(first["weights"])) == 10
    assert not torch.equal(first["minibatch"]["obs"], second["minibatch"]["obs"])
    for one, other in zip(first["orders"], second["orders"], strict=True):
        assert one.shape == other.shape and not torch.equal(one, other)

    # The gradient is that of the rows of both, and it is clipped after averaging.
    agent = make_agent(ppo, actions=3)
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
    ends = [4 * (101 * i - 1) for i in (1, 1, 2, 2, 3, 3)]  # 100 steps, and a reset between
    assert [int(game["global_step"]) for game in games] == ends

    status, _, errors = call(ppo, "--resume", run_dir)
    assert status == 2 and errors.count("\n") == 1 and "2 processes" in errors

    # With more steps to play, the run goes on.
    settings = json.loads((run_dir / "args.json").read_text()) | {"total_timesteps": 2560}
    (run_dir / "args.json").write_text(json.dumps(settings))
    status, _, errors = finish(ppo, "--resume", run_dir, launcher=TORCHRUN)
    assert status == 0, errors
    metrics = read(run_dir / "metrics.csv")
    assert [int(row["global_step"]) for row in metrics] == [512, 1024, 1536, 2048, 2560]
    status, _, errors = finish(ppo, "--evaluate", run_dir, launcher=TORCHRUN)
    assert status != 0 and "--evaluate" in errors
