"""ProMP (Rothfuss et al. 2019, arXiv 1810.06784): MAML for reinforcement learning, by proximal steps in place of TRPO."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from mamljax import gaussian
from mamljax.checks import check_count
from mamljax.devices import divide
from mamljax.inner import adapt
from mamljax.outer import meta_learner
from mamljax.rl.advantages import masked_mean
from mamljax.rl.collect import Batch, CollectFn
from mamljax.rl.maml_rl import act, collect_and_adapt, divergence, judged, likelihood_ratio_loss, maml_rl, summary
from mamljax.rules import Rule, rule_for
from mamljax.types import MetaLearner, Metrics, Model, PyTree, State


def promp(
    model: Model,
    collect: CollectFn,
    *,
    rule: Rule,
    inner_steps: int,
    eval_steps: int,
    tx: optax.GradientTransformation,
    outer_steps: int = 5,
    clip: float = 0.3,
    kl_weight: float = 5e-4,
    multi_step_loss: bool = False,
    chunk_size: int | None = None,
) -> MetaLearner:
    r"""Learn a policy that a few policy-gradient steps adapt to a task, by several small steps on the same trajectories.

    Tasks, trajectories and adaptation are those of `maml_rl` with likelihood ratios. The meta-loss of a task is
    $-\frac1n \sum_t \min(r_t A_t, \mathrm{clip}(r_t, 1 - \epsilon, 1 + \epsilon) A_t) + \frac\eta S \sum_s D_s$, where $r_t$ is
    how much more likely the adapted policy makes an action than the one that took it, and $D_s$ the divergence, before
    adaptation step $s$, from the policy that gathered what the step is taken on. Clipping keeps the adapted policy near the one
    that acted, the divergence those before it, where TRPO bounds the former's alone; each meta-update takes several steps of
    `tx`, whose gradient is that of `maml_rl` at the first.

    Args:
        model: the policy; see `collect.collector`.
        collect: (key, params, task) -> batch; from `collect.collector`.
        rule: the inner step size alpha, or any Optax transformation; 0.1 in the paper.
        inner_steps: S, adaptation steps in training; 1 or more.
        eval_steps: adaptation steps in evaluation.
        tx: the outer optimiser; `optax.adam(1e-3)` in the authors' code.
        outer_steps: steps of it on the trajectories of one meta-update; 5 in the authors' code.
        clip: epsilon; 0.3 in the authors' code.
        kl_weight: eta, by nat; 5e-4 in the authors' code, which can adapt it.
        multi_step_loss: whether the policy is judged after every one of the S steps, as `maml_rl` does it.
        chunk_size: tasks differentiated at a time; see `outer.meta_learner`.

    Returns:
        A meta-learner over the tasks of an environment. `update` reports the mean undiscounted `return_before` and
        `return_after` adaptation, the `loss` and `grad_norm` before the last of its steps, and the share of `unstable`
        trajectories. `evaluate` is that of `maml_rl`.

    Raises:
        ValueError: a count, `clip` or `kl_weight` out of range, a step size that is not positive and finite, a rule without
            finite meta-gradients.

    Differs from the authors' code: the weight of the divergence is constant, and advantages are not shifted to be positive.
    """
    check_count("inner_steps", inner_steps)
    check_count("outer_steps", outer_steps)
    if not 0 < clip < 1:
        raise ValueError(f"clip must lie between 0 and 1, got {clip}. The authors' code has 0.3.")
    if not (math.isfinite(kl_weight) and kl_weight >= 0):
        raise ValueError(f"kl_weight must be finite and not negative, got {kl_weight}. The authors' code has 5e-4.")
    rule = rule_for(model, rule, differentiable=True)
    judged_from = 1 if multi_step_loss else inner_steps
    plain = maml_rl(model, collect, rule=rule, inner_steps=inner_steps, eval_steps=eval_steps, tx=tx)

    def gather(params: PyTree, keys_and_tasks: tuple[Array, PyTree]) -> Batch:
        keys, tasks = keys_and_tasks
        return jax.vmap(partial(collect_and_adapt, model, collect, rule, inner_steps), (0, None, 0))(keys, params, tasks)

    def task_loss(params: PyTree, batches: Batch) -> Array:
        before = jax.tree.map(lambda leaf: leaf[:-1], batches)
        _, path = adapt(partial(likelihood_ratio_loss, model), params, before, rule)
        mean, log_std = jax.vmap(partial(act, model))(path, batches)
        strayed = jax.vmap(divergence)(before, (mean[:-1], log_std[:-1])).mean()
        acted = mean[judged_from:], log_std[judged_from:]
        return jax.vmap(partial(clipped_loss, clip=clip))(judged(judged_from, batches), acted).mean() + kl_weight * strayed

    descend = meta_learner(model.init, task_loss, plain.evaluate, tx=tx, chunk_size=chunk_size)

    def update(key: Array, state: State, tasks: PyTree) -> tuple[State, Metrics]:
        keys = jax.random.split(key, len(jax.tree.leaves(tasks)[0]))
        batches = divide(gather, state.params, (keys, tasks))
        state, metrics = lax.scan(lambda state, _: descend.update(key, state, batches), state, length=outer_steps)
        return state, {**summary(batches), **jax.tree.map(lambda values: values[-1], metrics)}

    return MetaLearner(plain.init, update, plain.evaluate)


def clipped_loss(batch: Batch, actions: tuple[Array, Array], clip: float) -> Array:
    """`maml_rl.surrogate_loss`, but nothing is gained by making an action more or less likely than by a factor of 1 + `clip` or
    1 - `clip` (Schulman et al. 2017, arXiv 1707.06347), []."""
    acted = batch.trajectories
    ratio = jnp.exp(gaussian.log_prob(acted.actions, *actions) - gaussian.log_prob(acted.actions, acted.mean, acted.log_std))
    gain = jnp.minimum(ratio * batch.advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * batch.advantages)
    return -masked_mean(gain, acted.mask)
