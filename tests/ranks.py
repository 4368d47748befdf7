"""One process of test_atari.py's run under torchrun: trains, and saves what it saw.

torchrun --nproc-per-node 2 tests/ranks.py FILE FLAGS… writes FILE-RANK."""

import sys
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

import ppo_atari as ppo

seen = {"orders": [], "weights": [], "clipped_gradients": [], "minibatches": 0}
ppo_loss, randperm, orthogonal_ = ppo.ppo_loss, torch.randperm, torch.nn.init.orthogonal_


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def different_weights(weight, gain):
    """In the second process all weights are larger, until train makes them equal."""
    orthogonal_(weight, gain)
    weight.data += 0.01 * ppo.RANK


def keep_order(n, **options):
    seen["orders"].append(randperm(n, **options))
    return seen["orders"][-1]


def keep_minibatch(agent, batch, args):
    """The KL is 0 in the first process; in the second it grows by 1 with each minibatch."""
    state = {name: weights.clone() for name, weights in agent.state_dict().items()}
    seen.setdefault("agent", state)
    seen.setdefault("minibatch", {name: rows.clone() for name, rows in batch.items()})
    seen["weights"].append(flat(agent.parameters()).view(torch.int32).sum().item())
    seen["minibatches"] += 1
    loss, logged = ppo_loss(agent, batch, args)
    return loss, logged | {"approx_kl": torch.tensor(float(ppo.RANK * seen["minibatches"]))}


class Adam(torch.optim.Adam):
    def step(self):
        gradients = [parameter.grad for parameter in self.param_groups[0]["params"]]
        seen["clipped_gradients"].append(flat(gradients))
        super().step()


ppo.ppo_loss, torch.nn.init.orthogonal_ = keep_minibatch, different_weights
torch.randperm, torch.optim.Adam = keep_order, Adam
ppo.train(tyro.cli(ppo.Args, args=sys.argv[2:]))
torch.save(seen, f"{sys.argv[1]}-{ppo.RANK}")
