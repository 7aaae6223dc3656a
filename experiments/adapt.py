"""Adapt a network trained by few_shot.py to images of your own. `python experiments/adapt.py --help`

Takes a folder of labelled images for each class, fine-tunes the network on them, and writes what it predicts of other
images, with probabilities, as CSV.
"""

import csv
import dataclasses
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from few_shot_learners import network_and_rule, set_precision, start_of
from few_shot_presets import Options as RunOptions
from few_shot_presets import image_shape
from few_shot_trained import read_options, read_trained

from mamljax.checks import check_count
from mamljax.data.bank import DataError
from mamljax.data.decoding import decode
from mamljax.data.folders import SUFFIXES, images_of_class
from mamljax.figures import steps_taken
from mamljax.files import write_atomically
from mamljax.losses import cross_entropy
from mamljax.maml import fine_tune
from mamljax.run_directory import CheckpointError
from mamljax.types import Examples

AT_A_TIME = 256  # images to classify


@dataclasses.dataclass(frozen=True)
class Options:
    """Adapt a trained network to images of your own. Images of any size and mode are converted to those it was trained on."""

    checkpoint: Path
    """Output directory of a few_shot.py run."""
    support: Path
    """Directory with a folder of labelled images for each class; the folder's name is the label."""
    query: Path
    """Directory of the images to classify, in folders or not. Networks normalise by the images that they see together: each
    is seen with the support images, so that its prediction depends on no other."""
    method: Literal[
        *("maml", "fomaml", "anil", "boil", "context", "meta_sgd", "maml++", "imaml", "proto_maml", "meta_lstm", "pretrained")
    ] = "maml"
    """Which of the run's networks."""
    steps: int | None = None
    """Adaptation steps; by default as many as the run's --test-steps."""
    inner_lr: float | None = None
    """Step size; by default that of the run's adaptation. The pretrained network has none: its best is in the run's report.
    Those of meta_sgd, maml++ and meta_lstm are learned."""
    out: Path = Path("predictions.csv")
    """The file to write: a line for each image with its path, the predicted class, and the probability of each class."""


def predict(options: Options) -> tuple[list[str], list[str], np.ndarray]:
    """Adapt the network; returns the class names [N], the query files [n], and probabilities [n, N]."""
    run = read_options(options.checkpoint)
    steps, lr = steps_and_lr(options, run)
    names, support = labelled_images(options, run)
    queries = images_in(options.query)

    # The network as it was trained, and then adapted to the images with labels.
    set_precision(run)
    trained = read_trained(options.checkpoint / "checkpoints" / options.method, run.ways)
    network, rule = network_and_rule(options.method, run, lr)
    start = start_of(options.method, run, trained.params, support)
    adapted, _ = fine_tune(network, cross_entropy, start, support, rule, steps)

    # An image by itself is seen beside the support images, by which the network normalises; it is the last of them.
    def logits(x: jax.Array) -> jax.Array:
        return network.apply(adapted, jnp.concatenate([support.x, x[None]]))[-1]

    @jax.jit
    def probabilities_of(images: jax.Array) -> jax.Array:
        return jax.nn.softmax(jax.lax.map(logits, images))

    # Not all files at once: there may be more of them than memory holds.
    starts = range(0, len(queries), AT_A_TIME)
    probabilities = np.concatenate([probabilities_of(load(queries[start : start + AT_A_TIME], run)) for start in starts])
    if not np.isfinite(probabilities).all():
        raise ValueError(
            f"adaptation diverged: the probabilities are not finite after {steps} steps. Lower --inner-lr or --steps."
        )
    before, after = (cross_entropy(network.apply(params, support.x), support.y) for params in (start, adapted))
    if after > before:
        rise = f"the loss on the labelled images rose from {before:.3g} to {after:.3g}"
        print(f"note: {rise} {steps_taken(steps)}: trust no prediction. Lower --inner-lr or --steps.", file=sys.stderr)
    return names, [str(file) for file in queries], probabilities


