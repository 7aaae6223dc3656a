"""Inner rules: how an adaptation step follows the gradient. Any Optax transformation is one."""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.core import Tracer

from mamljax.checks import check_count, check_params, check_positive, is_number
from mamljax.types import Model, PyTree


class RuleLearningModel(Model):
    """A model that has the parameters of a learned inner rule among its own; for use with the rule that came with it."""


class StepwiseRule(optax.GradientTransformation):
    """The rule of `learned_by_step`, which needs all of its model's parameters together."""


Rule: TypeAlias = float | Array | optax.GradientTransformation  # a step size stands for gradient descent
PROBED_STEPS = 8  # rectified Adam changes its rule within the first few


def as_rule(rule: Rule) -> optax.GradientTransformation:
    """Make an inner rule of a step size; an Optax transformation stays as it is, and its derivatives are not looked at."""
    if is_number(rule):
        check_step_size(rule)
        return optax.sgd(rule)
    if not isinstance(rule, optax.GradientTransformation):
        raise ValueError(
            f"rule must be a step size or an Optax transformation, got {rule!r}. For a schedule pass optax.sgd(schedule); of "
            "optax.MultiSteps pass gradient_transformation()."
        )
    return rule


def checked_rule(rule: Rule, params: PyTree, *, differentiable: bool) -> optax.GradientTransformation:
    """Make an inner rule as `as_rule` does, and check that it works on these parameters and has finite meta-gradients.

    Args:
        rule: a step size, which stands for gradient descent, or any Optax transformation. Within
            `jit` or `vmap` nothing can be known of its numbers: only that it works is then checked.
        params: arrays, or their shapes, of the parameters to adapt.
        differentiable: whether meta-gradients will pass through the rule.

    Returns:
        An Optax transformation.

    Raises:
        ValueError: the step size is not positive and finite; `params` holds other than floating-point leaves; the rule
            needs more than gradients and parameters, or other parameters; its derivative is not finite, in one of its first
            steps, where entries or whole arrays of the gradient are zero, as dead ReLUs have it (Adam with `eps_root=0`). A
            gradient that is zero as a whole is not tried.
    """
    check_params(params)
    if is_number(rule):
        return as_rule(rule)
    _check_updates(as_rule(rule), params, differentiable=differentiable)
    return rule


def _check_updates(rule: optax.GradientTransformation, params: PyTree, *, differentiable: bool) -> None:
    """Take a few steps with gradients as they occur; raise `ValueError` if the rule fails, or its derivative is not finite."""

    # A scalar, so that its gradient has the derivatives of all updates of the first few steps.
    def total_update(gradient: PyTree, params: PyTree) -> Array:
        def step(opt: PyTree, _: None) -> tuple[PyTree, Array]:
            updates, opt = rule.update(gradient, opt, params)
            return opt, optax.tree.sum(updates)

        return lax.scan(step, rule.init(params), length=PROBED_STEPS)[1].sum()

    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), params)
    try:
        # That the rule works at all shows from shapes, without computing anything.
        if not differentiable:
            jax.eval_shape(total_update, ones, ones)
            return
        slope = jax.jit(jax.grad(total_update))
        with jax.debug_nans(False):  # what is wrong is said below
            derivatives = jax.tree.leaves([slope(gradient, ones) for gradient in _with_dead_units(ones)])
    except (AttributeError, TypeError) as error:
        raise ValueError(f"the inner rule failed when given gradients and parameters, which is all it gets: {error}") from error
    except LookupError as error:
        raise ValueError(
            f"the inner rule looks for {error} in the parameters, and there is none. A learned rule goes with the model that "
            "was returned with it: pass both."
        ) from error
    # Of a traced step size nothing can be known, nor of any rule while JAX traces what calls this.
    if not all(isinstance(leaf, Tracer) or np.isfinite(leaf).all() for leaf in derivatives):
        raise ValueError(
            "the inner rule has no finite derivative where entries or whole arrays of the gradient are zero, so meta-gradients "
            "would be NaN. Give Adam and its kin eps_root=1e-8 (rectified Adam and rules that divide by norms stay "
            "without one all the same); or take another rule, or first_order where there is one."
        )


