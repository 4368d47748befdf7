"""One of the processes of test_atari.py's run under torchrun; keeps what it saw and what became of it in a file.

torchrun --nproc-per-node 2 tests/ranks.py FILE FLAGS…
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

import ppo_atari as ppo

seen = {"initial": None, "minibatches": [], "gradients": [], "parameters": []}
loss, reduce, diagnostics, flat_parameters = ppo.ppo_loss, dist.all_reduce, ppo.diagnostics, ppo.flat_parameters
torch._C._get_accelerator = lambda: torch.device("mps")  # as on a machine that has another device than the one in use


def keep_minibatch(agent, args, *minibatch):
    if seen["initial"] is None:
        seen["initial"] = {name: value.clone() for name, value in agent.state_dict().items()}
    seen["parameters"].append(torch.cat([p.detach().flatten() for p in agent.parameters()]))
    seen["minibatches"].append([tensor.clone() for tensor in minibatch])
    return loss(agent, args, *minibatch)


def keep_gradient(tensor, *rest):
    reduce(tensor, *rest)
    seen["gradients"].append(tensor / ppo.WORLD_SIZE)


def different_weights(agent):
    """Those of the first process; the other begins with others, until they are made equal."""
    parameters = flat_parameters(agent)
    parameters.data += 0.01 * ppo.RANK
    return parameters


def very_different_kl(*args):
    """0 on the first process; on the second it grows by 1 with every minibatch."""
    old_kl, _, *rest = diagnostics(*args)
    return old_kl, float(ppo.RANK * len(seen["minibatches"])), *rest


ppo.ppo_loss, dist.all_reduce, ppo.diagnostics = keep_minibatch, keep_gradient, very_different_kl
ppo.flat_parameters = different_weights
ppo.train(tyro.cli(ppo.Args, args=sys.argv[2:]))
torch.save(seen, f"{sys.argv[1]}-{ppo.RANK}")
