"""How many environment steps a second, policy included? MuJoCo's C engine on threads, and MJX.

`python benchmarks/environment_steps.py` rolls out Gaussian policies (2 x 100 ReLU, other weights for each task) in one compiled
call: 40 tasks x 20 trajectories, the authors' meta-batch. On a CPU, MJX takes a smaller batch (`--mjx-tasks`).
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import harness
import jax
from jax import Array

from mamljax import report
from mamljax.models import mlp
from mamljax.rl.environment import Environment
from mamljax.rl.locomotion import locomotion


@dataclasses.dataclass(frozen=True)
class Options:
    """Environment steps a second, policy included."""

    tasks: tuple[str, ...] = ("half_cheetah_velocity", "ant_velocity")
    """Environments; as of `mamljax.rl.locomotion`."""
    engines: tuple[Literal["mujoco", "mjx"], ...] = ("mujoco", "mjx")
    """Physics engines, each compared with the others."""
    protocol: Literal["paper", "gymnasium"] = "paper"
    """Whose simulation: an environment step is 1 step of the physics, or 5."""
    num_tasks: int = 40
    """Tasks of a meta-batch, each with weights of its own."""
    trajectories: int = 20
    """Trajectories of each task."""
    horizon: int = 50
    """Environment steps of a trajectory; the paper's are 200."""
    mjx_tasks: int = 2
    """Tasks of a meta-batch for MJX on a CPU, where it is slow; elsewhere it is --num-tasks."""
    repeats: int = 5
    """Measurements, of which the median counts; all take turns."""
    out: Path = Path("out/environment_steps")
    """Directory for results.json, report.md and the figure."""


def rollouts(environment: Environment, *, num_tasks: int, trajectories: int, horizon: int) -> Callable[[], Array]:
    """Compile rollouts of policies with other weights for each task; returns what runs them: rewards [B, E, T]."""
    model = mlp(environment.observation_size, (100, 100), environment.action_size)

    def trajectory(key: Array, params: dict, task: Array) -> Array:
        reset_key, key = jax.random.split(key)
        state, observation = environment.reset(reset_key, task)

        def step(carry: tuple, key: Array) -> tuple[tuple, Array]:
            state, observation = carry
            step_key, noise_key = jax.random.split(key)
            mean = model.apply(params, observation[None])[0]
            taken = environment.step(step_key, state, mean + jax.random.normal(noise_key, mean.shape), task)
            return (taken.state, taken.observation), taken.reward

        return jax.lax.scan(step, (state, observation), jax.random.split(key, horizon))[1]

    def of_task(key: Array) -> Array:
        params_key, task_key, key = jax.random.split(key, 3)
        params, task = model.init(params_key), environment.sample_task(task_key)
        # Weights that differ from task to task, as after adaptation: no product takes in all trajectories at once.
        return jax.vmap(trajectory, (0, None, None))(jax.random.split(key, trajectories), params, task)

    run = jax.jit(jax.vmap(of_task))
    keys = jax.random.split(jax.random.key(0), num_tasks)
    return lambda: run(keys)


def processor_seconds(run: Callable[[], Array]) -> float:
    """Time that the processors spend on one call, on all threads together; other programs do not disturb it much."""
    started = time.process_time()
    jax.block_until_ready(run())
    return time.process_time() - started


def measure(options: Options) -> list[report.Row]:
    """Rows of each environment and engine: environment steps a second, and a second of a processor's time."""
    rows = []
    for name in options.tasks:
        runs, batches = {}, {}
        for engine in options.engines:
            slow = engine == "mjx" and jax.default_backend() == "cpu"
            batches[engine] = options.mjx_tasks if slow else options.num_tasks
            environment = locomotion(name, protocol=options.protocol, engine=engine)
            runs[engine] = rollouts(
                environment, num_tasks=batches[engine], trajectories=options.trajectories, horizon=options.horizon
            )
        medians = harness.medians(runs, options.repeats)
        for engine, run in runs.items():
            steps = batches[engine] * options.trajectories * options.horizon
            shared = {"method": f"{engine}, {batches[engine]} x {options.trajectories} trajectories"}
            shared |= {"setting": f"{name}, {options.protocol}", "protocol": f"median of {options.repeats}"}
            shared |= {"step": options.horizon, "tasks": batches[engine], **harness.UNTRAINED}
            rows.append(report.Row(metric="environment steps per second", mean=steps / (medians[engine] / 1e3), **shared))
            rows.append(
                report.Row(
                    metric="environment steps per second of processor time", mean=steps / processor_seconds(run), **shared
                )
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.main("environment_steps", Options, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
