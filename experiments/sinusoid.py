"""Sinusoid regression: figures 2, 3 and 6 of Finn et al. 2017, and its table 2. `python experiments/sinusoid.py`

Each method trains one network on curves y = A sin(x - phase), each seen at a few points, and is judged on new curves after
0 to 10 steps of gradient descent on 5, 10 or 20 points.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import runner
from jax import Array

from mamljax import report
from mamljax.baselines.multi_task import multi_task, no_penalty, squared_distance, squared_norm
from mamljax.baselines.pretrain import pretrain
from mamljax.evaluate import evaluate, mean_and_ci95
from mamljax.figures import legend_below, new_figure, steps_taken
from mamljax.losses import mse
from mamljax.maml import fine_tune, maml
from mamljax.models import mlp
from mamljax.reptile import reptile
from mamljax.tasks.sinusoid import INPUT, sinusoid
from mamljax.types import MetaLearner, Model, PyTree, State

SOURCE = "Finn et al. 2017, table 2"
PUBLISHED = {  # mean squared error, 5-shot, by number of adaptation steps
    "maml": {1: 0.67, 5: 0.38, 10: 0.35},
    "pretrained": {1: 2.41, 5: 2.23, 10: 2.19},
    "multi_task": {1: 4.19, 5: 3.85, 10: 3.69},
    "multi_task_norm": {1: 7.18, 5: 5.69, 10: 5.60},
    "multi_task_mean": {1: 2.91, 5: 2.72, 10: 2.71},
}
PENALTIES = {"multi_task": no_penalty, "multi_task_norm": squared_norm, "multi_task_mean": squared_distance}
KERNEL_INITS = {"corrected": jax.nn.initializers.lecun_normal(), "paper": jax.nn.initializers.truncated_normal(0.01)}
TUNED = ("reptile", "pretrained", "random", *PENALTIES)  # their step size of fine-tuning is tuned
Method = Literal[
    "maml", "fomaml", "reptile", "pretrained", "oracle", "random", "multi_task", "multi_task_norm", "multi_task_mean"
]


@dataclasses.dataclass(frozen=True)
class Options(runner.Options):
    """Sinusoid regression, by default as in the paper (section 5.1) and its code, but for the first weights (--protocol)."""

    preset: Literal["paper", "quick", "multi_task", "reptile"] = "paper"
    """Values for all options below and above: paper; quick for a first look in under a minute; multi_task, the means of 500
    networks, each trained on a task of its own, in table 2; or reptile, which came after the paper."""
    method: tuple[Method, ...] = ("maml", "fomaml", "pretrained", "oracle", "random")
    """Methods, trained in this order: MAML, first-order MAML, one network for all tasks, one that is told amplitude and
    phase, an untrained one. For --preset multi_task: the mean of networks trained on one task each, without a penalty, with
    one on their norm, or with one on their distance from the mean. For --preset reptile: Reptile. All but MAML and the one
    that is told have a tuned step size in evaluation."""
    protocol: Literal["corrected", "paper"] = "corrected"
    """How the weights begin, on which the text is silent: with Flax's default, LeCun normal (corrected), or truncated normal
    with standard deviation 0.01 as in the authors' code (paper)."""
    steps: int = 70_000
    out: Path = Path("out/sinusoid")
    num_tasks: int = 25
    shots: int = 10
    """K, support points of a training task."""
    queries: int = 10
    """Query points of a training task."""
    inner_lr: float = 0.001
    """Step size of adaptation, on the mean squared error; the default of the authors' code, where the text has 0.01."""
    inner_steps: int = 1
    """Adaptation steps in training."""
    meta_lr: float = 0.001
    """Step size of Adam, the outer optimiser."""
    hidden_sizes: tuple[int, ...] = (40, 40)
    """Units of each hidden layer."""
    differentiation: Literal["mixed", "reverse"] = "reverse"
    """How MAML differentiates through adaptation; both are exact, and reverse is faster for few points and steps."""
    batch_size: int = 10
    """Reptile: points of an adaptation step in training."""
    task_steps: int = 2_000
    """Steps of Adam by which the network of a single task is trained."""
    penalty: float = 0.1
    """Weight of its penalty, if it has one."""
    eval_shots: tuple[int, ...] = (5, 10, 20)
    """K, support points of a test task; one table each."""
    eval_steps: int = 10
    """Adaptation steps in evaluation."""
    eval_queries: int = 50
    """Query points of a test task."""
    tuning_lrs: tuple[float, ...] = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
    """Step sizes to choose from for fine-tuning, by the mean error over all steps on validation tasks."""

    only_for = {"differentiation": ("maml",), "batch_size": ("reptile",), "task_steps": PENALTIES, "penalty": [*PENALTIES][1:]}
    may_change = (*runner.Options.may_change, "eval_shots", "eval_steps", "eval_tasks", "eval_queries", "tuning_lrs")


