"""How long does a meta-update of reinforcement learning take? By the number of TRPO's conjugate gradient iterations.

`python benchmarks/rl_update.py` times whole meta-updates of the experiments' sizes: trajectories before and after adaptation,
the meta-gradient, TRPO with a Hessian-vector product for each iteration, ten in the paper, and the line search. Those products
are most of the arithmetic. How far the loss falls with fewer is here too: all start from one policy with the same key, and so
with the same trajectories.

What no implementation of the same mathematics on the same machine can avoid stands beside it: the environment's own steps,
without a policy, and the matrix products, at the rate that `jnp.matmul` reaches on their sizes.

On a CPU the tasks are divided among as many simulated devices as this process may use cores.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import arithmetic
import harness
import jax
import optax
from jax import Array

from mamljax import report
from mamljax.devices import BY_TASK, on, place, task_mesh
from mamljax.models import gaussian_policy
from mamljax.rl.collect import collector
from mamljax.rl.environment import Environment
from mamljax.rl.locomotion import locomotion
from mamljax.rl.maml_rl import maml_rl
from mamljax.rl.navigation import navigation
from mamljax.rl.trpo import trpo
from mamljax.types import MetaLearner, Metrics, PyTree

Name = Literal["navigation", "half_cheetah_velocity", "half_cheetah_direction", "ant_velocity", "ant_direction"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Time of a meta-update of reinforcement learning."""

    tasks: tuple[Name, ...] = ("navigation", "half_cheetah_velocity")
    """Environments."""
    cg_steps: tuple[int, ...] = (10, 5)
    """Conjugate gradient iterations."""
    trajectories: int = 20
    """Trajectories of each task, before and again after adaptation."""
    num_tasks: int | None = None
    """Tasks of a meta-batch; by default 20 for navigation and 40 for the others, as in the paper."""
    horizon: int | None = None
    """Environment steps of a trajectory; by default 100 and 200."""
    devices: int | None = None
    """Devices among which the tasks are divided; by default as many as divide them, of those there are."""
    repeats: int = 3
    """Measurements, of which the median counts; all take turns."""
    out: Path = Path("out/rl_update")
    """Directory for results.json, report.md and the figure."""


def build_learner(
    environment: Environment, tx: optax.GradientTransformation, *, trajectories: int, horizon: int
) -> MetaLearner:
    """MAML with the paper's policy and one adaptation step."""
    policy = gaussian_policy(environment.observation_size, environment.action_size)
    collect = collector(policy, environment, horizon=horizon, trajectories=trajectories)
    return maml_rl(policy, collect, rule=0.1, inner_steps=1, eval_steps=1, tx=tx, differentiation="reverse", chunk_size=1)


def build_update(
    environment: Environment, *, cg_steps: int, num_tasks: int, devices: int, **sizes: int
) -> Callable[[], Metrics]:
    """Compile the first meta-update of a policy; returns what does it again and again."""
    learner = build_learner(environment, trpo(0.01, cg_steps=cg_steps), **sizes)
    mesh = task_mesh(devices) if devices > 1 else None
    key = jax.random.key(0)
    tasks = jax.vmap(environment.sample_task)(jax.random.split(key, num_tasks))
    placed = (*place((key, learner.init(key)), mesh), place(tasks, mesh, BY_TASK))
    with on(mesh):
        compiled = jax.jit(learner.update).lower(*placed).compile()
    return lambda: compiled(*placed)[1]


def environment_steps(environment: Environment, *, num_tasks: int, trajectories: int, horizon: int) -> Callable[[], Array]:
    """Compile the steps of the environment that a meta-update takes before adaptation, with actions at random."""

    def trajectory(key: Array, task: PyTree) -> Array:
        def step(state: PyTree, key: Array) -> tuple[PyTree, Array]:
            action = jax.random.normal(key, (environment.action_size,))
            outcome = environment.step(key, state, action, task)
            return outcome.state, outcome.reward

        return jax.lax.scan(step, environment.reset(key, task)[0], jax.random.split(key, horizon))[1]

    def of_task(key: Array) -> Array:
        return jax.vmap(trajectory, (0, None))(jax.random.split(key, trajectories), environment.sample_task(key))

    run = jax.jit(jax.vmap(of_task))
    keys = jax.random.split(jax.random.key(0), num_tasks)
    return lambda: run(keys)


