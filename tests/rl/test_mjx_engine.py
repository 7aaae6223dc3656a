"""MJX against the C engine."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("mujoco.mjx")

from mamljax.rl.locomotion import locomotion

KEY = jax.random.key(0)
TASK = jnp.float32(1.5)


def rollout(engine, task, *, protocol, actions):
    environment = locomotion(task, protocol=protocol, engine=engine)

    @jax.jit
    def run(actions):
        def body(state, action):
            step = environment.step(KEY, state, action, TASK)
            return step.state, step

        return jax.lax.scan(body, environment.reset(KEY, TASK)[0], actions)[1]

    return run(actions)


def agree(task, protocol, steps, size, *, atol):
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, size)).astype(np.float32)
    c, mjx = (rollout(engine, task, protocol=protocol, actions=actions) for engine in ("mujoco", "mjx"))
    np.testing.assert_allclose(mjx.observation, c.observation, rtol=atol, atol=atol)
    np.testing.assert_allclose(mjx.reward, c.reward, rtol=atol, atol=atol)
    np.testing.assert_array_equal(mjx.done, c.done)


def test_half_cheetah_agrees():
    agree("half_cheetah_velocity", "paper", 30, 6, atol=1e-3)


def test_what_the_ant_measures_is_there_without_a_deprecated_way():
    """Warnings are errors here; shapes show it, as its program takes long to compile."""
    environment = locomotion("ant_velocity", engine="mjx")
    c = locomotion("ant_velocity", engine="mujoco")
    of_mjx, of_c = (jax.eval_shape(each.reset, KEY, TASK)[1] for each in (environment, c))
    assert (of_mjx.shape, of_mjx.dtype) == (of_c.shape, of_c.dtype)


def test_threads_are_refused():
    with pytest.raises(ValueError, match="threads is of the C engine, got 2"):
        locomotion("half_cheetah_velocity", engine="mjx", threads=2)


def test_without_mjx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco.mjx", None)
    monkeypatch.delattr("mujoco.mjx")
    with pytest.raises(ImportError, match=r'pip install "mamljax\[rl\]", or choose engine="mujoco"'):
        locomotion("half_cheetah_velocity", engine="mjx")
