"""What to run: each study is blocks of tasks × arms × seeds, with the rule that judges its runs.

Rules are committed before the first run that they judge. `python benchmark/run.py STUDY` runs
what is missing. The rules of the verdicts on claims stand in claims.py.
"""

from typing import NamedTuple


class Arm(NamedTuple):
    """What is compared: flags, and a patch of the script from variations/."""

    flags: str = ""
    variation: str = ""


class Block(NamedTuple):
    tasks: dict  # task: script and flags
    arms: dict  # name: Arm
    seeds: range


class Study(NamedTuple):
    blocks: list
    rule: str = ""
    metrics: tuple = ()  # columns of metrics.csv whose curves are kept, beside the return's
    evaluations: int = 0  # on the way: ten episodes each, with sampled actions
    played: int = 0  # episodes of the finished agent: with sampled, and with greedy actions


class Run(NamedTuple):
    study: str
    task: str
    arm: str
    seed: int
    script: str
    flags: str
    variation: str


def runs(study):
    """All runs of a study, each once, the first seeds of all arms first."""
    found = {}
    for tasks, arms, seeds in STUDIES[study].blocks:
        for task, command in tasks.items():
            script, _, flags = command.partition(" ")
            for name, arm in arms.items():
                for seed in seeds:
                    words = f"{flags} {arm.flags}".strip()
                    found[Run(study, task, name, seed, script, words, arm.variation)] = None
    return sorted(found, key=lambda run: run.seed)


def pick(names, table):
    """{name: table[name]} for a text of names."""
    return {name: table[name] for name in names.split()}


DIAGNOSTICS = ("approx_kl", "clipfrac", "entropy", "explained_variance", "grad_norm")
DEFAULT = {"default": Arm()}
LONG = "--total-timesteps 1000000"

# ---------- Tasks ----------
CLASSIC = f"ppo.py {LONG} --num-envs 16 --num-steps 256 --num-minibatches 32 "
CLASSIC += "--update-epochs 10 --norm-obs --norm-reward"
HALF_CHEETAH, LUNAR, SWIMMER = "HalfCheetah-v5", "LunarLander-v3", "Swimmer-v5"
DOUBLE_PENDULUM = "InvertedDoublePendulum-v5"
DISCRETE = {
    "CartPole-v1": "ppo.py",
    "MountainCar-v0": f"{CLASSIC} --gae-lambda 0.98 --ent-coef 0",
    LUNAR: f"{CLASSIC} --gamma 0.995 --learning-rate 3e-4 --ent-coef 0.003",
}
MUJOCO = f"{HALF_CHEETAH} Hopper-v5 Walker2d-v5 Ant-v5 {SWIMMER} Humanoid-v5 Reacher-v5 "
MUJOCO += f"InvertedPendulum-v5 {DOUBLE_PENDULUM}"
CONTINUOUS = dict.fromkeys(MUJOCO.split(), "ppo_continuous.py --compile")
WALKER = {"BipedalWalker-v3": "ppo_continuous.py --total-timesteps 2000000"}
ATARI = dict.fromkeys(["Pong", "Breakout", "BeamRider"], "ppo_atari.py")

# ---------- Defaults ----------
DEFAULTS_RULE = """
Which defaults ppo_continuous.py gets. Candidates: today's; environments that start at random
ages; no --recompute-advantages; both. Seeds 11 to 20 of four tasks, 1,000,000 steps. The score
is the mean return of the last 100 training episodes. The ratio of a candidate is its score over
that of today's default with the same seed, averaged over the four tasks: one number a seed, and
a 95 % t interval over the ten seeds. --recompute-advantages and its lines go, unless the
interval for removing it lies below 1. Random ages become the default only if their interval
lies above 1. If both change, the interval of both together must not lie below 1.
"""
NO_RECOMPUTE = "--no-recompute-advantages"
CANDIDATES = {
    "default": Arm(),
    "random-start-ages": Arm(variation="random_start_ages"),
    "no-recompute": Arm(NO_RECOMPUTE),
    "both": Arm(NO_RECOMPUTE, "random_start_ages"),
}

