"""What the reinforcement learning experiments share: options, methods, results, figures. `navigation.py` is one of them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import runner
from jax import Array

from mamljax import report
from mamljax.evaluate import evaluate, mean_and_ci95, normalised
from mamljax.figures import legend_below, new_figure
from mamljax.models import gaussian_policy, with_context
from mamljax.record import read_metrics
from mamljax.rl.collect import Collector, collect_with
from mamljax.rl.environment import Environment
from mamljax.rl.maml_rl import InnerObjective, maml_rl
from mamljax.rl.promp import promp
from mamljax.rl.trpo import HessianVectorProduct, trpo
from mamljax.rl.wrappers import with_task_observed
from mamljax.rules import all_but
from mamljax.types import MetaLearner, Metrics, State

ADAPTING = ("maml", "fomaml", "promp", "context")  # in training already
BY_TRPO = ("maml", "fomaml", "context", "pretrained", "oracle")  # unless --outer says otherwise
TUNED = ("pretrained", "random")  # their step size of fine-tuning is tuned
FIRST = "return of the first of the trajectories in a row"
METRICS = ("return", "return_of_first", "unstable")
Method = Literal["maml", "fomaml", "promp", "context", "pretrained", "random", "oracle"]


@dataclasses.dataclass(frozen=True)
class Options(runner.Options):
    """Options of the reinforcement learning experiments."""

    method: tuple[Method, ...] = ("maml", "fomaml", "pretrained", "random", "oracle")
    """Methods, trained in this order: MAML, first-order MAML, MAML by proximal steps (promp; Rothfuss et al. 2019), MAML that
    adapts nothing but a further input (context), one policy for all tasks, an untrained one, and one that is told the task
    (oracle). The pretrained and the untrained policy are fine-tuned with a step size that is tuned for them."""
    num_tasks: int = 20
    trajectories: int = 20
    """E, trajectories before and after each adaptation step in training. Where they end early further ones follow, so that
    there are nearly E x T steps to learn from, as in the authors' code."""
    horizon: int = 100
    """T, environment steps after which a trajectory ends."""
    discount: float = 0.99
    """Discount factor, by environment step."""
    gae_lambda: float = 1.0
    """Lambda of generalised advantage estimation; 1 in the paper."""
    hidden_sizes: tuple[int, ...] = (100, 100)
    """Units of each hidden layer of the policy."""
    context_size: int = 10
    """Dimensions of the further input; chosen here, as the paper does not say."""
    inner_lr: float = 0.1
    """Step size of adaptation, halved after the first step."""
    inner_steps: int = 1
    """Adaptation steps in training."""
    inner_objective: InnerObjective = "log_prob"
    """What an adaptation step is the gradient of, when the meta-gradient goes through it: log-probabilities, as in the authors'
    code, or likelihood ratios, which give credit for what the policy does before adaptation (Rothfuss et al. 2019), and
    which promp always has."""
    multi_step_loss: bool = False
    """Judge the policy in training after every one of the adaptation steps, by the sum of its returns, not after the last
    alone."""
    outer: Literal["trpo", "adam"] = "trpo"
    """Outer optimiser: trust region policy optimisation, or Adam for vanilla policy gradient; promp always has Adam."""
    max_kl: float = 0.01
    """TRPO: bound of the mean KL divergence of a meta-update, in nats; 0.01 in the authors' code, 0.02 in their published run
    of half-cheetah's directions."""
    damping: float = 1e-5
    """TRPO: added to the diagonal of the divergence's Hessian."""
    cg_steps: int = 10
    """TRPO: conjugate gradient iterations."""
    hvp: HessianVectorProduct = "exact"
    """TRPO: Hessian-vector products, exact or by finite differences as in the paper."""
    meta_lr: float = 0.001
    """Adam: step size."""
    promp_steps: int = 5
    """ProMP: steps of Adam on the trajectories of a meta-update; this, like the next two, as in its authors' scripts."""
    promp_clip: float = 0.3
    """ProMP: how far from 1 the ratio of an action's probabilities may go and still gain."""
    promp_kl_weight: float = 5e-4
    """ProMP: weight of the divergence that a meta-update makes before adaptation, per nat."""
    chunk_size: int | None = None
    """Tasks differentiated at a time; by default one on a CPU, elsewhere all."""
    eval_tasks: int = 40
    eval_steps: int = 3
    """Adaptation steps at test."""
    eval_trajectories: int = 20
    """Trajectories before and after each adaptation step at test."""
    tuning_lrs: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
    """Step sizes to choose from for fine-tuning, by the mean return over all steps on tasks of their own."""
    log_every: int = 5
    validate_every: int = 20

    may_change = (*runner.Options.may_change, "tuning_lrs", "chunk_size", "eval_trajectories")
    may_be_zero = (*runner.Options.may_be_zero, "discount", "gae_lambda", "promp_kl_weight")
    only_for = {
        **dict.fromkeys(("inner_lr", "inner_steps", "multi_step_loss"), ADAPTING),
        **dict.fromkeys(("outer", "max_kl", "damping", "cg_steps", "hvp"), BY_TRPO),
        **dict.fromkeys(("promp_steps", "promp_clip", "promp_kl_weight"), ("promp",)),
        "context_size": ("context",),
    }


