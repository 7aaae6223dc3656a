"""Strips of frames."""

import numpy as np
import pytest

pytest.importorskip("mujoco")
pytest.importorskip("gymnasium")

from mamljax.rl.rendering import RenderingError, render_strip

STANDING = np.zeros(9)


def test_frames_show_the_robot_move():
    positions = np.tile(STANDING, (7, 1))
    positions[-1, 2] = 1.5  # on its head
    try:
        frames = render_strip("half_cheetah_velocity", positions, frames=3, height=60, width=80)
    except RenderingError as error:
        pytest.skip(str(error))
    assert (frames.shape, frames.dtype) == ((3, 60, 80, 3), np.uint8)
    np.testing.assert_array_equal(frames[0], frames[1])
    assert (frames[0] != frames[2]).any(-1).mean() > 0.01


def test_without_a_graphics_library_there_is_one_clear_error(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "none")
    with pytest.raises(RenderingError, match=r"cannot render: tried none \(.*\)\. Install Mesa"):
        render_strip("half_cheetah_velocity", STANDING[None], frames=1)


def test_bad_input():
    with pytest.raises(ValueError, match="task must be one of half_cheetah_velocity"):
        render_strip("walker", STANDING[None], frames=1)
    for positions in (STANDING, STANDING[None, :5], STANDING[None]):
        with pytest.raises(ValueError, match=r"positions must be \[T, 9\] with T at least 2"):
            render_strip("half_cheetah_velocity", positions, frames=2)
    with pytest.raises(ValueError, match="frames must be a whole number of at least 1"):
        render_strip("half_cheetah_velocity", STANDING[None], frames=0)
