"""MJX, MuJoCo written in JAX: for accelerators, where whole trajectories stay on the device."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mamljax.checks import check_count
from mamljax.rl.simulation import MEASURES, Engine, Measure, Simulation


def mjx_engine(model: Any, *, frame_skip: int, measures: tuple[str, ...] = (), threads: int | None = None) -> Engine:
    """Build MJX for one robot.

    Args:
        model: a `mujoco.MjModel`; its state must be positions and velocities alone.
        frame_skip: steps of the physics for each control.
        measures: names in `MEASURES`; positions and velocities come always, and are cheaper alone.
        threads: must be None, as XLA has its own.

    Returns:
        The engine, in float32 throughout. Its `resume` is the constraint solver's first guess, [nv] float32.

    Raises:
        ValueError: `frame_skip` below 1, or `threads` given.
        ImportError: MJX is missing.

    Differs from the C engine: float32 instead of float64, so that trajectories drift apart as contacts come and go. MJX 3.17
    also turns free bodies by an older Runge-Kutta rule than MuJoCo 4.0 does; and in the moment in which the ant's last foot
    leaves the ground, accelerations differ by some per cent, in float64 too. Half-cheetah agrees to float32's precision.
    """
    check_count("frame_skip", frame_skip)
    if threads is not None:
        raise ValueError(f"threads is of the C engine, got {threads!r}. Leave it out for MJX.")
    mjx = import_mjx()
    device_model = mjx.put_model(model, impl="jax")
    empty = mjx.make_data(model, impl="jax")

    def measure(data: Any) -> Simulation:
        evaluated = data
        if measures:  # at the new state; XLA drops what is not used of it
            evaluated = mjx.rne_postconstraint(device_model, mjx.subtree_vel(device_model, mjx.forward(device_model, data)))
        measured = {name: _measured(evaluated, MEASURES[name]) for name in measures}
        # MJX does not say when it diverges: `locomotion` looks at the numbers themselves.
        return Simulation(data.qpos, data.qvel, measured, jnp.bool_(True), data.qacc_warmstart)

    def start(position: Array, velocity: Array) -> Simulation:
        with jax.numpy_rank_promotion("allow"):  # MJX relies on it
            return measure(empty.replace(qpos=position, qvel=velocity))

    def advance(simulation: Simulation, control: Array) -> Simulation:
        position, velocity, guess = simulation.position, simulation.velocity, simulation.resume
        data = empty.replace(qpos=position, qvel=velocity, qacc_warmstart=guess, ctrl=control)
        with jax.numpy_rank_promotion("allow"):
            return measure(jax.lax.fori_loop(0, frame_skip, lambda _, data: mjx.step(device_model, data), data))

    return Engine(start, advance)


def import_mjx() -> Any:
    """Import MJX; raise `ImportError` that says which extra has it."""
    try:
        from mujoco import mjx
    except ImportError as error:
        raise ImportError('MJX is not installed: pip install "mamljax[rl]", or choose engine="mujoco".') from error
    return mjx


def _measured(data: Any, measure: Measure) -> Array:
    # What MJX keeps to its implementation it also passes on, with a warning that it will not for long.
    owner = data._impl if hasattr(data._impl, measure.field) else data
    value = getattr(owner, measure.field)[measure.bodies].astype(jnp.float32)
    return value.reshape(9) if measure.field == "xmat" else value  # a row, as MuJoCo has it
