"""Few-shot image classification: table 1 of Finn et al. 2017, a preset for each cell. `python experiments/few_shot.py`

Each method learns from episodes of N classes with K labelled images each, and is judged on episodes of classes that it
never saw, after 0 to 10 steps of gradient descent on their labelled images.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import runner
from jax import Array
from jax.tree_util import Partial

from mamljax import image_models, models, report
from mamljax.baselines.pretrain import pretrain
from mamljax.baselines.transfer import fine_tuning, nearest_neighbour
from mamljax.data.bank import images_of
from mamljax.data.folders import image_folders, split_folders
from mamljax.data.miniimagenet import miniimagenet
from mamljax.data.omniglot import Split, omniglot, split_omniglot
from mamljax.evaluate import evaluate, mean_and_ci95
from mamljax.losses import accuracy, cross_entropy
from mamljax.maml import fine_tune, maml
from mamljax.rules import Rule, all_but
from mamljax.tasks.images import HostEpisodes, episodes, inductive, labelled
from mamljax.types import MetaLearner, Model, PyTree, SampleFn, State, Task, as_argument

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SOURCE = "Finn et al. 2017, table 1"
PUBLISHED = {  # accuracy in %, by dataset, network, ways, shots and method
    ("omniglot", "strided_conv", 5, 1, "maml"): 98.7,
    ("omniglot", "strided_conv", 5, 5, "maml"): 99.9,
    ("omniglot", "strided_conv", 20, 1, "maml"): 95.8,
    ("omniglot", "strided_conv", 20, 5, "maml"): 98.9,
    ("omniglot", "fully_connected", 5, 1, "maml"): 89.7,
    ("omniglot", "fully_connected", 5, 5, "maml"): 97.5,
    ("miniimagenet", "pooled_conv", 5, 1, "maml"): 48.70,
    ("miniimagenet", "pooled_conv", 5, 5, "maml"): 63.11,
    ("miniimagenet", "pooled_conv", 5, 1, "fomaml"): 48.07,
    ("miniimagenet", "pooled_conv", 5, 5, "fomaml"): 63.15,
    ("miniimagenet", "pooled_conv", 5, 1, "fine_tuning"): 28.86,
    ("miniimagenet", "pooled_conv", 5, 5, "fine_tuning"): 49.79,
    ("miniimagenet", "pooled_conv", 5, 1, "nearest_neighbour"): 41.08,
    ("miniimagenet", "pooled_conv", 5, 5, "nearest_neighbour"): 51.04,
}
NORM_PARAMETERS = ("shift", "scale")  # of the outer loop alone
VALIDATION_SEED, TEST_SEED = 1_000_001, 1_000_002
TUNED = ("pretrained", "random", "fine_tuning")  # their step size of fine-tuning is tuned
Method = Literal["maml", "fomaml", "pretrained", "random", "fine_tuning", "nearest_neighbour"]


@dataclasses.dataclass(frozen=True)
class Options(runner.Options):
    """Few-shot classification of images, by default Omniglot 5-way 1-shot as in the paper and its code."""

    preset: str = "omniglot-5w1s"
    """Values for all options below and above, one preset for each cell of the paper's table."""
    method: tuple[Method, ...] = ("maml",)
    """Methods, trained in this order: MAML, first-order MAML, one network for all episodes, an untrained one; and a classifier
    over all training classes, with its output layer renewed and everything fine-tuned, or its features compared."""
    protocol: Literal["paper", "corrected"] = "paper"
    """What --eval-queries and --eval-tasks are if they are not given: K and 600, as in the paper and its code (paper), or 15
    and 6000 (corrected)."""
    steps: int = 60_000
    out: Path = Path("out/omniglot-5w1s")
    dataset: Literal["omniglot", "miniimagenet", "folder"] = "omniglot"
    """Omniglot, miniImageNet, or images of your own in --data-dir."""
    data_dir: Path | None = None
    """Directory of the raw data set, which is needed once."""
    cache_dir: Path | None = None
    """Directory of prepared image banks; by default MAMLJAX_CACHE_DIR or ~/.cache/mamljax/banks."""
    split: Split = "seeded"
    """Characters of Omniglot for training, validation and test: 1100/100/423 at random, or those of Vinyals et al. 2016."""
    image_size: int = 84
    """Height and width in pixels to which images of your own are resized."""
    channels: Literal[1, 3] = 3
    """Grey or coloured images of your own."""
    images_on: Literal["device", "host"] = "device"
    """Where the images lie: in the device's memory, or, if it has no room for them, mapped from the bank's file, whence the
    host reads episodes ahead of the device."""
    network: Literal["strided_conv", "pooled_conv", "fully_connected"] = "strided_conv"
    """The Omniglot network, the miniImageNet network, or the one without convolutions."""
    filters: int = 64
    """Channels of each convolution."""
    norm: Literal["shift", "scale_and_shift"] = "shift"
    """What normalisation learns after normalising; the authors' code has a shift only."""
    statistics: Literal["transductive", "inductive"] = "transductive"
    """What normalisation is computed from in evaluation: all query images at once, as in the authors' code, or the
    support images alone."""
    num_tasks: int = 32
    ways: int = 5
    """N, classes of an episode."""
    shots: int = 1
    """K, support images of each class."""
    queries: int = 1
    """Query images of each class, in training."""
    eval_queries: int | None = None
    """Query images of each class in evaluation."""
    eval_tasks: int | None = None
    """Test episodes."""
    validation_tasks: int = 600
    """Validation episodes; always the same."""
    inner_lr: float = 2.0
    """Step size of adaptation, on the mean cross-entropy: N times that of the paper, whose code sums over classes."""
    inner_steps: int = 1
    """Adaptation steps in training."""
    eval_steps: int = 10
    """Adaptation steps in evaluation."""
    test_steps: int = 3
    """Adaptation steps of the paper's number, after which validation chooses the best checkpoint."""
    meta_lr: float = 0.001
    """Step size of Adam, the outer optimiser."""
    clip: float | None = None
    """Bound on each element of the meta-gradient."""
    differentiation: Literal["mixed", "reverse"] = "reverse"
    """How MAML differentiates through adaptation; both are exact."""
    chunk_size: int = 4
    """Tasks differentiated or evaluated at a time, a divisor of --num-tasks. The fastest on a CPU whose cache they just fit.
    With --devices on a CPU take 1, on an accelerator --num-tasks."""
    precision: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"
    """Arithmetic of products, where the device has others than float32; parameters are always float32."""
    tuning_lrs: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
    """Step sizes to choose from for fine-tuning of methods other than MAML, by validation accuracy after the training; the
    first also serves for validation during it."""
    validate_every: int = 1_000
    log_every: int = 100
    checkpoint_seconds: float = 30.0

    free = (*runner.Options.free, "data_dir", "cache_dir", "images_on", "chunk_size", "eval_steps", "eval_tasks")


