"""Trains one of the scripts, or a patched copy, and evaluates the agent: used by run.py.

    python benchmark/train.py ppo.py 10 100 --env-id CartPole-v1  # the script's flags last

Evaluates the agent so many times on the way (here 10), ten episodes each with sampled
actions, and the finished agent in so many episodes (here 100), sampled and greedy.
Training is the same with and without. Leaves mean returns in RUNS_DIR/evaluation.json.
"""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import tyro


def main():
    path, evaluations, played, *flags = sys.argv[1:]
    sys.path.insert(0, str(Path(path).resolve().parent))
    script = importlib.import_module(Path(path).stem)
    args = tyro.cli(script.Args, args=flags)
    if args.resume is not None:
        args = replace(script.load_run(args.resume)[0], resume=args.resume)
    iterations = args.total_timesteps // (args.num_envs * args.num_steps)
    numbers = range(1, int(evaluations) + 1)
    milestones = {iterations * i // len(numbers): i for i in numbers}
    file = Path(args.runs_dir) / "evaluation.json"
    means = json.loads(file.read_text()) if file.exists() else {}

    def evaluate(agent, name, envs, episodes, greedy=False):
        changed = replace(args, num_envs=envs, eval_episodes=episodes, greedy=greedy)
        changed = replace(changed, evaluate=args.runs_dir)  # no training: whole episodes
        means[str(name)] = float(script.evaluate(agent, changed).mean())
        file.with_suffix(".tmp").write_text(json.dumps(means))
        file.with_suffix(".tmp").replace(file)  # in one move, so that it is always complete

    def after_iteration(agent, metrics):
        if metrics["iteration"] in milestones:
            evaluate(agent, milestones[metrics["iteration"]], 10, 1)

    agent = script.load_agent(script.train(args, after_iteration))
    if int(played):
        evaluate(agent, "sampled", 20, int(played) // 20)
        evaluate(agent, "greedy", 20, int(played) // 20, greedy=True)


if __name__ == "__main__":
    main()
