"""Few-shot image classification: table 1 of Finn et al. 2017, a preset for each cell. `python experiments/few_shot.py`

Each method learns from episodes of N classes with K labelled images each, and is judged on episodes of classes that it
never saw, after 0 to 10 steps of gradient descent on their labelled images.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import runner
from jax import Array
from jax.tree_util import Partial

from mamljax import models, report
from mamljax.baselines.pretrain import pretrain
from mamljax.data.bank import Bank
from mamljax.data.omniglot import Split, omniglot, split_omniglot
from mamljax.evaluate import evaluate, mean_and_ci95
from mamljax.losses import accuracy, cross_entropy
from mamljax.maml import maml
from mamljax.rules import all_but
from mamljax.tasks.images import episodes
from mamljax.types import MetaLearner, Model, State

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
Method = Literal["maml", "fomaml", "pretrained", "random"]


@dataclasses.dataclass(frozen=True)
class Options(runner.Options):
    """Few-shot classification of images, by default Omniglot 5-way 1-shot as in the paper and its code."""

    preset: str = "omniglot-5w1s"
    """Values for all options below and above, one preset for each cell of the paper's table."""
    method: tuple[Method, ...] = ("maml",)
    """Methods, trained in this order."""
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
    """Tasks differentiated at a time, a divisor of --num-tasks."""
    precision: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"
    """Arithmetic of products, where the device has others than float32; parameters are always float32."""
    tuning_lrs: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
    """Step sizes to choose from for fine-tuning of methods other than MAML, by validation accuracy."""
    validate_every: int = 1_000
    log_every: int = 100
    checkpoint_seconds: float = 30.0


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
    """Samplers of training, validation and test episodes."""

    train: Partial
    val: Partial
    test: Partial


def execute(options: Options, run: runner.Run) -> None:
    """Train every method, evaluate all on the same test episodes, draw the figures."""
    jax.config.update("jax_default_matmul_precision", options.precision)
    bank = load_bank(options)
    data = samplers(options, bank)
    rows = []
    for method in options.method:
        states, num_updates = train(method, options, run, bank, data)
        scores = test_scores(build_learner(method, options, options.eval_steps), states, data.test, options, seed=TEST_SEED)
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
            seeds=options.seeds,
            meta_updates=num_updates,
            published={} if published is None else {options.test_steps: published},
            source=SOURCE,
        )
    results = run.write(rows)
    report.learning_curves(results, options.out / "learning_curves.png")


def load_bank(options: Options) -> Bank:
    """Open the images of `--dataset`."""
    return omniglot(options.data_dir, options.cache_dir)


def samplers(options: Options, bank: Bank) -> Data:
    """Build the samplers of the three splits."""
    split = split_omniglot(bank.names, options.split)

    def sampler(part: str, queries: int) -> Partial:
        return episodes(
            bank.images[split[part]],
            counts=bank.counts[split[part]],
            ways=options.ways,
            shots=options.shots,
            queries=queries,
            rotations=options.dataset == "omniglot",
        )

    return Data(sampler("train", options.queries), *(sampler(part, eval_queries(options)) for part in ("val", "test")))


def eval_queries(options: Options) -> int:
    """Query images of each class in evaluation."""
    return options.eval_queries or (options.shots if options.protocol == "paper" else 15)


def eval_tasks(options: Options) -> int:
    """Test episodes."""
    return options.eval_tasks or (600 if options.protocol == "paper" else 6000)


def build_network(options: Options, image: Array) -> Model:
    """Build the network for images like [1, H, W, C]."""
    use_scale = options.norm == "scale_and_shift"
    modules = {
        "strided_conv": models.StridedConvNet(options.ways, options.filters, use_scale=use_scale),
        "pooled_conv": models.PooledConvNet(options.ways, options.filters, use_scale=use_scale),
        "fully_connected": models.FullyConnectedNet(options.ways, use_scale=use_scale),
    }
    return models.from_linen(modules[options.network], image)


@functools.lru_cache
def build_learner(method: Method, options: Options, eval_steps: int) -> MetaLearner:
    """Build the learner of a method."""
    shape = (1, 28, 28, 1) if options.dataset == "omniglot" else (1, 84, 84, 3)
    model = build_network(options, jnp.zeros(shape))
    tx = optax.adam(options.meta_lr)
    tx = tx if options.clip is None else optax.chain(optax.clip(options.clip), tx)
    shared = {
        "rule": all_but(NORM_PARAMETERS, options.inner_lr),
        "eval_steps": eval_steps,
        "tx": tx,
        "metric_fns": {"accuracy": accuracy},
    }
    if method in ("maml", "fomaml"):
        differentiation = "first_order" if method == "fomaml" else options.differentiation
        shared |= {"inner_steps": options.inner_steps, "differentiation": differentiation, "chunk_size": options.chunk_size}
        return maml(model, cross_entropy, **shared)
    return pretrain(model, cross_entropy, **shared)


def train(method: Method, options: Options, run: runner.Run, bank: Bank, data: Data) -> tuple[State, int]:
    """Train a method from every seed; returns the best states [seeds] and the number of meta-updates done."""
    learner = build_learner(method, options, options.test_steps)
    if method == "random":
        return jax.vmap(learner.init)(run.keys), 0

    def validation_error(sample: Partial, state: State) -> Array:
        key = jax.random.key(VALIDATION_SEED)
        scores = evaluate(learner, state, sample, key=key, num_tasks=options.validation_tasks, batch_size=20)
        return 1 - scores["accuracy"][:, options.test_steps].mean()

    config = {"bank": bank.checksum}
    result = run.train(method, learner, data.train, validate_fn=Partial(validation_error, data.val), config=config)
    return result.best, result.num_updates


def test_scores(learner: MetaLearner, states: State, sample: Partial, options: Options, *, seed: int) -> np.ndarray:
    """Accuracy before and after each step: [seeds, tasks, S + 1]."""
    key = jax.random.key(seed)
    seeds = [jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in range(options.seeds)]
    scores = [evaluate(learner, state, sample, key=key, num_tasks=eval_tasks(options), batch_size=20) for state in seeds]
    return np.stack([score["accuracy"] for score in scores])


if __name__ == "__main__":
    sys.exit(runner.main("few_shot", PRESETS, execute))
