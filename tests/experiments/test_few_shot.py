"""The few-shot experiment and the use of its networks, as a user runs them, at tiny size on images drawn here."""

import csv
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import adapt
import few_shot
import few_shot_learners
import jax
import jax.numpy as jnp
import locomotion
import navigation
import numpy as np
import pytest
import runner
import sinusoid
from few_shot_data import load
from few_shot_learners import build_learner, build_network, network_and_rule, outer_optimiser, set_precision
from few_shot_presets import Method, eval_queries
from few_shot_trained import Trained, beginning_with, check_begin_with, read_options, read_trained
from PIL import Image

from mamljax import report
from mamljax.record import read_metrics
from mamljax.run_directory import CheckpointError, claim_directory
from mamljax.types import Examples, Task

TINY = [
    "--dataset",
    "folder",
    "--image-size",
    "12",
    "--channels",
    "1",
    "--network",
    "fully_connected",
    "--ways",
    "3",
    "--shots",
    "1",
    "--queries",
    "2",
    "--eval-queries",
    "2",
    "--steps",
    "20",
    "--inner-lr",
    "0.5",
    "--num-tasks",
    "2",
    "--chunk-size",
    "1",
    "--log-every",
    "10",
    "--validate-every",
    "10",
    "--validation-tasks",
    "4",
    "--eval-tasks",
    "4",
    "--eval-steps",
    "4",
    "--test-steps",
    "2",
    "--tuning-lrs",
    "0.1",
    "0.5",
]
# One of each kind; each takes long to compile.
METHODS = ("maml", "maml++", "proto_maml", "random", "fine_tuning", "prototypical")


