"""What runs of `few_shot.py` have learned, for `adapt.py` and for other runs to begin with (`--begin-with`)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from few_shot_learners import build_learner
from few_shot_presets import MORE_THAN_A_NETWORK, TRANSFER, Method, Options, cell, image_shape
from jax import Array

from mamljax.record import best_update, read_metrics
from mamljax.run_directory import CheckpointError, read_config
from mamljax.train import read_best
from mamljax.types import PyTree, State

Source = dict[str, Any]  # what a network has learned from: its "dataset", "split", and "classes" if the images are one's own


class Trained(NamedTuple):
    """What a method has learned in a run."""

    method: Method
    options: Options  # of the run
    state: State  # the best in validation, [seeds]
    num_updates: int
    best_update: int | None  # that of `state`, if any was validated
    sources: list[Source]  # those of the network that it began with, too

    @property
    def params(self) -> PyTree:
        """The parameters of its first seed; of a classifier over all training classes, its features."""
        params = jax.tree.map(lambda leaf: leaf[0], self.state.params)
        return params["features"] if self.method in TRANSFER else params

    def __str__(self) -> str:
        """Say what it is, for the results of what begins with it."""
        best = "" if self.best_update in (None, self.num_updates) else f", best at {self.best_update:,}"
        return f"{self.method} of {cell(self.options)}, {self.num_updates:,} updates{best}"


def read_options(directory: Path) -> Options:
    """Read the options with which a run was trained, from its output directory."""
    try:
        config = read_config(directory)
        if config.pop("experiment") != "few_shot":
            raise ValueError("it is of another experiment")
        return Options(**config | {"precision": "float32"})  # it may go on in any other
    except (ValueError, KeyError, TypeError) as error:
        hint = (
            f" Give {directory.parent.parent} and --method {directory.name}." if directory.parent.name == "checkpoints" else ""
        )
        raise CheckpointError(f"{directory} is no output directory of few_shot.py ({error}).{hint}") from error


def read_trained(directory: Path, num_classes: int) -> Trained:
    """Read what a method has learned in a run, from `OUT/checkpoints/METHOD`.

    Args:
        directory: where its checkpoints lie.
        num_classes: classes for training; a classifier must be one over as many, unless the images are one's own.

    Raises:
        CheckpointError: there is no such run, or it cannot be read.
    """
    directory = directory.absolute()
    method, lines = directory.name, read_metrics(directory / "metrics.jsonl")
    if method not in get_args(Method) or not (directory / "config.json").exists():
        beside = {path.parent.name for path in directory.parent.glob("*/config.json")} & {*get_args(Method)}
        trained = ", ".join(sorted(beside)) if directory.parent.name == "checkpoints" else ""
        has = f"There is one of {trained} beside it." if trained else "One is in OUT/checkpoints/METHOD."
        raise CheckpointError(f"{directory} holds no training run of few_shot.py. {has}")
    options, config = read_options(directory.parent.parent), read_config(directory)
    classes, num_updates = (config.get("classes") or {}).get("train", []), lines[-1]["update"] if lines else 0
    own = {"dataset": options.dataset, "split": options.split, "classes": classes}
    sizes = {"eval_steps": options.test_steps, "rule": options.inner_lr}
    learner = build_learner(method, options, len(classes) or num_classes, **sizes)
    # Before its first meta-update a network has learned from no class.
    sources = (config.get("begun_with") or []) + ([own] if num_updates > 0 else [])
    return Trained(method, options, read_best(learner, directory), num_updates, best_update(directory), sources)


def check_begin_with(trained: Trained, options: Options, parts: Mapping[str, Sequence[str]]) -> None:
    """Check that a run can begin with a trained network, and is validated and tested on no class that it has learned from.

    Args:
        trained: the network.
        options: of the run.
        parts: the names of the run's classes for "train", "val" and "test".

    Raises:
        CheckpointError: it is not one network, is no classifier where the methods need one, is another network than that of
            the options, or has seen such classes.
    """
    if trained.method in MORE_THAN_A_NETWORK or trained.options.seeds > 1:
        raise CheckpointError(f"--begin-with takes one network, and this is more ({trained}). Give one of maml, of one seed.")
    if (transfer := [method for method in options.method if method in TRANSFER]) and trained.method not in TRANSFER:
        needed = " or ".join(TRANSFER)
        raise CheckpointError(f"--begin-with must be of {needed} for --method {' '.join(transfer)}, not {trained}.")
    # It must be the network of this run, but for the output layer.
    old, new = (
        {f"--{name}": getattr(each, name) for name in ("network", "filters", "norm", "statistics")}
        | {"images of": list(image_shape(each))}
        for each in (trained.options, options)
    )
    if differences := [f"{name} {old[name]}, here {new[name]}" for name in old if old[name] != new[name]]:
        raise CheckpointError(f"--begin-with has another network ({trained}): {'; '.join(differences)}. Give the same.")
    # None of the classes that it learned from may be for validation or test here.
    for source in trained.sources:
        seen = sorted(_comparable(source["classes"], parts) & _comparable([*parts["val"], *parts["test"]], parts))
        other_split = source["dataset"] == options.dataset == "omniglot" and source["split"] != options.split
        if seen or other_split:
            some = ", ".join(seen[:5]) + (", ..." if len(seen) > 5 else "")
            which = some if seen else f"those of --split {source['split']}"
            raise CheckpointError(
                f"--begin-with has learned from classes that are for validation or test here ({trained}): {which}. "
                "Give a run with the same classes for training. If they only have the same names, rename the folders."
            )


def beginning_with(trained: Trained, init: Callable[[Array], State]) -> Callable[[Array], State]:
    """Let a method begin with a trained network, instead of with random parameters.

    The features are those of the trained network. Its output layer stays if it has enough outputs, the first of more: which
    class is which is drawn anew in every episode. Otherwise, or if it has none for episodes, it begins with zeros.
    """

    def begin(key: Array) -> State:
        state = init(key)
        return state._replace(params={name: _first_of(trained.params.get(name), new) for name, new in state.params.items()})

    return begin


def _first_of(old: PyTree | None, new: PyTree) -> PyTree:
    """The first outputs of a layer, as many as a new one has; zeros if it has too few, or if there is no layer."""
    if old is None or any(a.shape[-1] < b.shape[-1] for a, b in zip(*map(jax.tree.leaves, (old, new)), strict=True)):
        return jax.tree.map(jnp.zeros_like, new)
    return jax.tree.map(lambda a, b: a[..., : b.shape[-1]], old, new)


def _comparable(names: Sequence[str], parts: Mapping[str, Sequence[str]]) -> set[str]:
    """Names of classes without the folder of their part, as in "train/cat", unless some then become equal in these parts."""
    there = [name for part in parts.values() for name in part]
    ambiguous = len({name.split("/")[-1] for name in there}) < len(there)
    return {name if ambiguous else name.split("/")[-1] for name in names}