# ---------- Tuned flags ----------
TUNED_RULE = """
For each task, the candidate whose runs with seeds 1 to 5 have the highest mean return over
their last 100 training episodes gets a row in the results, marked as tuned, on other seeds.
The default flags are a candidate. Candidates may be added until the first run on other seeds.

short-episodes, a time limit of 100 steps in training, was added when all other candidates for
InvertedDoublePendulum had their five runs and a trial on seeds 11 to 14 had gone well. Its
training returns are of a tenth of an episode. So its score is the mean return of 100 full
episodes that the finished agent plays, sampling its actions.
"""
# rl-zoo3: its hyperparams/ppo.yml, as far as there are such flags. Its value loss has no 1/2,
# so its coefficient of 0.696 is 1.392 here; a minibatch of 512 is more than 128 rows: one.
SWIMMER_FLAGS = "--gamma 0.9999 --gae-lambda 0.98 --learning-rate 6e-4 --target-kl None "
SWIMMER_FLAGS += "--num-envs 4 --num-steps 1024 --num-minibatches 16"
PENDULUM_FLAGS = "--gamma 0.9 --learning-rate 1e-3 --num-envs 4 --num-steps 1024 "
PENDULUM_FLAGS += "--num-minibatches 64"
DOUBLE_FLAGS = (
    "--num-envs 1 --num-steps 128 --num-minibatches 1 --gamma 0.98 --gae-lambda 0.8 "
)
DOUBLE_FLAGS += "--learning-rate 1.55454e-4 --no-anneal-lr --clip-coef 0.4 --vf-coef 1.392 "
DOUBLE_FLAGS += f"--target-kl None {NO_RECOMPUTE}"
ACROBOT_FLAGS = "--num-envs 16 --num-steps 256 --num-minibatches 64 --gae-lambda 0.94 "
ACROBOT_FLAGS += "--ent-coef 0 --norm-obs --norm-reward"
TUNED_TASKS = {
    SWIMMER: "ppo_continuous.py",
    DOUBLE_PENDULUM: "ppo_continuous.py",
    "Pendulum-v1": "ppo_continuous.py --total-timesteps 300000",
    **WALKER,
    "Acrobot-v1": f"ppo.py {LONG}",
}
TUNED = {
    SWIMMER: {
        "default": Arm(),
        "gamma-0.9999": Arm("--gamma 0.9999"),
        "rl-zoo3": Arm(SWIMMER_FLAGS),
    },
    DOUBLE_PENDULUM: {
        "default": Arm(),
        "rl-zoo3": Arm(DOUBLE_FLAGS),
        "slow": Arm("--learning-rate 1e-4"),
        "short-episodes": Arm(variation="short_episodes"),
    },
    "Pendulum-v1": {"default": Arm(), "rl-zoo3": Arm(PENDULUM_FLAGS)},
    "BipedalWalker-v3": {
        "default": Arm(),
        "rl-zoo3": Arm("--gamma 0.999 --clip-coef 0.18"),
    },
    "Acrobot-v1": {
        "default": Arm(),
        "rl-zoo3": Arm(ACROBOT_FLAGS),
        "rl-zoo3-10-epochs": Arm(f"{ACROBOT_FLAGS} --update-epochs 10"),
    },
}
CHOSEN = {  # by the rule; Acrobot's follows when its candidates have run
    SWIMMER: "rl-zoo3",
    DOUBLE_PENDULUM: "short-episodes",
    "Pendulum-v1": "rl-zoo3",
    "BipedalWalker-v3": "default",
}


def tuned_blocks():
    blocks = []
    for task, arms in TUNED.items():
        command = pick(task, TUNED_TASKS)
        blocks.append(Block(command, arms, range(1, 6)))
        if task in CHOSEN:
            blocks.append(Block(command, pick(CHOSEN[task], arms), range(6, 11)))
    return blocks


def tuned_results():
    """The chosen flags, where they are not the defaults, on the seeds of the results."""
    chosen = {task: TUNED[task][arm] for task, arm in CHOSEN.items() if arm != "default"}
    return [
        Block(pick(t, TUNED_TASKS), {"tuned": chosen[t]}, range(21, 31)) for t in chosen
    ]