def _preset(name: str, **options: object) -> Options:
    return Options(preset=name, out=Path("out") / name, **options)


FC = {"network": "fully_connected", "chunk_size": 32}
TWENTY_WAY = {"ways": 20, "num_tasks": 16, "inner_steps": 5, "test_steps": 5, "chunk_size": 1, "differentiation": "mixed"}
MINI = {"dataset": "miniimagenet", "network": "pooled_conv", "filters": 32, "num_tasks": 4, "queries": 15, "inner_lr": 0.05}
MINI |= {"inner_steps": 5, "test_steps": 10, "chunk_size": 1, "differentiation": "mixed"}
# The authors clip to +-10 where the loss is summed over N Q queries and divided by K; here it is their mean.
PRESETS = {
    options.preset: options
    for options in (
        _preset("omniglot-5w1s"),
        _preset("omniglot-5w5s", shots=5, queries=5, chunk_size=1),
        _preset("omniglot-20w1s", **TWENTY_WAY),
        _preset("omniglot-20w5s", shots=5, queries=5, **TWENTY_WAY),
        _preset("omniglot-5w1s-fc", **FC),
        _preset("omniglot-5w5s-fc", shots=5, queries=5, **FC),
        _preset("miniimagenet-5w1s", clip=10 / 75, **MINI),
        _preset("miniimagenet-5w5s", shots=5, clip=10 / 15, **MINI),
    )
}


