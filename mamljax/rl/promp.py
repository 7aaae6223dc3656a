"""ProMP (Rothfuss et al. 2019, arXiv 1810.06784): MAML for reinforcement learning, by proximal steps in place of TRPO."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from mamljax.checks import check_count, check_positive
from mamljax.devices import divide
from mamljax.distributions import Distribution
from mamljax.inner import adapt
from mamljax.outer import meta_learner
from mamljax.rl.advantages import masked_mean
from mamljax.rl.collect import Batch, Collector
from mamljax.rl.maml_rl import (
    action_distribution,
    collect_and_adapt,
    collect_from_all,
    likelihood_ratio,
    likelihood_ratio_loss,
    maml_rl,
    map_tasks,
    mean_kl,
    outer_batches,
    summary,
    surrogate_loss,
)
from mamljax.rl.trpo import TrustRegionState
from mamljax.rules import Rule, rule_for
from mamljax.types import MetaLearner, Metrics, Model, PyTree, State


def promp(
    collector: Collector,
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
    $-\frac1n \sum_t \min(r_t A_t, \mathrm{clip}(r_t, 1 - \epsilon, 1 + \epsilon) A_t) + \frac\eta S \sum_s D_s$ over its $n$
    steps, where $r_t$ is the likelihood ratio of an action between the adapted policy and the one that acted, and $D_s$ the
    divergence of the policy before adaptation step $s$ from the one that gathered the trajectories of that step. Clipping
    removes the incentive to move the adapted policy further; the other term restrains those before it, which TRPO leaves
    unbounded. A meta-update takes several steps of `tx` on this loss, the first of them along the meta-gradient of `maml_rl`.

    Args:
        collector: the policy and how it gathers trajectories; from `collect.collect_with`.
        rule: the inner step size alpha, or any Optax transformation; 0.1 in the authors' scripts.
        inner_steps: S, adaptation steps in training; 1 or more.
        eval_steps: adaptation steps in evaluation.
        tx: the outer optimiser; `optax.adam(1e-3)` in the authors' scripts.
        outer_steps: steps of it in a meta-update; 5 in the authors' scripts.
        clip: epsilon; 0.3 in the authors' scripts.
        kl_weight: eta, per nat; 5e-4 in the authors' scripts. Their option to adapt it is left out.
        multi_step_loss: whether the policy is judged after every one of the S steps, as `maml_rl` does it.
        chunk_size: tasks differentiated at a time; see `outer.meta_learner`.

    Returns:
        A meta-learner over the tasks of an environment. `update` reports what that of `maml_rl` does, the `surrogate` without
        clipping and the `grad_norm` before the last of its steps; and `kl_before`, the divergence before adaptation that the
        update has made, in nats. `evaluate` is that of `maml_rl`.

    Raises:
        ValueError: a count, `clip` or `kl_weight` out of range, a step size that is not positive and finite, a rule without
            finite meta-gradients, TRPO as `tx`.
    """
    check_count("inner_steps", inner_steps)
    check_count("outer_steps", outer_steps)
    if not 0 < clip < 1:
        raise ValueError(f"clip must lie strictly between 0 and 1, got {clip}. The authors' scripts have 0.3.")
    check_positive("kl_weight", kl_weight, "The authors' scripts have 5e-4.", or_zero=True)
    policy = collector.policy
    rule = rule_for(policy, rule, differentiable=True)
    plain = maml_rl(collector, rule=rule, inner_steps=inner_steps, eval_steps=eval_steps, tx=tx)
    if _has_trpo(jax.eval_shape(plain.init, jax.random.key(0)).opt):
        raise ValueError("tx must take small steps on the loss, such as optax.adam(1e-3); with trpo(...) use maml_rl.")
    collect_one = partial(collect_and_adapt, collector, rule, inner_steps)
    first_step = 1 if multi_step_loss else inner_steps  # the first after which the outer loss sees the policy

    def changes(params: PyTree, batches: Batch, loss_fn: Callable = surrogate_loss) -> Metrics:
        """The loss of the policies of one task, and their divergences from those that acted."""
        policies = _policies_on_path(policy, rule, params, batches)
        kl = jax.vmap(mean_kl)(batches, policies)
        adapted = jax.tree.map(lambda leaf: leaf[first_step:], policies)
        loss = jax.vmap(loss_fn)(outer_batches(first_step, batches), adapted).mean()
        return {"surrogate": loss, "kl": kl[first_step:].mean(), "kl_before": kl[:-1].mean()}

    def task_loss(params: PyTree, batches: Batch) -> Array:
        changed = changes(params, batches, partial(clipped_loss, clip=clip))
        return changed["surrogate"] + kl_weight * changed["kl_before"]

    descend = meta_learner(policy.init, task_loss, plain.evaluate, tx=tx, chunk_size=chunk_size)

    def update(key: Array, state: State, tasks: PyTree) -> tuple[State, Metrics]:
        batches = collect_from_all(collect_one, key, state.params, tasks)
        # These steps draw nothing: the key is of no account to them.
        state, seen = lax.scan(lambda state, _: descend.update(key, state, batches), state, length=outer_steps)
        # Once more, at the new parameters, and without clipping.
        changed = divide(partial(map_tasks, changes, chunk_size=chunk_size), state.params, batches)
        metrics = {**summary(batches), **jax.tree.map(jnp.mean, changed), "grad_norm": seen["grad_norm"][-1]}
        return state, metrics

    return descend._replace(update=update)


def _has_trpo(opt: PyTree) -> bool:
    """Whether the state of an optimiser has that of TRPO in it, alone or in a chain."""

    def is_trpo(node: PyTree) -> bool:
        return isinstance(node, TrustRegionState)

    return any(map(is_trpo, jax.tree.leaves(opt, is_leaf=is_trpo)))


def _policies_on_path(model: Model, rule: optax.GradientTransformation, params: PyTree, batches: Batch) -> Distribution:
    """What the policies before and after each step do in the states of their batches, every leaf [S + 1, T, E, ...]."""
    before = jax.tree.map(lambda leaf: leaf[:-1], batches)
    _, path = adapt(partial(likelihood_ratio_loss, model), params, before, rule)
    return jax.vmap(partial(action_distribution, model))(path, batches)


def clipped_loss(batch: Batch, policy: Distribution, clip: float) -> Array:
    """`maml_rl.surrogate_loss`, with nothing to gain from ratios beyond 1 + `clip` or 1 - `clip` (arXiv 1707.06347), []."""
    ratio = likelihood_ratio(batch, policy)
    gain = jnp.minimum(ratio * batch.advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * batch.advantages)
    return -masked_mean(gain, batch.trajectories.mask)
