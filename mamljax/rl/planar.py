"""The centre of mass of a robot that moves in a plane, from its joints alone."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from mamljax.rl.robots import import_mujoco
from mamljax.rl.simulation import TORSO, Engine, Simulation

PLANAR_MEASURES = ("centre_of_mass", "centre_of_mass_velocity")


def is_planar(model: Any) -> bool:
    """Whether a model slides along x and z, and all its other joints turn about y through their body's origin."""
    mujoco = import_mujoco()
    slide, hinge = mujoco.mjtJoint.mjJNT_SLIDE, mujoco.mjtJoint.mjJNT_HINGE
    types = [slide, slide] + [hinge] * (model.njnt - 2)
    axes = [[1, 0, 0], [0, 0, 1]] + [[0, 1, 0]] * (model.njnt - 2)
    upright = not model.jnt_pos.any() and (model.body_quat == [1, 0, 0, 0]).all() and not model.qpos0.any()
    return upright and model.nbody == model.njnt - 1 and list(model.jnt_type) == types and (model.jnt_axis == axes).all()


def with_planar_centre_of_mass(engine: Engine, model: Any) -> Engine:
    r"""Have an engine measure the centre of mass and its velocity without evaluating the physics anew, which takes half a step.

    With $\theta_b$ the angle of body b to the world, it is $p + \sum_b R(\theta_b) d_b$, where p is the torso's place and
    $d_b$ the mass-weighted mean of b's centre and of its children's joints, each child with all that hangs on it.

    Args:
        engine: of the robot; it need not measure anything.
        model: a `mujoco.MjModel` that `is_planar`.

    Returns:
        The engine, whose simulations have `centre_of_mass` and `centre_of_mass_velocity` too: [3] float32, m and m/s.
    """
    place, turns, levers = (jnp.asarray(constant, jnp.float32) for constant in _chain(model))

    def measure(simulation: Simulation) -> Simulation:
        angle, rate = ((turns * joints[None]).sum(1) for joints in (simulation.position, simulation.velocity))
        cos, sin, (x, z) = jnp.cos(angle), jnp.sin(angle), levers
        # A turn about y takes (x, z) to (x cos + z sin, z cos - x sin). The velocity is the derivative of that.
        centre = simulation.position[:2] + place + _sums(x * cos + z * sin, z * cos - x * sin)
        velocity = simulation.velocity[:2] + _sums(rate * (z * cos - x * sin), -rate * (x * cos + z * sin))
        values = (jnp.insert(value, 1, 0.0) for value in (centre, velocity))  # y
        return simulation._replace(measured=simulation.measured | dict(zip(PLANAR_MEASURES, values, strict=True)))

    return Engine(
        start=lambda position, velocity: measure(engine.start(position, velocity)),
        advance=lambda simulation, control: measure(engine.advance(simulation, control)),
    )


def _sums(x: Array, z: Array) -> Array:
    return jnp.stack([x.sum(), z.sum()])


def _chain(model: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the torso's place (x, z) [2], which joints turn each body [bodies, nq], and each body's d [2, bodies]."""
    turns, levers = np.zeros((model.nbody, model.nq)), np.zeros((model.nbody, 3))
    # In the order of their numbers parents come before their children.
    for body in range(TORSO, model.nbody):
        parent = model.body_parentid[body]
        turns[body] = turns[parent]
        turns[body, model.body_jntadr[body] + model.body_jntnum[body] - 1] = 1.0  # its last joint is its hinge
        # For itself its own mass, at its centre; for its parent all that hangs on it, at its joint.
        levers[body] += model.body_mass[body] * model.body_ipos[body]
        levers[parent] += model.body_subtreemass[body] * model.body_pos[body]
    levers /= model.body_subtreemass[TORSO]
    return model.body_pos[TORSO, [0, 2]], turns[TORSO:], levers[TORSO:, [0, 2]].T
