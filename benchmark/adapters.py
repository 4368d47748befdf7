"""Adapters for probes.py: how to train a PPO, and to ask what it has learned.

Each uses its library as its documentation says, with what probes need: short rollouts, a
few epochs, a learning rate of 1e-3 that settles within the steps (lowered to 0 where there
is a schedule), rewards as they are, observations normalised where there is a way to. The
agent that answers was saved and loaded, where there is a way to. A library is imported only
when it is asked for, since each has a virtual environment of its own.
"""

import contextlib
import importlib
import os
import runpy
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import gymnasium as gym
import numpy as np
import torch

torch.set_num_threads(1)


def ours(env_id, gamma, num_envs, steps, seed, continuous, script=None):
    """ppo.py and ppo_continuous.py; script: a changed copy of one of them."""
    script = script or importlib.import_module("ppo_continuous" if continuous else "ppo")
    flags = {"num_steps": 32, "num_minibatches": 4, "update_epochs": 4, "clip_vloss": False}
    flags |= {"norm_obs": True, "norm_reward": False, "target_kl": None, "device": "cpu"}
    with TemporaryDirectory() as folder:
        args = script.Args(
            env_id,
            num_envs=num_envs,
            total_timesteps=steps,
            gamma=gamma,
            seed=seed,
            learning_rate=1e-3,
            runs_dir=folder,
            **flags,
        )
        agent = script.load_agent(script.train(args))
    x = lambda obs: agent.normalize(torch.from_numpy(obs))
    if not continuous:
        action = lambda obs: agent.act(x(obs), greedy=True).numpy()
    else:
        action = lambda obs: agent.env_action(agent.act(x(obs), greedy=True).numpy())
    return lambda obs: agent.value(x(obs)).numpy(), action


