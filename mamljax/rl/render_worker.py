"""Draw poses of a robot, as a process of its own: `python render_worker.py MODEL.mjb POSITIONS.npy HEIGHT WIDTH FRAMES.npy`.

MuJoCo chooses its graphics library when it is imported, by the variable `MUJOCO_GL`, and some of them end the process where
they fail; neither must happen to a training run.
"""

import sys

import mujoco
import numpy as np


def main(model_path: str, positions_path: str, height: str, width: str, frames_path: str) -> None:
    """Read model and positions [T, nq], write frames [T, height, width, 3] uint8, seen by the camera that tracks the robot."""
    model = mujoco.MjModel.from_binary_path(model_path)
    model.vis.global_.offheight, model.vis.global_.offwidth = int(height), int(width)
    data = mujoco.MjData(model)
    frames = []
    with mujoco.Renderer(model, int(height), int(width)) as renderer:
        for position in np.load(positions_path):
            data.qpos[:] = position
            mujoco.mj_forward(model, data)
            renderer.update_scene(data, camera="track")
            frames.append(renderer.render().copy())
    np.save(frames_path, np.stack(frames))


if __name__ == "__main__":
    main(*sys.argv[1:])
