"""With the same weights and minibatch, our loss has the gradient of stable-baselines3's."""

import pytest
import stable_baselines3
import torch

import ppo
import ppo_continuous


class Caught(Exception):
    """Stops stable-baselines3 after its first backward pass, before it clips the gradient."""


def copy_weights(policy, agent):
    """Copies the weights of a stable-baselines3 policy into our agent; returns pairs of
    parameters (ours, theirs)."""
    actor = [*policy.mlp_extractor.policy_net, policy.action_net]
    critic = [*policy.mlp_extractor.value_net, policy.value_net]
    agent.actor.load_state_dict(torch.nn.Sequential(*actor).state_dict())
    agent.critic.load_state_dict(torch.nn.Sequential(*critic).state_dict())
    ours = [*agent.actor.parameters(), *agent.critic.parameters()]
    pairs = list(zip(ours, parameters_of(actor + critic)))
    if hasattr(policy, "log_std"):
        agent.log_std.data.copy_(policy.log_std)
        pairs.append((agent.log_std, policy.log_std))
    return pairs


def parameters_of(layers):
    return [parameter for layer in layers for parameter in layer.parameters()]


@pytest.mark.parametrize(
    ("script", "env_id"), [(ppo, "CartPole-v1"), (ppo_continuous, "Pendulum-v1")]
)
@pytest.mark.parametrize("clip", [0.2, 0.02])
def test_gradient_is_that_of_stable_baselines3(monkeypatch, script, env_id, clip):
    # Its value loss has no ½, so its weight of 0.25 is our 0.5. It clips the value loss by another
    # formula, without the maximum of the two errors, so that clip is off in both.
    options = {"n_steps": 128, "batch_size": 128, "n_epochs": 1, "ent_coef": 0.01, "vf_coef": 0.25}
    sizes = {"pi": [64, 64], "vf": [256, 256] if script is ppo_continuous else [64, 64]}
    options |= {"clip_range": clip, "policy_kwargs": {"net_arch": sizes}}
    model = stable_baselines3.PPO("MlpPolicy", env_id, seed=1, device="cpu", **options)
    _, callback = model._setup_learn(128)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 128)
    torch.manual_seed(1)
    # Move the policy, as the first minibatches of an update do, so that ratios differ from 1.
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)

    args = script.Args(clip_coef=clip, clip_vloss=False, ent_coef=0.01, vf_coef=0.5)
    options = (False, -0.5, True) if script is ppo_continuous else ()
    agent = script.Agent(model.observation_space, model.action_space, *options)
    pairs = copy_weights(model.policy, agent)
    rows = next(model.rollout_buffer.get())  # all 128; their order does not change the means
    actions = rows.actions if script is ppo_continuous else rows.actions.long().flatten()
    batch = {"x": rows.observations, "actions": actions, "old_log_probs": rows.old_log_prob}
    batch |= {"old_values": rows.old_values, "advantages": rows.advantages, "returns": rows.returns}
    script.ppo_loss(agent, batch, args)[0].backward()
    ratio = (agent.evaluate_actions(rows.observations, actions)[0] - rows.old_log_prob).exp()
    shares = [(ratio < 1 - clip).float().mean(), (ratio > 1 + clip).float().mean()]
    assert clip == 0.2 or min(shares) > 0.02  # with 0.02, ratios leave the interval on both sides

    def catch(*_):
        raise Caught

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", catch)
    with pytest.raises(Caught):
        model.train()
    for ours, theirs in pairs:
        assert theirs.grad.abs().max() > 1e-5
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
