"""Small environments for the tests; importing this registers them, as does an id like environments:Stub-v0."""

import os
import time

import gymnasium as gym
import numpy as np

# For test_bad_input.py: one environment for each thing that ppo.py must refuse.


class Stub(gym.Env):
    """An episode of five steps with reward 1; the spaces come from the registration."""

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


def same_step_vector(num_envs, **kwargs):
    """A vector environment that resets within the step that ends an episode."""
    make = lambda: Stub(**kwargs)
    return gym.vector.SyncVectorEnv([make] * num_envs, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


box = gym.spaces.Box(-1, 1, (2,))
gym.register("Stub-v0", Stub)
gym.register("StubImages-v0", Stub, kwargs={"observations": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)})
gym.register("StubMultiDiscrete-v0", Stub, kwargs={"actions": gym.spaces.MultiDiscrete([2, 3])})
gym.register("StubSequence-v0", Stub, kwargs={"observations": gym.spaces.Sequence(box)})
gym.register("StubGraph-v0", Stub, kwargs={"observations": gym.spaces.Graph(box, box)})
gym.register("StubSameStep-v0", Stub, vector_entry_point=same_step_vector)
gym.register("StubBoxSameStep-v0", Stub, vector_entry_point=same_step_vector, kwargs={"actions": box})


# For test_runs.py.


class NanReward(Stub):
    """A Stub whose reward is not a number after as many steps of all its instances together as good_steps says."""

    good_steps = 0

    def step(self, action):
        NanReward.good_steps -= 1
        observation, reward, *rest = super().step(action)
        return observation, reward if NanReward.good_steps >= 0 else float("nan"), *rest


class Slow(Stub):
    """A Stub that sleeps in every step while the variable SLOW stands in the environment, to be stopped meanwhile."""

    def step(self, action):
        time.sleep(float(os.environ.get("SLOW", 0)))
        return super().step(action)


gym.register("NanReward-v0", NanReward)
gym.register("Slow-v0", Slow)


# For test_training.py: worlds whose values are known, spaces that need flattening, simulators that remember.


class Ring(gym.Env):
    """Three states in a circle, left in turn with reward 1, 2, 3 whatever the action; a time limit is registered.

    With `terminal`, arriving at state 0 ends the episode.
    """

    observation_space, action_space = gym.spaces.Discrete(3), gym.spaces.Discrete(2, start=5)

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
        return {"matrix": np.eye(2, dtype=np.float32), "tuple": (self.state, np.array([0, 1], np.int8))}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        return self.observe(), *super().step(action)[1:]


class Walker(gym.Wrapper):
    """BipedalWalker, which keeps the state of its solver across reset, with four actions to choose from."""

    def __init__(self):
        super().__init__(gym.make("BipedalWalker-v3").unwrapped)
        self.action_space = gym.spaces.Discrete(4)

    def step(self, action):
        return self.env.step(np.array([[1, 0, -1, 0], [-1, 1, 0, 0], [0, 0, 1, -1], [0, 1, 0, 1]][action], np.float32))


gym.register("Ring-v0", Ring, max_episode_steps=4)
gym.register("RingTerminal-v0", Ring, kwargs={"terminal": True})
gym.register("Mixed-v0", Mixed, max_episode_steps=4)
gym.register("Walker-v0", Walker, max_episode_steps=100)
