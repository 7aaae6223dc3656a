"""Half-cheetah and ant with a velocity or a direction to run in (Finn et al. 2017, section 5.3), on any physics engine."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mamljax.checks import check_count
from mamljax.rl.environment import Environment, Step
from mamljax.rl.mjx_engine import mjx_engine
from mamljax.rl.mujoco_engine import mujoco_engine
from mamljax.rl.planar import PLANAR_MEASURES, is_planar, with_planar_centre_of_mass
from mamljax.rl.protocols import PROTOCOLS, Protocol, clipped_contacts
from mamljax.rl.robots import first_position, load_robot
from mamljax.rl.simulation import Engine, Simulation

T = TypeVar("T")
FASTEST = 1e3  # m/s or rad/s; beyond it a simulation counts as unstable, as its rewards would outweigh a whole batch's
TASKS = {  # robot, and the greatest velocity to run at; None for a direction
    "half_cheetah_velocity": ("half_cheetah", 2.0),
    "half_cheetah_direction": ("half_cheetah", None),
    "ant_velocity": ("ant", 3.0),
    "ant_direction": ("ant", None),
}
ENGINES = {"mujoco": mujoco_engine, "mjx": mjx_engine}


def locomotion(
    task: str,
    *,
    protocol: str = "paper",
    frame_skip: int | None = None,
    timestep: float | None = None,
    engine: str = "mujoco",
    threads: int | None = None,
) -> Environment:
    r"""Build the environment of a robot that is to run at a velocity, or in a direction.

    The reward of a step is $b - |v - v^*| - c$ for a velocity $v^*$, and $b + d v$ for a direction $d = \pm 1$, where $v$ is
    the velocity along x, $c$ the cost of the action (and of contacts, for the ant) and $b$ a bonus for the ant.

    Args:
        task: a name in `TASKS`: "half_cheetah_velocity", "half_cheetah_direction", "ant_velocity" or "ant_direction".
        protocol: "paper", as in the authors' code: $v$ is the centre of mass's, of which the observation tells, and the
            constants are those of Finn et al.; or "gymnasium", where direction 1 is HalfCheetah-v5 or Ant-v5: $v$ is the
            root's over the step, and observation, costs, bonus and first states are Gymnasium's.
        frame_skip: steps of the physics for each action, by default the protocol's: 1, or 5.
        timestep: seconds of a step of the physics, by default the protocol's: 0.01, but 0.02 for the paper's ant.
        engine: "mujoco" for the C engine, or "mjx" for MJX on an accelerator.
        threads: of the C engine; by default as many as the process may run on.

    Returns:
        The environment. Tasks are [] float32: a velocity, U[0, 2] m/s for half-cheetah and U[0, 3] m/s for ant, or 1 or -1.
        Actions are clipped to [-1, 1]. Its state is a `Simulation`. A step that diverges ends the trajectory: it has no reward,
        its observation is that of the state before, and its own state is not finite (`state.stable` is False): do not step on
        from it.

    Raises:
        ValueError: an unknown task, protocol or engine; a count or time step that is not positive.
        ImportError: MuJoCo, MJX or Gymnasium is missing; the message says which extra has them.

    Differs from the paper's simulator: MuJoCo is today's and not version 1.31, whose solver was another. With "paper", the
    ant's contacts are as stiff and as wide as the authors', not as Gymnasium's file has them. With "gymnasium", contact
    forces and the ant's velocity are those of the state after the step, where Gymnasium takes what the integrator has
    evaluated last.

    >>> environment = locomotion("half_cheetah_velocity")
    >>> state, observation = environment.reset(jax.random.key(0), task=1.5)
    >>> environment.step(jax.random.key(1), state, jnp.zeros(environment.action_size), 1.5).observation.shape
    (20,)
    """
    robot, fastest = _chosen("task", task, TASKS)
    settings = _settings(robot, protocol, frame_skip, timestep)
    build_engine = _chosen("engine", engine, ENGINES)
    model = load_robot(robot, timestep=settings.timestep, edits=settings.edits, measures=settings.measures)
    simulate = _measuring(build_engine, model, settings, threads)
    first = jnp.asarray(first_position(model) if settings.starts_at_init_qpos else model.qpos0, jnp.float32)
    reset = functools.partial(_reset, simulate, settings, first, jnp.zeros(model.nv))
    observation = jax.eval_shape(reset, jax.random.key(0), jnp.float32(0))[1]
    return Environment(
        sample_task=functools.partial(_sample_task, fastest),
        reset=reset,
        step=functools.partial(_step, simulate, settings, fastest is None),
        observation_size=observation.size,
        action_size=model.nu,
    )


def _measuring(build_engine: Callable[..., Engine], model: Any, settings: Protocol, threads: int | None) -> Engine:
    planar = is_planar(model)
    # Where joints alone tell the centre of mass, the engine is not asked for it.
    measures = tuple(name for name in settings.measures if not (planar and name in PLANAR_MEASURES))
    engine = build_engine(model, frame_skip=settings.frame_skip, measures=measures, threads=threads)
    return with_planar_centre_of_mass(engine, model) if len(measures) < len(settings.measures) else engine


def _sample_task(fastest: float | None, key: Array) -> Array:
    if fastest is None:
        return jax.random.rademacher(key, (), jnp.float32)
    return jax.random.uniform(key, maxval=fastest)


def _reset(
    simulate: Engine, settings: Protocol, position: Array, velocity: Array, key: Array, task: Array
) -> tuple[Simulation, Array]:
    del task
    position_key, velocity_key = jax.random.split(key)
    position += settings.position_scale * settings.position_noise(position_key, position.shape)
    velocity += settings.velocity_scale * jax.random.normal(velocity_key, velocity.shape)
    simulation = simulate.start(position, velocity)
    return simulation, settings.observe(simulation)


def _step(
    simulate: Engine, settings: Protocol, directed: bool, key: Array, before: Simulation, action: Array, task: Array
) -> Step:
    del key
    action = jnp.clip(action, -1.0, 1.0)
    after = simulate.advance(before, action)
    stable = _is_stable(after)
    # Before the reward is computed, so that no NaN gets into it.
    after = optax.tree.where(stable, after, before)
    done = _fallen(after, settings)
    reward = _reward(before, after, action, task, done, directed=directed, settings=settings)
    # It is the state that tells `rollout` of a step that diverged; observation and reward are finite all the same.
    position, velocity = (jnp.where(stable, values, jnp.nan) for values in (after.position, after.velocity))
    return Step(
        state=after._replace(position=position, velocity=velocity, stable=stable),
        observation=settings.observe(after),
        reward=jnp.where(stable, reward, 0.0),
        done=done | ~stable,
    )


def _is_stable(simulation: Simulation) -> Array:
    values = jnp.concatenate([simulation.position, simulation.velocity])
    return simulation.stable & jnp.isfinite(values).all() & (jnp.abs(simulation.velocity).max() <= FASTEST)


def _fallen(simulation: Simulation, settings: Protocol) -> Array:
    if settings.heights is None:
        return jnp.bool_(False)
    lowest, highest = settings.heights
    height = simulation.position[2]
    return (height < lowest) | (height > highest)


def _reward(
    before: Simulation, after: Simulation, action: Array, task: Array, done: Array, *, directed: bool, settings: Protocol
) -> Array:
    if "centre_of_mass_velocity" in settings.measures:
        velocity = after.measured["centre_of_mass_velocity"][0]
    else:
        velocity = (after.position[0] - before.position[0]) / (settings.frame_skip * settings.timestep)
    reward = task * velocity if directed else settings.velocity_bonus - jnp.abs(velocity - task)
    reward += settings.bonus if settings.bonus_at_end else jnp.where(done, 0.0, settings.bonus)
    reward -= settings.control_cost * jnp.sum(action**2)
    if settings.contact_cost:
        reward -= settings.contact_cost * jnp.sum(clipped_contacts(after) ** 2)
    return reward


def robot_of(task: str) -> str:
    """Name the robot of a task; raises `ValueError` for an unknown task."""
    return _chosen("task", task, TASKS)[0]


def _settings(robot: str, protocol: str, frame_skip: int | None, timestep: float | None) -> Protocol:
    settings = _chosen("protocol", protocol, {name: row for (owner, name), row in PROTOCOLS.items() if owner == robot})
    frame_skip = settings.frame_skip if frame_skip is None else frame_skip
    timestep = settings.timestep if timestep is None else timestep
    check_count("frame_skip", frame_skip)
    if not 0 < timestep < float("inf"):
        raise ValueError(f"timestep must be a positive number of seconds, got {timestep!r}.")
    return settings._replace(frame_skip=frame_skip, timestep=timestep)


def _chosen(kind: str, name: str, choices: Mapping[str, T]) -> T:
    if name not in choices:
        raise ValueError(f"{kind} must be one of {', '.join(choices)}, got {name!r}.")
    return choices[name]
