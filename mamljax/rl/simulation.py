"""What a physics engine is: two pure functions of one simulation, the same for every engine; `vmap` makes batches."""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from mamljax.types import PyTree

TORSO = 1  # the body of this number, as body 0 is the world


class Measure(NamedTuple):
    """Something that the physics engine computes of a state, for rewards and observations."""

    field: str  # MuJoCo's name
    bodies: int | slice  # of which bodies
    forces: bool  # the constraint solver must run to know it
    sensor: tuple[str, dict[str, str]] | None = None  # in the model, for MuJoCo to compute it


MEASURES = {
    "centre_of_mass": Measure("subtree_com", TORSO, forces=False),  # [3] m, of the whole robot
    "centre_of_mass_velocity": Measure(  # [3] m/s
        "subtree_linvel", TORSO, forces=False, sensor=("subtreelinvel", {"body": "torso"})
    ),
    "torso_frame": Measure("xmat", TORSO, forces=False),  # [9], rotation from the torso's axes to the world's, row by row
    "contact_forces": Measure(  # [bodies, 6] torque about the centre of mass (N m) and force (N)
        "cfrc_ext", slice(None), forces=True, sensor=("framelinacc", {"objtype": "xbody", "objname": "torso"})
    ),
}


class Simulation(NamedTuple):
    """The state of one simulation after a step, measured at that state (MuJoCo's own values lag by a step of the physics)."""

    position: Array  # [nq] float32, generalised coordinates: m, rad, quaternions
    velocity: Array  # [nv] float32, generalised velocities: m/s, rad/s
    measured: dict[str, Array]  # float32, by name in `MEASURES`: those asked for
    stable: Array  # [] bool: False if this step diverged; the rest is then of no use
    resume: PyTree  # what the engine needs to go on exactly


class Engine(NamedTuple):
    """A physics engine with a robot in it."""

    start: Callable[[Array, Array], Simulation]  # (position [nq], velocity [nv]) -> a simulation that begins so
    advance: Callable[[Simulation, Array], Simulation]  # (simulation, control [nu]) -> after frame_skip steps of the physics