def rule_for(model: Model, rule: Rule, *, differentiable: bool) -> optax.GradientTransformation:
    """Make an inner rule for the parameters of a model, as `checked_rule` does.

    Raises:
        ValueError: as `checked_rule`; or `model` is not a `Model`, or learns its own rule and is given a step size instead.
    """
    if not isinstance(model, Model):
        raise ValueError(f"model must be a Model, got {type(model).__name__}. Make one by models.from_linen or from_nnx.")
    if isinstance(model, RuleLearningModel) and is_number(rule):
        raise ValueError(
            f"the model learns its own inner rule, and would learn nothing of it with rule={rule}. Pass that rule."
        )
    return checked_rule(rule, jax.eval_shape(model.init, jax.random.key(0)), differentiable=differentiable)


def check_step_size(inner_lr: float | Array) -> None:
    """Raise `ValueError` unless the step size is a positive and finite number, or a traced one."""
    check_positive("the inner step size", inner_lr, "The paper uses 0.01 to 0.4.")


def _with_dead_units(ones: PyTree) -> list[PyTree]:
    """Gradients with the zeros that dead ReLUs leave: a first of several entries; every other array, and then the others."""
    leaves, structure = jax.tree.flatten(ones)
    first_entries = [_with_dead_unit(leaf) for leaf in leaves]
    whole = [[leaf * ((index + parity) % 2) for index, leaf in enumerate(leaves)] for parity in (0, 1)]
    # Not all at once: the norm of a gradient of zero has no derivative, which is no reason to refuse a rule that clips it.
    return [jax.tree.unflatten(structure, gradient) for gradient in (first_entries, *(whole if len(leaves) > 1 else ()))]


def _with_dead_unit(leaf: np.ndarray) -> np.ndarray:
    leaf = leaf.copy()
    if leaf.size > 1:
        leaf.flat[0] = 0
    return leaf


def learned_step_sizes(model: Model, inner_lr: float) -> tuple[Model, optax.GradientTransformation]:
    r"""Let `maml` learn a step size for every single parameter together with the initialisation (Meta-SGD).

    $\theta' \leftarrow \theta' - \alpha \circ \nabla L_i^{support}(\theta')$ with $\alpha$ shaped like $\theta$ and
    of either sign (Li et al. 2017, arXiv 1707.09835, equation 3).

    Args:
        model: the network.
        inner_lr: the value at which all step sizes begin; positive and finite.

    Returns:
        A model whose params are a dict of "theta" and "alpha", and the rule that goes with it; give both to `maml`.

    Raises:
        ValueError: the step size is not positive and finite.
    """
    check_step_size(inner_lr)

    def init(key: Array) -> PyTree:
        theta = model.init(key)
        return {"theta": theta, "alpha": jax.tree.map(lambda leaf: jnp.full_like(leaf, inner_lr), theta)}

    def step(gradient: PyTree, params: PyTree) -> PyTree:
        # The step sizes stay as they are here: they are for the outer loop alone to learn.
        theta = jax.tree.map(lambda alpha, leaf: -alpha * leaf, params["alpha"], gradient["theta"])
        return {"theta": theta, "alpha": jax.tree.map(jnp.zeros_like, params["alpha"])}

    return RuleLearningModel(init, lambda params, x: model.apply(params["theta"], x)), optax.stateless(step)


