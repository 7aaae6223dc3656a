"""What is said of numbers that are not finite, and the means of those that are."""

import numpy as np
import pytest

from mamljax.divergence import DivergenceError, finite_means

NAN = np.nan


def means(metrics, finite=(), done=10, stop=13):
    return finite_means({name: np.array(values) for name, values in metrics.items()}, finite, done, stop, "; kept")


def test_means_are_of_the_updates_made_and_of_all_seeds():
    assert means({"loss": [1.0, 2.0, 6.0, NAN], "grad_norm": [1.0, 1.0, 1.0, 0.0]}) == {"loss": 3, "grad_norm": 1}
    assert means({"loss": [[1.0, 2.0, 6.0, NAN], [2.0, 3.0, 7.0, 0.0]]}) == {"loss": 3.5}


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        ([1, NAN, NAN], "loss became nan"),
        ([[1, -np.inf, 1]], "loss became -inf"),  # of one seed alone nobody asks which it is
        ([[1, 1, NAN], [1, np.inf, NAN], [1, 1, 1]], "loss of seed number 1 became inf"),
    ],
)
def test_the_first_update_that_was_not_finite_is_named_and_its_seed(loss, what):
    with pytest.raises(DivergenceError, match=f"^{what} at meta-update 12; kept. Lower the inner or the outer step size"):
        means({"grad_norm": np.ones_like(loss), "loss": loss})


def test_a_parameter_that_is_not_finite_is_named():
    finite = {"Dense_0": {"bias": np.array([True, True]), "kernel": np.array([True, False])}}
    with pytest.raises(
        DivergenceError, match=r"^params\['Dense_0'\]\['kernel'\] is no longer finite after meta-update 13; kept"
    ):
        means({"loss": [1.0, 2.0, 3.0]}, finite)
