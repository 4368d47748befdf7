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
loss, reduce, diagnostics = ppo.ppo_loss, dist.all_reduce, ppo.diagnostics


def keep_minibatch(agent, args, *minibatch):
    if seen["initial"] is None:
        seen["initial"] = {name: value.clone() for name, value in agent.state_dict().items()}
    seen["parameters"].append(torch.cat([p.detach().flatten() for p in agent.parameters()]))
    seen["minibatches"].append([tensor.clone() for tensor in minibatch])
    return loss(agent, args, *minibatch)


def keep_gradient(tensor, *rest):
    reduce(tensor, *rest)
    seen["gradients"].append(tensor / ppo.WORLD_SIZE)


def very_different_kl(*args):
    """0 on the first process; on the second it grows by 1 with every minibatch."""
    old_kl, _, *rest = diagnostics(*args)
    return old_kl, float(ppo.RANK * len(seen["minibatches"])), *rest


ppo.ppo_loss, dist.all_reduce, ppo.diagnostics = keep_minibatch, keep_gradient, very_different_kl
ppo.train(tyro.cli(ppo.Args, args=sys.argv[2:]))
torch.save(seen, f"{sys.argv[1]}-{ppo.RANK}")
