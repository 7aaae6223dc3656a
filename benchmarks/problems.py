"""The problems that benchmarks measure, with the settings that the experiments have for them."""

from functools import cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mamljax.image_models import PooledConvNet, StridedConvNet
from mamljax.inner import Differentiation
from mamljax.losses import cross_entropy, mse
from mamljax.maml import maml
from mamljax.models import from_linen, mlp
from mamljax.rules import all_but
from mamljax.tasks.images import as_task
from mamljax.tasks.sinusoid import sinusoid
from mamljax.types import LossFn, MetaLearner, Model, PyTree, Task

META_LR = 1e-3
Name = Literal["omniglot-5w1s", "miniimagenet-5w1s", "sinusoid"]


class Problem(NamedTuple):
    """What to learn, by which network, with which arithmetic."""

    name: str
    network: Literal["mlp", "strided_conv", "pooled_conv"]
    width: int  # units of both hidden layers, or channels of each convolution
    image: tuple[int, ...]  # (H, W, C); none for sinusoids
    shots: int  # support images of each class, or points
    queries: int
    num_tasks: int  # B
    inner_lr: float
    inner_steps: int
    differentiation: Differentiation
    chunk_size: int | None
    ways: int = 5
    devices: int = 1  # among which the tasks are divided
    updates: int = 1  # meta-updates that the library does in one call where a single one is too short to time


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem("omniglot-5w1s", "strided_conv", 64, (28, 28, 1), 1, 1, 32, 2.0, 1, "reverse", 1),
        Problem("miniimagenet-5w1s", "pooled_conv", 32, (84, 84, 3), 1, 15, 4, 0.05, 5, "mixed", 1),
        Problem("sinusoid", "mlp", 40, (), 10, 10, 25, 0.001, 1, "reverse", None, updates=200),
    )
}


def problem_here(name: Name) -> Problem:
    """The problem as it suits the device; on an accelerator all tasks at once, and many meta-updates in a call."""
    problem = PROBLEMS[name]
    if jax.default_backend() == "cpu":
        return problem
    return problem._replace(chunk_size=None, updates=max(50, problem.updates))


def build_model(problem: Problem) -> Model:
    """Build the network."""
    if problem.network == "mlp":
        return mlp(1, (problem.width, problem.width), 1)
    module = {"strided_conv": StridedConvNet, "pooled_conv": PooledConvNet}[problem.network]
    return from_linen(module(problem.ways, problem.width), jnp.zeros((1, *problem.image)))


def loss_of(problem: Problem) -> LossFn:
    """The loss of the inner and the outer loop."""
    return cross_entropy if problem.image else mse


def build_learner(problem: Problem, differentiation: Differentiation) -> MetaLearner:
    """Build MAML as the experiment does, with Adam as the outer optimiser and no clipping."""
    return maml(
        build_model(problem),
        loss_of(problem),
        rule=all_but(("shift",), problem.inner_lr) if problem.image else problem.inner_lr,
        inner_steps=problem.inner_steps,
        eval_steps=1,
        tx=optax.adam(META_LR),
        differentiation=differentiation,
        chunk_size=problem.chunk_size,
    )


@cache
def weights_and_tasks(problem: Problem) -> tuple[PyTree, Task]:
    """First weights, and a meta-batch of tasks; float32 NumPy arrays. Images are noise: no time depends on them."""
    key = jax.random.key(0)
    if problem.image:
        shape = (problem.num_tasks, problem.ways, problem.shots + problem.queries, *problem.image)
        drawn = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        tasks = jax.vmap(partial(as_task, shots=problem.shots))(drawn)
    else:
        keys = jax.random.split(key, problem.num_tasks)
        tasks = jax.vmap(sinusoid(shots=problem.shots, queries=problem.queries))(keys)
    return jax.tree.map(np.asarray, (jax.jit(build_model(problem).init)(key), tasks))
