"""What to run: each study is blocks of tasks × arms × seeds. run.py runs what is missing.

The rules that judge a study are committed before its first run: in README.md beside this
file for "defaults" and "tuned", in claims.md for "claims-2".
"""

import csv
import re
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple


class Arm(NamedTuple):
    """What is compared: flags, and a patch of the script from variations/."""

    flags: str = ""
    variation: str = ""


Block = namedtuple("Block", "tasks arms seeds")  # {task: script and flags}, {name: Arm}
Run = namedtuple("Run", "study task arm seed script variation flags")


class Study(NamedTuple):
    blocks: list
    metrics: tuple = ()  # columns of metrics.csv whose curves are kept, beside the return's
    evaluations: int = 0  # on the way: ten episodes each, with sampled actions
    played: int = 0  # episodes of the finished agent, sampled and greedy


def runs(study):
    """All runs of a study, each once, the first seeds of all arms first."""
    found = {}
    for tasks, arms, seeds in STUDIES[study].blocks:
        for task, command in tasks.items():
            for name, arm in arms.items():
                script, _, flags = f"{command} {arm.flags}".strip().partition(" ")
                for seed in seeds:
                    found[Run(study, task, name, seed, script, arm.variation, flags)] = None
    return sorted(found, key=lambda run: run.seed)


def pick(names, table):
    """{name: table[name]} for a text of names."""
    return {name: table[name] for name in names.split()}


# ---------- Tasks ----------
CONTINUOUS, LONG = "ppo_continuous.py", "--total-timesteps 1000000"
CLASSIC = f"ppo.py {LONG} --num-envs 16 --num-steps 256 --num-minibatches 32 "
CLASSIC += "--update-epochs 10 --norm-obs --norm-reward"
CHEETAH, LUNAR, SWIMMER = "HalfCheetah-v5", "LunarLander-v3", "Swimmer-v5"
DISCRETE = {
    "CartPole-v1": "ppo.py",
    "MountainCar-v0": f"{CLASSIC} --gae-lambda 0.98 --ent-coef 0",
    LUNAR: f"{CLASSIC} --gamma 0.995 --learning-rate 3e-4 --ent-coef 0.003",
}
NAMES = f"{CHEETAH} Hopper-v5 Walker2d-v5 Ant-v5 {SWIMMER} Humanoid-v5 Reacher-v5 "
NAMES += "InvertedPendulum-v5 InvertedDoublePendulum-v5"
MUJOCO = dict.fromkeys(NAMES.split(), f"{CONTINUOUS} --compile")
WALKER = {"BipedalWalker-v3": f"{CONTINUOUS} --total-timesteps 2000000"}
ATARI = dict.fromkeys(["Pong", "Breakout", "BeamRider"], "ppo_atari.py")

# ---------- Tuned flags ----------
# rl-zoo3: flags of its hyperparams/ppo.yml; README.md says which are left out. Its value
# loss has no ½, so a coefficient of 0.696 is 1.392 here; a minibatch of 512 is more than
# 128 rows: one.
PENDULUM_FLAGS = "--gamma 0.9 --learning-rate 1e-3 --num-envs 4 --num-steps 1024 "
PENDULUM_FLAGS += "--num-minibatches 64"
SWIMMER_FLAGS = "--gamma 0.9999 --gae-lambda 0.98 --learning-rate 6e-4 --target-kl None "
SWIMMER_FLAGS += "--num-envs 4 --num-steps 1024 --num-minibatches 16"
DOUBLE_FLAGS = "--num-envs 1 --num-steps 128 --num-minibatches 1 --gamma 0.98 "
DOUBLE_FLAGS += "--gae-lambda 0.8 --learning-rate 1.55454e-4 --no-anneal-lr "
DOUBLE_FLAGS += "--clip-coef 0.4 --vf-coef 1.392 --target-kl None"
ACROBOT_FLAGS = "--num-envs 16 --num-steps 256 --num-minibatches 64 --gae-lambda 0.94 "
ACROBOT_FLAGS += "--ent-coef 0 --norm-obs --norm-reward"
TUNED_TASKS = {
    SWIMMER: CONTINUOUS,
    "InvertedDoublePendulum-v5": CONTINUOUS,
    "Pendulum-v1": f"{CONTINUOUS} --total-timesteps 300000",
    **WALKER,
    "Acrobot-v1": f"ppo.py {LONG}",
}
CANDIDATES = [  # beside the default flags: task, name, Arm
    (SWIMMER, "gamma-0.9999", Arm("--gamma 0.9999")),
    (SWIMMER, "rl-zoo3", Arm(SWIMMER_FLAGS)),
    ("InvertedDoublePendulum-v5", "rl-zoo3", Arm(DOUBLE_FLAGS)),
    ("InvertedDoublePendulum-v5", "slow", Arm("--learning-rate 1e-4")),
    ("InvertedDoublePendulum-v5", "short-episodes", Arm("", "short_episodes")),
    ("Pendulum-v1", "rl-zoo3", Arm(PENDULUM_FLAGS)),
    ("BipedalWalker-v3", "rl-zoo3", Arm("--gamma 0.999 --clip-coef 0.18")),
    ("Acrobot-v1", "rl-zoo3", Arm(ACROBOT_FLAGS)),
    ("Acrobot-v1", "rl-zoo3-10-epochs", Arm(f"{ACROBOT_FLAGS} --update-epochs 10")),
]
CHOSEN = {SWIMMER: "rl-zoo3", "InvertedDoublePendulum-v5": "short-episodes"}
CHOSEN |= {"Pendulum-v1": "rl-zoo3", "BipedalWalker-v3": "default"}
CHOSEN |= {"Acrobot-v1": "rl-zoo3-10-epochs"}
DEFAULT = {"default": Arm()}
TUNED = [Block(TUNED_TASKS, DEFAULT, range(1, 6)), Block(WALKER, DEFAULT, range(6, 11))]
RESULTS = [Block(DISCRETE | MUJOCO | WALKER, DEFAULT, range(21, 31))]
for task, name, arm in CANDIDATES:
    TUNED.append(Block(pick(task, TUNED_TASKS), {name: arm}, range(1, 6)))
    if CHOSEN.get(task) == name:
        TUNED.append(Block(pick(task, TUNED_TASKS), {name: arm}, range(6, 11)))
        RESULTS.append(Block(pick(task, TUNED_TASKS), {"tuned": arm}, range(21, 31)))