def learned_by_step(
    model: Model, inner_lr: float, inner_steps: int, per_step: str | Sequence[str] = ()
) -> tuple[Model, optax.GradientTransformation]:
    r"""Let each adaptation step have learned step sizes of its own, and parameters such as those of normalisation (MAML++).

    $\theta_{i+1} = \theta_i - \alpha_{i,l} \nabla L_i^{support}(\theta_i)$ with a number $\alpha_{i,l}$ for each step i and
    each array l of parameters (Antoniou et al. 2019, arXiv 1810.09502, section 4).

    Args:
        model: the network.
        inner_lr: the value at which all step sizes begin; positive and finite.
        inner_steps: S, steps that have step sizes of their own; further ones in evaluation go on with the last.
        per_step: names on the paths of parameters, as for `all_but`: of these the network has separate values before the first
            and after every step. They are not adapted; the outer loop alone learns them.

    Returns:
        A model whose params are a dict of "theta", the network's, those named by `per_step` with a leading axis [S + 1]; of
        "step_sizes" with their structure, each [S]; and of "step", which counts the steps taken. And the rule that goes with
        it; give both to `maml`, or to `maml_plus_plus`.

    Raises:
        ValueError: the step size is not positive and finite, a count below 1, a name that no parameter and no layer has.

    Differs from the authors' code, which judges the network after step i with the normalisation of the network before it.
    """
    check_step_size(inner_lr)
    check_count("inner_steps", inner_steps)
    names = {per_step} if isinstance(per_step, str) else {*per_step}
    by_step = _mask_of(names, jax.eval_shape(model.init, jax.random.key(0)))

    def init(key: Array) -> PyTree:
        theta = jax.tree.map(lambda leaf, own: jnp.stack([leaf] * (inner_steps + 1)) if own else leaf, model.init(key), by_step)
        step_sizes = jax.tree.map(lambda leaf: jnp.full(inner_steps, inner_lr, leaf.dtype), theta)
        # A parameter, and no state of the rule: the network needs it too, to choose what is its own after each step.
        return {"theta": theta, "step_sizes": step_sizes, "step": jnp.zeros(())}

    def apply(params: PyTree, x: Array) -> Array:
        step = _step_index(params["step"], inner_steps + 1)
        return model.apply(jax.tree.map(lambda leaf, own: leaf[step] if own else leaf, params["theta"], by_step), x)

    def advance(gradient: PyTree, params: PyTree) -> PyTree:
        step = _step_index(params["step"], inner_steps)

        def update(slope: Array, sizes: Array, own: bool) -> Array:
            return jnp.zeros_like(slope) if own else -sizes[step] * slope

        theta = jax.tree.map(update, gradient["theta"], params["step_sizes"], by_step)
        step_sizes = jax.tree.map(jnp.zeros_like, params["step_sizes"])
        return {"theta": theta, "step_sizes": step_sizes, "step": jnp.ones_like(params["step"])}

    return RuleLearningModel(init, apply), StepwiseRule(*optax.stateless(advance))


def _step_index(step: Array, length: int) -> Array:
    """The number of a step as an index, at most the last. As a parameter it is floating-point: noise may move it a little."""
    return jnp.minimum(jnp.round(step).astype(int), length - 1)


def all_but(frozen: str | Sequence[str], rule: Rule) -> optax.GradientTransformation:
    """Adapt all parameters but the named ones, or those of the named layers, which the outer loop alone learns.

    Args:
        frozen: names on the paths of parameters: ("shift", "scale") for those of every `image_models.BatchStatNorm`; all layers
            but the last for ANIL (arXiv 1909.09157), the last alone for BOIL (arXiv 2008.08882). Several names joined by "/",
            as in "encoder/Dense_0", are of what lies so within another.
        rule: what the others follow, a step size or an Optax transformation, but not that of `learned_by_step`, nor a chain
            that has it.

    Raises:
        ValueError: the step size is not positive and finite, or the rule is that of `learned_by_step`; where it is used, a name
            that no parameter and no layer has, or names that leave nothing to adapt.

    >>> params = {"Dense_0": {"kernel": jnp.ones(2)}, "Norm_0": {"shift": jnp.ones(2)}}
    >>> rule = all_but(["shift"], 0.5)
    >>> rule.update(params, rule.init(params), params)[0]["Norm_0"]["shift"].tolist()
    [0.0, 0.0]
    """
    if isinstance(rule, StepwiseRule):
        raise ValueError(
            "all_but cannot divide the rule of learned_by_step. Name what is not to be adapted there, as per_step."
        )
    frozen = {frozen} if isinstance(frozen, str) else {*frozen}

    def labels(params: PyTree) -> PyTree:
        is_frozen = _mask_of(frozen, params)
        if frozen and all(jax.tree.leaves(is_frozen)):
            raise ValueError(f"{sorted(frozen)} are all the parameters there are. Leave some to adapt.")
        return jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "adapted", is_frozen)

    return optax.partition({"frozen": optax.set_to_zero(), "adapted": as_rule(rule)}, labels)


def _mask_of(names: set[str], params: PyTree) -> PyTree:
    """Which parameters have one of these names on their paths; raises `ValueError` for a name that none has."""

    def parts(path: tuple) -> list[str]:
        return [jax.tree_util.keystr((key,), simple=True) for key in path]

    def on_path(path: tuple) -> set[str]:
        """The parts of a path, and all joined ones that follow one another."""
        names = parts(path)
        return {"/".join(names[first:last]) for last in range(len(names) + 1) for first in range(last)}

    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    if missing := sorted(names - set().union(*map(on_path, paths))):
        raise ValueError(f"no parameter and no layer is called {missing}. There are {sorted(set().union(*map(parts, paths)))}.")
    return jax.tree.map_with_path(lambda path, _: bool(on_path(path) & names), params)
