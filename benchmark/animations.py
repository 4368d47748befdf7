"""Makes the animations of the README: trains agents, films them, writes results/NAME.gif.

python benchmark/animations.py    # MuJoCo without a display: MUJOCO_GL=egl before it
"""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
from moviepy import VideoFileClip, concatenate_videoclips

ROOT = Path(__file__).parents[1]
AGENTS = {  # name: script and flags
    "cartpole-before": "ppo.py --total-timesteps 512",  # after one update
    "cartpole-after": "ppo.py",
    "half-cheetah": "ppo_continuous.py --env-id benchmark.animations:HalfCheetahFilm-v5",
    "breakout": "ppo_atari.py --total-timesteps 1000000",
}
# The same environment, with a camera that follows: gymnasium's own loses a fast agent.
HALF_CHEETAH = "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv"
FILM = {"max_episode_steps": 1000, "kwargs": {"camera_name": "track"}}
gym.register("HalfCheetahFilm-v5", HALF_CHEETAH, **FILM)


def main():
    for name, command in AGENTS.items():
        folder, (script, *flags) = ROOT / "runs" / "animations" / name, command.split()
        python = [sys.executable, ROOT / script]
        if not folder.exists():
            subprocess.run([*python, *flags, "--runs-dir", folder], check=True)
        (run_dir,) = folder.iterdir()
        episodes = "10" if name == "cartpole-before" else "1"
        film = ["--num-envs", "1", "--eval-episodes", episodes, "--capture-video"]
        subprocess.run([*python, "--evaluate", run_dir, *film], check=True)
        paths = sorted(max(run_dir.glob("videos/*")).glob("*.mp4"))
        clip = concatenate_videoclips([VideoFileClip(path) for path in paths])
        clip = clip.subclipped(0, min(6, clip.duration)).resized(height=150)
        clip.write_gif(ROOT / "benchmark" / "results" / f"{name}.gif", fps=12)


if __name__ == "__main__":
    main()
