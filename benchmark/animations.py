"""Makes the animations at the top of the README: agents of the scripts, filmed by --evaluate.

    python benchmark/animations.py    # MuJoCo without a display: MUJOCO_GL=egl before it

Trains what is missing in runs/animations/ (about half an hour), films one episode of each
agent, or several if the pole falls at once, and writes the first seconds to results/NAME.gif.
"""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
from moviepy import VideoFileClip, concatenate_videoclips

# The same environment, with a camera that follows: gymnasium's own loses a fast agent.
HALF_CHEETAH = "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv"
FILM = {"max_episode_steps": 1000, "kwargs": {"camera_name": "track"}}
gym.register("HalfCheetahFilm-v5", HALF_CHEETAH, **FILM)

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
CHEETAH_FLAGS = "--env-id benchmark.animations:HalfCheetahFilm-v5 --compile"
AGENTS = {  # name: script, flags
    "cartpole-before": ("ppo.py", "--total-timesteps 512"),  # after one update
    "cartpole-after": ("ppo.py", ""),
    "half-cheetah": ("ppo_continuous.py", CHEETAH_FLAGS),
    "breakout": ("ppo_atari.py", "--total-timesteps 1000000"),
}
SECONDS = 6


def main():
    for name, (script, flags) in AGENTS.items():
        folder = ROOT / "runs" / "animations" / name
        python = [sys.executable, ROOT / script]
        if not folder.exists():
            subprocess.run([*python, *flags.split(), "--runs-dir", folder], check=True)
        (run_dir,) = folder.iterdir()
        episodes = "10" if name == "cartpole-before" else "1"
        film = ["--num-envs", "1", "--eval-episodes", episodes, "--capture-video"]
        subprocess.run([*python, "--evaluate", run_dir, *film], check=True)
        newest = max(run_dir.glob("videos/*"))
        paths = [newest] if newest.is_file() else sorted(newest.glob("*.mp4"))
        clip = concatenate_videoclips([VideoFileClip(path) for path in paths])
        clip = clip.subclipped(0, min(SECONDS, clip.duration)).resized(height=150)
        clip.write_gif(RESULTS / f"{name}.gif", fps=12)


if __name__ == "__main__":
    main()
