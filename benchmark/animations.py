"""Makes the animations of the README: trains agents, films them, writes results/NAME.gif.

python benchmark/animations.py NAME ...    # or all; MuJoCo needs MUJOCO_GL=egl or osmesa
"""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
from moviepy import VideoFileClip, concatenate_videoclips

ROOT = Path(__file__).parents[1]
AGENTS = {  # name: script and flags
    "untrained": "ppo.py --learning-rate 0 --total-timesteps 512",
    "cartpole": "ppo.py",
    "half-cheetah": "ppo_continuous.py --env-id benchmark.animations:HalfCheetahFilm-v5",
    "breakout": "ppo_atari.py --total-timesteps 1000000",
}
# The same environment, with a camera that follows: gymnasium's own loses a fast agent.
HALF_CHEETAH = "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv"
FILM = {"max_episode_steps": 1000, "kwargs": {"camera_name": "track"}}
gym.register("HalfCheetahFilm-v5", HALF_CHEETAH, **FILM)


def darken(picture):
    """White, too bright on a dark page, becomes a bluish grey."""
    picture = picture.copy()
    picture[(picture > 240).all(-1)] = (150, 165, 180)
    return picture


def main():
    for name in sys.argv[1:] or AGENTS:
        folder, (script, *flags) = ROOT / "runs/animations" / name, AGENTS[name].split()
        python = [sys.executable, ROOT / script]
        if not folder.exists():
            subprocess.run([*python, *flags, "--runs-dir", folder], check=True)
        (run_dir,) = folder.iterdir()
        film = "--num-envs 1 --eval-episodes 5 --capture-video".split()
        subprocess.run([*python, "--evaluate", run_dir, *film], check=True)
        films = map(VideoFileClip, run_dir.glob("videos/**/*.mp4"))
        clip = concatenate_videoclips(list(films))
        clip = clip.subclipped(0, min(4, clip.duration)).image_transform(darken)
        clip = clip.resized(height=250).cropped(x_center=clip.w * 125 / clip.h, width=250)
        clip.write_gif(ROOT / "benchmark/results" / f"{name}.gif", fps=10)


if __name__ == "__main__":
    main()
