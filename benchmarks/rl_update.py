"""How long does a meta-update of reinforcement learning take, by TRPO and by ProMP?

`python benchmarks/rl_update.py` times whole meta-updates of the experiments' sizes: trajectories before and after adaptation,
the meta-gradient, TRPO with a Hessian-vector product for each iteration, ten in the paper, and the line search. Those products
are most of the arithmetic. ProMP takes five steps of Adam on the same trajectories instead. How far the loss falls is here too:
all start from one policy with the same key.

What two of the parts take alone stands beside it: the environment's own steps, without a policy, on as many devices; and the
matrix products, at the rate that `jnp.matmul` reaches on their sizes, on one device with all threads.

On a CPU the tasks are divided among as many simulated devices as this process may use cores.
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import arithmetic
import harness
import jax
import jax.numpy as jnp
import optax
from jax import Array

from mamljax import report
from mamljax.devices import BY_TASK, divide, on, place, task_mesh
from mamljax.models import gaussian_policy
from mamljax.rl.collect import Collector, collect_with
from mamljax.rl.environment import Environment
from mamljax.rl.locomotion import locomotion
from mamljax.rl.maml_rl import maml_rl
from mamljax.rl.navigation import navigation
from mamljax.rl.promp import promp
from mamljax.rl.trpo import TrustRegionState, trpo
from mamljax.types import MetaLearner, PyTree, State

SHARED = {"rule": 0.1, "inner_steps": 1, "eval_steps": 1, "chunk_size": 1}
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


def build_maml(environment: Environment, tx: optax.GradientTransformation, **sizes: int) -> MetaLearner:
    """MAML with the paper's policy and one adaptation step, its inner objective that of the locomotion presets."""
    return maml_rl(collector_of(environment, **sizes), tx=tx, inner_objective="likelihood_ratio", **SHARED)


def build_promp(environment: Environment, **sizes: int) -> MetaLearner:
    """ProMP with the same policy."""
    return promp(collector_of(environment, **sizes), tx=optax.adam(1e-3), **SHARED)


def collector_of(environment: Environment, *, trajectories: int, horizon: int) -> Collector:
    """The paper's policy, and how it gathers trajectories."""
    policy = gaussian_policy(environment.observation_size, environment.action_size)
    return collect_with(policy, environment, horizon=horizon, trajectories=trajectories)


def first_update(learner: MetaLearner, environment: Environment, num_tasks: int) -> tuple[Array, State, PyTree]:
    """The arguments of a policy's first meta-update: a key, the state, the tasks."""
    key, init_key, task_key = jax.random.split(jax.random.key(0), 3)
    return key, learner.init(init_key), jax.vmap(environment.sample_task)(jax.random.split(task_key, num_tasks))


def compiled(fn: Callable, common: Sequence[PyTree], by_task: PyTree, devices: int) -> Callable[[], PyTree]:
    """Compile a function for tasks divided among devices; returns what calls it with these arguments again and again."""
    mesh = task_mesh(devices) if devices > 1 else None
    placed = (*place(common, mesh), place(by_task, mesh, BY_TASK))
    with on(mesh):
        program = jax.jit(fn).lower(*placed).compile()
    return lambda: program(*placed)


def environment_steps(
    environment: Environment, *, num_tasks: int, trajectories: int, horizon: int, devices: int
) -> Callable[[], Array]:
    """Compile the steps of the environment that a meta-update takes before adaptation, with actions at random."""

    def trajectory(key: Array, task: PyTree) -> Array:
        reset_key, action_key, step_key = jax.random.split(key, 3)
        actions = jax.random.normal(action_key, (horizon, environment.action_size))

        def step(state: PyTree, action_and_key: tuple[Array, Array]) -> tuple[PyTree, Array]:
            action, key = action_and_key
            outcome = environment.step(key, state, action, task)
            return outcome.state, outcome.reward

        state, _ = environment.reset(reset_key, task)
        return jax.lax.scan(step, state, (actions, jax.random.split(step_key, horizon)))[1]

    def of_task(key: Array) -> Array:
        task_key, key = jax.random.split(key)
        return jax.vmap(trajectory, (0, None))(jax.random.split(key, trajectories), environment.sample_task(task_key))

    def of_all(keys: Array) -> Array:
        return divide(lambda _, keys: jax.vmap(of_task)(keys), None, keys)

    return compiled(of_all, (), jax.random.split(jax.random.key(0), num_tasks), devices)