QUICK = Options(preset="quick", steps=5_000, eval_tasks=200, out=Path("out/sinusoid_quick"))
FIVE_HUNDRED = {"steps": 20, "log_every": 20, "shots": 50, "queries": 50}  # tasks: 20 meta-updates of 25
MULTI_TASK = Options(preset="multi_task", method=tuple(PENALTIES), out=Path("out/sinusoid_multi_task"), **FIVE_HUNDRED)
REPTILE = Options(preset="reptile", method=("reptile",), inner_lr=0.01, inner_steps=10, out=Path("out/sinusoid_reptile"))
PRESETS = {options.preset: options for options in (Options(), QUICK, MULTI_TASK, REPTILE)}


def execute(options: Options, run: runner.Run) -> None:
    """Train every method, evaluate all on the same test tasks, draw the figures."""
    rows, fits = [], {}
    learners = {method: build_learner(method, options) for method in options.method}  # all, before any is trained
    for method, learner in learners.items():
        states, num_updates = train(method, learner, options, run)
        if num_updates == 0 and method != "random":  # time ran out before
            continue
        for shots in options.eval_shots:
            lr = tuned_lr(options, states, shots=shots) if method in TUNED else options.inner_lr
            fits.setdefault(method, (jax.tree.map(lambda leaf: leaf[0], states), lr))
            errors = query_errors(states, lr, options=options, oracle=method == "oracle", shots=shots, seed=runner.TEST_SEED)
            fields = {"method": method, "setting": f"{shots}-shot", "protocol": options.protocol, "tasks": options.eval_tasks}
            fields |= {"note": f"step size {lr:g}" if method in TUNED else "", **run.effort(method)}
            published = PUBLISHED.get(method, {}) if shots == 5 else {}
            rows += report.rows_over_steps(*mean_and_ci95(errors), metric="mse", published=published, source=SOURCE, **fields)
    results = run.write(rows)
    report.learning_curves(results, options.out / "learning_curves.png")
    draw_fits(options, fits, options.out / "fits.png")


def build_learner(method: Method, options: Options) -> MetaLearner:
    """Build the learner of a method."""
    oracle = method == "oracle"
    model, tx = network(options, oracle=oracle), optax.adam(options.meta_lr)
    adaptation = {"rule": options.inner_lr, "eval_steps": 0 if oracle else options.eval_steps}
    if method in ("maml", "fomaml"):
        mode = "first_order" if method == "fomaml" else options.differentiation
        return maml(model, mse, inner_steps=options.inner_steps, tx=tx, differentiation=mode, **adaptation)
    if method == "reptile":
        return reptile(model, mse, inner_steps=options.inner_steps, batch_size=options.batch_size, tx=tx, **adaptation)
    if method in PENALTIES:

        def penalty(params: PyTree, mean: PyTree) -> Array:
            return options.penalty * PENALTIES[method](params, mean)

        return multi_task(model, mse, task_tx=tx, task_steps=options.task_steps, penalty=penalty, **adaptation)
    return pretrain(model, mse, tx=tx, **adaptation)  # also the oracle, and the untrained network


