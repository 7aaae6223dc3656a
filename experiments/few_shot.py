"""Few-shot image classification: table 1 of Finn et al. 2017, a preset for each cell. `python experiments/few_shot.py`

Each method learns from episodes of N classes with K labelled images each, and is judged on episodes of classes that it
never saw, after 0 to 10 steps of gradient descent on their labelled images.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax
import runner
from few_shot_data import Data, load
from few_shot_learners import build_learner, network_and_rule, set_precision, start_of
from few_shot_presets import (
    MAML,
    PRESETS,
    TRANSFER,
    TUNED,
    Method,
    Options,
    cell,
    eval_tasks,
    validation_steps,
)
from few_shot_published import PUBLISHED, PUBLISHED_STEPS, SOURCE, SOURCES
from few_shot_trained import Trained, beginning_with, check_begin_with, read_trained
from jax import Array
from jax.tree_util import Partial

from mamljax import report
from mamljax.closures import as_partial
from mamljax.evaluate import evaluate, mean_and_ci95
from mamljax.figures import new_figure, steps_taken
from mamljax.losses import cross_entropy
from mamljax.maml import fine_tune
from mamljax.types import MetaLearner, PyTree, SampleFn, State, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def execute(options: Options, run: runner.Run) -> None:
    """Train every method, evaluate all on the same test episodes, draw the figures."""
    set_precision(options)
    data, begun_with = load(options), None
    if options.begin_with is not None:
        begun_with = read_trained(options.begin_with, data.num_classes)
        check_begin_with(begun_with, options, data.parts)
    # Results say of which images they are.
    run.config["bank"] = data.checksum
    rows, trained = [], {}
    for method in options.method:
        states, num_updates = train(method, options, run, data, begun_with)
        if num_updates == 0 and options.steps and method in run.results:  # time ran out before
            continue
        with run.evaluating(method, eval_tasks(options)):
            lr = tuned_lr(method, options, data, states) if method in TUNED else options.inner_lr
            learner = build_learner(method, options, data.num_classes, eval_steps=options.eval_steps, rule=lr)
            sizes = {"num_tasks": eval_tasks(options), "chunk_size": runner.tasks_at_a_time(options, at_least=40)}
            scores = accuracies(learner, states, data.test, seed=runner.TEST_SEED, **sizes)
        notes = [] if begun_with is None else [f"from {begun_with}"]
        notes += [f"step size {lr:g}"] if method in TUNED else []
        effort = run.effort(method, best=True) | {"meta_updates": num_updates}
        rows += rows_of(method, options, 100 * scores, note=", ".join(notes), **effort)
        # Of the first seed, whose episodes are drawn below.
        trained[method] = jax.tree.map(lambda leaf: leaf[0], states), lr
    results = run.write(rows)
    report.learning_curves(results, options.out / "learning_curves.png")
    report.training_curves({method: run.directory(method) for method in trained}, options.out / "training_curves.png")
    for method in trained.keys() & {*MAML}:
        draw_episodes(method, options, data, *trained[method], options.out / f"episodes_{method}.png")


def rows_of(method: Method, options: Options, scores: Array, **fields: object) -> list[report.Row]:
    """Rows of the results, one for each step, of accuracies in % [seeds, num_tasks, S + 1], beside the published one."""
    mean, ci95 = mean_and_ci95(scores)
    # Where no steps are taken the published number stands beside the only one.
    published_step = PUBLISHED_STEPS.get(method, options.test_steps) if len(mean) > 1 else 0
    published = PUBLISHED.get((options.dataset, options.network, options.ways, options.shots, method))
    return report.rows_over_steps(
        mean,
        ci95,
        method=method,
        setting=cell(options),
        protocol=f"{options.protocol}, inductive" if options.statistics == "inductive" else options.protocol,
        metric="accuracy in %",
        tasks=eval_tasks(options),
        published={} if published is None else {published_step: published},
        source=SOURCES.get(method, SOURCE),
        **fields,
    )


def train(method: Method, options: Options, run: runner.Run, data: Data, begun_with: Trained | None) -> tuple[State, int]:
    """Train a method from every seed; returns the best states [seeds] and the number of meta-updates done."""
    lr = options.tuning_lrs[0] if method in TUNED else options.inner_lr
    learner = build_learner(method, options, data.num_classes, eval_steps=validation_steps(method, options), rule=lr)
    if method == "random":
        return jax.vmap(learner.init)(run.keys), 0
    if begun_with is not None and method in TRANSFER:
        return begun_with.state, begun_with.num_updates
    classes = data.parts if options.dataset == "folder" else None  # the others have class lists of their own
    # What decides how the training goes, and is in no option.
    config = {"bank": data.checksum, "classes": classes, "begun_with": None if begun_with is None else begun_with.sources}
    if begun_with is not None:
        learner = learner._replace(init=beginning_with(begun_with, learner.init))

    def validation_error(sample: SampleFn, state: State) -> Array:
        key = jax.random.key(runner.VALIDATION_SEED)
        sizes = {"num_tasks": options.validation_tasks, "chunk_size": runner.tasks_at_a_time(options, at_least=40)}
        scores = evaluate(learner, state, sample, key=key, **sizes)
        return 1 - scores["accuracy"][:, -1].mean()

    sample = data.labelled if method in TRANSFER else data.train
    result = run.train(method, learner, sample, validate_fn=Partial(validation_error, as_partial(data.val)), config=config)
    return result.best, result.num_updates


def accuracies(learner: MetaLearner, states: State, sample: SampleFn, *, num_tasks: int, chunk_size: int, seed: int) -> Array:
    """Accuracy of states [seeds] on the query sets, before and after each step: [seeds, num_tasks, S + 1]."""
    scores = []
    # One seed after the other, in the memory that one takes.
    for index in range(len(jax.tree.leaves(states)[0])):
        state = jax.tree.map(lambda leaf, index=index: leaf[index], states)
        key = jax.random.key(seed)
        scores.append(evaluate(learner, state, sample, key=key, num_tasks=num_tasks, chunk_size=chunk_size)["accuracy"])
    return jnp.stack(scores)


def tuned_lr(method: Method, options: Options, data: Data, states: State) -> float:
    """The step size of fine-tuning with the best mean accuracy on validation episodes, after as many steps as the paper's."""

    @jax.jit
    def score(lr: Array, states: State, sample: SampleFn) -> Array:
        learner = build_learner(method, options, data.num_classes, eval_steps=options.test_steps, rule=optax.sgd(lr))
        sizes = {"num_tasks": options.validation_tasks, "chunk_size": runner.tasks_at_a_time(options, at_least=40)}
        scores = accuracies(learner, states, sample, seed=runner.VALIDATION_SEED, **sizes)
        return scores[..., -1].mean()

    return max(options.tuning_lrs, key=lambda lr: score(lr, states, as_partial(data.val)))