# ---------- Claims: the first round ----------
# Arms "plain" have neither KL limit nor value clip, which could make up for what is switched
# off. A gain of 1: the last layer of the actor begins as large as the others.
PLAIN = "--target-kl None --no-clip-vloss"
NO_DETAILS = "--no-norm-obs --no-norm-reward --no-anneal-lr"
EPOCHS_20 = f"{PLAIN} --update-epochs 20"
CLEANRL = f"{LONG} --num-envs 1 --num-steps 2048 --no-bootstrap-truncated "
CLEANRL += f"--initial-log-std 0 --clip-vloss --target-kl None {NO_RECOMPUTE}"
LADDER = ["", "--bootstrap-truncated", "--initial-log-std -0.5", "--no-clip-vloss"]
LADDER += [
    "--recompute-advantages",
    "--num-envs 32 --num-steps 64",
]  # each added to the last
ARMS = {
    "base": Arm(),
    "plain": Arm(PLAIN),
    "plain-no-clip": Arm(f"{PLAIN} --clip-coef inf"),
    "plain-no-details": Arm(f"{PLAIN} {NO_DETAILS}", "head_gain"),
    "plain-no-clip-no-details": Arm(f"{PLAIN} --clip-coef inf {NO_DETAILS}", "head_gain"),
    "plain-kl-limit": Arm(f"{PLAIN} --target-kl 0.02"),
    "plain-no-clip-kl-limit": Arm(f"{PLAIN} --clip-coef inf --target-kl 0.02"),
    **{f"plain-epochs-{n}": Arm(f"{PLAIN} --update-epochs {n}") for n in (1, 2, 4, 20)},
    "plain-epochs-20-no-clip": Arm(f"{EPOCHS_20} --clip-coef inf"),
    "plain-epochs-20-no-clip-kl-limit": Arm(
        f"{EPOCHS_20} --clip-coef inf --target-kl 0.02"
    ),
    "plain-epochs-100": Arm(f"{PLAIN} --update-epochs 100", "epoch_metrics"),
    **{f"plain-clip-{e}": Arm(f"{PLAIN} --clip-coef {e}") for e in (0.05, 0.1, 0.3)},
    **{
        f"plain-kl-penalty-{beta}": Arm(f"{PLAIN} --kl-penalty {beta}", "kl_penalty")
        for beta in (0.3, 1, 3)
    },
    "clip-vloss": Arm("--clip-vloss"),
    "no-clip-vloss": Arm("--no-clip-vloss"),
    "no-norm-adv": Arm("--no-norm-adv"),
    **{f"ent-{coef}": Arm(f"--ent-coef {coef}") for coef in (0, 0.01, 0.05)},
    **{f"lambda-{lam}": Arm(f"--gae-lambda {lam}") for lam in (0, 0.5, 0.9, 0.99, 1)},
    "no-bootstrap": Arm("--no-bootstrap-truncated"),
    "reset-rows": Arm(variation="reset_rows"),
    "no-recompute": Arm(NO_RECOMPUTE),
    "no-norm-obs": Arm("--no-norm-obs"),
    "no-norm-reward": Arm("--no-norm-reward"),
    "log-std-0": Arm("--initial-log-std 0"),
    "head-gain-1": Arm(variation="head_gain"),
    "no-anneal": Arm("--no-anneal-lr"),
    **{
        f"ladder-{i}": Arm(" ".join([CLEANRL, *LADDER[1 : i + 1]]), "narrow_critic")
        for i in range(6)
    },
    "ladder-6": Arm(" ".join([CLEANRL, *LADDER[1:]])),  # with a critic of 256 units
    "long": Arm(LONG),
    "random-start-ages": Arm(variation="random_start_ages"),
    "adaptive-kl": Arm("--no-anneal-lr", "adaptive_kl"),
    "adam-betas": Arm(variation="adam_betas"),
    "spo": Arm(variation="spo"),
}
PENDULUM = {"Pendulum-v1": f"{TUNED_TASKS['Pendulum-v1']} {PENDULUM_FLAGS} --gamma 0.99"}
CHEETAH = {HALF_CHEETAH: "ppo_continuous.py --compile --total-timesteps 300000"}
LANDER = {LUNAR: DISCRETE[LUNAR].replace("ppo.py", "ppo.py --compile")}
SHORT = {
    "CartPole-v1": "ppo.py --total-timesteps 50000",
    "Blackjack-v1": "ppo.py --total-timesteps 100000",
    "FrozenLake-v1": "ppo.py --total-timesteps 100000",
}
FIVE = "plain-no-clip plain-no-details plain-no-clip-no-details plain-kl-limit lambda-0 "
FIVE += (
    "plain-no-clip-kl-limit plain-epochs-1 plain-epochs-2 plain-epochs-4 plain-epochs-20 "
)
FIVE += (
    "plain-epochs-20-no-clip plain-epochs-20-no-clip-kl-limit plain-clip-0.05 lambda-0.5 "
)
FIVE += "plain-clip-0.1 plain-clip-0.3 lambda-0.9 lambda-0.99 lambda-1"
TEN = "no-norm-adv ent-0.01 ent-0.05 no-norm-obs no-norm-reward head-gain-1 no-anneal "
TEN += "plain-kl-penalty-0.3 plain-kl-penalty-1 plain-kl-penalty-3"
ONLY_CHEETAH = "plain-epochs-100 no-bootstrap long " + " ".join(
    f"ladder-{i}" for i in range(7)
)
CLAIMS = [
    Block(CHEETAH | LANDER, pick("base plain", ARMS), range(1, 21)),
    Block(PENDULUM | SHORT, pick("base", ARMS), range(1, 21)),
    Block(CHEETAH | LANDER, pick(TEN, ARMS), range(1, 11)),
    Block(CHEETAH, pick("clip-vloss no-recompute log-std-0", ARMS), range(1, 11)),
    Block(LANDER, pick("no-clip-vloss ent-0 reset-rows", ARMS), range(1, 11)),
    Block(SHORT, pick("reset-rows", ARMS), range(1, 11)),
    Block(CHEETAH | LANDER, pick(FIVE, ARMS), range(1, 6)),
    Block(CHEETAH, pick(ONLY_CHEETAH, ARMS), range(1, 6)),
    Block(PENDULUM, pick("no-bootstrap", ARMS), range(1, 6)),
]

