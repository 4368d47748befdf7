"""Small environments for the tests. Importing this registers them.

NAME-v0 has two discrete actions, NAMEBox-v0 is the same with one continuous action, and
`Pictures` shows any of them as ppo_atari.py wants it.
"""

import os
import time

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.vector import AutoresetMode


class Stub(gym.Env):
    """Episodes of `length` steps with reward 1, or endless ones; the spaces come from the
    registration. A step takes $SLOW seconds, so that a test can stop it."""

    metadata = {"render_modes": []}

    def __init__(self, observations=None, actions=None, length=5, render_mode=None):
        self.observation_space = observations or gym.spaces.Box(-1, 1, (2,))
        self.action_space = actions or gym.spaces.Discrete(2)
        self.length, self.steps = length, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        time.sleep(float(os.environ.get("SLOW", 0)))
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == self.length, False, {}


class Faulty(Stub):
    """A Stub that after good_steps steps of all instances has rewards that are not numbers,
    or fails."""

    good_steps, fails = 0, False

    def step(self, action):
        Faulty.good_steps -= 1
        observation, reward, *rest = super().step(action)
        if Faulty.good_steps < 0 and Faulty.fails:
            raise RuntimeError("the environment is broken")
        return observation, reward if Faulty.good_steps >= 0 else float("nan"), *rest


class Ring(gym.Env):
    """Three states in a circle, left in turn with reward 1, 2, 3 whatever the action.

    With `terminal`, arriving at state 0 ends the episode.
    """

    observation_space, action_space = gym.spaces.Discrete(3), gym.spaces.Discrete(2)

    def __init__(self, terminal=False):
        self.terminal = terminal

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return 0, {}

    def step(self, action):
        assert self.action_space.contains(action), action
        reward, self.state = self.state + 1.0, (self.state + 1) % 3
        return self.state, reward, self.terminal and self.state == 0, False, {}


class Sides(gym.Env):
    """Ten steps; the action that has the number of the state pays 1, another nothing."""

    observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.state = 0, int(self.np_random.integers(2))
        return self.state, {}

    def step(self, action):
        reward = float(action == self.state)
        self.steps, self.state = self.steps + 1, int(self.np_random.integers(2))
        return self.state, reward, self.steps == 10, False, {}