def product_seconds(environment: Environment, repeats: int, *, cg_steps: int, num_tasks: int, **sizes: int) -> float:
    """The time of a meta-update's matrix products alone, if its line search takes the first step that it tries."""

    def update(
        grads: PyTree,
        state: optax.OptState,
        params: PyTree,
        *,
        kl_product: Callable[[PyTree], PyTree],
        value_and_kl_fn: Callable[[PyTree], tuple[Array, Array]],
        **extra: PyTree,
    ) -> tuple[PyTree, optax.OptState]:
        """As often as TRPO does, what it does."""
        direction, _ = jax.lax.scan(lambda vector, _: (kl_product(vector), None), grads, length=cg_steps)
        return jax.tree.map(lambda leaf: leaf * sum(value_and_kl_fn(direction)), direction), state

    tx = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    learner, key = build_learner(environment, tx, **sizes), jax.random.key(0)
    tasks = jax.vmap(environment.sample_task)(jax.random.split(key, num_tasks))
    counted = arithmetic.products(learner.update, key, learner.init(key), tasks)
    return arithmetic.flops(counted) / arithmetic.product_rate(counted, repeats)


def measure(options: Options) -> list[report.Row]:
    """Rows of each environment and number of iterations: seconds, and how far the loss falls."""
    rows = []
    for name in options.tasks:
        sizes = {"num_tasks": 20, "horizon": 100} if name == "navigation" else {"num_tasks": 40, "horizon": 200}
        sizes |= {size: getattr(options, size) for size in sizes if getattr(options, size) is not None}
        devices = options.devices or max(n for n in range(1, jax.device_count() + 1) if sizes["num_tasks"] % n == 0)
        if sizes["num_tasks"] % devices:
            raise ValueError(
                f"--num-tasks must be a multiple of --devices, got {sizes['num_tasks']} tasks and {devices} devices."
            )
        sizes |= {"trajectories": options.trajectories, "devices": devices}
        environment = navigation() if name == "navigation" else locomotion(name)
        runs = {
            f"{steps} conjugate gradient iterations": build_update(environment, cg_steps=steps, **sizes)
            for steps in options.cg_steps
        }
        conditions = (
            f"median of {options.repeats}, {sizes['num_tasks']} tasks, horizon {sizes['horizon']}, "
            f"{harness.cores()} cores, {devices} devices"
        )
        for method, milliseconds in harness.medians(runs, options.repeats).items():
            shared = {"method": method, "setting": name, "step": 1, "tasks": sizes["num_tasks"], **harness.UNTRAINED}
            rows.append(report.Row(metric="seconds per meta-update", mean=milliseconds / 1e3, protocol=conditions, **shared))
            fall = -float(runs[method]()["surrogate"])
            rows.append(
                report.Row(metric="fall of the loss in the first meta-update", mean=fall, protocol=conditions, **shared)
            )
        sizes.pop("devices")
        for method, seconds in unavoidable(environment, options, sizes).items():
            shared = {"method": method, "setting": name, "step": 1, "tasks": sizes["num_tasks"], **harness.UNTRAINED}
            rows.append(report.Row(metric="seconds per meta-update", mean=seconds, protocol=conditions, **shared))
        print(f"{name}: done", file=sys.stderr)
    return rows


def unavoidable(environment: Environment, options: Options, sizes: Mapping[str, int]) -> dict[str, float]:
    """Seconds, by name, of the parts that whoever does a meta-update has to do."""
    steps = harness.medians({"": environment_steps(environment, **sizes)}, options.repeats)[""] / 1e3
    seconds = {"the environment alone": 2 * steps}  # before and after adaptation
    for cg_steps in options.cg_steps:
        seconds[f"the products of {cg_steps} iterations alone"] = product_seconds(
            environment, options.repeats, cg_steps=cg_steps, **sizes
        )
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.main("rl_update", Options, measure, argv)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", harness.cores())
    sys.exit(main())