class Data(NamedTuple):
    """The samplers of a data set."""

    image: Array  # [1, H, W, C] zeros, for its shape
    num_classes: int  # in training
    checksum: str  # of all images
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
            sizes = {"num_tasks": eval_tasks(options), "batch_size": options.chunk_size}
            scores = accuracies(learner, states, data.test, seed=TEST_SEED, **sizes)
        mean, ci95 = mean_and_ci95(100 * scores)
        published = PUBLISHED.get((options.dataset, options.network, options.ways, options.shots, method))
        rows += report.rows_over_steps(
            mean,
            ci95,
            method=method,
            setting=options.preset,
            protocol=options.protocol,
            metric="accuracy in %",
            tasks=eval_tasks(options),
            published={} if published is None else {min(options.test_steps, len(mean) - 1): published},
            source=SOURCE,
            note=f"step size {lr:g}" if method in TUNED else "",
            **run.effort(method),
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
        train=sampler("train", options.queries),
        val=sampler("val", eval_queries(options)),
        test=sampler("test", eval_queries(options)),
        labelled=classifier_sample,
    )


def image_shape(options: Options) -> tuple[int, int, int, int]:
    """The shape of one image, [1, H, W, C]."""
    own = (1, options.image_size, options.image_size, options.channels)
    return {"omniglot": (1, 28, 28, 1), "miniimagenet": (1, 84, 84, 3), "folder": own}[options.dataset]


def eval_queries(options: Options) -> int:
    """Query images of each class in evaluation."""
    return options.eval_queries or (options.shots if options.protocol == "paper" else 15)


def eval_tasks(options: Options) -> int:
    """Test episodes."""
    return options.eval_tasks or (600 if options.protocol == "paper" else 6000)


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
    shared = {"tx": tx, "metric_fns": {"accuracy": accuracy}, "chunk_size": options.chunk_size}
    adaptation = {"rule": all_but(NORM_PARAMETERS, rule), "eval_steps": eval_steps}
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
        scores = evaluate(learner, state, sample, key=key, num_tasks=options.validation_tasks, batch_size=options.chunk_size)
        return 1 - scores["accuracy"][:, -1].mean()

    sample = data.labelled if method in ("fine_tuning", "nearest_neighbour") else data.train
    config = {"bank": data.checksum}
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
        sizes = {"num_tasks": options.validation_tasks, "batch_size": options.chunk_size}
        scores = accuracies(learner, states, sample, seed=VALIDATION_SEED, **sizes)
        return scores[..., -1].mean()

    return max(options.tuning_lrs, key=lambda lr: score(lr, states, as_argument(data.val)))


def draw_episodes(options: Options, data: Data, state: State, lr: float, path: Path, *, count: int = 4) -> None:
    """Draw test episodes: support images, then query images with their prediction before and after adaptation."""
    network, rule = build_network(options, data.image, options.ways), all_but(NORM_PARAMETERS, lr)

    @jax.jit
    def adapted(params: PyTree, sample: SampleFn, key: Array) -> tuple[Task, Array]:
        """An episode, and the classes predicted of its query images before and after adaptation: [2, N * Q]."""
        task = sample(key)
        final, _ = fine_tune(network, cross_entropy, params, task.support, rule, options.test_steps)
        return task, jnp.stack([network.apply(params, task.query.x).argmax(-1) for params in (params, final)])

    shown = min(options.ways, 5)  # classes, one image of each
    figure = report.new_figure(1.2 * 2 * shown + 1, 1.75 * count)
    panels = figure.subplots(count, 2 * shown, squeeze=False)
    for number, row in enumerate(panels):
        key = jax.random.fold_in(jax.random.key(TEST_SEED), number)
        task, guesses = adapted(state.params, as_argument(data.test), key)
        labels = np.asarray(task.query.y)
        for label in range(shown):
            first = int((np.asarray(task.support.y) == label).argmax())
            _draw_image(row[label], task.support.x[first], f"class {label}", "black")
            query = int((labels == label).argmax())
            old, new = guesses[:, query]
            _draw_image(row[shown + label], task.query.x[query], f"{old} → {new}", "C2" if new == label else "C3")
        row[0].set_ylabel(f"episode {number + 1}")
        row[shown].set_ylabel("queries")
    figure.suptitle(
        f"Test episodes: the support set's classes; queries 0 to {shown - 1}, with the class predicted "
        f"before → after {options.test_steps} steps"
    )
    figure.savefig(path, dpi=100)


def _draw_image(axes: "Axes", image: Array, title: str, colour: str) -> None:
    axes.imshow(np.asarray(image).squeeze(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_title(title, color=colour, fontsize="medium")
    axes.set(xticks=[], yticks=[])


if __name__ == "__main__":
    sys.exit(runner.main("few_shot", PRESETS, execute))
