"""The images of `few_shot.py`, and what it draws from them."""

import functools
from typing import NamedTuple

import jax
import numpy as np
from few_shot_presets import TRANSFER, Options, eval_queries
from jax import Array

from mamljax.data.bank import Bank, images_of
from mamljax.data.folders import image_folders, split_folders
from mamljax.data.miniimagenet import miniimagenet
from mamljax.data.omniglot import omniglot, split_omniglot
from mamljax.tasks.images import HostEpisodes, episodes, inductive, labelled
from mamljax.types import SampleFn


class Data(NamedTuple):
    """The samplers of a data set."""

    num_classes: int  # in training
    checksum: str  # of all images
    parts: dict[str, list[str]]  # the names of the classes of each split
    train: SampleFn  # episodes
    val: SampleFn
    test: SampleFn
    labelled: SampleFn | None  # batches of training images labelled by their class, if a method needs them


def load(options: Options) -> Data:
    """Open the images of `--dataset` and build the samplers of its three splits."""
    if options.dataset == "omniglot":
        bank = omniglot(options.data_dir, options.cache_dir)
        split = split_omniglot(bank.names, options.split)
    elif options.dataset == "miniimagenet":
        bank = miniimagenet(options.data_dir, options.cache_dir)
        split = split_folders(bank.names)
    else:
        bank = image_folders(options.data_dir, options.cache_dir, size=options.image_size, channels=options.channels)
        split = split_folders(bank.names)
    # As in the paper, after Santoro et al. 2016: a character that is turned is another character.
    rotations = options.dataset == "omniglot"
    shared = {"ways": options.ways, "shots": options.shots, "rotations": rotations}

    @functools.cache
    def images_on_device(part: str) -> Array:
        return jax.device_put(images_of(bank, split[part]))

    def sampler(part: str, queries: int) -> SampleFn:
        classes = split[part]
        check_images(bank, classes, options.shots + queries, part, "--queries" if part == "train" else "--eval-queries")
        arguments = shared | {"queries": queries, "counts": bank.counts[classes]}
        try:
            if options.images_on == "host":
                sample = HostEpisodes(bank.images, classes=classes, **arguments)
            else:
                sample = episodes(images_on_device(part), **arguments)
        except ValueError as error:
            raise ValueError(f"the {part} split, {len(classes)} of {len(bank.names)} classes: {error}") from error
        return inductive(sample) if options.statistics == "inductive" else sample

    # Classifiers over all training classes learn from batches as large as an episode.
    classifier_sample = None
    if set(TRANSFER) & set(options.method):
        batch_size = options.ways * (options.shots + options.queries)
        counts = bank.counts[split["train"]]
        classifier_sample = labelled(images_on_device("train"), batch_size=batch_size, rotations=rotations, counts=counts)
    return Data(
        num_classes=len(split["train"]),
        checksum=bank.checksum,
        parts={part: [bank.names[index] for index in indices] for part, indices in split.items()},
        train=sampler("train", options.queries),
        val=sampler("val", eval_queries(options)),
        test=sampler("test", eval_queries(options)),
        labelled=classifier_sample,
    )


def check_images(bank: Bank, classes: np.ndarray, needed: int, part: str, flag: str) -> None:
    """Raise `ValueError` unless every class of a split has as many images as an episode takes of it."""
    few = {bank.names[index]: int(bank.counts[index]) for index in classes if bank.counts[index] < needed}
    if few:
        raise ValueError(
            f"episodes of the {part} split need {needed} images of each class, support and query images together, but some "
            f"have fewer: {', '.join(f'{name} {count}' for name, count in list(few.items())[:5])}{', ...' * (len(few) > 5)}. "
            f"Add images to them, leave them out, or lower --shots or {flag}."
        )
