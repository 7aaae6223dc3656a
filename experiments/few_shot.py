"""Few-shot image classification: table 1 of Finn et al. 2017, a preset for each cell. `python experiments/few_shot.py`

Each method learns from episodes of N classes with K labelled images each, and is judged on episodes of classes that it
never saw, after 0 to 10 steps of gradient descent on their labelled images.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import runner
from few_shot_presets import PRESETS, PUBLISHED, SOURCE, Method, Options, cell, eval_queries, eval_tasks, image_shape
from jax import Array
from jax.tree_util import Partial

from mamljax import image_models, models, report
from mamljax.baselines.pretrain import pretrain
from mamljax.baselines.transfer import fine_tuning, nearest_neighbour
from mamljax.data.bank import Bank, images_of
from mamljax.data.folders import image_folders, split_folders
from mamljax.data.miniimagenet import miniimagenet
from mamljax.data.omniglot import omniglot, split_omniglot
from mamljax.evaluate import evaluate, mean_and_ci95
from mamljax.losses import accuracy, cross_entropy
from mamljax.maml import fine_tune, maml
from mamljax.rules import Rule, all_but
from mamljax.tasks.images import HostEpisodes, episodes, inductive, labelled
from mamljax.types import MetaLearner, Model, PyTree, SampleFn, State, Task, as_argument

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NORM_PARAMETERS = {"shift": ("shift",), "scale_and_shift": ("shift", "scale")}  # of the outer loop alone
VALIDATION_SEED, TEST_SEED = 1_000_001, 1_000_002
TUNED = ("pretrained", "random", "fine_tuning")  # their step size of fine-tuning is tuned


class Data(NamedTuple):
    """The samplers of a data set."""

    image: Array  # [1, H, W, C] zeros, for its shape
    num_classes: int  # in training
    checksum: str  # of all images
    parts: dict[str, list[str]]  # the names of the classes of each split
    train: SampleFn  # episodes
    val: SampleFn
    test: SampleFn
    labelled: SampleFn | None  # batches of training images labelled by their class, if a method needs them


def execute(options: Options, run: runner.Run) -> None:
    """Train every method, evaluate all on the same test episodes, draw the figures."""
    jax.config.update("jax_default_matmul_precision", options.precision)
    data = load(options)
    run.config["bank"] = data.checksum
    rows, trained = [], {}
    for method in options.method:
        states, num_updates = train(method, options, data, run)
        if num_updates == 0 and method != "random":  # time ran out before
            continue
        with run.sharing():
            lr = tuned_lr(method, options, data, states) if method in TUNED else options.inner_lr
            learner = build_learner(method, options, data, eval_steps=options.eval_steps, rule=lr)
            sizes = {"num_tasks": eval_tasks(options), "batch_size": runner.tasks_at_a_time(options)}
            scores = accuracies(learner, states, data.test, seed=TEST_SEED, **sizes)
        mean, ci95 = mean_and_ci95(100 * scores)
        published = PUBLISHED.get((options.dataset, options.network, options.ways, options.shots, method))
        rows += report.rows_over_steps(
            mean,
            ci95,
            method=method,
            setting=cell(options),
            protocol=options.protocol + ", inductive" * (options.statistics == "inductive"),
            metric="accuracy in %",
            tasks=eval_tasks(options),
            published={} if published is None else {options.test_steps if len(mean) > 1 else 0: published},
            source=SOURCE,
            note=f"step size {lr:g}" if method in TUNED else "",
            **run.effort(method, best=True),
        )
        trained[method] = jax.tree.map(lambda leaf: leaf[0], states), lr
    results = run.write(rows)
    report.learning_curves(results, options.out / "learning_curves.png")
    report.training_curves({method: run.directory(method) for method in run.results}, options.out / "training_curves.png")
    for method in ("maml", "fomaml"):
        if method in trained:
            draw_episodes(options, data, *trained[method], options.out / f"episodes_{method}.png")


def load(options: Options) -> Data:
    """Open the images of `--dataset` and build the samplers of its three splits."""
    if options.dataset == "omniglot":
        bank = omniglot(options.data_dir, options.cache_dir)
        split = split_omniglot(bank.names, options.split)
    elif options.dataset == "miniimagenet":
        bank = miniimagenet(options.data_dir, options.cache_dir)
        split = split_folders(bank.names)
    else:
        if options.data_dir is None:
            raise ValueError("--dataset folder needs --data-dir, a folder of class folders or of train/, val/ and test/.")
        bank = image_folders(options.data_dir, options.cache_dir, size=options.image_size, channels=options.channels)
        split = split_folders(bank.names)
    rotations = options.dataset == "omniglot"
    shared = {"ways": options.ways, "shots": options.shots, "rotations": rotations}

    def sampler(part: str, queries: int) -> SampleFn:
        classes = split[part]
        check_images(bank, classes, options.shots + queries, part)
        arguments = shared | {"queries": queries, "counts": bank.counts[classes]}
        try:
            if options.images_on == "host":
                sample = HostEpisodes(bank.images, classes=classes, **arguments)
            else:
                sample = episodes(images_of(bank, classes), **arguments)
        except ValueError as error:
            raise ValueError(f"the {part} split of {options.dataset}: {error}") from error
        return inductive(sample) if options.statistics == "inductive" else sample

    classifier_sample = None
    if {"fine_tuning", "nearest_neighbour"} & set(options.method):
        number = options.ways * (options.shots + options.queries)
        counts = bank.counts[split["train"]]
        classifier_sample = labelled(images_of(bank, split["train"]), number=number, rotations=rotations, counts=counts)
    return Data(
        image=jnp.zeros(image_shape(options)),
        num_classes=len(split["train"]),
        checksum=bank.checksum,
        parts={part: [bank.names[number] for number in numbers] for part, numbers in split.items()},
        train=sampler("train", options.queries),
        val=sampler("val", eval_queries(options)),
        test=sampler("test", eval_queries(options)),
        labelled=classifier_sample,
    )


def check_images(bank: Bank, classes: np.ndarray, needed: int, part: str) -> None:
    """Every class of a split has as many images as an episode takes of it."""
    few = {bank.names[number]: int(bank.counts[number]) for number in classes if bank.counts[number] < needed}
    if few:
        raise ValueError(
            f"episodes of the {part} split need {needed} images of each class, support and query images together, but some "
            f"have fewer: {', '.join(f'{name} {count}' for name, count in list(few.items())[:5])}{', ...' * (len(few) > 5)}. "
            "Add images to them, leave them out, or lower --shots or --queries."
        )


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
    return models.from_linen(modules[options.network], image)


def build_learner(method: Method, options: Options, data: Data, *, eval_steps: int, rule: Rule) -> MetaLearner:
    """Build the learner of a method, with a rule of adaptation for all parameters but those of normalisation."""
    tx = optax.adam(options.meta_lr)
    tx = tx if options.clip is None else optax.chain(optax.clip(options.clip), tx)
    shared = {"tx": tx, "metric_fns": {"accuracy": accuracy}, "chunk_size": runner.tasks_at_a_time(options)}
    adaptation = {"rule": all_but(NORM_PARAMETERS[options.norm], rule), "eval_steps": eval_steps}
    if method in ("fine_tuning", "nearest_neighbour"):
        features = build_network(options, data.image, None)
        shared |= {"num_classes": data.num_classes, "ways": options.ways}
        if method == "nearest_neighbour":
            return nearest_neighbour(features, data.image, cross_entropy, **shared)
        return fine_tuning(features, data.image, cross_entropy, **adaptation, **shared)
    network = build_network(options, data.image, options.ways)
    if method in ("maml", "fomaml"):
        differentiation = "first_order" if method == "fomaml" else options.differentiation
        adaptation |= {"inner_steps": options.inner_steps, "differentiation": differentiation}
        return maml(network, cross_entropy, **adaptation, **shared)
    return pretrain(network, cross_entropy, **adaptation, **shared)


def train(method: Method, options: Options, data: Data, run: runner.Run) -> tuple[State, int]:
    """Train a method from every seed; returns the best states [seeds] and the number of meta-updates done."""
    lr = options.tuning_lrs[0] if method in TUNED else options.inner_lr
    learner = build_learner(method, options, data, eval_steps=options.test_steps, rule=lr)
    if method == "random":
        return jax.vmap(learner.init)(run.keys), 0

    def validation_error(sample: SampleFn, state: State) -> Array:
        key = jax.random.key(VALIDATION_SEED)
        sizes = {"num_tasks": options.validation_tasks, "batch_size": runner.tasks_at_a_time(options)}
        scores = evaluate(learner, state, sample, key=key, **sizes)
        return 1 - scores["accuracy"][:, -1].mean()

    sample = data.labelled if method in ("fine_tuning", "nearest_neighbour") else data.train
    config = {"bank": data.checksum}
    if options.dataset == "folder":  # the others have class lists of their own
        config["classes"] = data.parts
    result = run.train(method, learner, sample, validate_fn=Partial(validation_error, as_argument(data.val)), config=config)
    return result.best, result.num_updates


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
        sizes = {"num_tasks": options.validation_tasks, "batch_size": runner.tasks_at_a_time(options)}
        scores = accuracies(learner, states, sample, seed=VALIDATION_SEED, **sizes)
        return scores[..., -1].mean()

    return max(options.tuning_lrs, key=lambda lr: score(lr, states, as_argument(data.val)))


def draw_episodes(options: Options, data: Data, state: State, lr: float, path: Path, *, count: int = 4) -> None:
    """Draw test episodes: support images, then query images with their prediction before and after adaptation."""
    network, rule = build_network(options, data.image, options.ways), all_but(NORM_PARAMETERS[options.norm], lr)

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