def draw_episodes(method: Method, options: Options, data: Data, state: State, lr: float, path: Path, *, count: int = 4) -> None:
    """Draw test episodes: support images, then query images with their prediction before and after adaptation."""
    network, rule = network_and_rule(method, options, lr)

    @jax.jit
    def adapted(params: PyTree, sample: SampleFn, key: Array) -> tuple[Task, Array]:
        """An episode, and the classes predicted of its query images before and after adaptation: [2, N * Q]."""
        task = sample(key)
        start = start_of(method, options, params, task.support)
        final, _ = fine_tune(network, cross_entropy, start, task.support, rule, options.test_steps)
        return task, jnp.stack([network.apply(params, task.query.x).argmax(-1) for params in (start, final)])

    shown = min(options.ways, 5)  # classes, one image of each
    draw = functools.partial(_draw_image, greys="gray_r" if options.dataset == "omniglot" else "gray")  # its ink is 1
    figure = new_figure(max(9, 1.2 * 2 * shown + 1), 1.75 * count)
    panels = figure.subplots(count, 2 * shown, squeeze=False)
    for index, row in enumerate(panels):
        key = jax.random.fold_in(jax.random.key(runner.TEST_SEED), index)
        task, guesses = adapted(state.params, as_partial(data.test), key)
        labels = np.asarray(task.query.y)
        for label in range(shown):
            first = int((np.asarray(task.support.y) == label).argmax())
            draw(row[label], task.support.x[first], f"class {label}", "black")
            query = int((labels == label).argmax())
            old, new = guesses[:, query]
            draw(row[shown + label], task.query.x[query], f"{old} → {new}", "C2" if new == label else "C3")
        row[0].set_ylabel(f"episode {index + 1}")
        row[shown].set_ylabel("queries")
    figure.suptitle(
        f"Test episodes: the support set's classes; queries 0 to {shown - 1}, with the class predicted "
        f"before → {steps_taken(options.test_steps)}"
    )
    figure.savefig(path, dpi=100)


def _draw_image(axes: "Axes", image: Array, title: str, colour: str, *, greys: str) -> None:
    axes.imshow(np.asarray(image).squeeze(), cmap=greys, vmin=0, vmax=1)
    axes.set_title(title, color=colour, fontsize="medium")
    axes.set(xticks=[], yticks=[])


if __name__ == "__main__":
    runner.run_script("few_shot", PRESETS, execute)