def draw_class(rng):
    """A picture of stripes, its width and direction those of the class."""
    x, y = np.meshgrid(np.arange(12), np.arange(12))
    angle, width = rng.uniform(0, np.pi), rng.uniform(1, 3)
    return 127 + 120 * np.sin((x * np.cos(angle) + y * np.sin(angle)) / width)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twelve classes of six noisy images, divided by folders."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(12):
        part = ("train", "val", "test")[min(number // 6 + number // 9, 2)]
        folder = root / part / f"class{number}"
        folder.mkdir(parents=True)
        picture = draw_class(rng)
        for image in range(6):
            noisy = np.clip(picture + rng.normal(0, 15, picture.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{image}.png")
    return root


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    return tmp_path_factory.mktemp("banks")


def main(images, banks, *argv):
    argv = [*TINY, "--data-dir", images, "--cache-dir", banks, *argv]
    return runner.main("few_shot", few_shot.PRESETS, few_shot.execute, [*map(str, argv)])


@pytest.fixture(scope="module")
def finished(images, banks, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    assert main(images, banks, "--out", out, "--method", *METHODS) == 0
    return out


def test_writes_what_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    figures = {"learning_curves.png", "training_curves.png"}
    figures |= {f"episodes_{method}.png" for method in ("maml", "maml++", "proto_maml")}
    assert names == figures | {"checkpoints", "config.json", "lock", "report.md", "results.json"}
    for name in figures:
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    rows = {(row.method, row.step): row for row in report.read_results(finished / "results.json")["rows"]}
    adapting = set(METHODS) - {"prototypical"}
    assert rows.keys() == {(method, step) for method in adapting for step in range(5)} | {("prototypical", 0)}
    assert all(0 <= row.mean <= 100 and row.tasks == 4 and row.published is None for row in rows.values())
    assert {method: rows[method, 0].meta_updates for method in METHODS} == dict.fromkeys(METHODS, 20) | {"random": 0}
    assert rows["fine_tuning", 1].note in ("step size 0.1", "step size 0.5")
    lines = read_metrics(finished / "checkpoints" / "maml" / "metrics.jsonl")
    assert [line["update"] for line in lines] == [10, 20]
    assert rows["maml", 0].best_update == min(lines, key=lambda line: line["validation_error"])["update"]
    assert rows["random", 0].best_update is None
    assert all(0 <= line["validation_error"] <= 1 for line in lines)


def test_published_numbers_stand_beside_the_step_they_are_of(images, banks, tmp_path, monkeypatch):
    """The step that test is done with, of more that are shown; the only one of a method that takes none."""
    methods = ("random", "nearest_neighbour")
    published = {
        ("folder", "fully_connected", 3, 1, method): number for method, number in zip(methods, (33.3, 44.4), strict=True)
    }
    monkeypatch.setattr(few_shot, "PUBLISHED", published)
    assert main(images, banks, "--out", tmp_path, "--method", *methods) == 0
    rows = report.read_results(tmp_path / "results.json")["rows"]
    beside = {(row.method, row.step): row.published for row in rows if row.published is not None}
    assert beside == {("random", 2): 33.3, ("nearest_neighbour", 0): 44.4}


def test_a_run_begins_with_the_network_of_another(finished, images, banks, tmp_path):
    """And with --steps 0 that is all: a classifier's fine-tuning is as it was, and MAML has its features."""
    trained = read_trained(finished / "checkpoints" / "fine_tuning", 6)
    origin = f"from {trained}"
    assert origin.startswith("from fine_tuning of folder, 3-way 1-shot, fully_connected, 20 updates")
    options = ("--begin-with", finished / "checkpoints" / "fine_tuning", "--steps", 0)
    assert main(images, banks, "--out", tmp_path, *options, "--method", "maml", "fine_tuning", "nearest_neighbour") == 0
    rows, old = (
        {(row.method, row.step): row for row in report.read_results(run / "results.json")["rows"]}
        for run in (tmp_path, finished)
    )
    assert [rows["fine_tuning", step].mean for step in range(5)] == [old["fine_tuning", step].mean for step in range(5)]
    assert [rows[method, 0].meta_updates for method in ("maml", "fine_tuning", "nearest_neighbour")] == [0, 20, 20]
    assert rows["maml", 0].note == origin
    assert rows["fine_tuning", 0].note.startswith(f"{origin}, step size ")
    run = dataclasses.replace(read_options(tmp_path), data_dir=images, cache_dir=banks)
    comparison = build_learner("nearest_neighbour", run, 6, eval_steps=4, rule=0.1)
    sizes = {"num_tasks": 4, "chunk_size": 1, "seed": runner.TEST_SEED}
    scores = few_shot.accuracies(comparison, trained.state, load(run).test, **sizes)
    assert rows["nearest_neighbour", 0].mean == pytest.approx(100 * scores.mean())
    features, began = trained.params, read_trained(tmp_path / "checkpoints" / "maml", 6).params
    assert began.keys() - features.keys() == {"Dense_4"}
    jax.tree.map(np.testing.assert_array_equal, began, jax.tree.map(jnp.zeros_like, began) | features)


def learned(method, **changes):
    """What a method has learned in no updates, for networks without convolutions unless it is changed."""
    options = dataclasses.replace(few_shot.PRESETS["omniglot-5w1s-fc"], **changes)
    init = build_learner(method, options, 6, eval_steps=1, rule=0.1).init
    return Trained(method, options, jax.vmap(init)(jax.random.split(jax.random.key(1), 1)), 0, None, [])


@pytest.mark.parametrize("method", ["maml", "anil", "prototypical"])
@pytest.mark.parametrize("ways", [4, 5, 6])
def test_the_output_layer_stays_as_far_as_it_has_enough_outputs(method, ways):
    options, of_five_ways = learned(method, ways=ways).options, learned("maml")
    random = build_learner(method, options, 6, eval_steps=1, rule=0.1).init
    params = beginning_with(of_five_ways, random)(jax.random.key(0)).params
    assert ("Dense_4" in params) == (method != "prototypical")
    assert params.keys() | {"Dense_4"} == of_five_ways.params.keys()
    for name, layer in params.items():
        old = of_five_ways.params[name]
        if name == "Dense_4":
            assert layer["kernel"].shape == (64, ways)
            old = jax.tree.map(lambda leaf: leaf[..., :ways] if ways <= 5 else np.zeros((*leaf.shape[:-1], ways)), old)
        jax.tree.map(np.testing.assert_array_equal, layer, old)


PARTS = {"train": ["a", "b"], "val": ["c"], "test": ["d"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "scale_and_shift"}, "--norm shift, here scale_and_shift. Give the same"),
        ({"network": "strided_conv", "filters": 4}, "--network fully_connected, here strided_conv; --filters 64, here 4"),
        ({"statistics": "inductive"}, "--statistics transductive, here inductive"),
        ({"dataset": "folder", "image_size": 20}, r"images of \[1, 28, 28, 1\], here \[1, 20, 20, 3\]"),
    ],
)
def test_to_begin_with_another_network_is_refused(changes, message):
    options = dataclasses.replace(few_shot.PRESETS["omniglot-5w1s-fc"], **changes)
    with pytest.raises(CheckpointError, match=f"another network .maml of omniglot-5w1s-fc, 0 updates.: {message}"):
        check_begin_with(learned("maml"), options, PARTS)


def test_to_begin_with_more_or_other_than_a_network_is_refused():
    options = few_shot.PRESETS["omniglot-5w1s-fc"]
    for trained in (learned("meta_sgd"), learned("maml", seeds=2)):
        with pytest.raises(CheckpointError, match="takes one network, and this is more"):
            check_begin_with(trained, options, PARTS)
    transfer = dataclasses.replace(options, method=("maml", "fine_tuning"))  # before maml is trained
    with pytest.raises(CheckpointError, match="must be of fine_tuning or nearest_neighbour for --method fine_tuning"):
        check_begin_with(learned("maml"), transfer, PARTS)


def test_to_begin_with_what_has_seen_the_test_classes_is_refused():
    """Of one's own images by their names, with or without folders of parts; of Omniglot by the split."""
    trained = learned("maml")

    def check(parts, **source):
        source = {"dataset": "folder", "split": "seeded", "classes": []} | source
        check_begin_with(trained._replace(sources=[source]), trained.options, parts)

    folders = {part: [f"{part}/{name}" for name in names] for part, names in PARTS.items()}
    for parts in (PARTS, folders):
        check(parts, classes=["train/a", "train/e"])
        with pytest.raises(CheckpointError, match="for validation or test here .maml of .*: c, d. Give a run"):
            check(parts, classes=["train/c", "train/d"])
    same_names = {part: [f"{part}/1", f"{part}/2"] for part in folders}
    check(same_names, classes=same_names["train"])
    check(PARTS, dataset="omniglot")
    check(PARTS, dataset="miniimagenet", split="vinyals")
    with pytest.raises(CheckpointError, match="for validation or test here .*: those of --split vinyals. Give a run"):
        check(PARTS, dataset="omniglot", split="vinyals")


def test_what_a_network_has_learned_from_is_passed_on(finished, images, banks, tmp_path, capsys):
    """By a run that begins with it, to the next one."""
    first = {"dataset": "folder", "split": "seeded", "classes": [f"train/class{number}" for number in range(6)]}
    assert read_trained(finished / "checkpoints" / "maml", 6).sources == [first]
    begin = ("--begin-with", finished / "checkpoints" / "maml", "--steps", 0)
    assert main(images, banks, *begin, "--out", tmp_path / "second") == 0
    assert read_trained(tmp_path / "second" / "checkpoints" / "maml", 6).sources == [first]
    moved = tmp_path / "images"
    shutil.copytree(images, moved)
    (moved / "train" / "class0").rename(moved / "test" / "class0")
    begin = ("--begin-with", tmp_path / "second" / "checkpoints" / "maml")
    assert main(images, banks, *begin, "--data-dir", moved, "--out", tmp_path / "third") == 2
    assert (
        "for validation or test here (maml of folder, 3-way 1-shot, fully_connected, 0 updates): class0."
        in capsys.readouterr().err
    )


def test_resumed_run_is_the_undisturbed_one(finished, images, banks, tmp_path):
    assert main(images, banks, "--out", tmp_path, "--steps", 10) == 0
    assert main(images, banks, "--out", tmp_path) == 0
    rows = [
        [row.mean for row in report.read_results(out / "results.json")["rows"] if row.method == "maml"]
        for out in (finished, tmp_path)
    ]
    assert rows[0] == rows[1]
    assert (
        main(images, banks, "--out", tmp_path, "--chunk-size", 2, "--method", "random") == 0
    )  # it may change, unlike the rest


def test_inductive_statistics_and_scale(images, banks, tmp_path):
    argv = ["--statistics", "inductive", "--norm", "scale_and_shift", "--protocol", "corrected"]
    assert main(images, banks, "--out", tmp_path, *argv) == 0
    rows = report.read_results(tmp_path / "results.json")["rows"]
    assert {row.protocol for row in rows} == {"corrected, inductive"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ways", 4], "the val split, 3 of 12 classes: 4-way episodes need 4 classes, but there are 3. Lower ways"),
        (
            ["--shots", 5],
            "train split need 7 images of each class, support and query images together, but some have fewer: train/class0 6",
        ),
        (["--ways", 1], "--ways must be a whole number of at least 2, got 1. One class cannot be told from itself."),
        (["--test-steps", 5], "--eval-steps must be at least --test-steps, 5, got 4."),
        (["--data-dir", "nowhere"], "cannot read nowhere: No such file or directory"),
        (["--method", "maml", "meta_lstm", "--inner-lr", 2], "--method meta_lstm needs an --inner-lr below 1, got 2.0"),
        (
            ["--method", "imaml", "--inner-lr", 1, "--strength", 4],
            "--method imaml needs an --inner-lr below 2 / --strength, 0.5, as larger steps",
        ),
        (["--method", "context"], "--method context needs a --network with convolutions, got fully_connected"),
        (["--begin-with", "nowhere"], "nowhere holds no training run of few_shot.py. One is in OUT/checkpoints/METHOD"),
        (
            ["--begin-with", "nowhere", "--method", "random"],
            "--begin-with is for one seed and --method maml fomaml anil imaml proto_maml pretrained",
        ),
        (["--begin-with", "nowhere", "--seeds", 2], "got --seeds 2."),
        (["--steps", 0], "--steps 0 is for --begin-with. For an untrained network take --method random."),
        (["--filters", 0], "--filters must be a whole number of at least 1"),
    ],
)
def test_bad_input_is_one_message(images, banks, tmp_path, capfd, argv, message):
    assert main(images, banks, "--out", tmp_path, *argv) == 2
    errors = capfd.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_options_of_other_methods_are_noted(tmp_path, capfd):
    argv = ["--method", "siamese", "maml", "--strength", "3", "--inner-lr", "0.3", "--multi-step-updates", "5000"]
    for notes in (["note: --strength has no effect on --method siamese maml"], []):  # at the beginning alone
        assert runner.main("few_shot", few_shot.PRESETS, lambda options, run: None, [*argv, "--out", str(tmp_path)]) == 0
        assert [line for line in capfd.readouterr().err.splitlines() if line.startswith("note:")] == notes


@pytest.mark.parametrize("experiment", [few_shot, locomotion, navigation, sinusoid])
def test_every_preset_has_options_of_its_own_methods(experiment):
    for options in experiment.PRESETS.values():
        assert not options.without_effect(type(options)())
    assert options.only_for.keys() <= vars(options).keys()
    assert {method for methods in options.only_for.values() for method in methods} <= {*get_args(experiment.Method)}


def test_presets_state_the_settings_of_the_paper():
    presets = few_shot.PRESETS
    assert presets["omniglot-5w1s"].inner_lr == 5 * 0.4
    assert presets["omniglot-20w1s"].inner_lr == 20 * 0.1
    assert presets["miniimagenet-5w1s"].inner_lr == pytest.approx(5 * 0.01)
    assert {name: (p.num_tasks, p.inner_steps, p.test_steps) for name, p in presets.items()} == {
        "omniglot-5w1s": (32, 1, 3),
        "omniglot-5w5s": (32, 1, 3),
        "omniglot-20w1s": (16, 5, 5),
        "omniglot-20w5s": (16, 5, 5),
        "omniglot-5w1s-fc": (32, 1, 3),
        "omniglot-5w5s-fc": (32, 1, 3),
        "miniimagenet-5w1s": (4, 5, 10),
        "miniimagenet-5w5s": (4, 5, 10),
        "omniglot-5w1s-maml++": (8, 5, 5),
        "omniglot-5w5s-maml++": (8, 5, 5),
        "omniglot-20w1s-maml++": (8, 5, 5),
        "omniglot-20w5s-maml++": (8, 5, 5),
        "miniimagenet-5w1s-maml++": (2, 5, 5),
        "miniimagenet-5w5s-maml++": (2, 5, 5),
        "omniglot-5w1s-imaml": (32, 16, 16),
        "omniglot-5w5s-imaml": (32, 16, 16),
        "omniglot-20w1s-imaml": (16, 25, 25),
        "omniglot-20w5s-imaml": (16, 25, 25),
    }
    assert {name: p.clip for name, p in presets.items() if p.clip} == {  # 10 by element of a loss summed over classes
        "miniimagenet-5w1s": pytest.approx(10 / (5 * 15)),
        "miniimagenet-5w5s": pytest.approx(10 * 5 / (5 * 15)),
        "miniimagenet-5w1s-maml++": 10,  # of the mean
        "miniimagenet-5w5s-maml++": 10,
    }
    for name, p in presets.items():
        method = name.split("-")[-1]
        assert p.out.name == name
        assert p.method == (method if method in ("maml++", "imaml") else "maml",)
        assert (p.steps, p.annealing) == {"maml++": (50_000, 50_000), "imaml": (20_000, None)}.get(method, (60_000, None))
    for name, p in presets.items():
        mini, plus_plus = "mini" in name, name.endswith("++")
        assert p.queries == (15 if mini else 1 if plus_plus else p.shots)
        assert eval_queries(p) == ((15 if mini else 1) if plus_plus else p.shots)


def test_the_outer_step_size_falls_to_a_hundredth_if_asked():
    """Of Adam, whose updates are of its step size if the gradient stays as it is."""
    options = dataclasses.replace(few_shot.PRESETS["omniglot-5w1s"], annealing=4)
    gradient = {"w": jnp.array([3.0, -0.1])}
    tx, sizes = outer_optimiser(options), []
    state = tx.init(gradient)
    for _ in range(6):
        updates, state = tx.update(gradient, state, gradient)
        sizes.append(np.asarray(updates["w"]))
    falling = 1e-3 * np.array([1, 0.8550, 0.505, 0.1550, 0.01, 0.01])
    np.testing.assert_allclose(sizes, falling[:, None] * np.array([-1, 1]), rtol=1e-3)


def test_meta_gradients_are_clipped_if_asked():
    """By element, before Adam sees them."""
    clipped, plain = (
        outer_optimiser(dataclasses.replace(few_shot.PRESETS["omniglot-5w1s"], clip=clip)) for clip in (0.5, None)
    )
    ours, theirs = clipped.init(jnp.zeros(2)), plain.init(jnp.zeros(2))
    for raw, within in (([3.0, -0.1], [0.5, -0.1]), ([0.1, -7.0], [0.1, -0.5])):
        one, ours = clipped.update(jnp.array(raw), ours)
        two, theirs = plain.update(jnp.array(within), theirs)
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("precision", ["float32", "tensorfloat32", "bfloat16"])
def test_precision_is_that_of_products_or_of_the_whole_network(precision):
    options = dataclasses.replace(few_shot.PRESETS["omniglot-5w1s"], precision=precision)
    image = jnp.zeros((1, 28, 28, 1))
    network = build_network(options, 5)
    params = jax.eval_shape(network.init, jax.random.key(0))
    before = jax.config.jax_default_matmul_precision
    try:
        set_precision(options)
        program = str(jax.make_jaxpr(network.apply)(params, image))
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert ("bf16[1,28,28,1]" in program) == (precision == "bfloat16")
    assert ("Precision.HIGHEST" in program) == (precision == "float32")
    assert network.apply(jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params), image).dtype == jnp.float32


def test_tasks_at_a_time(monkeypatch):
    """One on a CPU, a meta-batch elsewhere, in evaluation more; unless something else is asked for."""
    chosen = dataclasses.replace(few_shot.PRESETS["omniglot-5w1s"], chunk_size=4)
    for backend, by_default in (("cpu", 1), ("gpu", 32)):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert runner.tasks_at_a_time(few_shot.PRESETS["omniglot-5w1s"]) == by_default
        assert runner.tasks_at_a_time(chosen) == runner.tasks_at_a_time(chosen, at_least=40) == 4
    assert runner.tasks_at_a_time(few_shot.PRESETS["omniglot-5w1s"], at_least=40) == 40


@pytest.mark.parametrize(
    ("method", "moves"),
    [
        ("maml", {"body", "head"}),
        ("fomaml", {"body", "head"}),
        ("anil", {"head"}),
        ("boil", {"body"}),
        ("context", {"context"}),
        ("meta_sgd", {"body", "head"}),
        ("maml++", {"body", "head", "step"}),
        ("imaml", {"body", "head", "shift"}),
        ("proto_maml", {"body", "head"}),
        ("meta_lstm", {"body", "head"}),
    ],
)
def test_what_a_method_adapts(method, moves):
    """Of the features and of the output layer; learned step sizes never, the shifts of normalisation by implicit MAML alone."""
    options = few_shot.PRESETS["omniglot-5w1s"]
    network, rule = network_and_rule(method, options, 0.5)
    params = jax.eval_shape(network.init, jax.random.key(0))
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
    parts = set()
    for path, change in jax.tree.leaves_with_path(rule.update(ones, rule.init(ones), ones)[0]):
        name = jax.tree_util.keystr(path)
        part = next(
            part
            for part in ("context", "alpha", "step_sizes", "cell", "shift", "Conv3x3", "Dense_0", "head", "step")
            if part in name
        )
        if np.any(change):
            parts.add({"Conv3x3": "body", "Dense_0": "head"}.get(part, part))
    assert parts == moves


def test_implicit_maml_is_held_as_the_options_say(monkeypatch):
    options = dataclasses.replace(few_shot.PRESETS["omniglot-5w1s-imaml"], strength=3.0, damping=7.0, cg_steps=4)
    _, rule = network_and_rule("imaml", options, 0.1)
    update, _ = rule.update({"w": jnp.zeros(2)}, rule.init({"w": jnp.ones(2)}), {"w": jnp.full(2, 3.0)})
    np.testing.assert_allclose(update["w"], -0.1 * 3 * (3 - 1), rtol=1e-6)
    settings = {}
    monkeypatch.setattr(few_shot_learners, "imaml", lambda network, loss_fn, **given: settings.update(given))
    build_learner("imaml", options, 5, eval_steps=3, rule=0.1)
    assert [settings[name] for name in ("rule", "strength", "damping", "cg_steps")] == [0.1, 3.0, 7.0, 4]


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_learns_and_is_evaluated(method):
    """By shapes alone, which compiles nothing."""
    options = dataclasses.replace(few_shot.PRESETS["omniglot-5w1s-fc"], inner_lr=0.1, inner_steps=2, num_tasks=1)
    learner = build_learner(method, options, 5, eval_steps=3, rule=0.1)
    task = Task(*[Examples(jnp.zeros((5, 28, 28, 1)), jnp.arange(5))] * 2)
    state = jax.eval_shape(learner.init, jax.random.key(0))
    tasks = jax.tree.map(lambda leaf: leaf[None], task)
    assert jax.eval_shape(learner.update, jax.random.key(0), state, tasks)[0] == state
    comparing = ("nearest_neighbour", "matching", "siamese", "mann", "memory_module")
    comparing += ("neural_statistician", "prototypical")
    scores = jax.eval_shape(learner.evaluate, jax.random.key(0), state, task)["accuracy"]
    assert scores.shape == (1 if method in comparing else 4,)


def test_results_are_of_what_was_trained(finished):
    rows = report.read_results(finished / "results.json")["rows"]
    assert {row.setting for row in rows} == {"folder, 3-way 1-shot, fully_connected"}
    for name, options in few_shot.PRESETS.items():
        assert few_shot.cell(options) == name


def test_an_unknown_preset_is_refused(images, banks, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(images, banks, "--preset", "omniglot-5w2s", "--out", tmp_path / "run")
    assert stop.value.code == 2
    assert "omniglot-5w2s" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_after_a_refusal_the_corrected_command_runs(images, banks, tmp_path):
    assert main(images, banks, "--out", tmp_path, "--shots", 5) == 2
    assert main(images, banks, "--out", tmp_path, "--method", "random") == 0


def test_a_class_moved_to_another_split_is_refused(images, banks, tmp_path, capsys):
    moved = tmp_path / "images"
    shutil.copytree(images, moved)
    arguments = ("--data-dir", moved, "--out", tmp_path / "run", "--steps", 10)
    assert main(images, banks, *arguments) == 0
    (moved / "train" / "class5").rename(moved / "val" / "class5")
    assert main(images, banks, *arguments) == 2
    assert "holds a run of another configuration: it has {'classes': {'test'" in capsys.readouterr().err


def predict(finished, support, query, out, *argv):
    argv = ["--checkpoint", finished, "--support", support, "--query", query, "--out", out, *argv]
    return adapt.main([*map(str, argv)])


def lines_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def copy(images, folder, *, suffix=".png", mode="L", size=12):
    """Support of one image, and queries of two, of the three test classes."""
    for source in sorted((images / "test").iterdir()):
        (folder / "support" / source.name).mkdir(parents=True)
        (folder / "query").mkdir(exist_ok=True)
        for number in range(3):
            place = folder / "support" / source.name if number == 0 else folder / "query"
            with Image.open(source / f"{number}.png") as image:
                image.convert(mode).resize((size, size)).save(place / f"{source.name}_{number}{suffix}")
    return folder / "support", folder / "query"


@pytest.mark.parametrize("method", ["maml", "maml++", "proto_maml"])
def test_adapt_writes_predictions(finished, images, tmp_path, method):
    support, query = copy(images, tmp_path)
    assert predict(finished, support, query, tmp_path / "out" / "p.csv", "--method", method) == 0
    rows = lines_of(tmp_path / "out" / "p.csv")
    assert [row["file"] for row in rows] == [str(path) for path in sorted(query.iterdir())]
    names = ["class10", "class11", "class9"]
    for row in rows:
        probabilities = [float(row[f"p({name})"]) for name in names]
        assert sum(probabilities) == pytest.approx(1, abs=1e-3)
        assert row["prediction"] == names[int(np.argmax(probabilities))]


def test_adapt_follows_the_labels(finished, images, tmp_path):
    """Renaming the class folders renames the predictions."""
    support, query = copy(images, tmp_path)
    assert predict(finished, support, query, tmp_path / "a.csv", "--steps", 5) == 0
    for old, new in (("class10", "x"), ("class11", "y"), ("class9", "z")):
        (support / old).rename(support / new)
    assert predict(finished, support, query, tmp_path / "b.csv", "--steps", 5) == 0
    a, b = ([row["prediction"] for row in lines_of(tmp_path / name)] for name in ("a.csv", "b.csv"))
    assert [{"class10": "x", "class11": "y", "class9": "z"}[name] for name in a] == b


@pytest.mark.parametrize(("mode", "size", "suffix"), [("RGB", 30, ".jpg"), ("RGBA", 12, ".png"), ("P", 20, ".gif")])
def test_adapt_takes_images_of_other_sizes_and_modes(finished, images, tmp_path, mode, size, suffix):
    support, query = copy(images, tmp_path, mode=mode, size=size, suffix=suffix)
    assert predict(finished, support, query, tmp_path / "p.csv") == 0
    assert len(lines_of(tmp_path / "p.csv")) == 6


def test_adapt_predicts_each_image_alone(finished, images, tmp_path):
    """Whether it comes with others or not, and whatever hidden files lie beside it."""
    support, query = copy(images, tmp_path)
    assert predict(finished, support, query, tmp_path / "all.csv") == 0
    first, *others = sorted(query.iterdir())
    for other in others:
        other.rename(other.with_name("." + other.name))
    (support / "class9" / "._0.png").write_bytes(b"what an archiver leaves")
    assert predict(finished, support, query, tmp_path / "one.csv") == 0
    assert lines_of(tmp_path / "one.csv") == lines_of(tmp_path / "all.csv")[:1]
    assert lines_of(tmp_path / "one.csv")[0]["file"] == str(first)


def test_adapt_follows_links_and_writes_any_name(finished, images, tmp_path, monkeypatch):
    support, query = copy(images, tmp_path)
    assert predict(finished, support, query, tmp_path / "direct.csv") == 0
    (tmp_path / "elsewhere").mkdir()
    first, *others = sorted(query.iterdir())
    for file in others:
        file.rename(tmp_path / "elsewhere" / file.name)
    (query / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(query)
    odd = Path(os.fsdecode(os.fsencode(query) + b"/\xff.png"))
    first.rename(odd)
    (tmp_path / "real.csv").touch()
    (tmp_path / "linked.csv").symlink_to("real.csv")
    monkeypatch.setattr(adapt, "AT_A_TIME", 2)
    assert predict(finished, support, query, tmp_path / "linked.csv") == 0
    rows = list(csv.reader((tmp_path / "real.csv").read_text(errors="surrogateescape").splitlines()))[1:]
    assert {row[0] for row in rows} == {str(odd), *(str(query / "link" / file.name) for file in others)}
    direct = sorted(list(row.values())[1:] for row in lines_of(tmp_path / "direct.csv"))
    assert sorted(row[1:] for row in rows) == direct


def test_adapt_names_the_methods_that_a_run_has(finished, images, tmp_path, capsys):
    support, query = copy(images, tmp_path)
    assert predict(finished, support, query, tmp_path / "p.csv", "--method", "anil") == 2
    assert re.search(r"anil holds no training run of few_shot.py. There is one of .*maml.* beside it", capsys.readouterr().err)
    with pytest.raises(CheckpointError, match="One is in OUT/checkpoints/METHOD"):
        read_trained(finished, 3)


def test_adapt_refuses_what_it_cannot_use(finished, images, tmp_path, capsys):
    support, query = copy(images, tmp_path)
    out = tmp_path / "p.csv"

    def error(*argv):
        assert predict(*argv) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "holds no training run (config.json: No such file or directory)" in error(tmp_path, support, query, out)
    claim_directory(tmp_path / "other", {"experiment": "sinusoid"})
    assert "is no output directory of few_shot.py (it is of another experiment)" in error(
        tmp_path / "other", support, query, out
    )
    hint = f"Give {finished} and --method maml."
    assert hint in error(finished / "checkpoints" / "maml", support, query, out)
    assert "the probabilities are not finite after 2 steps. Lower --inner-lr" in error(
        finished, support, query, out, "--inner-lr", 1e38
    )
    assert predict(finished, support, query, tmp_path / "worthless.csv", "--inner-lr", 1e3) == 0
    assert re.search(r"note: the loss on .* rose from 1\S* to \S* after 2 steps: trust no prediction", capsys.readouterr().err)
    assert "--steps must be a whole number of at least 1, got 0" in error(finished, support, query, out, "--steps", 0)
    assert "Give --inner-lr" in error(finished, support, query, out, "--method", "pretrained")
    for method in ("meta_sgd", "maml++", "meta_lstm"):
        assert "Leave --inner-lr out" in error(finished, support, query, out, "--method", method, "--inner-lr", 0.1)
    assert "--out must be the file to write" in error(finished, support, query, out.parent)
    assert "--out is for a table, but " in error(finished, support, query, next(query.glob("**/*.png")))
    assert "cannot read the directory" in error(finished, tmp_path / "none", query, out)
    twin = support / "class9" / "twin.png"
    shutil.copy(next(path for path in support.glob("*/*.png") if path.parent.name != "class9"), twin)
    assert re.search(r"one image has two labels: .*\.png and .*\.png. Delete one", error(finished, support, query, out))
    twin.unlink()
    (support / "class9").rename(tmp_path / "class9")
    message = error(finished, support, query, out)
    assert "holds 2 class folders, but the network" in message
    assert "tells 3 classes apart. Give 3, or train with --ways 2" in message
    (support / "class9").mkdir()
    assert "class9 has no images" in error(finished, support, query, out)
    (support / "class9" / "broken.png").write_bytes(b"no image")
    assert "broken.png" in error(finished, support, query, out)


def test_adapt_names_the_first_difference_of_another_architecture(finished, images, tmp_path, capsys):
    support, query = copy(images, tmp_path)
    config = json.loads((finished / "config.json").read_text())
    other = tmp_path / "run"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"network": "strided_conv"}))
    (other / "checkpoints").symlink_to(finished / "checkpoints")
    assert predict(other, support, query, tmp_path / "p.csv") == 2
    errors = capsys.readouterr().err
    assert "is one of another model or method: at " in errors
    assert "['BatchStatNorm_0']['shift'] it has float32[1, 256], expected float32[1, 64]" in errors


@pytest.mark.parametrize(("method", "steps"), [("maml", 10), ("maml++", 5), ("meta_lstm", 5)])
def test_learned_steps_are_validated_no_further_than_they_were_learned(monkeypatch, method, steps):
    """miniImageNet's preset has 5 in training, and 10 at test."""

    def build(method, options, num_classes, *, eval_steps, rule):
        raise RuntimeError(f"asked for {eval_steps}")  # that is all there is to see

    monkeypatch.setattr(few_shot, "build_learner", build)
    with pytest.raises(RuntimeError, match=f"^asked for {steps}$"):
        few_shot.train(method, few_shot.PRESETS["miniimagenet-5w1s"], None, SimpleNamespace(num_classes=64), None)


def test_results_do_not_go_among_the_images(images, banks, capsys):
    assert main(images, banks, "--out", images / "run") == 2
    assert "lies in --data-dir, whose folders are classes" in capsys.readouterr().err
    assert not (images / "run").exists()
