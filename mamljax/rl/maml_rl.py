"""MAML for reinforcement learning (Finn, Abbeel, Levine 2017, arXiv 1703.03400), algorithm 3."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from mamljax.checks import check_choice, check_count, check_optimiser
from mamljax.devices import divide
from mamljax.distributions import Distribution
from mamljax.inner import adapt
from mamljax.rl.advantages import masked_mean
from mamljax.rl.collect import Batch, Collector
from mamljax.rl.rollout import distribution_of
from mamljax.rl.trpo import TrustRegionState
from mamljax.rules import Rule, rule_for
from mamljax.types import MetaLearner, Metrics, Model, PyTree, State

OuterDifferentiation = Literal["reverse", "first_order"]
InnerObjective = Literal["log_prob", "likelihood_ratio"]


def maml_rl(
    collector: Collector,
    *,
    rule: Rule,
    inner_steps: int,
    eval_steps: int,
    tx: optax.GradientTransformation,
    inner_objective: InnerObjective = "log_prob",
    multi_step_loss: bool = False,
    differentiation: OuterDifferentiation = "reverse",
    chunk_size: int | None = None,
) -> MetaLearner:
    r"""Learn a policy that a few policy-gradient steps adapt to a task.

    An inner step is one of REINFORCE on fresh trajectories, $\theta' \leftarrow \theta + \alpha \nabla_\theta \frac1n \sum_t
    A_t \log \pi_\theta(a_t | s_t)$. The meta-loss is the surrogate $-\frac1n \sum_t A_t \pi_{\theta'}(a_t | s_t) / \pi_{old}
    (a_t | s_t)$ on trajectories of the adapted policy, mean over tasks. All trajectories of a meta-update are drawn once;
    `tx` may then evaluate the surrogate, and the divergence from the policies that acted, for as many parameters as it likes.

    With `inner_steps=0` it is the *pretrained* baseline, one policy for all tasks that is fine-tuned in evaluation; with
    `eval_steps=0` as well and an environment `wrappers.with_task_observed` the *oracle*; without a single update *random
    initialisation*.

    Args:
        collector: the policy and how it gathers trajectories; from `collect.collect_with`.
        rule: the inner step size alpha, or any Optax transformation: `optax.sgd(schedule)` gives each step its own.
        inner_steps: S, adaptation steps in training; 0 for none.
        eval_steps: adaptation steps in evaluation.
        tx: the outer optimiser, `trpo.trpo(0.01)` in the paper; it gets the extra arguments described there. With any other,
            such as Adam, this is vanilla policy gradient. (Optax's line searches refuse these arguments.)
        inner_objective: what an adaptation step is the gradient of, when the meta-gradient goes through it. "log_prob", above,
            as in the authors' code: the actions before the step count as given. "likelihood_ratio", $\frac1n \sum_t A_t
            \pi_\theta(a_t | s_t) / \pi_{old}(a_t | s_t)$, whose gradient is the same where the policy is the one that acted:
            its derivative counts that another policy takes these actions more or less often, though with their advantages as
            constants (the low-variance curvature of Rothfuss et al. 2019, arXiv 1810.06784). In first order the meta-gradient
            is the same with either, though TRPO's line search still adapts by the one that is chosen.
        multi_step_loss: whether the policy is judged after every one of the S steps, as Antoniou et al. 2019 (MAML++) do in
            classification, and not after the last alone. What is maximised is then the sum of the returns: each step's
            advantages, standardised for themselves, count by the standard deviation that they had.
        differentiation: "reverse" (exact) or "first_order"; see `inner.adapt`. Not "mixed", which has no forward mode: TRPO
            multiplies by the Jacobian of adaptation and by its transpose.
        chunk_size: tasks differentiated at a time; by default all of them. On a CPU 1 is fastest. The result is the same. The
            derivatives that are kept for the products are of all tasks in any case: about two numbers for each unit of the
            policy and each step in the environment.

    Returns:
        A meta-learner over the tasks of an environment. `update` reports the mean undiscounted `return_before` and
        `return_after` adaptation, `surrogate` (after the update; 0 before it, the lower the better), `kl` (in nats, made by
        the update), `grad_norm`, and the share of `unstable` trajectories. `evaluate` gives the mean `return`,
        `return_of_first`, of the first trajectory of each row, and `unstable`; [eval_steps + 1], each on fresh trajectories.
        Returns are of all trajectories, the authors' measure (where they end early, more of them are short), but for unstable
        ones: a task with no others has NaN, and does not count in training.

    Raises:
        ValueError: a negative count, a step size that is not positive and finite, a rule without finite meta-gradients, an
            unknown `differentiation` or `inner_objective`.
    """
    check_count("inner_steps", inner_steps, minimum=0)
    check_count("eval_steps", eval_steps, minimum=0)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    check_choice("differentiation", differentiation, OuterDifferentiation)
    check_choice("inner_objective", inner_objective, InnerObjective)
    check_optimiser(tx)
    policy = collector.policy
    rule = rule_for(policy, rule, differentiable=inner_steps > 0 and differentiation != "first_order")
    tx = optax.with_extra_args_support(tx)
    # The first step after which the outer loss sees the policy; without adaptation it sees the policy as it is, number 0.
    first_step = min(1, inner_steps) if multi_step_loss else inner_steps
    inner_loss = {"log_prob": reinforce_loss, "likelihood_ratio": likelihood_ratio_loss}[inner_objective]

    collect_one = partial(collect_and_adapt, collector, rule, inner_steps)
    policies = partial(_adapted_policies, policy, partial(inner_loss, policy), rule, first_step, differentiation)
    policies_of_share = partial(map_tasks, policies, chunk_size=chunk_size)

    def update(key: Array, state: State, tasks: PyTree) -> tuple[State, Metrics]:
        batches = collect_from_all(collect_one, key, state.params, tasks)
        outer = jax.vmap(partial(outer_batches, first_step))(batches)
        extra = _outer_arguments(partial(divide, policies_of_share, tasks=batches), outer, state.params)
        updates, opt = tx.update(extra["grad"], state.opt, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        if isinstance(opt, TrustRegionState):  # its line search has just evaluated both
            surrogate, kl = extra["value"] + opt.change, opt.kl
        else:
            surrogate, kl = extra["value_and_kl_fn"](params)
        metrics = {"surrogate": surrogate, "kl": kl, "grad_norm": optax.tree.norm(extra["grad"])}
        return state._replace(params=params, opt=opt), {**summary(batches), **metrics}

    def init(key: Array) -> State:
        params = policy.init(key)
        return State(params, tx.init(params))

    def evaluate(key: Array, state: State, task: PyTree) -> Metrics:
        batches = collect_and_adapt(collector, rule, eval_steps, key, state.params, task)
        of_first = jnp.nanmean(batches.first_returns, axis=1)
        return {"return": batches.mean_return, "return_of_first": of_first, "unstable": jax.vmap(_unstable)(batches)}

    return MetaLearner(init, update, evaluate)


def _outer_arguments(policies_of: Callable[[PyTree], Distribution], batches: Batch, params: PyTree) -> dict[str, PyTree]:
    """What the outer optimiser is given, by name: the surrogate at `params`, its gradient, and what `trpo` asks for.

    The gradient and all products of the Hessian are of one linearisation, of what the policies do as a function of `params`.

    Args:
        policies_of: params -> what the adapted policies do in all states of `batches`, every leaf [B, J, T, E, ...].
        batches: those of the outer loss, from `outer_batches`, [B, J, ...].
        params: the meta-parameters.
    """

    def loss_of(policies: Distribution) -> Array:
        return jax.vmap(jax.vmap(surrogate_loss))(batches, policies).mean()

    def kl_of(policies: Distribution) -> Array:
        return jax.vmap(jax.vmap(mean_kl))(batches, policies).mean()

    def value_and_kl_fn(params: PyTree) -> tuple[Array, Array]:
        policies = policies_of(params)
        return loss_of(policies), kl_of(policies)

    # Linearised once: its transpose gives the gradient, and both together every product of conjugate gradients.
    policies, push = jax.linearize(policies_of, params)
    pull = jax.linear_transpose(push, params)
    loss, slope = jax.value_and_grad(loss_of)(policies)

    def kl_product(vector: PyTree) -> PyTree:
        """Multiply by the divergence's Hessian, which is J^T (d^2 KL) J, since its gradient vanishes here."""
        return pull(jax.jvp(jax.grad(kl_of), (policies,), (push(vector),))[1])[0]

    return {
        "value": loss,
        "grad": pull(slope)[0],
        "value_fn": lambda params: value_and_kl_fn(params)[0],
        "value_and_kl_fn": value_and_kl_fn,
        "kl_product": kl_product,
    }


def _adapted_policies(
    model: Model,
    inner_loss: Callable[[PyTree, Batch], Array],
    rule: optax.GradientTransformation,
    first_step: int,
    differentiation: OuterDifferentiation,
    params: PyTree,
    batches: Batch,
) -> Distribution:
    """What the policies do that are judged, each in the states of its own batch, every leaf [J, T, E, ...]."""
    # Of S + 1 batches, each of the policy after as many steps, the last is only judged.
    before = jax.tree.map(lambda leaf: leaf[:-1], batches)
    _, path = adapt(inner_loss, params, before, rule, differentiation=differentiation)
    adapted, after = jax.tree.map(lambda leaf: leaf[first_step:], (path, batches))
    return jax.vmap(partial(action_distribution, model))(adapted, after)


def outer_batches(first_step: int, batches: Batch) -> Batch:
    """The batches of the outer loss [J, ...], those after `first_step` steps and every further one, on one scale."""
    batches = jax.tree.map(lambda leaf: leaf[first_step:], batches)
    # Standardised advantages times their own deviation are the returns' scale again; with one batch the weight is 1.
    weights = (batches.advantage_std + 1e-8) / (batches.advantage_std.mean() + 1e-8)
    return batches._replace(advantages=batches.advantages * weights[:, None, None])


def map_tasks(fn: Callable[[PyTree, Batch], PyTree], params: PyTree, batches: Batch, *, chunk_size: int | None) -> PyTree:
    """Apply `fn(params, batch)` to the batches of each task [B, ...], so many tasks at a time, by default all."""
    # One alone, not a batch of one, whose products take longer.
    batch_size = None if chunk_size == 1 else chunk_size or len(batches.advantage_std)
    return lax.map(partial(fn, params), batches, batch_size=batch_size)


def collect_from_all(collect_one: Callable[[Array, PyTree, PyTree], Batch], key: Array, params: PyTree, tasks: PyTree) -> Batch:
    """Apply `collect_one(key, params, task)` to each of a meta-batch of tasks [B, ...], divided among the devices."""

    def of_share(params: PyTree, keys_and_tasks: tuple[Array, PyTree]) -> Batch:
        keys, tasks = keys_and_tasks
        return jax.vmap(collect_one, (0, None, 0))(keys, params, tasks)

    return divide(of_share, params, (jax.random.split(key, len(jax.tree.leaves(tasks)[0])), tasks))


def collect_and_adapt(
    collector: Collector, rule: optax.GradientTransformation, num_steps: int, key: Array, params: PyTree, task: PyTree
) -> Batch:
    """Adapt a policy to one task as `inner.adapt` does, each step on fresh trajectories of the policy as it then is.

    Returns:
        The batch of each step, and last that of the adapted policy: [num_steps + 1, ...].
    """

    def learn(carry: tuple, batch: Batch) -> tuple:
        params, opt = carry
        # Whatever the `inner_objective`: at the policy that acted both have this gradient.
        gradient = jax.grad(partial(reinforce_loss, collector.policy))(params, batch)
        updates, opt = rule.update(gradient, opt, params)
        return optax.apply_updates(params, updates), opt

    def step(carry: tuple, number_and_key: tuple[Array, Array]) -> tuple[tuple, Batch]:
        number, key = number_and_key
        batch = collector.collect(key, carry[0], task)
        # In the same loop as the last batch, of which nothing is learned: a second rollout would take as long to compile again.
        return lax.cond(number < num_steps, learn, lambda carry, batch: carry, carry, batch), batch

    numbers_and_keys = jnp.arange(num_steps + 1), jax.random.split(key, num_steps + 1)
    return lax.scan(step, (params, rule.init(params)), numbers_and_keys)[1]


def reinforce_loss(model: Model, params: PyTree, batch: Batch) -> Array:
    r"""The loss whose gradient is that of REINFORCE: $-\frac1n \sum_t A_t \log \pi_\theta(a_t | s_t)$, []."""
    log_prob = action_distribution(model, params, batch).log_prob(batch.trajectories.actions)
    return -masked_mean(log_prob * batch.advantages, batch.trajectories.mask)


def likelihood_ratio_loss(model: Model, params: PyTree, batch: Batch) -> Array:
    """The `surrogate_loss` of these parameters, []; where they are those that acted, its gradient is that of REINFORCE."""
    return surrogate_loss(batch, action_distribution(model, params, batch))


def surrogate_loss(batch: Batch, policy: Distribution) -> Array:
    r"""The loss $-\frac1n \sum_t A_t \pi(a_t | s_t) / \pi_{old}(a_t | s_t)$ of a policy in the states of a batch, []."""
    return -masked_mean(likelihood_ratio(batch, policy) * batch.advantages, batch.trajectories.mask)


def likelihood_ratio(batch: Batch, policy: Distribution) -> Array:
    r"""The ratio $\pi(a_t | s_t) / \pi_{old}(a_t | s_t)$ for the actions of a batch, [T, E].

    It is clipped at $e^{20}$ with no gradient beyond, so that a factor of zero cannot make it NaN.
    """
    acted = batch.trajectories
    log_ratio = policy.log_prob(acted.actions) - acted.policy.log_prob(acted.actions)
    return jnp.exp(jnp.minimum(log_ratio, 20.0))


def mean_kl(batch: Batch, policy: Distribution) -> Array:
    """The mean Kullback-Leibler divergence from the policy that acted to this one, over the states of a batch, in nats: []."""
    acted = batch.trajectories
    return masked_mean(acted.policy.kl_divergence(policy), acted.mask)  # type: ignore[arg-type]  # both are of one kind


def action_distribution(model: Model, params: PyTree, batch: Batch) -> Distribution:
    """What a policy would do in all states of a batch, every leaf [T, E, ...]."""
    observations = batch.trajectories.observations
    # One axis of states: gradients of products that sum over two are slow on a CPU.
    flat = distribution_of(model, params, observations.reshape(-1, observations.shape[-1]))
    return jax.tree.map(lambda leaf: leaf.reshape(*observations.shape[:-1], *leaf.shape[1:]), flat)


def _unstable(batches: Batch) -> Array:
    """The share of trajectories that ended because a state was not finite, []."""
    return batches.trajectories.unstable.sum() / batches.trajectories.ends.sum()


def summary(batches: Batch) -> Metrics:
    """Mean returns before and after adaptation, and the share of unstable trajectories, over a meta-batch [B, S + 1, ...]."""
    # Of tasks that have a return: a training does not end because every trajectory of one of them was unstable.
    before, after = jnp.nanmean(batches.mean_return[:, 0]), jnp.nanmean(batches.mean_return[:, -1])
    return {"return_before": before, "return_after": after, "unstable": _unstable(batches)}
