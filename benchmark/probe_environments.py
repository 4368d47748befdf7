"""Probes: tiny environments in which the right answer can be worked out on paper.

Importing this registers them: ProbeNAME-v0 has two discrete actions, ProbeNAMEBox-v0 one
continuous action. `gym.make("probe_environments:ProbeEnds-v0")` does both.

γ is 1/2 where nothing else is said. In most environments the actions do not matter, and the
answer is the value V of a state. They are built so that one mistake shows and the others do
not: where a row with another mistake would be learned from, its target is V all the same.
For example, many PPO loops also learn from a row that only resets: observation, the last
one; reward, 0; next observation, the next episode's first one. So in all environments but
`Reset`, V(last) = γ V(first), if the last state is one that is learned.
"""

import gymnasium as gym
import numpy as np

START = 0  # the state in which most episodes begin


class Probe(gym.Env):
    """Observations have a 1 at the number of the state, else 0."""

    states = 1
    high = 1.0  # continuous actions are numbers from -high to high
    limit = None  # of steps, at which Gymnasium cuts an episode short

    def __init__(self, continuous=False):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (self.states,), np.float32)
        bounds = gym.spaces.Box(-self.high, self.high, (1,), np.float32)
        self.action_space = bounds if continuous else gym.spaces.Discrete(2)
        self.continuous = continuous

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.first()
        return self.observe(), {}

    def first(self):
        return START

    def observe(self):
        return np.eye(self.states, dtype=np.float32)[self.state]

    def number(self, action):
        """The continuous action, or -0.5 and 0.5 for the discrete ones."""
        action = np.asarray(action).item()
        return action if self.continuous else action - 0.5


class Ends(Probe):
    """Episodes of two steps: the start, which pays 3, then one of three states. From there
    nothing else would be seen, but the episode ends:
        1: terminates, pays 2                    V = 2
        2: a time limit cuts it short, pays 1    V = 1 + ½ V, so V = 2
        3: both in the same step, pays 2         V = 2
    V(start) = 3 + ½ · 2 = 4. Termination counts in state 3: what is over needs no limit.
    """

    states, kinds = 4, [1, 2, 3]

    def step(self, action):
        if self.state == START:
            self.state = int(self.np_random.choice(self.kinds))
            return self.observe(), 3.0, False, False, {}
        terminated, truncated = self.state != 2, self.state != 1
        return self.observe(), 2.0 if terminated else 1.0, terminated, truncated, {}


class Termination(Ends):
    """Ends by termination only. Counting a future after it: V(1) = 2 + ½ V(1) = 4."""

    kinds = [1]


class Limit(Ends):
    """Ends by a time limit only. Without the future after it: V(2) = 1. With that of the
    next episode's start in its place: V(2) = 1 + ½ · 4 = 3."""

    kinds = [2]


class Ring(Probe):
    """Three states in a circle; state 1 pays 3½, the others nothing. A limit of five steps,
    0 1 2 0 1, ends in state 2.
    V(1) = 3½ + ½ V(2), V(2) = ½ V(0), V(0) = ½ V(1): V(0) = 2, V(1) = 4, V(2) = 1.
    At the limit V(2) is to be counted. Not V(1) = 4, that of the state before: V(1) rises.
    """

    states, limit = 3, 5

    def step(self, action):
        reward = 3.5 if self.state == 1 else 0.0
        self.state = (self.state + 1) % 3
        return self.observe(), reward, False, False, {}


class Endless(Probe):
    """One state without end that pays 0.2. γ = 0.9: V = 0.2 + 0.9 V = 2. A loop that counts
    no future after the last step of a rollout learns less."""

    def step(self, action):
        return self.observe(), 0.2, False, False, {}


