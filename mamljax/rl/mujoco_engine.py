"""MuJoCo's C engine inside compiled JAX programs: one call back to the host steps a whole batch, on threads."""

import functools
import math
import os
import threading
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from mamljax.checks import check_count
from mamljax.rl.robots import import_mujoco
from mamljax.rl.simulation import MEASURES, Engine, Simulation

KEPT_BATCHES = 8  # sizes of batches whose memory is kept
LATE = 1e6  # seconds, when steps begin: MuJoCo resets a diverged simulation, its count of warnings too, so the time tells


def mujoco_engine(model: Any, *, frame_skip: int, measures: tuple[str, ...] = (), threads: int | None = None) -> Engine:
    """Build MuJoCo's C engine for one robot.

    The physics is in float64, and its state goes through JAX as its bits, so that nothing is lost where JAX is in float32: a
    rollout is to the bit what a loop over `mujoco.mj_step` gives. Under `vmap`, however deep, one callback steps the batch.

    Args:
        model: a `mujoco.MjModel`; its state must be positions and velocities alone.
        frame_skip: steps of the physics for each control.
        measures: names in `MEASURES`; positions and velocities come always, and are cheaper alone.
        threads: of the host; by default as many as the process may run on.

    Returns:
        The engine. Its `resume` is [nq + 2 nv, 2] uint32, the bits of positions, velocities and the constraint solver's first
        guess in float64. A step is not stable if MuJoCo warns of positions, velocities, accelerations or controls that are not
        finite or huge; at the first such step MuJoCo also says so on stderr and in `MUJOCO_LOG.TXT`.

    Raises:
        ValueError: `frame_skip` or `threads` below 1, or a model with other state, such as actuators with activation.
        ImportError: MuJoCo is missing or too old.
    """
    check_count("frame_skip", frame_skip)
    threads = _available_cores() if threads is None else threads
    check_count("threads", threads)
    if model.na or model.nmocap or model.npluginstate:
        raise ValueError("the model must have no state beside positions and velocities: no activations, mocap or plugins.")
    stepper = _Stepper(model, frame_skip, measures, threads)

    def start(position: Array, velocity: Array) -> Simulation:
        return jax.pure_callback(stepper.start, stepper.shapes, position, velocity, vmap_method="broadcast_all")

    def advance(simulation: Simulation, control: Array) -> Simulation:
        return jax.pure_callback(stepper.advance, stepper.shapes, simulation.resume, control, vmap_method="broadcast_all")

    return Engine(start, advance)


class _Stepper:
    """The host's side: batches of simulations by their number, and what moves states in and out of them."""

    def __init__(self, model: Any, frame_skip: int, measures: tuple[str, ...], threads: int) -> None:
        mujoco = import_mujoco()
        self.failure, self.frame_skip, self.measures = mujoco.batch.SimulationError, frame_skip, measures
        # How far the new state is evaluated after the steps: no further than the measures need.
        self.stage = mujoco.mjtStage.mjSTAGE_NONE.value
        if measures:
            forces = any(MEASURES[name].forces for name in measures)
            self.stage = (mujoco.mjtStage.mjSTAGE_ACC if forces else mujoco.mjtStage.mjSTAGE_VEL).value
        warnings = mujoco.mjtWarning
        self.alarms = [w.value for w in (warnings.mjWARN_BADQPOS, warnings.mjWARN_BADQVEL, warnings.mjWARN_BADQACC)]
        self.alarms.append(warnings.mjWARN_BADCTRL.value)
        self.splits = (model.nq, model.nq + model.nv)
        self.batch_of = functools.lru_cache(KEPT_BATCHES)(functools.partial(self._batch, model, threads))
        self.lock = threading.Lock()  # compiled programs may run at the same time
        # A callback must promise its shapes: they are read off a first simulation.
        first = self.start(model.qpos0, np.zeros(model.nv))
        self.shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), first)

    def _batch(self, model: Any, threads: int, count: int) -> Any:
        batch = import_mujoco().batch.Batch(model, count, threads)
        for name in self.measures:
            batch.bind(MEASURES[name].field)  # it is zero until the next call
        return batch

    def start(self, position: ArrayLike, velocity: ArrayLike) -> Simulation:
        position, velocity = np.asarray(position, np.float64), np.asarray(velocity, np.float64)
        rows = np.concatenate([position, velocity, np.zeros_like(velocity)], axis=-1)
        return self._run(rows, None)

    def advance(self, resume: Array, control: Array) -> Simulation:
        # [..., nq + 2 nv, 2] words of 32 bits are [..., nq + 2 nv] doubles again.
        rows = np.ascontiguousarray(resume).view(np.float64)[..., 0]
        return self._run(rows, np.asarray(control))

    def _run(self, rows: np.ndarray, control: np.ndarray | None) -> Simulation:
        leading, rows = rows.shape[:-1], rows.reshape(-1, rows.shape[-1])
        with self.lock:
            batch = self.batch_of(math.prod(leading))
            # Every field is written, so that nothing is left over from the batch's last call.
            batch.time[:] = LATE
            batch.ctrl[:] = 0 if control is None else control.reshape(len(rows), -1)
            batch.qpos[:], batch.qvel[:], batch.qacc_warmstart[:] = np.split(rows, self.splits, axis=1)
            # Warnings are counted on from call to call: what counts is whether this one adds to them.
            warned = batch.warning[:, self.alarms, 1].sum(1)
            try:
                if control is None:
                    batch.forward(stage=self.stage)
                else:
                    batch.step(nstep=self.frame_skip, stage=self.stage)
            except self.failure:
                pass  # `status` says whose
            unchanged = (batch.status == 0) & (batch.warning[:, self.alarms, 1].sum(1) == warned)
            simulation = self._read(batch, unchanged & (batch.time >= LATE))
        return jax.tree.map(lambda leaf: leaf.reshape((*leading, *leaf.shape[1:])), simulation)

    def _read(self, batch: Any, stable: Any) -> Simulation:
        measures = {name: MEASURES[name] for name in self.measures}
        resume = np.concatenate([batch.qpos, batch.qvel, batch.qacc_warmstart], axis=1)
        return Simulation(
            position=batch.qpos.astype(np.float32),
            velocity=batch.qvel.astype(np.float32),
            measured={name: batch.bind(m.field)[:, m.bodies].astype(np.float32) for name, m in measures.items()},
            stable=stable,
            resume=resume.view(np.uint32).reshape(*resume.shape, 2),
        )


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