def train(method: Method, learner: MetaLearner, options: Options, run: runner.Run) -> tuple[State, int]:
    """Train a method from every seed; returns the states [seeds] and the number of meta-updates done."""
    oracle = method == "oracle"
    if method == "random":
        return jax.vmap(learner.init)(run.keys), 0

    validation = sinusoid(shots=options.shots, queries=options.eval_queries, reveal=oracle)

    def validation_error(state: State) -> Array:  # for the log: it is the last state that is evaluated
        losses = evaluate(learner, state, validation, key=jax.random.key(runner.VALIDATION_SEED), num_tasks=options.eval_tasks)
        return losses["loss"][:, -1].mean()

    sample = sinusoid(shots=options.shots, queries=options.queries, reveal=oracle)
    result = run.train(method, learner, sample, validate_fn=validation_error)
    if method in PENALTIES:
        return result.state._replace(params=result.state.params["mean"]), result.num_updates
    return result.state, result.num_updates


def network(options: Options, *, oracle: bool = False) -> Model:
    """The network of every method; the oracle's sees amplitude and phase beside x."""
    return mlp(3 if oracle else 1, options.hidden_sizes, 1, kernel_init=KERNEL_INITS[options.protocol])


@functools.partial(jax.jit, static_argnames=("options", "oracle", "shots", "seed"))
def query_errors(states: State, lr: Array | float, *, options: Options, oracle: bool, shots: int, seed: int) -> Array:
    """Error before and after each step of size `lr`, whatever the states were trained by: [seeds, eval_tasks, S + 1]."""
    steps = 0 if oracle else options.eval_steps
    # For its evaluation alone, which is the same for every method: gradient descent on the support set.
    learner = pretrain(network(options, oracle=oracle), mse, rule=optax.sgd(lr), eval_steps=steps, tx=optax.identity())
    sample = sinusoid(shots=shots, queries=options.eval_queries, reveal=oracle)
    key = jax.random.key(seed)
    return jax.vmap(lambda state: evaluate(learner, state, sample, key=key, num_tasks=options.eval_tasks)["loss"])(states)


def tuned_lr(options: Options, states: State, *, shots: int) -> float:
    """The step size of fine-tuning with the least error on validation tasks, over all steps and seeds."""
    errors = [
        query_errors(states, lr, options=options, oracle=False, shots=shots, seed=runner.VALIDATION_SEED)[..., 1:].mean()
        for lr in options.tuning_lrs
    ]
    if not jnp.isfinite(jnp.array(errors)).any():
        raise ValueError(f"none of --tuning-lrs, {options.tuning_lrs}, has finite errors. Give smaller ones.")
    return options.tuning_lrs[int(jnp.nanargmin(jnp.array(errors)))]


def draw_fits(options: Options, fits: Mapping[Method, tuple[State, float]], path: Path) -> None:
    """Draw the first seed's networks before and after adaptation to 5 points, from all or from the left half of the range.

    They are those of MAML and of the pretrained network, if trained, else all that adapt.
    """
    shown = [method for method in ("maml", "pretrained") if method in fits] or [name for name in fits if name != "oracle"]
    if not shown:
        return
    figure = new_figure(14, 1 + 3 * len(shown))
    panels = figure.subplots(len(shown), 4, sharex=True, sharey="col", squeeze=False)
    for row, (method, (state, lr)) in zip(panels, ((method, fits[method]) for method in shown), strict=True):
        for column, axes in enumerate(row):
            interval = (INPUT[0], 0.0) if column % 2 else INPUT
            task = sinusoid(shots=5, queries=400, support_range=interval)(jax.random.key(runner.TEST_SEED + column // 2))
            x, y = (values[jnp.argsort(task.query.x[:, 0])] for values in task.query)
            _, states = fine_tune(network(options), mse, state.params, task.support, optax.sgd(lr), options.eval_steps)
            axes.plot(x, y, color="0.75", linewidth=4, label="true curve")
            for step, style in {0: "C7:", 1: "C0--", options.eval_steps: "C2-"}.items():
                params = jax.tree.map(lambda leaf, step=step: leaf[step], states)
                axes.plot(x, network(options).apply(params, x), style, label=steps_taken(step))
            axes.plot(task.support.x, task.support.y, "C3^", label="the 5 points")
            axes.axvspan(*interval, color="C3", alpha=0.05, label="where they lie")
            axes.set(title=f"{method}, curve {1 + column // 2}", xlabel="x", ylabel="y", ylim=(1.6 * y.min(), 1.6 * y.max()))
    legend_below(figure, figure.axes[0])
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    runner.run_script("sinusoid", PRESETS, execute)