class Drift(gym.Env):
    """Ten steps; a dot drifts to the left or to the right over a picture, and the action
    that tells the direction pays 1. One picture shows no direction."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, colours=()):
        self.observation_space = gym.spaces.Box(0, 255, (12, 12, *colours), np.uint8)

    def draw(self):
        picture = np.zeros(self.observation_space.shape, np.uint8)
        picture[self.row, self.column] = 255
        return picture

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.column = self.np_random.integers(12, size=2)
        self.steps, self.direction = 0, int(self.np_random.integers(2))
        return self.draw(), {}

    def step(self, action):
        self.steps += 1
        self.column = (self.column + 2 * self.direction - 1) % 12
        return self.draw(), float(action == self.direction), self.steps == 10, False, {}


class Locks(gym.Env):
    """Ten steps; two of 30 actions are possible, others in each of five states. The first
    of the two pays 1. An impossible one pays nothing or, with `strict`, is an error."""

    observation_space, action_space = gym.spaces.Discrete(5), gym.spaces.Discrete(30)

    def __init__(self, strict=False):
        self.strict = strict

    def observe(self):
        self.state = int(self.np_random.integers(5))
        mask = np.zeros(30, np.int8)
        mask[6 * self.state : 6 * self.state + 2] = 1
        return self.state, {"action_mask": mask} if self.steps < 10 else {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe()

    def step(self, action):
        choice = action - 6 * self.state
        assert choice in (0, 1) or not self.strict, "an impossible action"
        self.steps += 1
        state, info = self.observe()
        return state, float(choice == 0), self.steps == 10, False, info


class Copy(gym.Env):
    """Ten steps; an action that equals the observation in each component pays 1."""

    def __init__(self, space):
        self.observation_space = self.action_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps, self.shown = 0, self.observation_space.sample()
        return self.shown, {}

    def step(self, action):
        assert self.action_space.contains(action), action
        reward, self.shown = np.all(action == self.shown), self.observation_space.sample()
        self.steps += 1
        return self.shown, float(reward), self.steps == 10, False, {}


class OneNumber(gym.ActionWrapper):
    """Takes a number of ±2 instead of two actions: 0 where it is negative, else 1."""

    def __init__(self, env):
        super().__init__(env)
        self.action_space = gym.spaces.Box(-2, 2, (1,))

    def action(self, number):
        return int(number[0] >= 0)


def register(name, make, **options):
    settings = options.pop("kwargs", {})
    box = lambda **more: OneNumber(make(**settings, **more))
    gym.register(f"{name}-v0", make, kwargs=settings, **options)
    gym.register(f"{name}Box-v0", box, **options)


register("Stub", Stub)
register("StubShort", Stub, kwargs={"length": 1})
register("Endless", Stub, kwargs={"length": None})
register("Faulty", Faulty)
register("Ring", Ring, max_episode_steps=4)
register("RingTerminal", Ring, kwargs={"terminal": True})
register("Sides", Sides)
register("Pole", CartPoleEnv, max_episode_steps=60)
gym.register("Locks-v0", Locks)
gym.register("LocksStrict-v0", Locks, kwargs={"strict": True})
gym.register("Drift-v0", Drift)
gym.register("DriftColour-v0", Drift, kwargs={"colours": (3,)})
SPACES = {"Pair": gym.spaces.MultiDiscrete([2, 3]), "Bits": gym.spaces.MultiBinary(3)}
SPACES |= {"Square": gym.spaces.MultiDiscrete([[2, 2], [2, 2]])}
for name, space in (SPACES | {"Four": gym.spaces.Discrete(4)}).items():
    gym.register(f"{name}-v0", Copy, kwargs={"space": space})


# What the scripts must refuse.


def same_step_vector(num_envs, **kwargs):
    """A vector environment that resets within the step that ends an episode."""
    make = lambda: Stub(**kwargs)
    mode = AutoresetMode.SAME_STEP
    return gym.vector.SyncVectorEnv([make] * num_envs, autoreset_mode=mode)


def register_spaces(name, observations=None, actions=None):
    spaces = {"observations": observations, "actions": actions}
    gym.register(f"{name}-v0", Stub, kwargs=spaces)


BOX = gym.spaces.Box(-1, 1, (2,))
TUPLE = gym.spaces.Tuple([gym.spaces.Discrete(3), gym.spaces.MultiBinary(2)])
MATRIX = gym.spaces.Box(-1, 1, (2, 2))
register_spaces("Mixed", gym.spaces.Dict({"matrix": MATRIX, "tuple": TUPLE}))
register_spaces("Matrix", MATRIX)
register_spaces("MultiDiscrete", actions=gym.spaces.MultiDiscrete([2, 3]))
register_spaces("MultiFromOne", actions=gym.spaces.MultiDiscrete([2, 3], start=[0, 1]))
register_spaces("FromOne", actions=gym.spaces.Discrete(2, start=1))
register_spaces("Integers", actions=gym.spaces.Box(0, 3, (2,), np.int64))
register_spaces("Empty", actions=gym.spaces.Box(-1, 1, (0,)))
for suffix, actions in ("", None), ("Box", BOX):
    register_spaces(f"Sequence{suffix}", gym.spaces.Sequence(BOX), actions)
    register_spaces(f"Graph{suffix}", gym.spaces.Graph(BOX, None), actions)
    settings = {"vector_entry_point": same_step_vector, "kwargs": {"actions": actions}}
    gym.register(f"SameStep{suffix}-v0", Stub, **settings)


class Pictures(gym.vector.VectorWrapper):
    """Observations of D numbers as pictures of D bands, with AtariGames' info."""

    def __init__(self, envs):
        super().__init__(envs)
        (self.numbers,) = envs.single_observation_space.shape
        self.single_observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)

    def draw(self, obs):
        levels = np.clip(64 + 64 * obs, 0, 255).astype(np.uint8)
        bands = levels[:, np.arange(84) * self.numbers // 84]
        shape = (self.num_envs, 4, 84, 84)
        return np.broadcast_to(bands[:, None, :, None], shape).copy()

    def reset(self, **kwargs):
        self.done = np.zeros(self.num_envs, bool)
        obs, info = self.env.reset(**kwargs)
        return self.draw(obs), info

    def step(self, actions):
        obs, reward, terminated, truncated, info = self.env.step(actions)
        info |= {"valid": ~self.done, "new_game": self.done}
        self.done = terminated | truncated
        return self.draw(obs), reward, terminated, truncated, info
