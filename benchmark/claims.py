"""What tutorials and papers claim about PPO, the runs that decide it, and the rule of the verdicts.

    python benchmark/run.py claims-epochs     # the runs of one claim; "claims" runs them all
    python benchmark/claims.py                # returns of a random policy, which effects refer to

Each comparison changes one thing: the flags, or lines of a script's source, of its base. Arms are
shared by the claims, in results/claims/. benchmark/README.md says what was committed later.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
from studies import GAMMA_0_9, LUNAR_LANDER, NARROW_CRITIC, Run

RULE = """
The effect of a comparison on a task is (mean of the arm - mean of the base), divided by (mean of
the reference - return of a uniformly random policy). The reference is the arm that all of a claim's
comparisons start from: "base", or "plain" for those whose names begin with it; for the ladder
"long", the defaults with as many steps. The score of a run
is the mean return of its last 100 training episodes, for claims about sample efficiency the mean
return over the whole run. The pooled effect is the plain mean over tasks. Intervals (95 %) come
from a bootstrap that resamples seeds within each task and arm. References have 20 seeds, the other
arms five, or ten if the first five did not settle the claim. Verdicts, the first that applies:

depends on the task   the intervals of two tasks exclude 0 with opposite signs
matters               the pooled interval excludes 0, and the pooled effect is at least 5 %
does not matter       the pooled interval lies within -10 % and +10 %
not settled           otherwise, with half the interval's width

Comparisons with the same label are one, over all their tasks. DECIDING names those that decide a
claim, the first one unless its prediction speaks of more; the others explain. The claim holds if
their verdicts are what it predicts.
"""
BASE_SEEDS, SEEDS = 20, 5
TEN_SEEDS = {  # claims that the first five seeds did not settle
    "value-clip",
    "norm-adv",
    "reset-rows",
    "recompute",
    "normalisation",
    "start",
    "entropy",
    "kl-penalty",
}
DECIDING = {  # claim: verdict and sign that it predicts, and the comparisons that must show them
    "clip": ("matters", -1, ["no details, against no clip"]),
    "value-clip": ("does not matter", 0, ["value clip"]),
    "norm-adv": ("matters", -1, ["advantages not normalised"]),
    "epochs": ("matters", -1, ["1 epoch"]),
    "hundred-epochs": ("does not matter", 0, ["100 epochs"]),
    "overfit": ("matters", -1, ["20 epochs, no clip"]),
    "entropy": ("matters", 1, ["bonus of 0.01"]),
    "lambda": ("matters", -1, ["λ = 0", "λ = 1"]),
    "time-limit": ("matters", -1, ["time limit as termination"]),
    "reset-rows": ("matters", -1, ["reset rows kept"]),
    "recompute": ("matters", -1, ["advantages not recomputed"]),
    "normalisation": ("matters", -1, ["observations not normalised", "rewards not normalised"]),
    "start": ("matters", -1, ["gain of 1", "no annealing", "log σ = 0"]),
    "kl-penalty": ("does not matter", 0, ["best KL penalty"]),
}

HALF_CHEETAH, LUNAR = "HalfCheetah-v5", "LunarLander-v3"
MUJOCO = (HALF_CHEETAH,)  # Hopper and Walker2d were given up to save time, before any of their runs
TWO = (HALF_CHEETAH, LUNAR)
SHORT_EPISODES = ("CartPole-v1", "Blackjack-v1", "FrozenLake-v1")
PENDULUM = GAMMA_0_9.replace("0.9 ", "0.99 ")  # 0.9 hardly looks beyond a time limit
TASKS = {  # task: script, flags
    HALF_CHEETAH: ("ppo_continuous.py", "--compile --total-timesteps 300000"),  # ladder: LONG
    LUNAR: ("ppo.py", f"--compile {LUNAR_LANDER}"),
    "Pendulum-v1": ("ppo_continuous.py", PENDULUM),
    "CartPole-v1": ("ppo.py", "--total-timesteps 50000"),
    "Blackjack-v1": ("ppo.py", "--total-timesteps 100000"),
    "FrozenLake-v1": ("ppo.py", "--total-timesteps 100000"),
}

# Lines of the scripts that are replaced where no flag reaches.
HEAD_GAIN = {  # the last layer of the actor as large as the others
    "ppo.py": (("int(action_space.n), 0.01)", "int(action_space.n), 1.0)"),),
    "ppo_continuous.py": (("action_size, 0.01)", "action_size, 1.0)"),),
}
RESET_ROWS = (  # rows that only reset stay in the losses, in (norm) and in the statistics
    ("{name: column[~resets] for", "{name: column.flatten(0, 1) for"),
    ("stats.update(torch.stack(sums)[~resets])", "stats.update(torch.stack(sums).flatten())"),
    ("to_tensor(obs[:-1])[~resets]", "to_tensor(obs[:-1]).flatten(0, 1)"),
)
PLAIN_LOSS = "    pi_loss = policy_loss(log_ratio, advantages, args.clip_coef)\n"


def kl_penalty(beta):
    """The clipped objective replaced by −E[ρ Â] + β KL, with the estimate (k3)."""
    penalty = f"{beta} * (log_ratio.exp() - 1 - log_ratio)"
    new = f"    pi_loss = ({penalty} - log_ratio.exp() * advantages).mean()\n"
    return ((PLAIN_LOSS, new),)


# What each epoch of an update did, as further columns of metrics.csv.
RATE = '            "learning_rate": optimizer.param_groups[0]["lr"],\n'
EPOCH_COLUMNS = """            **{
                f"{name}_in_epoch_{epoch}": column[epoch - 1].item()
                for name, column in zip(
                    logged, torch.stack(logs).unflatten(0, (-1, args.num_minibatches)).mean(1).T
                )
                for epoch in (1, 2, 5, 10, 20, 50, 100)
                if name in ("approx_kl", "clipfrac", "max_ratio_dev")
            },
