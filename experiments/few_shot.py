"""Few-shot image classification: table 1 of Finn et al. 2017, a preset for each cell. `python experiments/few_shot.py`

Each method learns from episodes of N classes with K labelled images each, and is judged on episodes of classes that it
never saw, after 0 to 10 steps of gradient descent on their labelled images.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax
import runner
from few_shot_data import Data, load
from few_shot_presets import (
    MAML,
    PRESETS,
    PUBLISHED,
    PUBLISHED_STEPS,
    SOURCE,
    SOURCES,
    TRANSFER,
    Method,
    Options,
    cell,
    check_methods,
    eval_tasks,
)
from jax import Array
from jax.tree_util import Partial

from mamljax import image_models, models, report
from mamljax.baselines.meta_lstm import meta_lstm
from mamljax.baselines.metric_learning import matching, prototypical, siamese
from mamljax.baselines.pretrain import pretrain
from mamljax.baselines.transfer import fine_tuning, nearest_neighbour
from mamljax.checkpoint import CheckpointError
from mamljax.evaluate import evaluate, mean_and_ci95
from mamljax.losses import accuracy, cross_entropy
from mamljax.maml import fine_tune, maml
from mamljax.maml_plus_plus import maml_plus_plus
from mamljax.record import read_metrics
from mamljax.rules import Rule, all_but, learned_by_step, learned_step_sizes
from mamljax.train import read_best
from mamljax.types import MetaLearner, Model, PyTree, SampleFn, State, Task, as_argument

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NORM_PARAMETERS = {"shift": ("shift",), "scale_and_shift": ("shift", "scale")}  # of the outer loop alone
VALIDATION_SEED, TEST_SEED = 1_000_001, 1_000_002
TUNED = ("pretrained", "random", "fine_tuning")  # their step size of fine-tuning is tuned


def execute(options: Options, run: runner.Run) -> None:
    """Train every method, evaluate all on the same test episodes, draw the figures."""
    set_precision(options)
    check_methods(options)
    data, origin = load(options), origin_of_features(options)
    run.config["bank"] = data.checksum
    rows, trained = [], {}
    for method in options.method:
        states, num_updates = train(method, options, data, run)
        if num_updates == 0 and method != "random":  # time ran out before
            continue
        with run.sharing():
            lr = tuned_lr(method, options, data, states) if method in TUNED else options.inner_lr
            learner = build_learner(method, options, data, eval_steps=options.eval_steps, rule=lr)
            sizes = {"num_tasks": eval_tasks(options), "batch_size": runner.tasks_at_a_time(options, at_least=40)}
            scores = accuracies(learner, states, data.test, seed=TEST_SEED, **sizes)
        mean, ci95 = mean_and_ci95(100 * scores)
        published_step = PUBLISHED_STEPS.get(method, options.test_steps) if len(mean) > 1 else 0
        published = PUBLISHED.get((options.dataset, options.network, options.ways, options.shots, method))
        rows += report.rows_over_steps(
            mean,
            ci95,
            method=method,
            setting=cell(options),
            protocol=options.protocol + ", inductive" * (options.statistics == "inductive"),
            metric="accuracy in %",
            tasks=eval_tasks(options),
            published={} if published is None else {published_step: published},
            source=SOURCES.get(method, SOURCE),
            note=", ".join(origin + [f"step size {lr:g}"] * (method in TUNED)),
            **run.effort(method, best=True) | {"meta_updates": num_updates},
        )
        trained[method] = jax.tree.map(lambda leaf: leaf[0], states), lr
    results = run.write(rows)
    report.learning_curves(results, options.out / "learning_curves.png")
    report.training_curves({method: run.directory(method) for method in run.results}, options.out / "training_curves.png")
    for method in trained.keys() & {*MAML}:
        draw_episodes(method, options, data, *trained[method], options.out / f"episodes_{method}.png")


def set_precision(options: Options) -> None:
    """Let products be as precise as `--precision` says; those of bfloat16 are already, by the numbers that they multiply."""
    of_float32 = "tensorfloat32" if options.precision == "bfloat16" else options.precision
    jax.config.update("jax_default_matmul_precision", of_float32)


def build_network(options: Options, image: Array, ways: int | None) -> Model:
    """Build the network for images like [1, H, W, C]; without ways, its features alone."""
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
    network = models.from_linen(modules[options.network], image)
    return models.mixed_precision(network) if options.precision == "bfloat16" else network


def adapted_by(method: Method, options: Options, image: Array, rule: Rule) -> tuple[Model, optax.GradientTransformation]:
    """Build the network as a method adapts it, and what it adapts by the rule: all parameters but those of normalisation."""
    features, network = (build_network(options, image, ways) for ways in (None, options.ways))
    below, all_layers = (jax.eval_shape(model.init, jax.random.key(0)).keys() for model in (features, network))
    frozen = NORM_PARAMETERS[options.norm]
    match method:
        case "anil":
            frozen = below
        case "boil":
            frozen = (*frozen, *(all_layers - below))
        case "meta_sgd":
            network, rule = learned_step_sizes(network, rule)
        case "maml++":
            return learned_by_step(network, rule, options.inner_steps, per_step=frozen)
        case "meta_lstm":
            network, rule = meta_lstm(network, rule)
    return network, all_but(tuple(frozen), rule)


def outer_optimiser(options: Options) -> optax.GradientTransformation:
    """Adam, whose step size falls if it is to, after clipping."""
    lr = options.meta_lr
    adam = optax.adam(lr if options.annealing is None else optax.cosine_decay_schedule(lr, options.annealing, alpha=0.01))
    return adam if options.clip is None else optax.chain(optax.clip(options.clip), adam)


def build_learner(method: Method, options: Options, data: Data, *, eval_steps: int, rule: Rule) -> MetaLearner:
    """Build the learner of a method, which adapts by the rule, if at all."""
    shared = {
        "tx": outer_optimiser(options),
        "metric_fns": {"accuracy": accuracy},
        "chunk_size": runner.tasks_at_a_time(options),
    }
    network, adaptation_rule = adapted_by(method, options, data.image, rule)
    adaptation = {"rule": adaptation_rule, "eval_steps": eval_steps}
    differentiation = "first_order" if method in ("fomaml", "meta_lstm") else options.differentiation
    learning = adaptation | {"inner_steps": options.inner_steps, "differentiation": differentiation}
    classifier = {"num_classes": data.num_classes, "ways": options.ways}
    features = build_network(options, data.image, None)
    match method:
        case "maml" | "fomaml" | "anil" | "boil" | "meta_sgd" | "meta_lstm":
            return maml(network, cross_entropy, **learning, **shared)
        case "maml++":
            multi_step_updates = options.multi_step_updates
            return maml_plus_plus(network, cross_entropy, multi_step_updates=multi_step_updates, **learning, **shared)
        case "pretrained" | "random":
            return pretrain(network, cross_entropy, **adaptation, **shared)
        case "fine_tuning":
            return fine_tuning(features, data.image, cross_entropy, **classifier, **adaptation, **shared)
        case "nearest_neighbour":
            return nearest_neighbour(features, data.image, cross_entropy, **classifier, **shared)
        case "matching":
            return matching(features, cross_entropy, ways=options.ways, **shared)
        case "siamese":
            return siamese(features, data.image, cross_entropy, ways=options.ways, **shared)
        case "prototypical":
            return prototypical(features, cross_entropy, ways=options.ways, **shared)


def train(method: Method, options: Options, data: Data, run: runner.Run) -> tuple[State, int]:
    """Train a method from every seed; returns the best states [seeds] and the number of meta-updates done."""
    lr = options.tuning_lrs[0] if method in TUNED else options.inner_lr
    learner = build_learner(method, options, data, eval_steps=options.test_steps, rule=lr)
    if method == "random":
        return jax.vmap(learner.init)(run.keys), 0
    if options.features is not None:
        classifier = read_best(build_learner("nearest_neighbour", options, data, eval_steps=1, rule=lr), options.features)
        if method in TRANSFER:
            return classifier, updates_of(options.features)
        features = jax.tree.map(lambda leaf: leaf[0], classifier.params["features"])
        learner = learner._replace(init=functools.partial(begin_with, features, learner.init))

    def validation_error(sample: SampleFn, state: State) -> Array:
        key = jax.random.key(VALIDATION_SEED)
        sizes = {"num_tasks": options.validation_tasks, "batch_size": runner.tasks_at_a_time(options, at_least=40)}
        scores = evaluate(learner, state, sample, key=key, **sizes)
        return 1 - scores["accuracy"][:, -1].mean()

    sample = data.labelled if method in TRANSFER else data.train
    config = {"bank": data.checksum}
    if options.dataset == "folder":  # the others have class lists of their own
        config["classes"] = data.parts
    result = run.train(method, learner, sample, validate_fn=Partial(validation_error, as_argument(data.val)), config=config)
    return result.best, result.num_updates


def begin_with(features: PyTree, init: Callable[[Array], State], key: Array) -> State:
    """The first state of a network that has these features; what they have not, its output layer, is zero."""
    state = init(key)
    return state._replace(params=jax.tree.map(jnp.zeros_like, state.params) | features)


def origin_of_features(options: Options) -> list[str]:
    """What the results say of `--features`, if they are given."""
    return [] if options.features is None else [f"features of {updates_of(options.features):,} updates"]


def updates_of(directory: Path) -> int:
    """For how many updates a run was trained."""
    lines = read_metrics(directory / "metrics.jsonl")
    if not lines:
        raise CheckpointError(f"--features: {directory} holds no training run. A script's are OUT/checkpoints/METHOD.")
    return lines[-1]["update"]


def accuracies(learner: MetaLearner, states: State, sample: SampleFn, *, num_tasks: int, batch_size: int, seed: int) -> Array:
    """Accuracy of states [seeds] on the query sets, before and after each step: [seeds, num_tasks, S + 1]."""
    scores = []
    for number in range(len(jax.tree.leaves(states)[0])):
        state = jax.tree.map(lambda leaf, number=number: leaf[number], states)
        key = jax.random.key(seed)
        scores.append(evaluate(learner, state, sample, key=key, num_tasks=num_tasks, batch_size=batch_size)["accuracy"])
    return jnp.stack(scores)


def tuned_lr(method: Method, options: Options, data: Data, states: State) -> float:
    """The step size of fine-tuning with the best mean accuracy on validation episodes, after as many steps as the paper's."""

    @jax.jit
    def score(lr: Array, states: State, sample: SampleFn) -> Array:
        learner = build_learner(method, options, data, eval_steps=options.test_steps, rule=optax.sgd(lr))
        sizes = {"num_tasks": options.validation_tasks, "batch_size": runner.tasks_at_a_time(options, at_least=40)}
        scores = accuracies(learner, states, sample, seed=VALIDATION_SEED, **sizes)
        return scores[..., -1].mean()

    return max(options.tuning_lrs, key=lambda lr: score(lr, states, as_argument(data.val)))


