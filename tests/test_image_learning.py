"""MAML on images: it learns what can be learnt, and scores chance where nothing can."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamljax.evaluate import evaluate
from mamljax.image_models import BatchStatNorm, StridedConvNet
from mamljax.losses import accuracy, cross_entropy
from mamljax.maml import maml
from mamljax.models import from_linen
from mamljax.rules import all_but
from mamljax.tasks.images import episodes, inductive
from mamljax.train import fit

WAYS, SHOTS, QUERIES, TASKS = 3, 2, 4, 300
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (20, 8, 8, 8, 1)).astype(np.uint8)
MEANS = RNG.integers(0, 256, (20, 1, 8, 8, 1))  # a picture for each class
PICTURES = np.clip(MEANS + RNG.normal(0, 40, NOISE.shape), 0, 255).astype(np.uint8)


def learner_with(reference=None):
    norm = functools.partial(BatchStatNorm, reference=reference)
    model = from_linen(StridedConvNet(WAYS, filters=8, blocks=2, norm=norm), jnp.zeros((1, 8, 8, 1)))
    rule = all_but(("shift",), 0.5)
    arguments = {"rule": rule, "inner_steps": 1, "eval_steps": 3, "tx": optax.adam(3e-3), "differentiation": "reverse"}
    return maml(model, cross_entropy, metric_fns={"accuracy": accuracy}, **arguments)


def sampler(images):
    return episodes(images, ways=WAYS, shots=SHOTS, queries=QUERIES)


def shuffled(key, *, sample):
    """An episode whose query labels say nothing."""
    task = sample(key)
    return task._replace(query=task.query._replace(y=jax.random.permutation(jax.random.fold_in(key, 1), task.query.y)))


@functools.cache
def trained(on):
    images = {"noise": NOISE, "pictures": PICTURES}[on][:12]
    return fit(learner_with(), sampler(images), key=jax.random.key(0), num_updates=150, num_tasks=8, progress=False).state


def scores(state, sample, learner=None):
    """Mean accuracy before and after each step, and the standard error of what guessing would get."""
    values = evaluate(learner or learner_with(), state, sample, key=jax.random.key(1), num_tasks=TASKS)["accuracy"]
    return np.asarray(values).mean(0), float(np.std(values[:, -1]) / np.sqrt(TASKS))


@pytest.mark.slow
def test_learns_pictures_and_generalises_to_classes_never_seen():
    mean, _ = scores(trained("pictures"), sampler(PICTURES[12:]))
    assert abs(mean[0] - 1 / WAYS) < 0.15
    assert mean[-1] > 0.85


@pytest.mark.slow
def test_noise_scores_chance():
    mean, error = scores(trained("noise"), sampler(NOISE[12:]))
    assert np.abs(mean - 1 / WAYS).max() < 4.5 * error


@pytest.mark.slow
def test_shuffled_query_labels_score_chance():
    mean, error = scores(trained("pictures"), functools.partial(shuffled, sample=sampler(PICTURES[12:])))
    assert np.abs(mean - 1 / WAYS).max() < 4.5 * error


@pytest.mark.slow
def test_inductive_predictions_do_not_depend_on_the_other_queries():
    """Through the whole of evaluation: scored one query at a time, the accuracy is the same as of all at once."""
    learner, state = learner_with(reference=WAYS * SHOTS), trained("pictures")
    task = inductive(sampler(PICTURES[12:]))(jax.random.key(2))
    together = jax.jit(learner.evaluate)(jax.random.key(0), state, task)["accuracy"]
    support, queries = WAYS * SHOTS, WAYS * QUERIES

    @jax.jit
    def of_one(i):
        rows = jnp.concatenate([jnp.arange(support), support + i[None]])
        single = task._replace(query=jax.tree.map(lambda leaf: leaf[rows], task.query))
        return learner.evaluate(jax.random.key(0), state, single)["accuracy"]

    alone = [of_one(jnp.int32(i)) for i in range(queries)]
    np.testing.assert_allclose(np.mean(alone, axis=0), together, rtol=1e-5)
    assert together[-1] > 0.5