# ---------- Claims: the second round, on fresh seeds ----------
SIXTY = "plain clip-vloss no-norm-adv ent-0.01 head-gain-1 no-anneal plain-kl-penalty-1"
NEW = "adaptive-kl adam-betas spo"
CLAIMS_2 = [
    Block(CHEETAH, pick("base no-recompute", ARMS), range(21, 141)),
    Block(CHEETAH, pick(SIXTY, ARMS), range(21, 81)),
    Block(CHEETAH, pick(f"random-start-ages {NEW}", ARMS), range(21, 61)),
    Block(LANDER, pick("base no-norm-adv plain plain-kl-penalty-0.3", ARMS), range(21, 61)),
    Block(LANDER, pick(NEW, ARMS), range(21, 41)),
    Block(SHORT, pick("base reset-rows", ARMS), range(21, 81)),
    Block(pick(SWIMMER, CONTINUOUS), pick("base random-start-ages", ARMS), range(21, 31)),
]

# ---------- All studies ----------
CHOICE = pick(f"{HALF_CHEETAH} Walker2d-v5 {SWIMMER} Ant-v5", CONTINUOUS)
LIMITED = dict.fromkeys([*CONTINUOUS, "Ant-v4"], "ppo_continuous.py --compile")
LIMITED = {
    task: f"{command} --num-envs 16 --num-steps 128" for task, command in LIMITED.items()
}
LIMITED.pop("Ant-v5")
LIMITS = {
    "limit": Arm("--target-kl 0.02", "narrow_critic"),
    "no-limit": Arm("--target-kl None", "narrow_critic"),
}
RATES = {"healthy": Arm(), "learning-rate-x10": Arm("--learning-rate 3e-3")}
BFLOAT = {f"bf16-{x}": Arm(f"--total-timesteps 500000 --bf16 {x}") for x in ("on", "off")}
PEERS = dict.fromkeys([HALF_CHEETAH, "Hopper-v5", "Walker2d-v5"], "benchmark/sb3.py")
RESULTS = [
    Block(DISCRETE | CONTINUOUS | WALKER, DEFAULT, range(21, 31)),
    *tuned_results(),
]
STUDIES = {
    "defaults": Study(
        [Block(CHOICE, CANDIDATES, range(11, 21))], DEFAULTS_RULE, played=100
    ),
    "tuned": Study(tuned_blocks(), TUNED_RULE, ("entropy",), played=100),
    "results": Study(RESULTS, "", DIAGNOSTICS, evaluations=10, played=100),
    "atari": Study([Block(ATARI, DEFAULT, range(1, 4))], "", DIAGNOSTICS, played=100),
    "atari-bf16": Study([Block(pick("Breakout", ATARI), BFLOAT, range(1, 4))]),
    "sb3": Study(
        [Block(PEERS, {"default": Arm(), "rl-zoo3": Arm("--tuned")}, range(1, 4))]
    ),
    "kl-limit": Study([Block(LIMITED, LIMITS, range(1, 6))], metrics=("approx_kl",)),
    "diagnostics": Study(
        [Block(pick(LUNAR, DISCRETE), RATES, range(1, 4))], "", DIAGNOSTICS
    ),
    "claims": Study(
        CLAIMS, metrics=("approx_kl", "entropy", "explained_variance", "*_in_epoch_*")
    ),
    "claims-2": Study(CLAIMS_2, metrics=("approx_kl", "entropy")),
}