def draw_episodes(method: Method, options: Options, data: Data, state: State, lr: float, path: Path, *, count: int = 4) -> None:
    """Draw test episodes: support images, then query images with their prediction before and after adaptation."""
    network, rule = adapted_by(method, options, data.image, lr)

    @jax.jit
    def adapted(params: PyTree, sample: SampleFn, key: Array) -> tuple[Task, Array]:
        """An episode, and the classes predicted of its query images before and after adaptation: [2, N * Q]."""
        task = sample(key)
        final, _ = fine_tune(network, cross_entropy, params, task.support, rule, options.test_steps)
        return task, jnp.stack([network.apply(params, task.query.x).argmax(-1) for params in (params, final)])

    shown = min(options.ways, 5)  # classes, one image of each
    draw = functools.partial(_draw_image, greys="gray_r" if options.dataset == "omniglot" else "gray")  # its ink is 1
    figure = report.new_figure(max(9, 1.2 * 2 * shown + 1), 1.75 * count)
    panels = figure.subplots(count, 2 * shown, squeeze=False)
    for number, row in enumerate(panels):
        key = jax.random.fold_in(jax.random.key(TEST_SEED), number)
        task, guesses = adapted(state.params, as_argument(data.test), key)
        labels = np.asarray(task.query.y)
        for label in range(shown):
            first = int((np.asarray(task.support.y) == label).argmax())
            draw(row[label], task.support.x[first], f"class {label}", "black")
            query = int((labels == label).argmax())
            old, new = guesses[:, query]
            draw(row[shown + label], task.query.x[query], f"{old} → {new}", "C2" if new == label else "C3")
        row[0].set_ylabel(f"episode {number + 1}")
        row[shown].set_ylabel("queries")
    figure.suptitle(
        f"Test episodes: the support set's classes; queries 0 to {shown - 1}, with the class predicted "
        f"before → after {options.test_steps} steps"
    )
    figure.savefig(path, dpi=100)


def _draw_image(axes: "Axes", image: Array, title: str, colour: str, *, greys: str) -> None:
    axes.imshow(np.asarray(image).squeeze(), cmap=greys, vmin=0, vmax=1)
    axes.set_title(title, color=colour, fontsize="medium")
    axes.set(xticks=[], yticks=[])


if __name__ == "__main__":
    runner.run_script("few_shot", PRESETS, execute)