class Trained(NamedTuple):
    """A method after its training."""

    states: State  # every leaf [seeds, ...]
    effort: Mapping[str, Any]  # as `report.Row` has it
    lr: float  # of the first step of fine-tuning
    returns: np.ndarray  # [seeds, eval_tasks, S + 1] mean undiscounted return on the test tasks, of all trajectories
    first_returns: np.ndarray  # the same of the first trajectories alone
    unstable: np.ndarray  # [seeds, eval_tasks, S + 1] share of trajectories that ended since the simulation broke down


def run_methods(
    options: Options,
    run: runner.Run,
    env: Environment,
    *,
    setting: str,
    protocol: str,
    published: Mapping[str, Sequence[float]],
    source: str,
) -> Mapping[Method, Trained]:
    """Train every method, evaluate all on the same test tasks, write the results and the figures all experiments have.

    Args:
        options, run, env: of the experiment.
        setting: what the results are of, "navigation" for example.
        protocol: the rules under which they were measured.
        published: mean return by adaptation step, for each method that has one; of the paper's protocol and horizon, and so
            left out beside results of others.
        source: where the published numbers are from.

    Returns:
        Every method that was trained at all.
    """
    published = published if protocol == "paper" and options.horizon == type(options).horizon else {}
    trained = {}
    learners = {method: build_learner(method, options, env) for method in options.method}  # all, before any is trained
    for method, learner in learners.items():
        states, num_updates = train(method, learner, options, run, env)
        if num_updates > 0 or method == "random":  # else time ran out before
            with run.evaluating(method, options.eval_tasks):
                lr = tuned_lr(method, options, env, states) if method in TUNED else options.inner_lr
                metrics = measure(method, options, env, states, lr, seed=runner.TEST_SEED)
            measured = (np.asarray(metrics[name]) for name in METRICS)
            trained[method] = Trained(states, run.effort(method, best=True), lr, *measured)
    fields = {"setting": setting, "protocol": protocol, "source": source, "tasks": options.eval_tasks}
    results = run.write(rows_of(trained, published, **fields))
    returns_only = {**results, "rows": [row for row in results["rows"] if row.metric == "return"]}
    report.learning_curves(returns_only, options.out / "learning_curves.png")
    draw_training({method: run.directory(method) for method in trained}, options.out / "training_curves.png")
    return trained


def train(method: Method, learner: MetaLearner, options: Options, run: runner.Run, env: Environment) -> tuple[State, int]:
    """Train a method from every seed; returns the best states [seeds] and the number of meta-updates done."""
    if method == "random":
        return jax.vmap(learner.init)(run.keys), 0

    def validation_error(state: State) -> Array:
        """Minus the mean return over the steps of adaptation; before any, for methods that do not adapt in training."""
        key = jax.random.key(runner.VALIDATION_SEED)
        metrics = evaluate(learner, state, env.sample_task, key=key, num_tasks=options.eval_tasks)
        return -metrics["return"][:, int(method in ADAPTING) :].mean()

    result = run.train(method, learner, env.sample_task, validate_fn=validation_error)
    return result.best, result.num_updates


def build_learner(method: Method, options: Options, env: Environment) -> MetaLearner:
    """A method by its name."""
    collector = collector_of(method, options, env)
    shared = {
        "rule": rule_of(method, options.inner_lr),
        "inner_steps": options.inner_steps if method in ADAPTING else 0,
        "eval_steps": options.eval_steps if method in ADAPTING else 0,
        "multi_step_loss": options.multi_step_loss,
        "chunk_size": runner.tasks_at_a_time(options),
    }
    if method == "promp":
        how = {"outer_steps": options.promp_steps, "clip": options.promp_clip, "kl_weight": options.promp_kl_weight}
        return promp(collector, tx=optax.adam(options.meta_lr), **how, **shared)
    return maml_rl(
        collector,
        tx=outer_optimiser(options),
        inner_objective=options.inner_objective,
        differentiation="first_order" if method == "fomaml" else "reverse",
        **shared,
    )


def at_test(options: Options) -> Options:
    """The same options with as many trajectories as at test."""
    return dataclasses.replace(options, trajectories=options.eval_trajectories)


def collector_of(method: Method, options: Options, env: Environment) -> Collector:
    """The policy of a method, and how it gathers trajectories; the oracle's sees the task."""
    env = with_task_observed(env) if method == "oracle" else env
    further = options.context_size if method == "context" else 0
    model = gaussian_policy(env.observation_size + further, env.action_size, hidden_sizes=options.hidden_sizes)
    model = with_context(model, further) if further else model
    sizes = {name: getattr(options, name) for name in ("horizon", "trajectories", "discount", "gae_lambda")}
    return collect_with(model, env, **sizes)