"""
EPOCHS = ((RATE, RATE + EPOCH_COLUMNS),)

PLAIN = "--target-kl None --no-clip-vloss"  # neither can make up for what is switched off
NO_DETAILS = "--no-norm-obs --no-norm-reward --no-anneal-lr"
LONG = "--total-timesteps 1000000"
CLEANRL = f"{LONG} --num-envs 1 --num-steps 2048 --no-bootstrap-truncated --initial-log-std 0 "
CLEANRL += "--clip-vloss --target-kl None --no-recompute-advantages"
LADDER = {"ladder-0": CLEANRL}  # one change at a time, each on top of those before
LADDER["ladder-1"] = LADDER["ladder-0"] + " --bootstrap-truncated"
LADDER["ladder-2"] = LADDER["ladder-1"] + " --initial-log-std -0.5"
LADDER["ladder-3"] = LADDER["ladder-2"] + " --no-clip-vloss"
LADDER["ladder-4"] = LADDER["ladder-3"] + " --recompute-advantages"
LADDER["ladder-5"] = LADDER["ladder-4"] + " --num-envs 32 --num-steps 64"
LADDER["ladder-6"] = LADDER["ladder-5"]  # with a critic of 256 units; then "long", the defaults
STEP_NAMES = ["CleanRL's flags", "time limits bootstrapped", "log σ −0.5", "no value clip"]
STEP_NAMES += ["recomputed advantages", "32 × 64", "critic 256"]
LADDER_STEPS = dict(zip(STEP_NAMES, LADDER))
ARMS = {  # name: flags, replacements (of one script, or {script: replacements})
    "base": ("", ()),
    "plain": (PLAIN, ()),
    "plain-no-clip": (f"{PLAIN} --clip-coef inf", ()),
    "plain-no-details": (f"{PLAIN} {NO_DETAILS}", HEAD_GAIN),
    "plain-no-clip-no-details": (f"{PLAIN} --clip-coef inf {NO_DETAILS}", HEAD_GAIN),
    "plain-kl-limit": (f"{PLAIN} --target-kl 0.02", ()),
    "plain-no-clip-kl-limit": (f"{PLAIN} --clip-coef inf --target-kl 0.02", ()),
    **{f"plain-epochs-{n}": (f"{PLAIN} --update-epochs {n}", ()) for n in (1, 2, 4, 20)},
    "plain-epochs-20-no-clip": (f"{PLAIN} --update-epochs 20 --clip-coef inf", ()),
    "plain-epochs-20-no-clip-kl-limit": (
        f"{PLAIN} --update-epochs 20 --clip-coef inf --target-kl 0.02",
        (),
    ),
    "plain-epochs-100": (f"{PLAIN} --update-epochs 100", EPOCHS),
    **{f"plain-clip-{eps}": (f"{PLAIN} --clip-coef {eps}", ()) for eps in (0.05, 0.1, 0.3)},
    **{f"plain-kl-penalty-{beta}": (PLAIN, kl_penalty(beta)) for beta in (0.3, 1, 3)},
    "clip-vloss": ("--clip-vloss", ()),
    "no-clip-vloss": ("--no-clip-vloss", ()),
    "no-norm-adv": ("--no-norm-adv", ()),
    **{f"ent-{coef}": (f"--ent-coef {coef}", ()) for coef in (0, 0.01, 0.05)},
    **{f"lambda-{lam}": (f"--gae-lambda {lam}", ()) for lam in (0, 0.5, 0.9, 0.99, 1)},
    "no-bootstrap": ("--no-bootstrap-truncated", ()),
    "reset-rows": ("", RESET_ROWS),
    "no-recompute": ("--no-recompute-advantages", ()),
    "no-norm-obs": ("--no-norm-obs", ()),
    "no-norm-reward": ("--no-norm-reward", ()),
    "log-std-0": ("--initial-log-std 0", ()),
    "head-gain-1": ("", HEAD_GAIN),
    "no-anneal": ("--no-anneal-lr", ()),
    **{
        name: (flags, () if name == "ladder-6" else NARROW_CRITIC) for name, flags in LADDER.items()
    },
    "long": (LONG, ()),
}
REFERENCES = ("plain", "base")
BONUSES = {"bonus of 0.01": "ent-0.01", "bonus of 0.05": "ent-0.05"}


@dataclass(frozen=True)
class Comparison:
    label: str
    arm: str
    base: str
    tasks: tuple

    @property
    def reference(self):
        if self.base == "long":
            return "long"
        return "plain" if self.base.startswith("plain") else "base"


@dataclass(frozen=True)
class Claim:
    number: int
    name: str
    text: str
    prediction: str  # the verdict, and the sign of the effect, if the claim is right
    comparisons: tuple
    score: str = "score"  # or "mean_return", over the whole run


def compared(base, tasks, arms):
    """One comparison with the base for each {label: arm}."""
    return tuple(Comparison(label, arm, base, tasks) for label, arm in arms.items())


SOURCES = {  # claim: what others found; benchmark/README.md has the addresses
    "clip": (
        "[Engstrom]: the clip is not necessary; [Andrychowicz]: the clipped loss is best on "
        "four of five tasks; [Sun]: early stopping without a clip beats PPO"
    ),
    "value-clip": "[Andrychowicz]: it hurts; [Tianshou]: no difference overall",
    "norm-adv": (
        "[Andrychowicz]: little effect; [Tianshou]: no difference overall, but steadier on "
        "InvertedPendulum; [2412.07165]: several normalisations of PPO may gain by more tuning"
    ),
    "epochs": "[Andrychowicz]: crucial",
    "hundred-epochs": (
        "[2405.00662]: more epochs hasten the collapse of representations, which the clip does not "
        "prevent"
    ),
    "overfit": (
        "tutorials say so without numbers; [Schulman]: with neither, HalfCheetah ends below a "
        "random policy; [Engstrom]: tuned, and with the other details, it learns well without the "
        "clip"
    ),
    "clip-kl": "[Engstrom]: ratios leave the interval, the mean KL stays bounded",
    "entropy": (
        "[Andrychowicz]: no regulariser helps, except on HalfCheetah; [Tianshou]: on MuJoCo 0 is "
        "better than 0.01"
    ),
    "lambda": (
        "[Andrychowicz]: 0.9 does well on all tasks; [Tianshou], unsure of it: 0.9 is no better"
    ),
    "time-limit": (
        "[Pardo]: it matters; [Andrychowicz]: not with long limits; CleanRL: no gain in [PR 311], "
        "decisive for a user's environment in [issue 198]"
    ),
    "reset-rows": (
        "CleanRL, in [PR 494]: little effect, without numbers; we found no published ablation"
    ),
    "recompute": "[Andrychowicz]: yes; [Tianshou]: it contributes a lot",
    "normalisation": (
        "[Andrychowicz]: observations are crucial except on Hopper; [Engstrom]: the scale of "
        "rewards matters"
    ),
    "start": (
        "[Andrychowicz]: a standard deviation of 0.5 is best except on Hopper, a small head gives "
        "Humanoid 66 % more, annealing is secondary"
    ),
    "ladder": "[CleanRL]'s own table (HalfCheetah-v4): 1,443 ± 46",
    "kl-penalty": (
        "[Schulman]: the best clip is better than the best fixed or adaptive penalty; [KLip-PPO]: "
        "the clip is a penalty with a coefficient per sample; β = 1 keeps up on HalfCheetah "
        "and LunarLander, not on Ant and Humanoid"
    ),
}

FINDINGS = {  # claim: the verdict that these words describe, and the words
    "clip": (
        "depends on the task",
        "On HalfCheetah the details are worth more than the clip: leaving them out costs 58 to 72 "
        "% of what is learned, leaving out the clip 24 to 62 %. On LunarLander it is the other "
        "way round: leaving out the details costs at most a seventh, leaving out the clip a fifth "
        "to two fifths. With a KL limit, five seeds show no harm from leaving out the clip on "
        "LunarLander, but great harm on HalfCheetah; that is not to be compared with the harm "
        "without a KL limit, as its base has only seeds 1 to 5, which mostly do well. Plain "
        "policy gradient was not run.",
    ),
    "value-clip": (
        "not settled",
        "On LunarLander the value clip changes at most 2 %. On HalfCheetah ten seeds differ too "
        "much to tell.",
    ),
    "norm-adv": (
        "not settled",
        "On LunarLander 5 to 20 % is lost: four of ten runs learn to hover instead of landing; "
        "none of the 20 runs with normalised advantages does. All four are among seeds 6 to 10. "
        "On HalfCheetah ten seeds cannot tell.",
    ),
    "epochs": (
        "holds",
        "On both tasks one epoch reaches less than half of what ten reach, and the mean rises "
        "with each step up to ten. On HalfCheetah 20 are better still; on LunarLander they add at "
        "most 8 %.",
    ),
    "overfit": (
        "holds",
        "On HalfCheetah 20 epochs without the clip lose most of what they learn with it, and a KL "
        "limit in its place does not prevent that. Losses can exceed 100 %, as they are measured "
        "against what ten epochs learn, and 20 epochs with the clip learn more. On LunarLander "
        "about a quarter to a half is lost, and a KL limit prevents most of it. Whether the cause "
        "is over-fitting was not measured.",
    ),
    "clip-kl": (
        "does not hold",
        "On both tasks the mean KL grows with ε, but more slowly than ε². It stays below ½ε²: at "
        "0.42 to 0.80 times it on HalfCheetah, at less than half on LunarLander. This is the mean "
        "over all minibatches of a run whose learning rate falls to 0: the KL at the end of an "
        "update was not measured. On HalfCheetah it stays at 0.4 to 1 times ½ε² until the last "
        "fifth of a run; on LunarLander it is 0.3 to 0.6 times in the first fifth, and less than "
        "0.15 in the last. On HalfCheetah an ε of 0.1 costs a tenth or more of what is learned, "
        "0.05 half or more. On LunarLander the final return hardly depends on ε.",
    ),
    "entropy": (
        "not settled",
        "On LunarLander the policy keeps exploring without a bonus; 0.01 raises its entropy by "
        "about a tenth and changes the return by at most 3 %. On HalfCheetah the interval "
        "includes 0, yet nine of ten runs are worse than the run without a bonus on the same "
        "seed. Pooled, a gain of more than 1 % is unlikely. With 0.05 LunarLander loses a quarter "
        "of what it learns, HalfCheetah about three quarters.",
    ),
    "lambda": (
        "holds",
        "λ = 0 loses two fifths or more of what is learned on both tasks, λ = 1 a fifth to a half "
        "on HalfCheetah and up to a fifth on LunarLander. On LunarLander 0.5 and 0.9 are worse "
        "than 0.95 too, and 0.99 is level. On HalfCheetah 0.99 is worse; five seeds cannot tell "
        "whether 0.5 and 0.9 are better or worse. So the claim is not refuted, but 0.9 may still "
        "be better there. Bias and variance were not measured.",
    ),
    "kl-penalty": (
        "not settled",
        "On LunarLander the weakest penalty tried, β = 0.3, loses at most 6 % against the clip; 1 "
        "and 3 do lose. Weaker ones were not tried. On HalfCheetah 3 does worse, and ten seeds "
        "cannot tell 0.3 and 1 from the clip. The best β of a task is chosen on the seeds that it "
        "is judged by, which favours it.",
    ),
    "time-limit": (
        "holds",
        "A time limit ends every episode of both tasks. On Pendulum (200 steps; with a discount "
        "factor of 0.99, as the usual 0.9 hardly looks beyond the limit) half to four fifths of "
        "what is learned is lost. On HalfCheetah (1,000 steps) five seeds cannot tell (comparing "
        "the same seeds suggests a small loss), so the verdict rests on Pendulum.",
    ),
    "recompute": (
        "not settled",
        "On HalfCheetah ten seeds cannot tell: without recomputing, both a loss of a quarter and "
        "a gain of a fifth are possible.",
    ),
    "normalisation": (
        "holds",
        "Without normalised observations HalfCheetah loses 57 to 68 % of what is learned, "
        "LunarLander 1 to 5 %. Without scaled rewards LunarLander loses an eighth to a fifth; on "
        "HalfCheetah, the only MuJoCo task, ten seeds cannot tell. So for rewards the verdict "
        "comes from LunarLander; on MuJoCo it is not shown.",
    ),
    "start": (
        "not settled",
        "A log σ of 0 instead of −0.5 costs HalfCheetah two fifths or more of what is learned. A "
        "gain of 1 instead of 0.01 costs at most 4 % on LunarLander, and on HalfCheetah ten seeds "
        "cannot tell; the interval of both tasks together barely excludes 0; with other bootstrap "
        "draws it might not. The claim stays open because of annealing: ten seeds of HalfCheetah "
        "cannot tell.",
    ),
    "reset-rows": (
        "not settled",
        "On LunarLander no harm is seen. On CartPole, Blackjack and FrozenLake ten seeds differ "
        "too much to tell.",
    ),
    "hundred-epochs": (
        "does not hold",
        "With 100 epochs an agent learns about a tenth of what it learns with ten: every run ends "
        "below every run with one epoch. 20 epochs do better than ten (claim 4). The clip does "
        "not stop the later epochs: from epoch 20 to 100 of an update clipfrac rises from 0.47 to "
        "0.66, and the KL doubles. The critic fails as well: its explained variance is below 0 "
        "for most of the training, with ten or 20 epochs its median is above 0.6 (metrics of the "
        "runs). The clip does not limit it, and before each epoch the advantages are recomputed "
        "with it. Which of these costs the return was not measured.",
    ),
    "ladder": (
        "largest measured step: log σ −0.5",
        "In our script with the flags of CleanRL, four of five runs end at 1,377 to 1,535, near "
        "the mean that CleanRL publishes; one reaches 3,929. With time limits bootstrapped, three "
        "of five still stay below 1,800. With a log σ of −0.5 as well, all five end above 3,500. "
        "Five seeds cannot tell which of these two steps brings more, nor which of the others "
        "help; in another order the shares could differ. 32 × 64 are environments × steps of a "
        "rollout, instead of 1 × 2,048. Differences of code remain: for example, our statistics "
        "of observations are updated once per rollout, those of CleanRL in each step.",
    ),
}

CLAIMS = [
    Claim(
        1,
        "clip",
        "Most of PPO's gain over plain policy gradient is from code-level details "
        "(normalisation, annealing, a small policy head), not the clip",
        "matters, negative: no details (observations and rewards not normalised, no annealing, a "
        "gain of 1 for the policy head) is worse than no clip",
        (
            *compared("plain-no-clip", TWO, {"no details, against no clip": "plain-no-details"}),
            *compared("plain", TWO, {"no clip": "plain-no-clip", "no details": "plain-no-details"}),
            *compared("plain-no-details", TWO, {"no details: no clip": "plain-no-clip-no-details"}),
            *compared("plain-kl-limit", TWO, {"KL limit: no clip": "plain-no-clip-kl-limit"}),
        ),
    ),
    Claim(
        2,
        "value-clip",
        "Clipping the value loss is not essential",
        "does not matter",
        (
            *compared("no-clip-vloss", (LUNAR,), {"value clip": "base"}),  # its default
            *compared("base", MUJOCO, {"value clip": "clip-vloss"}),
        ),
    ),
    Claim(
        3,
        "norm-adv",
        "Normalising advantages stabilises training dramatically",
        "matters, negative",
        compared("base", TWO, {"advantages not normalised": "no-norm-adv"}),
    ),
    Claim(
        4,
        "epochs",
        "Reusing a batch for several epochs is most of the sample efficiency",
        "matters, negative: one epoch reaches less than half of what ten reach",
        compared(
            "plain",
            TWO,
            {f"{n} epoch{'s' * (n > 1)}": f"plain-epochs-{n}" for n in (1, 2, 4, 20)},
        ),
        score="mean_return",
    ),
    Claim(
        5,
        "hundred-epochs",
        "With 100 epochs the clip saturates and the remaining epochs do nothing",
        "does not matter, and clipfrac stays the same from epoch 20 to 100",
        compared("plain", MUJOCO, {"100 epochs": "plain-epochs-100"}),
    ),
    Claim(
        6,
        "overfit",
        "Many epochs with neither clip nor KL limit do harm",
        "matters, negative",
        (
            *compared(
                "plain-epochs-20",
                TWO,
                {
                    "20 epochs, no clip": "plain-epochs-20-no-clip",
                    "20 epochs, KL limit for clip": "plain-epochs-20-no-clip-kl-limit",
                },
            ),
            *compared("plain", TWO, {"10 epochs, no clip": "plain-no-clip"}),
        ),
    ),
    Claim(
        7,
        "clip-kl",
        "The clip at ε keeps the KL of an update near ½ε²",
        "mean approx_kl within a factor of 2 of ½ε² for each ε and task",
        compared("plain", TWO, {f"ε = {e}": f"plain-clip-{e}" for e in (0.05, 0.1, 0.3)}),
    ),
    Claim(
        8,
        "entropy",
        "Without the entropy bonus the policy turns deterministic too early",
        "matters, positive: 0.01 is better than none",
        (
            *compared("ent-0", (LUNAR,), BONUSES),
            *compared("base", MUJOCO, BONUSES),
        ),
    ),
    Claim(
        9,
        "lambda",
        "λ = 0.95 is a good setting",
        "no other λ is shown to be better, and 0 and 1 are worse",
        compared("base", TWO, {f"λ = {x}": f"lambda-{x}" for x in (0, 0.5, 0.9, 0.99, 1)}),
    ),
    Claim(
        10,
        "time-limit",
        "Treating a time limit as termination harms",
        "matters, negative",
        compared(
            "base", ("Pendulum-v1", HALF_CHEETAH), {"time limit as termination": "no-bootstrap"}
        ),
    ),
    Claim(
        11,
        "reset-rows",
        "Training on the reset rows of NEXT_STEP autoreset harms",
        "matters, negative",
        compared("base", (*SHORT_EPISODES, LUNAR), {"reset rows kept": "reset-rows"}),
    ),
    Claim(
        12,
        "recompute",
        "Recomputing advantages each epoch is worth it on MuJoCo",
        "matters, negative",
        compared("base", MUJOCO, {"advantages not recomputed": "no-recompute"}),
    ),
    Claim(
        13,
        "normalisation",
        "Observation and reward normalisation are crucial on MuJoCo",
        "matters, negative, both",
        compared(
            "base",
            TWO,
            {
                "observations not normalised": "no-norm-obs",
                "rewards not normalised": "no-norm-reward",
            },
        ),
    ),
    Claim(
        14,
        "start",
        "Initial log σ, the policy head's gain and annealing the learning rate matter",
        "matters, negative, each",
        (
            *compared("base", TWO, {"gain of 1": "head-gain-1", "no annealing": "no-anneal"}),
            *compared("base", MUJOCO, {"log σ = 0": "log-std-0"}),
        ),
    ),
    Claim(
        15,
        "ladder",
        "What turns CleanRL's 1,443 on HalfCheetah into 5,000",
        "nothing in particular; changes are added one at a time",
        compared("long", MUJOCO, LADDER_STEPS),
    ),
    Claim(
        16,
        "kl-penalty",
        "Clipping is a KL penalty in disguise, equally effective",
        "does not matter, for the best β of each task",
        compared("plain", TWO, {f"β = {b}": f"plain-kl-penalty-{b}" for b in (0.3, 1, 3)}),
    ),
]


def run_of(task, arm, seed):
    script, flags = TASKS[task]
    more, edits = ARMS[arm]
    edits = edits.get(script, ()) if isinstance(edits, dict) else edits
    return Run("claims", f"{task}--{arm}", seed, script, task, f"{flags} {more}".strip(), edits)


def seeds_of(claim, arm):
    """How many seeds the claim needs of an arm."""
    if arm in REFERENCES:
        return BASE_SEEDS
    return 10 if claim.name in TEN_SEEDS else SEEDS


def runs_of(claims):
    """Each run once, the first seeds of all arms first."""
    pairs = {}  # (task, arm): seeds
    for claim in claims:
        for comparison in claim.comparisons:
            for task in comparison.tasks:
                for arm in (comparison.reference, comparison.base, comparison.arm):
                    pairs[task, arm] = max(seeds_of(claim, arm), pairs.get((task, arm), 0))
    seeds = range(1, BASE_SEEDS + 1)
    return [run_of(*pair, seed) for seed in seeds for pair in pairs if seed <= pairs[pair]]


STUDIES = {f"claims-{claim.name}": runs_of([claim]) for claim in CLAIMS}
STUDIES["claims"] = runs_of(CLAIMS)


def bootstrap(scores, random_returns, rng, draws=10_000):
    """Effects of {task: scores of (arm, base, reference)}: {task or "pooled": (effect, low, high)}.

    An arm that is given twice, as base and reference, is resampled once.
    """
    found, samples = {}, []
    for task, names in scores.items():
        means = [np.mean(x) for x in names]
        drawn = {id(x): rng.choice(x, (draws, len(x))).mean(1) for x in names}
        arm, base, reference = (drawn[id(x)] for x in names)
        samples.append((arm - base) / (reference - random_returns[task]))
        effect = (means[0] - means[1]) / (means[2] - random_returns[task])
        found[task] = (effect, *np.percentile(samples[-1], [2.5, 97.5]))
    pooled = np.mean([effect for effect, _, _ in found.values()])
    found["pooled"] = (pooled, *np.percentile(np.mean(samples, 0), [2.5, 97.5]))
    return found


def same_seeds(scores, random_returns, rng, draws=10_000):
    """Like `bootstrap`, but compares each seed of the arm with that of base and reference.

    Each draw takes the same seeds of all three."""
    found, samples = {}, []
    for task, (arm, base, reference) in scores.items():
        count = min(len(arm), len(base))  # seeds are counted from 1
        differences = arm[:count] - base[:count]
        scales = reference[:count] - random_returns[task]
        drawn = rng.integers(count, size=(draws, count))
        samples.append(differences[drawn].mean(1) / scales[drawn].mean(1))
        interval = np.percentile(samples[-1], [2.5, 97.5])
        found[task] = (differences.mean() / scales.mean(), *interval)
    pooled = np.mean([effect for effect, _, _ in found.values()])
    found["pooled"] = (pooled, *np.percentile(np.mean(samples, 0), [2.5, 97.5]))
    return found


def verdict(effects):
    """Applies RULE to what `bootstrap` returns."""
    tasks = [interval for task, interval in effects.items() if task != "pooled"]
    effect, low, high = effects["pooled"]
    if any(low > 0 for _, low, _ in tasks) and any(high < 0 for _, _, high in tasks):
        return "depends on the task"
    if (low > 0 or high < 0) and abs(effect) >= 0.05:
        return "matters"
    if -0.1 <= low and high <= 0.1:
        return "does not matter"
    return f"not settled (± {100 * (high - low) / 2:.0f} %)"


def outcome(claim, effects, more=True):
    """Whether the claim holds, from {label: effects}; `more`: what else its prediction asks for."""
    wanted, sign, labels = DECIDING[claim.name]
    verdicts = [verdict(effects[label]) for label in labels]
    unsettled = [found for found in verdicts if found.startswith("not settled")]
    if unsettled:
        return unsettled[0]
    if "depends on the task" in verdicts:
        return "depends on the task"
    signs = all(sign * effects[label]["pooled"][0] >= 0 for label in labels)
    return "holds" if set(verdicts) == {wanted} and signs and more else "does not hold"


def random_returns(task, episodes=100):
    env = gym.make(task)
    env.action_space.seed(1)
    returns = []
    for episode in range(episodes):
        env.reset(seed=episode)
        score = done = 0
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            score += reward
            done = terminated or truncated
        returns.append(score)
    return float(np.mean(returns))


def main():
    path = Path(__file__).parent / "results" / "claims-random.json"
    path.write_text(json.dumps({task: random_returns(task) for task in TASKS}, indent=2) + "\n")


if __name__ == "__main__":
    main()
