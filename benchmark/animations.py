"""Makes the animations at the top of the README: agents of the scripts, filmed by --evaluate.

    python benchmark/animations.py    # MuJoCo without a display: MUJOCO_GL=egl or osmesa before it

Trains what is missing in runs/animations/ (about ten minutes), films one episode of each agent and
writes the first seconds of it to results/NAME.gif.
"""

import subprocess
import sys
from pathlib import Path

from moviepy import VideoFileClip

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
LUNAR_LANDER = "--total-timesteps 1000000 --num-envs 16 --num-steps 256 --num-minibatches 32"
LUNAR_LANDER += " --update-epochs 10 --gamma 0.995 --learning-rate 3e-4 --ent-coef 0.003"
LUNAR_LANDER += " --norm-obs --norm-reward"
AGENTS = {  # name: script, flags
    "cartpole-before": ("ppo.py", "--total-timesteps 512"),
    "cartpole-after": ("ppo.py", ""),
    "lunar-lander": ("ppo.py", f"--env-id LunarLander-v3 {LUNAR_LANDER}"),
    "half-cheetah": ("ppo_continuous.py", "--compile"),
}
SECONDS = 6


def main():
    for name, (script, flags) in AGENTS.items():
        folder = ROOT / "runs" / "animations" / name
        python = [sys.executable, ROOT / script]
        if not folder.exists():
            subprocess.run([*python, *flags.split(), "--runs-dir", folder], check=True)
        (run_dir,) = folder.iterdir()
        film = ["--num-envs", "1", "--eval-episodes", "1", "--capture-video"]
        subprocess.run([*python, "--evaluate", run_dir, *film], check=True)
        path = max(run_dir.glob("videos/*/*.mp4"))
        clip = VideoFileClip(path)
        clip = clip.subclipped(0, min(SECONDS, clip.duration)).resized(height=150)
        clip.write_gif(RESULTS / f"{name}.gif", fps=12)


if __name__ == "__main__":
    main()
