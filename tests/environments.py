"""Small environments for the tests. Importing this registers them, as an id like
environments:Stub-v0 does."""

import os
import time

import gymnasium as gym
import numpy as np


class Stub(gym.Env):
    """Episodes of five steps with reward 1; the spaces come from the registration."""

    metadata = {"render_modes": []}

    def __init__(self, observations=None, actions=None, render_mode=None):
        self.observation_space = observations or gym.spaces.Box(-1, 1, (2,))
        self.action_space = actions or gym.spaces.Discrete(2)
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == 5, False, {}


gym.register("Stub-v0", Stub)
gym.register("StubShort-v0", Stub, max_episode_steps=1)


# For test_bad_input.py: one environment for each thing that ppo.py must refuse.


def same_step_vector(num_envs, **kwargs):
    """A vector environment that resets within the step that ends an episode."""
    make = lambda: Stub(**kwargs)
    mode = gym.vector.AutoresetMode.SAME_STEP
    return gym.vector.SyncVectorEnv([make] * num_envs, autoreset_mode=mode)


box = gym.spaces.Box(-1, 1, (2,))
gym.register("StubMultiDiscrete-v0", Stub, kwargs={"actions": gym.spaces.MultiDiscrete([2, 3])})
gym.register("StubSameStep-v0", Stub, vector_entry_point=same_step_vector)
gym.register(
    "StubBoxSameStep-v0", Stub, vector_entry_point=same_step_vector, kwargs={"actions": box}
)


# For test_runs.py.


class NanReward(Stub):
    """A Stub whose reward is not a number after good_steps steps of all its instances."""

    good_steps = 0

    def step(self, action):
        NanReward.good_steps -= 1
        observation, reward, *rest = super().step(action)
        return observation, reward if NanReward.good_steps >= 0 else float("nan"), *rest


class Slow(Stub):
    """A Stub whose every step takes $SLOW seconds, so that a test can stop it."""

    def step(self, action):
        time.sleep(float(os.environ.get("SLOW", 0)))
        return super().step(action)


gym.register("NanReward-v0", NanReward)
gym.register("Slow-v0", Slow)


# For test_training.py: known values, spaces that need flattening, a simulator that keeps state.


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


class Mixed(Ring):
    """A Ring whose observation is a Dict of a matrix and a Tuple of discrete values."""

    observation_space = gym.spaces.Dict(
        {
            "matrix": gym.spaces.Box(-1, 1, (2, 2)),
            "tuple": gym.spaces.Tuple([gym.spaces.Discrete(3), gym.spaces.MultiBinary(2)]),
        }
    )

    def observe(self):
        values = (self.state, np.array([0, 1], np.int8))
        return {"matrix": np.eye(2, dtype=np.float32), "tuple": values}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        return self.observe(), *super().step(action)[1:]


class Walker(gym.Wrapper):
    """BipedalWalker, whose solver keeps its state across resets, with four discrete actions."""

    torques = np.array([[1, 0, -1, 0], [-1, 1, 0, 0], [0, 0, 1, -1], [0, 1, 0, 1]], np.float32)

    def __init__(self):
        super().__init__(gym.make("BipedalWalker-v3").unwrapped)
        self.action_space = gym.spaces.Discrete(4)

    def step(self, action):
        return self.env.step(self.torques[action])


gym.register("Ring-v0", Ring, max_episode_steps=4)
gym.register("RingTerminal-v0", Ring, kwargs={"terminal": True})
gym.register("Mixed-v0", Mixed, max_episode_steps=4)
gym.register("Walker-v0", Walker, max_episode_steps=100)


# For test_reference.py.


class Bandit(gym.Env):
    """One step per episode; each of four actions has its reward."""

    rewards = [0.0, 0.5, 1.0, -1.0]
    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        return np.ones(1, np.float32), self.rewards[action], True, False, {}


gym.register("Bandit-v0", Bandit)