def products_of_trpo(environment: Environment, *, cg_steps: int, num_tasks: int, **sizes: int) -> Counter[arithmetic.Product]:
    """Count the matrix products of a meta-update whose line search takes the first step that it tries."""

    def update(
        grads: PyTree,
        state: TrustRegionState,
        params: PyTree,
        *,
        kl_product: Callable[[PyTree], PyTree],
        value_and_kl_fn: Callable[[PyTree], tuple[Array, Array]],
        **extra: PyTree,
    ) -> tuple[PyTree, TrustRegionState]:
        """The products of TRPO: `cg_steps` with the Hessian, and one evaluation of the line search."""
        direction, _ = jax.lax.scan(lambda vector, _: (kl_product(vector), None), grads, length=cg_steps)
        return direction, TrustRegionState(jnp.ones(()), *value_and_kl_fn(direction))

    learner = build_maml(environment, optax.GradientTransformationExtraArgs(trpo(0.01).init, update), **sizes)
    return arithmetic.products(learner.update, *first_update(learner, environment, num_tasks))


def sizes_of(name: Name, options: Options) -> tuple[int, dict[str, int], int]:
    """How many tasks, other sizes, and on how many devices; where not given, the paper's, and all that divide the tasks."""
    paper = {"num_tasks": 20, "horizon": 100} if name == "navigation" else {"num_tasks": 40, "horizon": 200}
    num_tasks, horizon = options.num_tasks or paper["num_tasks"], options.horizon or paper["horizon"]
    devices = options.devices or max(n for n in range(1, jax.device_count() + 1) if num_tasks % n == 0)
    if num_tasks % devices:
        raise ValueError(f"--num-tasks must be a multiple of --devices, got {num_tasks} tasks and {devices} devices.")
    return num_tasks, {"horizon": horizon, "trajectories": options.trajectories}, devices


def seconds_of_products(environment: Environment, options: Options, num_tasks: int, sizes: dict[str, int]) -> dict[str, float]:
    """What the matrix products of each method's meta-update take alone, at the rate that the machine reaches on their sizes."""
    counts = {
        f"{steps} iterations": products_of_trpo(environment, cg_steps=steps, num_tasks=num_tasks, **sizes)
        for steps in options.cg_steps
    }
    learner = build_promp(environment, **sizes)
    counts["ProMP"] = arithmetic.products(learner.update, *first_update(learner, environment, num_tasks))
    return {
        f"the products of {method} alone": arithmetic.flops(counted) / arithmetic.product_rate(counted, options.repeats)
        for method, counted in counts.items()
    }


def measure_environment(name: Name, options: Options) -> list[report.Row]:
    """Rows of one environment: seconds of meta-updates and of their parts, and how far the loss falls."""
    num_tasks, sizes, devices = sizes_of(name, options)
    environment = navigation() if name == "navigation" else locomotion(name)
    learners = {
        f"{steps} conjugate gradient iterations": build_maml(environment, trpo(0.01, cg_steps=steps), **sizes)
        for steps in options.cg_steps
    }
    learners["ProMP"] = build_promp(environment, **sizes)
    runs = {}
    for method, learner in learners.items():
        *common, tasks = first_update(learner, environment, num_tasks)
        runs[method] = compiled(learner.update, common, tasks, devices)
    runs["the environment alone"] = environment_steps(environment, num_tasks=num_tasks, devices=devices, **sizes)
    # Whole meta-updates and the environment's steps, timed in turns; then the products, by themselves.
    seconds = {method: milliseconds / 1e3 for method, milliseconds in harness.medians(runs, options.repeats).items()}
    seconds["the environment alone"] *= 2  # before and after adaptation
    seconds |= seconds_of_products(environment, options, num_tasks, sizes)
    # All from the same policy on the same trajectories.
    falls = {method: -float(runs[method]()[1]["surrogate"]) for method in learners}
    where = f"{harness.cores()} cores, {devices} devices"
    conditions = f"median of {options.repeats}, {num_tasks} tasks, horizon {sizes['horizon']}, {where}"
    shared = {"setting": name, "step": 1, "tasks": num_tasks, "protocol": conditions, **harness.UNTRAINED}
    return [
        report.Row(method=method, metric=metric, mean=mean, **shared)
        for metric, means in (("seconds per meta-update", seconds), ("fall of the loss in the first meta-update", falls))
        for method, mean in means.items()
    ]


def measure(options: Options) -> list[report.Row]:
    """Rows of each environment."""
    rows = []
    for name in options.tasks:
        rows += measure_environment(name, options)
        print(f"{name}: done", file=sys.stderr)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    return harness.main("rl_update", Options, measure, argv)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", harness.cores())
    sys.exit(main())
