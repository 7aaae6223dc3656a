"""Pictures of a trajectory, on machines with and without a display."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike

from mamljax.checks import check_counts
from mamljax.rl.locomotion import robot_of
from mamljax.rl.robots import import_mujoco, load_robot

SECONDS = 120  # after which a graphics library counts as stuck


class RenderingError(RuntimeError):
    """Nothing on this machine can render."""


def render_strip(task: str, positions: ArrayLike, *, frames: int, height: int = 180, width: int = 240) -> np.ndarray:
    """Draw some moments of a trajectory, evenly spaced from the first to the last; the camera follows the robot.

    Args:
        task: a name in `locomotion.TASKS`.
        positions: [T, nq], the `position` of the states of one trajectory, in order.
        frames: how many moments; at most T.
        height, width: of a frame, in pixels.

    Returns:
        [frames, height, width, 3] uint8.

    Raises:
        RenderingError: no graphics library works here; an experiment can say so and go on. Where `MUJOCO_GL` is set only that
            one is tried, else EGL and then OSMesa, both of which need no display.
        ValueError: an unknown task, a count below 1, positions of another shape, or fewer than frames.
        ImportError: MuJoCo or Gymnasium is missing.
    """
    check_counts(frames=frames, height=height, width=width)
    model = load_robot(robot_of(task))
    positions = np.asarray(positions, np.float64)
    if positions.ndim != 2 or positions.shape[1] != model.nq or len(positions) < frames:
        raise ValueError(f"positions must be [T, {model.nq}] with T at least {frames}, got {list(positions.shape)}.")
    chosen = positions[np.linspace(0, len(positions) - 1, frames).round().astype(int)]
    with tempfile.TemporaryDirectory() as folder:
        model_path, positions_path, frames_path = (Path(folder) / name for name in ("model.mjb", "positions.npy", "frames.npy"))
        import_mujoco().mj_saveModel(model, str(model_path))
        np.save(positions_path, chosen)
        _draw([str(model_path), str(positions_path), str(height), str(width), str(frames_path)])
        return np.load(frames_path)


def _draw(arguments: list[str]) -> None:
    """Run the worker with one graphics library after another, until one works."""
    libraries = [os.environ["MUJOCO_GL"]] if os.environ.get("MUJOCO_GL") else ["egl", "osmesa"]
    worker = [sys.executable, str(Path(__file__).with_name("render_worker.py")), *arguments]
    failures = []
    for library in libraries:
        environment = {**os.environ, "MUJOCO_GL": library, "PYOPENGL_PLATFORM": library}
        try:
            subprocess.run(worker, env=environment, capture_output=True, text=True, check=True, timeout=SECONDS)
        except subprocess.CalledProcessError as error:
            lines = error.stderr.strip().splitlines()
            failures.append(f"{library} ({lines[-1] if lines else f'exit code {error.returncode}'})")
        except subprocess.TimeoutExpired:
            failures.append(f"{library} (nothing after {SECONDS} s)")
        else:
            return
    raise RenderingError(
        f"cannot render: tried {', '.join(failures)}. Install Mesa, for example by `apt-get install libegl1 libgl1-mesa-dri` "
        "or `apt-get install libosmesa6`, or set MUJOCO_GL to what works."
    )
