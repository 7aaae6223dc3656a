"""The options of `few_shot.py`, with a preset for each cell of the paper's table."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args

import runner

from mamljax.checks import check_count
from mamljax.data.omniglot import Split

Preset = Literal[
    *("omniglot-5w1s", "omniglot-5w5s", "omniglot-20w1s", "omniglot-20w5s", "omniglot-5w1s-fc", "omniglot-5w5s-fc"),
    *("miniimagenet-5w1s", "miniimagenet-5w5s"),
    *("omniglot-5w1s-maml++", "omniglot-5w5s-maml++", "omniglot-20w1s-maml++", "omniglot-20w5s-maml++"),
    *("miniimagenet-5w1s-maml++", "miniimagenet-5w5s-maml++"),
    *("omniglot-5w1s-imaml", "omniglot-5w5s-imaml", "omniglot-20w1s-imaml", "omniglot-20w5s-imaml"),
]
Method = Literal[
    *("maml", "fomaml", "anil", "boil", "context", "meta_sgd", "maml++", "imaml", "proto_maml", "meta_lstm"),
    *("pretrained", "random", "fine_tuning", "nearest_neighbour"),
    *("matching", "siamese", "mann", "memory_module", "neural_statistician", "prototypical"),
]

# They learn to adapt.
MAML = ("maml", "fomaml", "anil", "boil", "context", "meta_sgd", "maml++", "imaml", "proto_maml", "meta_lstm")
# What they learn is more than the network of the options.
MORE_THAN_A_NETWORK = ("context", "meta_sgd", "maml++", "meta_lstm", "siamese", "mann", "neural_statistician")
TUNED = ("pretrained", "random", "fine_tuning")  # their step size of fine-tuning is tuned
TRANSFER = ("fine_tuning", "nearest_neighbour")  # they train a classifier over all training classes


@dataclasses.dataclass(frozen=True)
class Options(runner.Options):
    """Few-shot classification of images, by default Omniglot 5-way 1-shot as in the paper and its code."""

    preset: Preset = "omniglot-5w1s"
    """Values for all options below and above, one preset for each cell of the paper's table, for MAML++ one more
    for each with convolutions, and for implicit MAML for each of Omniglot."""
    method: tuple[Method, ...] = ("maml",)
    """Methods, trained in this order: MAML, first-order MAML, MAML that adapts the output layer alone (anil), all but that
    (boil) or nothing but further channels of the image (context), that begins with an output layer made of each class's mean
    features (proto_maml), that learns a step size for each parameter (meta_sgd) or for each layer and step (maml++), or that
    differentiates a minimum, not the way there (imaml, implicit MAML; needs many small steps, as its presets have them); an
    LSTM that takes the steps (meta_lstm; needs an --inner-lr below 1, such as 0.01); one network for all episodes, an untrained
    one; and a classifier over all training classes, with its output layer renewed and everything fine-tuned, or its features
    compared. Matching, siamese and prototypical networks, and a memory module, learn from episodes to compare, a
    memory-augmented network (mann) to write down and look up, and a neural statistician to draw images like those of a class
    (give it several --queries)."""
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
    host reads episodes ahead of the device. The classifiers of fine_tuning and nearest_neighbour keep those of the training
    classes on the device."""
    network: Literal["strided_conv", "pooled_conv", "fully_connected"] = "strided_conv"
    """The Omniglot network, the miniImageNet network, or the one without convolutions."""
    filters: int = 64
    """Channels of each convolution."""
    norm: Literal["shift", "scale_and_shift"] = "shift"
    """What normalisation learns after normalising; the authors' code has a shift only."""
    statistics: Literal["transductive", "inductive"] = "transductive"
    """What normalisation of query images is computed from: all of them at once, as in the authors' code, or the support
    images alone, in training too."""
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
    """Step size of adaptation, on the mean cross-entropy: N times that of the paper, whose code sums over classes, while
    that of MAML++ has the mean too."""
    inner_steps: int = 1
    """Adaptation steps in training."""
    eval_steps: int = 10
    """Adaptation steps in evaluation."""
    test_steps: int = 3
    """Adaptation steps of the paper's number, after which validation chooses the best checkpoint; of maml++ and meta_lstm,
    which learn their steps, after no more than --inner-steps."""
    meta_lr: float = 0.001
    """Step size of Adam, the outer optimiser."""
    annealing: int | None = None
    """Meta-updates over which --meta-lr falls to a hundredth, along a cosine; by default it stays as it is."""
    context_channels: int = 1
    """Further channels of the image, for the method of that name; chosen here, as the paper does not say. Not for a
    fully_connected network, whose normalisation takes away what all images have in common."""
    multi_step_updates: int = 5_000
    """MAML++: meta-updates during which the query loss after earlier steps counts too, less and less."""
    strength: float = 0.2
    """Implicit MAML: lambda, which holds the parameters near those that adaptation began with. Chosen here: with the paper's
    2 it learned several times as slowly, where the authors' code has that in no step but the last."""
    cg_steps: int = 5
    """Implicit MAML: iterations of conjugate gradient."""
    damping: float = 5.0
    """Implicit MAML: added to lambda in the system that these solve; chosen here."""
    clip: float | None = None
    """Bound on each element of the meta-gradient."""
    differentiation: Literal["mixed", "reverse"] = "reverse"
    """How MAML differentiates through adaptation; both are exact."""
    chunk_size: int | None = None
    """Tasks differentiated or evaluated at a time; by default one on a CPU, elsewhere all of a meta-batch."""
    precision: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"
    """Arithmetic of products, where the device has others than float32; with bfloat16 that of the whole network, but for the
    statistics of normalisation and what mann and neural_statistician have above its features. Parameters, the loss and the
    optimiser are always float32. A run may go on with another one; its results then name the last."""
    begin_with: Path | None = None
    """Another run's network to begin with, its best in validation: OUT/checkpoints/METHOD of a run with the same network, which
    may have learned from other images of that size, or with another number of ways or shots. An output layer of enough outputs
    stays, cut to the first N; else the new one begins with zeros, as it does with a classifier that nearest_neighbour or
    fine_tuning trained. These two need such a classifier, over as many classes, are evaluated with it, and train nothing. With
    --steps 0 every method is evaluated only. Not for boil, context, meta_sgd, maml++, meta_lstm, siamese, mann,
    neural_statistician and random."""
    tuning_lrs: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
    """Step sizes to choose from for fine-tuning of methods other than MAML, by validation accuracy after the training; the
    first also serves for validation during it."""
    validate_every: int = 1_000
    log_every: int = 100
    checkpoint_seconds: float = 30.0

    # Not the tuning_lrs: the first decides which checkpoint of a method is best.
    may_change = (
        *runner.Options.may_change,
        *("data_dir", "cache_dir", "images_on", "chunk_size", "eval_steps", "eval_tasks"),
        "precision",  # it depends on the device, of which there may be another by then
    )
    may_be_zero = ("seed", "steps", "damping")
    only_for = {
        **dict.fromkeys(("inner_lr", "inner_steps"), MAML),
        **dict.fromkeys(("eval_steps", "test_steps"), (*MAML, *TUNED)),
        **dict.fromkeys(("strength", "cg_steps", "damping"), ("imaml",)),
        "differentiation": [method for method in MAML if method not in ("fomaml", "imaml", "meta_lstm")],
        "context_channels": ("context",),
        "multi_step_updates": ("maml++",),
        "tuning_lrs": TUNED,
    }

    def check(self) -> None:
        """Raise `ValueError` unless all are in range, and go together with each other and with every method."""
        super().check()
        if "meta_lstm" in self.method and not self.inner_lr < 1:
            raise ValueError(f"--method meta_lstm needs an --inner-lr below 1, got {self.inner_lr}. Give 0.01, for example.")
        if "imaml" in self.method and not self.inner_lr * self.strength < 2:
            raise ValueError(
                f"--method imaml needs an --inner-lr below 2 / --strength, {2 / self.strength:g}, as larger steps lead to no "
                f"minimum; got {self.inner_lr}. Lower either, or begin with --preset omniglot-5w1s-imaml."
            )
        if "context" in self.method and self.network == "fully_connected":
            raise ValueError(
                "--method context needs a --network with convolutions, got fully_connected: there a context adds the same to "
                "all examples, which normalisation takes away."
            )
        unable = (*MORE_THAN_A_NETWORK, "boil", "random")  # an output layer that stays zero would hide the features from boil
        others = [method for method in self.method if method in unable]
        if self.begin_with is not None and (others or self.seeds > 1):
            given = f"--method {' '.join(others)}" if others else f"--seeds {self.seeds}"
            able = " ".join(method for method in get_args(Method) if method not in unable)
            raise ValueError(f"--begin-with is for one seed and --method {able}, got {given}.")
        check_count("--ways", self.ways, "One class cannot be told from itself.", minimum=2)
        if self.eval_steps < self.test_steps:
            raise ValueError(f"--eval-steps must be at least --test-steps, {self.test_steps}, got {self.eval_steps}.")
        if self.dataset == "folder" and self.data_dir is None:
            raise ValueError("--dataset folder needs --data-dir, a folder of class folders or of train/, val/ and test/.")
        if self.dataset == "folder" and self.out.resolve().is_relative_to(self.data_dir.resolve()):
            raise ValueError(f"--out {self.out} lies in --data-dir, whose folders are classes. Choose another directory.")
        if self.begin_with is None and self.steps == 0:
            raise ValueError("--steps 0 is for --begin-with. For an untrained network take --method random.")