class Reset(Probe):
    """Two steps: the first pays 1, the second nothing, and its state is seen once more.
    γ = 0.9: V(1) = 0, V(0) = 1 + 0.9 V(1) = 1. Here V(last) = 0 is not γ V(first) = 0.9: a
    loop that learns from the row that only resets learns a V(1) between the two.
    """

    states = 2

    def step(self, action):
        reward, terminated = 1.0 - self.state, self.state == 1
        self.state = 1
        return self.observe(), reward, terminated, False, {}


class Leak(Probe):
    """Episodes of one step, in turn: state 0, which pays 0 and terminates; state 1, pays 1;
    state 2, pays 0 and is cut short; state 1 again, pays -1. All end in state 1.
    V(0) = V(2) = 0; V(1) = 0 on average. γ = 0.9. If the trace of the advantages goes on
    into the next episode, V(0) rises by γλ (terminated) or V(2) falls by γλ (cut short).
    """

    states, turn = 3, -1

    def first(self):
        self.turn = (self.turn + 1) % 4
        return [0, 1, 2, 1][self.turn]

    def step(self, action):
        reward, cut = [0.0, 1.0, 0.0, -1.0][self.turn], self.state == 2
        self.state = 1
        return self.observe(), reward, not cut, cut, {}


class Shift(Probe):
    """One step from state 0 or 1, by chance, which pays -1 or 1: V(0) = -1, V(1) = 1. It
    ends in state 2. A reward stored one row too early or too late meets another state, so
    that both values are 0 on average."""

    states = 3

    def first(self):
        return int(self.np_random.integers(2))

    def step(self, action):
        reward = 2.0 * self.state - 1
        self.state = 2
        return self.observe(), reward, True, False, {}


class Bounds(Probe):
    """One step; actions from -3 to 3, of which 2½ is best: a reward of -(action - 2½)²."""

    high = 3.0

    def step(self, action):
        return self.observe(), -((self.number(action) - 2.5) ** 2), True, False, {}


class Scale(Probe):
    """One step; observations of 999 and 1001, by chance; rewards of a thousandth. The best
    action is -1 for 999 and 1 for 1001, or the nearest. Without normalisation the two look
    alike, and the best action for both is 0."""

    def first(self):
        return 2 * int(self.np_random.integers(2)) - 1

    def observe(self):
        return np.array([1000 + self.state], np.float32)

    def step(self, action):
        reward = -1e-3 * (self.number(action) - self.state) ** 2
        self.state = 0
        return self.observe(), reward, True, False, {}


class Far(Probe):
    """A negative action at the start ends the episode with a reward of ½. Others lead down
    a path of 20 more steps, the last of which pays 1. γ = 0.99: the path is worth
    0.99^20 = 0.82, more than ½. With γ = 0.95 it would be worth 0.36, with 0.9 0.12."""

    states = 21

    def step(self, action):
        if self.state == START and self.number(action) < 0:
            return self.observe(), 0.5, True, False, {}
        at_end = self.state == self.states - 1
        self.state = min(self.state + 1, self.states - 1)
        return self.observe(), float(at_end), at_end, False, {}


class Stale(Probe):
    """Ten steps from state to state, by chance. The best action is -½ in states 0, 1, 2 and
    ½ in states 3, 4, 5. The state before or after an action tells nothing of what was best:
    where actions are chosen by it, or learned with it, all states have about the same."""

    states = 6

    def first(self):
        self.steps = 0
        return int(self.np_random.integers(6))

    def step(self, action):
        best = 0.5 if self.state >= 3 else -0.5
        reward = -((self.number(action) - best) ** 2)
        self.state, self.steps = int(self.np_random.integers(6)), self.steps + 1
        return self.observe(), reward, self.steps == 10, False, {}


for probe in [*Probe.__subclasses__(), *Ends.__subclasses__()]:
    for suffix, continuous in ("", False), ("Box", True):
        name, kwargs = f"Probe{probe.__name__}{suffix}-v0", {"continuous": continuous}
        gym.register(name, probe, max_episode_steps=probe.limit, kwargs=kwargs)
