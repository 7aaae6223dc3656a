"""Features of a classifier over all training classes: the two baselines of Ravi & Larochelle 2017 (ICLR, section 5)."""

from collections.abc import Mapping

import optax
from jax import Array

from mamljax.baselines.pretrain import pretrain
from mamljax.checks import check_count, check_metric_fns
from mamljax.comparison import cosine_similarity, evaluation, largest_of_class
from mamljax.maml import learning_curve
from mamljax.models import with_linear_head
from mamljax.rules import Rule, rule_for
from mamljax.types import LossFn, MetaLearner, Metrics, Model, PyTree, State, Task


def fine_tuning(
    features: Model,
    x: Array,
    loss_fn: LossFn,
    *,
    num_classes: int,
    ways: int,
    rule: Rule,
    eval_steps: int,
    tx: optax.GradientTransformation,
    metric_fns: Mapping[str, LossFn] = {},
    chunk_size: int | None = None,
) -> MetaLearner:
    """Train a classifier over all training classes; in evaluation, fine-tune it with a new output layer.

    Args:
        features: images [n, H, W, C] -> features [n, d].
        x: [n, H, W, C] an example input, for its shape and dtype only.
        loss_fn: (logits, labels) -> scalar, the mean over examples.
        num_classes: classes in training, of tasks from `tasks.images.labelled`.
        ways: N, classes of the episodes in evaluation, at least 2; labels are 0..N-1.
        rule: step size or Optax transformation of the fine-tuning.
        eval_steps: steps of fine-tuning.
        tx: the outer optimiser.
        metric_fns: further (logits, labels) -> scalar to report in evaluation, by name.
        chunk_size: tasks differentiated at a time; see `outer.meta_learner`.

    Returns:
        A meta-learner whose `evaluate` returns the `loss` and the metrics on the query set, each [eval_steps + 1].

    Raises:
        ValueError: a count below 1, a single class, a step size that is not positive and finite.
    """
    check_count("ways", ways, minimum=2)
    check_count("eval_steps", eval_steps)
    check_metric_fns(metric_fns)
    new_model = with_linear_head(features, x, ways)
    rule = rule_for(new_model, rule, differentiable=False)

    def evaluate(key: Array, state: State, task: Task) -> Metrics:
        # A new output layer for each task, and below it the features as they were trained.
        params = new_model.init(key) | {"features": state.params["features"]}
        return learning_curve(new_model, loss_fn, params, task, rule, eval_steps, metric_fns=metric_fns)

    return _classifier(features, x, loss_fn, num_classes, tx, chunk_size)._replace(evaluate=evaluate)


def nearest_neighbour(
    features: Model,
    x: Array,
    loss_fn: LossFn,
    *,
    num_classes: int,
    ways: int,
    tx: optax.GradientTransformation,
    metric_fns: Mapping[str, LossFn] = {},
    chunk_size: int | None = None,
) -> MetaLearner:
    """Train a classifier over all training classes; in evaluation, compare its features with those of the support images.

    The logit of a class is the largest cosine similarity with one of its support images. Support and query set go through the
    network apart, each normalised by itself where it is by its examples. Arguments and errors are those of `fine_tuning`.

    Returns:
        A meta-learner whose `evaluate` returns the `loss` and the metrics on the query set, each [1].
    """
    check_count("ways", ways, minimum=2)

    def compare(params: PyTree, task: Task) -> Array:
        support, query = (features.apply(params["features"], examples.x) for examples in task)
        return largest_of_class(cosine_similarity(query, support), task.support.y, ways)

    evaluate = evaluation(compare, loss_fn, metric_fns)
    return _classifier(features, x, loss_fn, num_classes, tx, chunk_size)._replace(evaluate=evaluate)


def _classifier(
    features: Model, x: Array, loss_fn: LossFn, num_classes: int, tx: optax.GradientTransformation, chunk_size: int | None
) -> MetaLearner:
    model = with_linear_head(features, x, num_classes)
    return pretrain(model, loss_fn, rule=1.0, eval_steps=0, tx=tx, chunk_size=chunk_size)  # nothing is fine-tuned here