def _preset(name: str, **options: object) -> Options:
    return Options(preset=name, out=Path("out") / name, **options)


FC = {"network": "fully_connected"}
TWENTY_WAY = {"ways": 20, "num_tasks": 16, "inner_steps": 5, "test_steps": 5, "differentiation": "mixed"}
MINI = {"dataset": "miniimagenet", "network": "pooled_conv", "filters": 32, "num_tasks": 4, "queries": 15, "inner_lr": 0.05}
MINI |= {"inner_steps": 5, "test_steps": 10, "differentiation": "mixed"}
# The settings of Antoniou et al.'s code. There networks pool for Omniglot too, and --meta-lr stays for miniImageNet; their
# paper begins in first order.
PLUS = {"method": ("maml++",), "steps": 50_000, "num_tasks": 8, "inner_steps": 5, "test_steps": 5, "inner_lr": 0.1}
PLUS |= {"norm": "scale_and_shift", "annealing": 50_000, "differentiation": "mixed"}
MINI_PLUS = MINI | PLUS | {"num_tasks": 2, "filters": 48, "inner_lr": 0.01, "multi_step_updates": 7_500, "clip": 10}
MINI_PLUS |= {"eval_queries": 15}
# Steps, their size and meta-updates as in Rajeswaran et al.'s code, whose normalisation learns a scale as well, whose Adam has
# an epsilon of 0.001, and whose tasks are 200,000 drawn beforehand. --strength and --damping were chosen here.
IMAML = {"method": ("imaml",), "steps": 20_000, "inner_lr": 0.1, "inner_steps": 16, "test_steps": 16, "eval_steps": 16}
TWENTY_WAY_IMAML = IMAML | {"ways": 20, "num_tasks": 16, "inner_steps": 25, "test_steps": 25, "eval_steps": 25}
# --clip: the authors clip at 10 the gradient of a loss that is summed over N Q queries and divided by K; here it is their
# mean, whose gradient is N Q / K times smaller.
PRESETS = {
    options.preset: options
    for options in (
        _preset("omniglot-5w1s"),
        _preset("omniglot-5w5s", shots=5, queries=5),
        _preset("omniglot-20w1s", **TWENTY_WAY),
        _preset("omniglot-20w5s", shots=5, queries=5, **TWENTY_WAY),
        _preset("omniglot-5w1s-fc", **FC),
        _preset("omniglot-5w5s-fc", shots=5, queries=5, **FC),
        _preset("miniimagenet-5w1s", clip=10 / 75, **MINI),
        _preset("miniimagenet-5w5s", shots=5, clip=10 / 15, **MINI),
        _preset("omniglot-5w1s-maml++", **PLUS),
        _preset("omniglot-5w5s-maml++", shots=5, eval_queries=1, **PLUS),
        _preset("omniglot-20w1s-maml++", ways=20, **PLUS),
        _preset("omniglot-20w5s-maml++", ways=20, shots=5, eval_queries=1, **PLUS),
        _preset("omniglot-5w1s-imaml", **IMAML),
        _preset("omniglot-5w5s-imaml", shots=5, queries=5, **IMAML),
        _preset("omniglot-20w1s-imaml", **TWENTY_WAY_IMAML),
        _preset("omniglot-20w5s-imaml", shots=5, queries=5, **TWENTY_WAY_IMAML),
        _preset("miniimagenet-5w1s-maml++", **MINI_PLUS),
        _preset("miniimagenet-5w5s-maml++", shots=5, **MINI_PLUS),
    )
}


def cell(options: Options) -> str:
    """What results are of: the preset's cell of the table, or what became of it."""
    names = ("dataset", "network", "ways", "shots")
    if all(getattr(options, name) == getattr(PRESETS[options.preset], name) for name in names):
        return options.preset
    return f"{options.dataset}, {options.ways}-way {options.shots}-shot, {options.network}"


def image_shape(options: Options) -> tuple[int, int, int, int]:
    """The shape of one image, [1, H, W, C]."""
    own = (1, options.image_size, options.image_size, options.channels)
    return {"omniglot": (1, 28, 28, 1), "miniimagenet": (1, 84, 84, 3), "folder": own}[options.dataset]


def validation_steps(method: Method, options: Options) -> int:
    """Adaptation steps after which validation chooses the best checkpoint: where they are learned, none beyond these."""
    return min(options.test_steps, options.inner_steps) if method in ("maml++", "meta_lstm") else options.test_steps


def eval_queries(options: Options) -> int:
    """Query images of each class in evaluation."""
    return options.eval_queries or (options.shots if options.protocol == "paper" else 15)


def eval_tasks(options: Options) -> int:
    """Test episodes."""
    return options.eval_tasks or (600 if options.protocol == "paper" else 6000)