def outer_optimiser(options: Options) -> optax.GradientTransformation:
    """TRPO, or Adam."""
    if options.outer == "adam":
        return optax.adam(options.meta_lr)
    return trpo(options.max_kl, damping=options.damping, cg_steps=options.cg_steps, hvp=options.hvp)


def rule_of(method: Method, lr: Array | float) -> optax.GradientTransformation:
    """Gradient descent, of the context alone or of all; its step size is halved after the first, as in the authors' code."""
    halving = optax.sgd(lambda step: lr * jnp.where(step == 0, 1.0, 0.5))
    return all_but("network", halving) if method == "context" else halving


def measure(method: Method, options: Options, env: Environment, states: State, lr: float, *, seed: int) -> Metrics:
    """Returns before and after each step that begins with size `lr`: metrics [seeds, eval_tasks, S + 1] on tasks of a seed."""
    return _measure(states, jnp.float32(lr), jax.random.key(seed), method=method, options=options, env=env)


@functools.partial(jax.jit, static_argnames=("method", "options", "env"))
def _measure(states: State, lr: Array, key: Array, *, method: Method, options: Options, env: Environment) -> Metrics:
    collector = collector_of(method, at_test(options), env)
    steps = 0 if method == "oracle" else options.eval_steps
    learner = maml_rl(collector, rule=rule_of(method, lr), inner_steps=0, eval_steps=steps, tx=optax.identity())
    evaluate_one = functools.partial(evaluate, sample=env.sample_task, key=key, num_tasks=options.eval_tasks)
    return jax.vmap(lambda params: evaluate_one(learner, State(params, ())))(states.params)


def tuned_lr(method: Method, options: Options, env: Environment, states: State) -> float:
    """The step size of fine-tuning with the highest return on tasks of its own, over all steps and seeds."""
    measured = (measure(method, options, env, states, lr, seed=runner.VALIDATION_SEED) for lr in options.tuning_lrs)
    returns = [np.asarray(metrics["return"])[..., 1:].mean() for metrics in measured]  # on the host, from all devices
    if np.isnan(returns).all():
        raise ValueError(f"none of --tuning-lrs, {options.tuning_lrs}, has finite returns. Give smaller ones.")
    return options.tuning_lrs[int(np.nanargmax(returns))]


def rows_of(
    trained: Mapping[Method, Trained], published: Mapping[str, Sequence[float]], *, source: str, **fields: str | int
) -> list[report.Row]:
    """The rows of all methods: returns, shares of unstable trajectories if there are any, normalised returns."""
    rows = []
    for method, result in trained.items():
        note = f"step size {result.lr:g}" if method in TUNED else ""
        mine = {"method": method, "note": note, **result.effort, **fields}
        beside = {"published": dict(enumerate(published.get(method, ()))), "source": source}
        rows += report.rows_over_steps(*mean_and_ci95(result.returns), metric="return", **beside, **mine)
        if not np.allclose(result.first_returns, result.returns, rtol=1e-4, equal_nan=True):  # some ended early
            rows += report.rows_over_steps(*mean_and_ci95(result.first_returns), metric=FIRST, **mine)
        if result.unstable.any():
            rows += report.rows_over_steps(*mean_and_ci95(result.unstable), metric="share of unstable trajectories", **mine)
        if method in ADAPTING and {"pretrained", "oracle"} <= trained.keys():
            ours = normalised(result.returns, trained["pretrained"].returns, trained["oracle"].returns)
            beside = {"published": normalised_published(method, published), "source": source}
            if np.isfinite(ours).all():
                rows += report.rows_over_steps(*mean_and_ci95(ours), metric="normalised return", **beside, **mine)
    return rows


def normalised_published(method: str, published: Mapping[str, Sequence[float]]) -> dict[int, float]:
    """The normalised returns that published numbers come to, by step."""
    if not {method, "pretrained", "oracle"} <= published.keys():
        return {}
    arrays = (np.reshape(published[name], (1, 1, -1)) for name in (method, "pretrained", "oracle"))
    return {step: round(float(value), 2) for step, value in enumerate(normalised(*arrays)[0, 0])}


def draw_training(directories: Mapping[Method, Path], path: Path) -> None:
    """Draw the mean returns in training, before and after adaptation, over the meta-updates of each method, if any has some."""
    logs = {method: read_metrics(directory / "metrics.jsonl") for method, directory in directories.items()}
    if not any(logs.values()):
        return
    figure = new_figure(6, 4)
    axes = figure.subplots()
    for colour, (method, log) in enumerate(logs.items()):  # one without a log has its colour in other figures
        if log:
            updates, before, after = ([line[name] for line in log] for name in ("update", "return_before", "return_after"))
            marker = "." if len(log) == 1 else ""  # no line has one point
            axes.plot(updates, before, ":", color=f"C{colour}", marker=marker)
            axes.plot(updates, after, color=f"C{colour}", marker=marker, label=method)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set(xlabel="meta-updates", ylabel="mean return in training", title="after adaptation; dotted: before")
    axes.grid(alpha=0.3)
    legend_below(figure, axes)
    figure.savefig(path, dpi=100)