# ---------- Claims ----------
# arms.csv has the flags of each arm, and its seeds on each task. "plain": neither KL limit
# nor value clip, which could make up for what is switched off.
CLAIMS_TASKS = {
    CHEETAH: f"{CONTINUOUS} --compile --total-timesteps 300000",
    LUNAR: DISCRETE[LUNAR].replace("ppo.py", "ppo.py --compile"),
    SWIMMER: MUJOCO[SWIMMER],
    "CartPole-v1": "ppo.py --total-timesteps 50000",
    "Blackjack-v1": "ppo.py --total-timesteps 100000",
    "FrozenLake-v1": "ppo.py --total-timesteps 100000",
}
CLAIMS = []
with open(Path(__file__).with_name("arms.csv"), newline="") as file:
    for row in csv.DictReader(file):
        arm = {row["arm"]: Arm(row["flags"], row["variation"])}
        for first, last, tasks in re.findall(r"(\d+)-(\d+) ([^;]+)", row["seeds"]):
            seeds = range(int(first), int(last) + 1)
            CLAIMS.append(Block(pick(tasks, CLAIMS_TASKS), arm, seeds))

# ---------- All studies ----------
DEFAULTS = {  # those of ppo_continuous.py: "default" is the former one, "both" today's
    "default": Arm("--no-random-start-ages", "recompute_advantages"),
    "random-start-ages": Arm("", "recompute_advantages"),
    "no-recompute": Arm("--no-random-start-ages"),
    "both": Arm(),
}
CHOICE = pick(f"{CHEETAH} Walker2d-v5 {SWIMMER} Ant-v5", MUJOCO)
RATES = {"healthy": Arm(), "learning-rate-x100": Arm("--learning-rate 3e-2")}
SHORT = {"CartPole-v1": "ppo.py --total-timesteps 100000"}
TRIED = {"default": Arm(), "td": Arm("--gae-lambda 0"), "entropy": Arm("--ent-coef 0.5")}
TRIED["large-steps"] = Arm("--learning-rate 2.5e-3 --update-epochs 20")
TRIED["no-clip"] = Arm(f"{TRIED['large-steps'].flags} --clip-coef inf")
BFLOAT = {f"bf16-{x}": Arm(f"--total-timesteps 500000 --bf16 {x}") for x in ("on", "off")}
PEERS = dict.fromkeys([CHEETAH, "Hopper-v5", "Walker2d-v5"], "benchmark/sb3.py")
ZOO = {"default": Arm(), "rl-zoo3": Arm("--tuned")}
COLUMNS = ("approx_kl", "clipfrac", "entropy", "explained_variance", "grad_norm")
STUDIES = {
    "defaults": Study([Block(CHOICE, DEFAULTS, range(11, 21))], played=100),
    "tuned": Study(TUNED, played=100),
    "results": Study(RESULTS, COLUMNS, evaluations=10, played=100),
    "atari": Study([Block(ATARI, DEFAULT, range(1, 4))], COLUMNS, played=100),
    "atari-bf16": Study([Block(pick("Breakout", ATARI), BFLOAT, range(1, 4))]),
    "sb3": Study([Block(PEERS, ZOO, range(1, 4))]),
    "diagnostics": Study([Block(pick(LUNAR, DISCRETE), RATES, range(1, 4))], COLUMNS),
    "tried": Study([Block(SHORT, TRIED, range(1, 4))], COLUMNS),
    "claims-2": Study(CLAIMS, ("approx_kl", "entropy")),
}