def sb3(env_id, gamma, num_envs, steps, seed, continuous, library="stable_baselines3"):
    """stable-baselines3, and SBX, which has the same interface."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    envs = VecNormalize(make_vec_env(env_id, num_envs, seed), norm_reward=False)
    algorithm = importlib.import_module(library).PPO
    options = {"learning_rate": lambda left: 1e-3 * left, "n_steps": 32, "batch_size": 32}
    options |= {"n_epochs": 4, "gamma": gamma, "seed": seed, "device": "cpu"}
    model = algorithm("MlpPolicy", envs, **options)
    model.learn(steps)
    with TemporaryDirectory() as folder:
        model.save(f"{folder}/model")
        envs.save(f"{folder}/envs")
        model = algorithm.load(f"{folder}/model", device="cpu")
        envs = VecNormalize.load(f"{folder}/envs", envs.venv)
    if library == "sbx":
        critic = lambda x: model.policy.vf.apply(model.policy.vf_state.params, x)
    else:
        critic = lambda x: model.policy.predict_values(torch.as_tensor(x)).detach()
    value = lambda obs: critic(envs.normalize_obs(obs))
    return value, lambda obs: model.predict(envs.normalize_obs(obs), deterministic=True)[0]


def sbx(*settings):
    return sb3(*settings, library="sbx")


def cleanrl(env_id, gamma, num_envs, steps, seed, continuous):
    """The scripts as they are, in the folder $CLEANRL."""
    if "Scale" in env_id and not continuous:
        raise NotImplementedError("ppo.py has no normalisation")
    script = "ppo_continuous_action.py" if continuous else "ppo.py"
    path = str(Path(os.environ["CLEANRL"], script))
    flags = {"env-id": env_id, "gamma": gamma, "num-envs": num_envs, "seed": seed}
    flags |= {"total-timesteps": steps, "num-steps": 32, "num-minibatches": 4}
    flags |= {"update-epochs": 4, "learning-rate": 1e-3}
    flags = [f"--{name}={value}" for name, value in flags.items()]
    sys.argv = [path, *flags, "--no-clip-vloss", "--no-cuda"]
    with TemporaryDirectory() as folder, contextlib.chdir(folder):
        left = runpy.run_path(path, run_name="__main__")  # its variables at the end
    agent, tensor = left["agent"].requires_grad_(False), torch.Tensor
    if not continuous:
        action = lambda obs: agent.actor(tensor(obs)).argmax(-1)
        return lambda obs: agent.get_value(tensor(obs)), action
    used, new = left["envs"].envs[0], left["make_env"](env_id, 0, False, "", gamma)()
    new.reset(seed=seed)
    # Its evaluation begins with new statistics; they are used where that is the question.
    statistics = (new if "Scale" in env_id else used).get_wrapper_attr("obs_rms")
    std = np.sqrt(statistics.var + 1e-8)
    x = lambda obs: tensor((obs - statistics.mean) / std).clamp(-10, 10)
    unit = np.sqrt(used.get_wrapper_attr("return_rms").var + 1e-8)  # it divides rewards
    return lambda obs: agent.get_value(x(obs)) * unit, lambda obs: agent.actor_mean(x(obs))


def tianshou(env_id, gamma, num_envs, steps, seed, continuous):
    """As in examples/mujoco/mujoco_ppo.py and test/discrete/test_ppo_discrete.py."""
    from tianshou.algorithm import PPO
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.data import Batch, Collector, VectorReplayBuffer
    from tianshou.env import DummyVectorEnv, VectorEnvNormObs
    from tianshou.trainer import OnPolicyTrainerParams

    envs = VectorEnvNormObs(DummyVectorEnv([lambda: gym.make(env_id)] * num_envs))
    np.random.seed(seed)  # noqa: NPY002, as the library draws from it
    torch.manual_seed(seed)
    envs.seed(seed)
    policy, critic = tianshou_networks(gym.make(env_id), continuous)
    optimizer = AdamOptimizerFactory(lr=1e-3)
    algorithm = PPO(policy=policy, critic=critic, optim=optimizer, gamma=gamma)
    collector = Collector(algorithm, envs, VectorReplayBuffer(32 * num_envs, num_envs))
    settings = {"max_epochs": 1, "epoch_num_steps": steps, "update_step_num_repetitions": 4}
    settings |= {"batch_size": 32, "collection_step_num_env_steps": 32 * num_envs}
    settings |= {"training_collector": collector, "test_collector": None}
    algorithm.run_training(OnPolicyTrainerParams(**settings))
    algorithm.eval()
    x = lambda obs: envs.get_obs_rms().norm(obs)
    choose = lambda x: policy(Batch(obs=x, info={})).act.detach().numpy()
    value = lambda obs: critic(x(obs)).detach()
    return value, lambda obs: policy.map_action(choose(x(obs)))


def tianshou_networks(env, continuous):
    from tianshou.algorithm.modelfree import reinforce
    from tianshou.utils.net import continuous as boxes
    from tianshou.utils.net import discrete
    from tianshou.utils.net.common import Net

    sizes = {"state_shape": env.observation_space.shape, "hidden_sizes": [64, 64]}
    net = lambda: Net(activation=torch.nn.Tanh, **sizes)
    options = {"action_space": env.action_space, "deterministic_eval": True}
    if not continuous:
        actor = discrete.DiscreteActor(preprocess_net=net(), action_shape=2)
        options["dist_fn"] = torch.distributions.Categorical
        policy = reinforce.DiscreteActorPolicy(actor=actor, **options)
        return policy, discrete.DiscreteCritic(preprocess_net=net())
    normal = lambda x: torch.distributions.Independent(torch.distributions.Normal(*x), 1)
    make = boxes.ContinuousActorProbabilistic
    actor = make(preprocess_net=net(), action_shape=(1,), unbounded=True)
    policy = reinforce.ProbabilisticActorPolicy(actor=actor, dist_fn=normal, **options)
    return policy, boxes.ContinuousCritic(preprocess_net=net())


def skrl(env_id, gamma, num_envs, steps, seed, continuous, time_limit_bootstrap=False):
    """As in examples/gymnasium/torch_gymnasium_pendulum_ppo.py."""
    from skrl.agents.torch.ppo import PPO
    from skrl.envs.wrappers.torch import wrap_env
    from skrl.memories.torch import RandomMemory
    from skrl.trainers.torch import SequentialTrainer
    from skrl.utils import set_seed

    set_seed(seed)
    env = wrap_env(gym.make_vec(env_id, num_envs, "sync"))
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    cfg = skrl_config(env, discount_factor=gamma, time_limit_bootstrap=time_limit_bootstrap)
    models = lambda: {"models": skrl_models(spaces, continuous), **spaces}
    agent = PPO(memory=RandomMemory(memory_size=32, num_envs=num_envs), cfg=cfg, **models())
    trainer = {"timesteps": steps // num_envs, "headless": True}
    SequentialTrainer(cfg=trainer, env=env, agents=agent).train()
    with TemporaryDirectory() as folder:
        agent.save(f"{folder}/agent.pt")
        agent = PPO(cfg=cfg, **models())
        agent.load(f"{folder}/agent.pt")
    x = lambda obs: agent._observation_preprocessor(torch.tensor(obs))
    output = lambda model, obs: model.net(x(obs)).detach()
    best = lambda output: output if continuous else output.argmax(-1)
    value = lambda obs: output(agent.value, obs)
    return value, lambda obs: best(output(agent.policy, obs))


def skrl_bootstrap(*settings):
    return skrl(*settings, time_limit_bootstrap=True)


def skrl_config(env, **options):
    from skrl.agents.torch.ppo import PPO_CFG
    from skrl.resources.preprocessors.torch import RunningStandardScaler

    options |= {"rollouts": 32, "learning_epochs": 4, "mini_batches": 4}
    options |= {"learning_rate": 1e-3, "value_clip": 0, "value_loss_scale": 0.5}
    options |= {"observation_preprocessor": RunningStandardScaler}
    options |= {"observation_preprocessor_kwargs": {"size": env.observation_space}}
    cfg = PPO_CFG(**options)
    cfg.experiment.write_interval = cfg.experiment.checkpoint_interval = 0
    return cfg


def skrl_models(spaces, continuous):
    from skrl.models.torch import CategoricalMixin, DeterministicMixin, GaussianMixin, Model

    def network(mixin, outputs):
        class Network(mixin, Model):
            def __init__(self):
                Model.__init__(self, **spaces)
                mixin.__init__(self)
                tanh, sizes = torch.nn.Tanh(), (self.num_observations, 64, 64, outputs)
                first, second, last = map(torch.nn.Linear, sizes, sizes[1:])
                self.net = torch.nn.Sequential(first, tanh, second, tanh, last)
                self.log_std = torch.nn.Parameter(torch.zeros(outputs))

            def compute(self, inputs, role):
                return self.net(inputs["observations"]), {"log_std": self.log_std}

        return Network()

    policy = network(GaussianMixin, 1) if continuous else network(CategoricalMixin, 2)
    return {"policy": policy, "value": network(DeterministicMixin, 1)}
