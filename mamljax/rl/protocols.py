"""How half-cheetah and ant are simulated, observed and rewarded: as the authors' code does, and as Gymnasium does."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mamljax.rl.simulation import Simulation


class Protocol(NamedTuple):
    """How a robot is simulated, observed and rewarded."""

    frame_skip: int  # steps of the physics for each action
    timestep: float  # seconds of a step of the physics
    observe: Callable[[Simulation], Array]  # -> observation [o]
    measures: tuple[str, ...]  # what observation and reward need
    control_cost: float  # times |a|^2
    contact_cost: float = 0.0  # times |contact forces, clipped to [-1, 1]|^2
    bonus: float = 0.0  # reward of each step
    bonus_at_end: bool = True  # also of the step that ends the trajectory
    velocity_bonus: float = 0.0  # reward of each step where the task is a velocity
    heights: tuple[float, float] | None = None  # m, of the torso; the trajectory ends outside of them
    edits: tuple[tuple[str, str, str], ...] = ()  # to the robot's file; see `robots.load_robot`
    starts_at_init_qpos: bool = True  # of the robot's file, where it has one
    position_noise: Callable[[Array, tuple[int, ...]], Array] = jax.random.normal
    position_scale: float = 0.01
    velocity_scale: float = 0.1  # of normal noise


def _half_cheetah_paper(simulation: Simulation) -> Array:
    """Observe positions but the first, velocities and centre of mass: 20 for half-cheetah, as the authors' code."""
    return jnp.concatenate([simulation.position[1:], simulation.velocity, simulation.measured["centre_of_mass"]])


def _ant_paper(simulation: Simulation) -> Array:
    """Observe positions, velocities, clipped contact forces, torso frame, centre of mass: 125 for ant, as the authors' code."""
    measured = simulation.measured
    parts = [simulation.position, simulation.velocity, clipped_contacts(simulation).ravel()]
    return jnp.concatenate([*parts, measured["torso_frame"], measured["centre_of_mass"]])


def _half_cheetah_gymnasium(simulation: Simulation) -> Array:
    """Observe positions but the first, and velocities: 17 for half-cheetah, as HalfCheetah-v5."""
    return jnp.concatenate([simulation.position[1:], simulation.velocity])


def _ant_gymnasium(simulation: Simulation) -> Array:
    """Observe positions but the first two, velocities and clipped contact forces: 105 for ant, as Ant-v5."""
    # Without the forces on body 0, which is the world.
    return jnp.concatenate([simulation.position[2:], simulation.velocity, clipped_contacts(simulation)[1:].ravel()])


def clipped_contacts(simulation: Simulation) -> Array:
    """Clip contact forces as rewards and observations have them: [bodies, 6] in [-1, 1]."""
    return jnp.clip(simulation.measured["contact_forces"], -1.0, 1.0)


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


MOTION = ("centre_of_mass", "centre_of_mass_velocity")
PROTOCOLS = {
    ("half_cheetah", "paper"): Protocol(
        frame_skip=1, timestep=0.01, observe=_half_cheetah_paper, measures=MOTION, control_cost=0.05
    ),
    ("half_cheetah", "gymnasium"): Protocol(
        frame_skip=5,
        timestep=0.01,
        observe=_half_cheetah_gymnasium,
        measures=(),
        control_cost=0.1,
        position_noise=_uniform,
        position_scale=0.1,
    ),
    ("ant", "paper"): Protocol(
        frame_skip=1,
        timestep=0.02,
        observe=_ant_paper,
        measures=(*MOTION, "torso_frame", "contact_forces"),
        control_cost=0.005,
        contact_cost=0.0005,
        bonus=0.05,
        velocity_bonus=1.0,
        heights=(0.2, 1.0),
        edits=(
            ("default/geom", "solimp", "0.8 0.8 0.01"),
            ("worldbody/geom", "margin", "0"),  # of the floor: margins of two bodies are added now, the greater counted then
        ),
    ),
    ("ant", "gymnasium"): Protocol(
        frame_skip=5,
        timestep=0.01,
        observe=_ant_gymnasium,
        measures=("contact_forces",),
        control_cost=0.5,
        contact_cost=0.0005,
        bonus=1.0,
        bonus_at_end=False,
        heights=(0.2, 1.0),
        starts_at_init_qpos=False,
        position_noise=_uniform,
        position_scale=0.1,
    ),
}
