"""The overhead benchmark at tiny size, and that both sides of it compute the same."""

import jax
import numpy as np
import optax
import overhead

from mamljax import report
from mamljax.losses import mse
from mamljax.maml import maml
from mamljax.models import mlp


def test_both_sides_learn_alike():
    """They draw other tasks, so their losses agree within the noise of 300 meta-batches."""
    model = mlp(1, (40, 40), 1)
    learner = maml(model, mse, rule=overhead.INNER_LR, inner_steps=1, eval_steps=1, tx=optax.adam(1e-3))
    hand = np.asarray(overhead.by_hand(learner.init(jax.random.key(0)).params, 600)())[-300:]
    library = np.asarray(overhead.by_library(learner, 600)())[-300:]
    error = np.sqrt((hand.var() + library.var()) / 300)
    assert abs(hand.mean() - library.mean()) < 5 * error


def test_writes_a_row_of_each(tmp_path):
    assert overhead.main(["--updates", "2", "--repeats", "1", "--out", str(tmp_path)]) == 0
    rows = report.read_results(tmp_path / "results.json")["rows"]
    assert next(row.mean for row in rows if row.metric == "relative to by hand") == 1.0
    assert len(rows) == 8
    assert all(row.mean > 0 for row in rows)


def test_counts_are_positive(tmp_path, capsys):
    assert overhead.main(["--updates", "0", "--out", str(tmp_path / "run")]) == 2
    assert "error: --updates must be a whole number of at least 1, got 0" in capsys.readouterr().err
