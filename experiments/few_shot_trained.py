"""What runs of `few_shot.py` have learned, for `adapt.py` and for other runs to begin with (`--begin-with`)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from few_shot_learners import build_learner, build_network
from few_shot_presets import MORE_THAN_A_NETWORK, TRANSFER, Method, Options, cell
from jax import Array

from mamljax.checkpoint import CheckpointError, read_config
from mamljax.record import read_metrics
from mamljax.train import read_best
from mamljax.types import PyTree, State


class Trained(NamedTuple):
    """What a method has learned in a run."""

    method: Method
    options: Options  # of the run
    classes: list[str]  # that it learned from, if the images are one's own
    state: State  # the best in validation, [seeds]
    num_updates: int

    @property
    def params(self) -> PyTree:
        """The parameters of its first seed; of a classifier over all training classes, its features."""
        params = jax.tree.map(lambda leaf: leaf[0], self.state.params)
        return params["features"] if self.method in TRANSFER else params

    def __str__(self) -> str:
        """Say what it is, for the results of what begins with it."""
        return f"{self.method} of {cell(self.options)}, {self.num_updates:,} updates"


def read_options(directory: Path) -> Options:
    """Read the options with which a run was trained, from its output directory."""
    try:
        config = read_config(directory)
        if config.pop("experiment") != "few_shot":
            raise ValueError("it is of another experiment")
        return Options(**config | {"precision": "float32"})  # it may go on in any other
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory} is no output directory of few_shot.py ({error}).") from error


def read_trained(directory: Path, num_classes: int) -> Trained:
    """Read what a method has learned in a run, from `OUT/checkpoints/METHOD`.

    Args:
        directory: where its checkpoints lie.
        num_classes: classes for training; a classifier must be one over as many.

    Raises:
        CheckpointError: there is no such run, or it cannot be read.
    """
    method, lines = directory.name, read_metrics(directory / "metrics.jsonl")
    if method not in get_args(Method) or not (directory / "config.json").exists():
        raise CheckpointError(f"{directory} holds no training run of few_shot.py. One is in OUT/checkpoints/METHOD.")
    options, config = read_options(directory.parent.parent), read_config(directory)
    learner = build_learner(method, options, num_classes, eval_steps=options.test_steps, rule=options.inner_lr)
    classes, num_updates = config.get("classes", {}).get("train", []), lines[-1]["update"] if lines else 0
    return Trained(method, options, classes, read_best(learner, directory), num_updates)


def check_held_out(trained: Trained, options: Options, parts: Mapping[str, Sequence[str]]) -> None:
    """Classes for validation and test are none that a network to begin with has learned from.

    Raises:
        CheckpointError: some are.
    """
    seen = sorted({_bare(name) for name in trained.classes} & {_bare(name) for name in (*parts["val"], *parts["test"])})
    if trained.options.dataset == options.dataset and (seen or trained.options.split != options.split):
        which = ", ".join(seen[:5]) + ", ..." * (len(seen) > 5) if seen else f"those of --split {trained.options.split}"
        raise CheckpointError(
            f"--begin-with {trained}, has learned from classes that are for validation or test here: {which}. "
            "Give a run that has the same classes for training."
        )


def classifier_of(trained: Trained) -> tuple[State, int]:
    """The states and number of updates of a trained classifier, which is all that the transfer methods learn."""
    if trained.method not in TRANSFER:
        raise CheckpointError(f"--begin-with must be a classifier of {' or '.join(TRANSFER)} for these methods, got {trained}.")
    return trained.state, trained.num_updates


def beginning_with(trained: Trained, options: Options, init: Callable[[Array], State]) -> Callable[[Array], State]:
    """Let a method of `options` begin with a trained network, instead of with random parameters.

    The features are those of the trained network. Its output layer stays as far as it has enough outputs, the first of more:
    which class is which is drawn anew in every episode. Otherwise, or if it has none for episodes, it begins with zeros.

    Raises:
        CheckpointError: the features are of another network; the first difference is named.
    """
    if trained.method in MORE_THAN_A_NETWORK:
        raise CheckpointError(f"--begin-with cannot take {trained}: it has learned more than a network. Give a run of maml.")
    expected = _shapes(jax.eval_shape(build_network(options, None).init, jax.random.key(0)))
    found = _shapes(trained.params)
    for path in expected:
        if found.get(path) != expected[path]:
            raise CheckpointError(
                f"--begin-with has another network: at {path} {trained}, has {found.get(path, 'nothing')}, expected "
                f"{expected[path]}. Give a run with the same --network, --filters and --norm, and images of the same size."
            )

    def begin(key: Array) -> State:
        state = init(key)
        return state._replace(params={name: _first_of(trained.params.get(name), new) for name, new in state.params.items()})

    return begin


def _first_of(old: PyTree | None, new: PyTree) -> PyTree:
    """The first outputs of a layer, as many as a new one has; zeros if it has too few, or if there is no layer."""
    if old is None or any(a.shape[-1] < b.shape[-1] for a, b in zip(*map(jax.tree.leaves, (old, new)), strict=True)):
        return jax.tree.map(jnp.zeros_like, new)
    return jax.tree.map(lambda a, b: a[..., : b.shape[-1]], old, new)


def _shapes(params: PyTree) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(params)}


def _bare(name: str) -> str:
    """The name of a class without the folder of its part, "train/cat" or "cat"."""
    return name.split("/")[-1]