def steps_and_lr(options: Options, run: RunOptions) -> tuple[int, float]:
    """How many adaptation steps to take, and their size: those of the run, unless the command line says otherwise."""
    if options.method == "pretrained" and options.inner_lr is None:
        raise ValueError(
            "a pretrained network has no step size of its own. "
            f"Give --inner-lr; {options.checkpoint / 'report.md'} has the best one."
        )
    if options.method in ("meta_sgd", "maml++", "meta_lstm") and options.inner_lr is not None:
        raise ValueError(f"--method {options.method} has learned its step sizes. Leave --inner-lr out.")
    steps = run.test_steps if options.steps is None else options.steps
    check_count("--steps", steps)
    return steps, run.inner_lr if options.inner_lr is None else options.inner_lr


def labelled_images(options: Options, run: RunOptions) -> tuple[list[str], Examples]:
    """Read the support set, a folder for each class: the names of the classes [N], and their images."""
    folders = sorted(path for path in listed(options.support) if path.is_dir())
    if len(folders) != run.ways:
        alternative = f", or train with --ways {len(folders)}." if len(folders) > 1 else "."
        raise DataError(
            f"{options.support} holds {len(folders)} class folders, but the network of {options.checkpoint} tells {run.ways} "
            f"classes apart. Give {run.ways}{alternative}"
        )
    files = [images_of_class(folder) for folder in folders]
    if run.statistics == "inductive" and any(len(of_class) != run.shots for of_class in files):
        raise DataError(f"an inductive network needs exactly {run.shots} support images of each class, as in its training.")
    labels = np.repeat(np.arange(run.ways), [len(of_class) for of_class in files])
    all_files = [file for of_class in files for file in of_class]
    x, seen = load(all_files, run), {}
    for file, label, image in zip(all_files, labels, np.asarray(x), strict=True):
        other, other_label = seen.setdefault(image.tobytes(), (file, label))
        if other_label != label:
            raise DataError(f"one image has two labels: {other} and {file}. Delete one of them.")
    return [folder.name for folder in folders], Examples(x, jnp.asarray(labels))


def listed(directory: Path) -> list[Path]:
    """What is in a directory, but for hidden files."""
    try:
        return sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read the directory {directory}: {error.strerror}.") from error


def images_in(directory: Path) -> list[Path]:
    """All image files in a directory and below, but for hidden ones, in the order of their names; at least one."""
    files, entered, waiting = [], set(), [directory]
    while waiting:
        folder = waiting.pop()
        if folder.resolve() in entered:  # by a symbolic link
            continue
        entered.add(folder.resolve())
        inside = listed(folder)
        waiting += [path for path in inside if path.is_dir()]
        files += [path for path in inside if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not files:
        raise DataError(f"{directory} holds no images ({' '.join(SUFFIXES)}).")
    return sorted(files)


def load(files: Sequence[Path], run: RunOptions) -> jax.Array:
    """Read images as the network was trained on them: [n, H, W, C] float32 in [0, 1]."""
    _, size, _, channels = image_shape(run)
    images = np.stack([decode(file, size=size, channels=channels, name=file, draft=True) for file in files])
    return jnp.asarray((255 - images if run.dataset == "omniglot" else images).astype(np.float32) / 255)


def main(argv: Sequence[str] | None = None) -> int:
    """Adapt, predict, and write the CSV file; returns 2 if something is wrong with the input."""
    options = tyro.cli(Options, args=argv)
    try:
        if options.out.exists() and not options.out.is_file():
            raise ValueError(f"--out must be the file to write, but {options.out} is something else.")
        if options.out.suffix.lower() in SUFFIXES:
            raise ValueError(f"--out is for a table, but {options.out} has the name of an image. Call it .csv.")
        options.out.parent.mkdir(parents=True, exist_ok=True)  # before the work, which would be lost
        names, files, probabilities = predict(options)
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["file", "prediction", *(f"p({name})" for name in names)])
        for file, row in zip(files, probabilities, strict=True):
            table.writerow([file, names[row.argmax()], *(f"{p:.4f}" for p in row)])
        write_atomically(options.out, text.getvalue())
    except (ValueError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write to {error.filename or options.out}: {error.strerror}.", file=sys.stderr)
        return 2
    print(f"{len(files)} predictions written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
