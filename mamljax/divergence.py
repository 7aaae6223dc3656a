"""Divergence: a training that is no longer finite stops at once, and is never saved so."""

import jax
import numpy as np

from mamljax.types import Metrics, PyTree


class DivergenceError(FloatingPointError):
    """A metric, such as the loss or the meta-gradient's norm, or a parameter is no longer finite."""


def finite_means(metrics: Metrics, finite: PyTree, done: int, stop: int, where: str) -> dict[str, float]:
    """The mean of each metric over some updates; raises `DivergenceError` if one is not finite, or a parameter after them.

    Args:
        metrics: [..., length] of each update, of which the first `stop - done` were made.
        finite: whether all numbers of each array of parameters are finite, in the structure of the parameters.
        done: meta-updates before these.
        stop: meta-updates after these.
        where: what is kept, to end a message with.
    """
    made = {name: np.asarray(values)[..., : stop - done] for name, values in metrics.items()}
    _check_metrics(made, done, where)
    for path, leaf in jax.tree.leaves_with_path(finite):
        if not np.all(leaf):
            name = "params" + jax.tree_util.keystr(path)
            raise DivergenceError(f"{name} is no longer finite after meta-update {stop}{where}. Lower the outer step size.")
    return {name: float(values.mean(dtype=np.float64)) for name, values in made.items()}


def _check_metrics(metrics: dict[str, np.ndarray], done: int, where: str) -> None:
    for name, values in metrics.items():
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            # The first in time, of whichever seed.
            *seed, offset = bad[bad[:, -1].argmin()]
            seeds = f" of seed number {seed[0]}" if len(values) > 1 and seed else ""
            update = done + offset + 1
            remedy = "Lower the inner or the outer step size, or clip the meta-gradient."
            # Before the first meta-update nothing was learned that could have gone wrong: so look at the data.
            if update == 1:
                remedy = (
                    "Look for values that are not finite in the data (or observations and rewards), and for labels that do not "
                    f"count from 0 or are more than the outputs. {remedy}"
                )
            raise DivergenceError(f"{name}{seeds} became {values[(*seed, offset)]} at meta-update {update}{where}. {remedy}")
