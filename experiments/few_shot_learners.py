"""The methods of `few_shot.py`: a learner for each, built from the options."""

import functools

import jax
import jax.numpy as jnp
import optax
import runner
from few_shot_presets import Method, Options, image_shape

from mamljax import image_models, models
from mamljax.baselines.mann import mann
from mamljax.baselines.memory_module import memory_module
from mamljax.baselines.meta_lstm import meta_lstm
from mamljax.baselines.metric_learning import matching, prototypical, siamese
from mamljax.baselines.neural_statistician import neural_statistician
from mamljax.baselines.pretrain import pretrain
from mamljax.baselines.transfer import fine_tuning, nearest_neighbour
from mamljax.imaml import held_near_start, imaml
from mamljax.losses import accuracy, cross_entropy
from mamljax.maml import maml
from mamljax.maml_plus_plus import maml_plus_plus
from mamljax.proto_maml import proto_maml, with_prototypes
from mamljax.rules import Rule, all_but, as_rule, learned_by_step, learned_step_sizes
from mamljax.types import Examples, MetaLearner, Model, PyTree

NORM_PARAMETERS = {"shift": ("shift",), "scale_and_shift": ("shift", "scale")}  # of the outer loop alone


def set_precision(options: Options) -> None:
    """Let products be as precise as `--precision` says; those of bfloat16 are already, by the numbers that they multiply."""
    of_float32 = "tensorfloat32" if options.precision == "bfloat16" else options.precision
    jax.config.update("jax_default_matmul_precision", of_float32)


def build_network(options: Options, ways: int | None, *, further_channels: int = 0) -> Model:
    """Build the network; without ways, its features alone."""
    norm = functools.partial(
        image_models.BatchStatNorm,
        use_scale=options.norm == "scale_and_shift",
        reference=options.ways * options.shots if options.statistics == "inductive" else None,
    )
    modules = {
        "strided_conv": image_models.StridedConvNet(ways, options.filters, norm=norm),
        "pooled_conv": image_models.PooledConvNet(ways, options.filters, norm=norm),
        "fully_connected": image_models.FullyConnectedNet(ways, norm=norm),
    }
    *size, channels = image_shape(options)
    network = models.from_linen(modules[options.network], jnp.zeros((*size, channels + further_channels)))
    return models.mixed_precision(network) if options.precision == "bfloat16" else network


def network_and_rule(method: Method, options: Options, rule: Rule) -> tuple[Model, optax.GradientTransformation]:
    """Build the network as a method adapts it, and the rule of what it adapts.

    That is all parameters but those of normalisation; by implicit MAML these as well, held near their start.
    """
    features, network = (build_network(options, ways) for ways in (None, options.ways))
    # The names of the layers: without the output layer, and with it.
    below, all_layers = (jax.eval_shape(model.init, jax.random.key(0)).keys() for model in (features, network))
    frozen = NORM_PARAMETERS[options.norm]
    match method:
        case "anil":
            frozen = below
        case "boil":
            frozen = (*frozen, *(all_layers - below))
        case "context":
            channels, size = options.context_channels, image_shape(options)[1:3]
            network = build_network(options, options.ways, further_channels=channels)
            return models.with_context(network, (*size, channels)), all_but("network", rule)
        case "meta_sgd":
            network, rule = learned_step_sizes(network, rule)
        case "maml++":
            return learned_by_step(network, rule, options.inner_steps, per_step=frozen)
        case "imaml":
            return network, optax.chain(held_near_start(options.strength), as_rule(rule))
        case "proto_maml":
            network = models.with_linear_head(features, jnp.zeros(image_shape(options)), options.ways)
        case "meta_lstm":
            network, rule = meta_lstm(network, rule)
    return network, all_but(tuple(frozen), rule)


def start_of(method: Method, options: Options, params: PyTree, support: Examples) -> PyTree:
    """The parameters of `network_and_rule` from which a method adapts to a task, for those that it has learned."""
    if method != "proto_maml":
        return params
    return with_prototypes(build_network(options, None), params, support, options.ways)


def outer_optimiser(options: Options) -> optax.GradientTransformation:
    """Adam, whose step size falls if it is to, after clipping."""
    lr = options.meta_lr
    adam = optax.adam(lr if options.annealing is None else optax.cosine_decay_schedule(lr, options.annealing, alpha=0.01))
    return adam if options.clip is None else optax.chain(optax.clip(options.clip), adam)


def build_learner(method: Method, options: Options, num_classes: int, *, eval_steps: int, rule: Rule) -> MetaLearner:
    """Build the learner of a method, which adapts by the rule, if at all.

    Args:
        method: which.
        options: the network and how it is to learn.
        num_classes: classes for training; the transfer methods alone tell them apart.
        eval_steps: adaptation steps in evaluation.
        rule: the step size of adaptation, or an Optax transformation.
    """
    shared = {
        "tx": outer_optimiser(options),
        "metric_fns": {"accuracy": accuracy},
        "chunk_size": runner.tasks_at_a_time(options),
    }
    network, adaptation_rule = network_and_rule(method, options, rule)
    adaptation = {"rule": adaptation_rule, "eval_steps": eval_steps}
    differentiation = "first_order" if method in ("fomaml", "meta_lstm") else options.differentiation
    learning = adaptation | {"inner_steps": options.inner_steps, "differentiation": differentiation}
    classifier = {"num_classes": num_classes, "ways": options.ways}
    features, image = build_network(options, None), jnp.zeros(image_shape(options))
    match method:
        case "maml" | "fomaml" | "anil" | "boil" | "context" | "meta_sgd" | "meta_lstm":
            return maml(network, cross_entropy, **learning, **shared)
        case "maml++":
            multi_step_updates = options.multi_step_updates
            return maml_plus_plus(network, cross_entropy, multi_step_updates=multi_step_updates, **learning, **shared)
        case "imaml":
            sizes = {"inner_steps": options.inner_steps, "strength": options.strength, "cg_steps": options.cg_steps}
            # The rule itself: `imaml` adds what holds parameters near their start, as `network_and_rule` does for `adapt.py`.
            how = {"rule": rule, "damping": options.damping, "eval_steps": eval_steps}
            return imaml(network, cross_entropy, **how, **sizes, **shared)
        case "proto_maml":
            return proto_maml(features, image, cross_entropy, ways=options.ways, **learning, **shared)
        case "pretrained" | "random":
            return pretrain(network, cross_entropy, **adaptation, **shared)
        case "fine_tuning":
            return fine_tuning(features, image, cross_entropy, **classifier, **adaptation, **shared)
        case "nearest_neighbour":
            return nearest_neighbour(features, image, cross_entropy, **classifier, **shared)
        case "matching":
            return matching(features, cross_entropy, ways=options.ways, **shared)
        case "mann":
            return mann(features, image, cross_entropy, ways=options.ways, **shared)
        case "memory_module":
            return memory_module(features, cross_entropy, ways=options.ways, **shared)
        case "neural_statistician":
            return neural_statistician(features, image, cross_entropy, ways=options.ways, **shared)
        case "siamese":
            return siamese(features, image, cross_entropy, ways=options.ways, **shared)
        case "prototypical":
            return prototypical(features, cross_entropy, ways=options.ways, **shared)
