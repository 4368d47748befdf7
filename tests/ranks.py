"""One process of test_atari.py's run under torchrun: trains, and saves what it saw to FILE-RANK.

torchrun --nproc-per-node 2 tests/ranks.py FILE FLAGS…
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

import ppo_atari as ppo

seen = {"first_obs": [], "orders": [], "weights": [], "grad_norms": [], "minibatches": 0}
start_envs, flat_parameters, ppo_loss = ppo.start_envs, ppo.flat_parameters, ppo.ppo_loss
randperm, all_reduce = torch.randperm, dist.all_reduce


def keep_first_obs(args, iteration):
    envs, obs = start_envs(args, iteration)
    seen["first_obs"] += list(obs)
    return envs, obs


def different_weights(agent):
    """In the second process all weights are larger, until train makes them equal."""
    parameters = flat_parameters(agent)
    parameters.data += 0.01 * ppo.RANK
    return parameters


def keep_order(n, **options):
    seen["orders"].append(randperm(n, **options))
    return seen["orders"][-1]


def keep_minibatch(agent, batch, args):
    """The KL is 0 in the first process; in the second it grows by 1 with every minibatch."""
    seen.setdefault(
        "agent", {name: weights.clone() for name, weights in agent.state_dict().items()}
    )
    seen.setdefault("minibatch", {name: rows.clone() for name, rows in batch.items()})
    bits = torch.cat([parameter.detach().flatten() for parameter in agent.parameters()])
    seen["weights"].append(bits.view(torch.int32).sum().item())
    seen["minibatches"] += 1
    loss, logged = ppo_loss(agent, batch, args)
    return loss, logged | {"approx_kl": torch.tensor(float(ppo.RANK * seen["minibatches"]))}


def keep_gradient(tensor):
    all_reduce(tensor)
    if tensor.ndim == 1:  # not the KL
        seen.setdefault("gradient", tensor / ppo.WORLD_SIZE)
        seen["grad_norms"].append(tensor.norm().item() / ppo.WORLD_SIZE)


class Adam(torch.optim.Adam):
    def step(self):
        (parameters,) = self.param_groups[0]["params"]
        seen.setdefault("clipped_gradient", parameters.grad.clone())
        super().step()


ppo.start_envs, ppo.flat_parameters, ppo.ppo_loss = (
    keep_first_obs,
    different_weights,
    keep_minibatch,
)
torch.randperm, dist.all_reduce, torch.optim.Adam = keep_order, keep_gradient, Adam
ppo.train(tyro.cli(ppo.Args, args=sys.argv[2:]))
torch.save(seen, f"{sys.argv[1]}-{ppo.RANK}")
