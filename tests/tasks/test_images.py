"""Episodes: what is drawn, and how evenly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mamljax.image_models import FullyConnectedNet
from mamljax.losses import accuracy, cross_entropy
from mamljax.maml import maml
from mamljax.models import from_linen
from mamljax.tasks import images
from mamljax.tasks.images import HostEpisodes, distinct, episodes, inductive, labelled, turn
from mamljax.train import fit

CLASSES, IMAGES, SIZE = 7, 6, 4
# Each pixel of image j of class i holds 10 i + j, but for a mark in one corner that tells how it was turned.
BANK = np.broadcast_to(
    (10 * np.arange(CLASSES)[:, None] + np.arange(IMAGES)).astype(np.uint8)[..., None, None, None],
    (CLASSES, IMAGES, SIZE, SIZE, 1),
).copy()
BANK[:, :, 0, 0] = 255
KEY = jax.random.key(0)
COUNT = 6000  # episodes
TRAINING = {"rule": 0.1, "inner_steps": 1, "eval_steps": 1, "tx": optax.adam(0.01), "differentiation": "reverse"}


@jax.jit
def draw_all(sample, keys):
    return jax.vmap(sample)(keys)


@functools.lru_cache
def draw(seed=0, *, rotations=False, counts=None):
    sample = episodes(BANK, ways=3, shots=2, queries=3, rotations=rotations, counts=counts)
    return draw_all(sample, jax.random.split(jax.random.key(seed), COUNT))


def origin(examples):
    """Class and image number in the bank: [episodes, n]."""
    number = np.rint(255 * np.asarray(examples.x[..., 1, 1, 0])).astype(int)
    return number // 10, number % 10


def test_shapes_dtypes_and_range():
    task = episodes(BANK, ways=3, shots=2, queries=3)(KEY)
    assert (task.support.x.shape, task.query.x.shape) == ((6, SIZE, SIZE, 1), (9, SIZE, SIZE, 1))
    assert task.support.x.dtype == task.query.x.dtype == jnp.float32
    assert task.support.x.max() == 1.0
    np.testing.assert_array_equal(task.support.y, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(task.query.y, [0, 0, 0, 1, 1, 1, 2, 2, 2])


def test_classes_of_an_episode_are_distinct_and_agree_between_support_and_query():
    tasks = draw()
    (support, _), (query, _) = origin(tasks.support), origin(tasks.query)
    support, query = support.reshape(COUNT, 3, 2), query.reshape(COUNT, 3, 3)
    assert (support == support[:, :, :1]).all()
    assert (query == support[:, :, :1]).all()
    assert all(len(set(episode)) == 3 for episode in support[:, :, 0])


def test_support_and_query_never_share_an_image():
    tasks = draw()
    (_, support), (_, query) = origin(tasks.support), origin(tasks.query)
    images = np.concatenate([support.reshape(COUNT, 3, 2), query.reshape(COUNT, 3, 3)], axis=2)
    assert all(len(set(images_of_a_class)) == 5 for images_of_a_class in images.reshape(-1, 5))


def test_every_class_stands_for_every_label_equally_often():
    classes, _ = origin(draw().support)
    counts = np.array([np.bincount(column, minlength=CLASSES) for column in classes[:, ::2].T])
    p = 1 / CLASSES
    assert np.abs(counts - COUNT * p).max() < 4.5 * np.sqrt(COUNT * p * (1 - p))


def test_every_image_is_in_the_support_set_equally_often():
    _, images = origin(draw().support)
    counts = np.bincount(images[:, 0], minlength=IMAGES)
    p = 1 / IMAGES
    assert np.abs(counts - COUNT * p).max() < 4.5 * np.sqrt(COUNT * p * (1 - p))


@pytest.mark.parametrize(("total", "count"), [(1, 1), (4, 4), (5, 2)])
def test_distinct_draws_every_order_equally_often(total, count):
    draws = np.asarray(jax.vmap(distinct, in_axes=(0, None))(jax.random.bits(KEY, (8000, count)), jnp.int32(total)))
    assert draws.min() == 0
    assert draws.max() == total - 1
    orders, counts = np.unique(draws, axis=0, return_counts=True)
    assert len(orders) == np.prod(np.arange(total, total - count, -1))
    p = 1 / len(orders)
    assert np.abs(counts - 8000 * p).max() <= 4.5 * np.sqrt(8000 * p * (1 - p))


def test_classes_are_turned_as_a_whole_by_every_angle():
    tasks = draw(rotations=True)
    corners = [(0, 0), (SIZE - 1, 0), (SIZE - 1, SIZE - 1), (0, SIZE - 1)]  # where the mark goes, counter-clockwise
    x = np.concatenate([tasks.support.x.reshape(COUNT, 3, 2, SIZE, SIZE), tasks.query.x.reshape(COUNT, 3, 3, SIZE, SIZE)], 2)
    turns = np.stack([x[..., row, column] == 1.0 for row, column in corners], axis=-1)
    assert (turns.sum(-1) == 1).all()
    turns = turns.argmax(-1)
    assert (turns == turns[..., :1]).all()
    counts = np.bincount(turns[:, 0, 0], minlength=4)
    assert np.abs(counts - COUNT / 4).max() < 4.5 * np.sqrt(COUNT * 3 / 16)
    assert (turns[:, 0, 0] != turns[:, 1, 0]).any()


def turns_of(examples):
    """By how many quarters each image is turned, by where its mark is: [episodes, n]."""
    corners = [(0, 0), (SIZE - 1, 0), (SIZE - 1, SIZE - 1), (0, SIZE - 1)]
    return np.stack([examples.x[..., row, column, 0] == 1.0 for row, column in corners], axis=-1).argmax(-1)


def assert_independent(one, other):
    """All pairs of two of four values are equally frequent."""
    counts, p = np.histogram2d(one.ravel(), other.ravel(), bins=(4, 4), range=((-0.5, 3.5),) * 2)[0], 1 / 16
    assert counts.sum() == one.size
    assert np.abs(counts - one.size * p).max() < 4.5 * np.sqrt(one.size * p * (1 - p))


def test_how_a_class_is_turned_does_not_tell_which_it_is():
    sample = episodes(BANK[:4], ways=1, shots=1, queries=1, rotations=True)
    tasks = draw_all(sample, jax.random.split(KEY, 4000))
    assert_independent(origin(tasks.support)[0], turns_of(tasks.support))


def test_classes_numbers_and_turns_of_labelled_images_are_independent():
    examples = labelled(BANK[:4, :4], batch_size=4000, rotations=True)(KEY).support
    classes, numbers = origin(examples)
    np.testing.assert_array_equal(classes, examples.y)
    for one, other in ((classes, numbers), (classes, turns_of(examples)), (numbers, turns_of(examples))):
        assert_independent(one, other)


@pytest.mark.parametrize("turns", range(4))
def test_turn_is_numpys(turns):
    image = np.arange(18).reshape(1, 3, 3, 2)
    np.testing.assert_array_equal(turn(jnp.asarray(image), jnp.int32(turns)), np.rot90(image, turns, axes=(1, 2)))


def test_without_rotations_images_are_as_they_are():
    assert (draw().support.x[..., 0, 0, :] == 1.0).all()


def test_same_key_same_episode_another_key_another_one():
    first, again, other = draw(seed=0), draw(seed=0), draw(seed=1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.support.x != other.support.x).any()


def test_classes_with_fewer_images_are_never_drawn_beyond_them():
    counts = (6, 5, 6, 6, 6, 5, 6)
    tasks = draw(counts=counts)
    for examples in tasks:
        classes, images = origin(examples)
        assert (images < np.array(counts)[classes]).all()
    (classes, images) = origin(tasks.query)
    assert (images[(classes == 1) | (classes == 5)] == 4).any()


def test_the_bank_is_an_argument_of_the_compiled_program():
    sample = episodes(BANK, ways=3, shots=1, queries=1)
    jaxpr = jax.make_jaxpr(lambda sample, key: sample(key))(sample, KEY)
    assert [aval.shape for aval in jaxpr.in_avals[:2]] == [BANK.shape, (CLASSES,)]
    assert not any(np.shape(constant) == BANK.shape for constant in jaxpr.consts)


@pytest.mark.parametrize(
    "sampler", [lambda bank: episodes(bank, ways=3, shots=1, queries=1), lambda bank: labelled(bank, batch_size=4)]
)
def test_what_becomes_of_the_images_later_does_not_matter(sampler):
    room = np.empty(BANK.size + 64, np.uint8)
    mine = room[-room.ctypes.data % 64 :][: BANK.size].reshape(BANK.shape)  # aligned: a CPU device uses such memory as it is
    mine[:] = BANK
    sample = sampler(mine)
    before = sample(KEY)
    mine[:] = 0
    jax.tree.map(np.testing.assert_array_equal, sample(KEY), before)
    assert before.support.x.any()


def test_a_memory_map_is_not_copied(tmp_path):
    np.save(tmp_path / "bank.npy", np.zeros((1000, 20, 28, 28, 1), np.uint8))  # 15.7 MB
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    images = episodes(mapped, ways=3, shots=1, queries=1).args[0]
    if images.device.platform == "cpu":
        assert images.unsafe_buffer_pointer() == mapped.ctypes.data


def test_inductive_query_sets_begin_with_the_support_set_unlabelled():
    sample = episodes(BANK, ways=3, shots=2, queries=3)
    task, plain = inductive(sample)(KEY), sample(KEY)
    jax.tree.map(np.testing.assert_array_equal, task.support, plain.support)
    np.testing.assert_array_equal(task.query.x, np.concatenate([plain.support.x, plain.query.x]))
    np.testing.assert_array_equal(task.query.y, [-1] * 6 + list(plain.query.y))


def test_unlabelled_examples_do_not_count():
    logits = jax.random.normal(KEY, (5, 3))
    labels = jnp.array([-1, 2, -1, 0, 1])
    for fn in (cross_entropy, accuracy):
        np.testing.assert_allclose(fn(logits, labels), fn(logits[labels >= 0], labels[labels >= 0]), rtol=1e-6)


GOOD = {"ways": 3, "shots": 2, "queries": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ways": 0}, "ways must be a whole number of at least 1, got 0"),
        ({"shots": 0}, "shots must be a whole number of at least 1"),
        ({"queries": -1}, "queries must be a whole number of at least 1"),
        ({"ways": 8}, r"8-way episodes need 8 classes, but there are 7. Lower ways"),
        ({"shots": 4}, r"4 support and 3 query images a class need 7 images, but class 0 has 6. Lower shots or queries"),
        ({"counts": [6, 6, 4, 6, 6, 6, 6]}, r"need 5 images, but class 2 has 4"),
        ({"counts": [6, 6]}, r"counts must be \[classes\] of 1 to 6"),
        ({"counts": [0] * 7}, r"counts must be \[classes\] of 1 to 6"),
        ({"counts": [7] * 7}, r"counts must be \[classes\] of 1 to 6"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        episodes(BANK, **GOOD | arguments)


def test_bad_images():
    with pytest.raises(
        ValueError, match=r"images must be an array \[classes, images, H, W, C\] uint8, got \[7, 6, 4, 4, 1\] float64"
    ):
        episodes(BANK.astype(float), **GOOD)
    with pytest.raises(ValueError, match=r"got \[6, 4, 4, 1\] uint8"):
        episodes(BANK[0], **GOOD)
    with pytest.raises(ValueError, match="rotations need square images, got 3 x 4"):
        episodes(BANK[:, :, 1:], **GOOD, rotations=True)


def test_episodes_read_on_the_host_are_the_same(monkeypatch):
    """Through the callback, and read ahead by `fit` for one seed and for several; and then they are read in chunks."""
    arguments = {"ways": 3, "shots": 1, "queries": 2, "rotations": True, "counts": [6, 5, 6, 6, 6, 5, 6]}
    device, host = episodes(BANK, **arguments), HostEpisodes(BANK, **arguments)
    keys = jax.random.split(KEY, 20)
    jax.tree.map(np.testing.assert_array_equal, *(jax.jit(jax.vmap(sample))(keys) for sample in (host, device)))

    reads, read = [], HostEpisodes._read
    monkeypatch.setattr(HostEpisodes, "_read", lambda self, *index: reads.append(len(index[0])) or read(self, *index))
    network = from_linen(FullyConnectedNet(3, (4,)), BANK[0] / 255)
    # Not Adam: it would make whole steps of the rounding of gradients that are zero, those of biases before normalisation.
    learner = maml(network, cross_entropy, **TRAINING | {"tx": optax.sgd(0.1)})
    for key, seeds in ((KEY, 1), (jax.random.split(KEY, 2), 2)):
        run = functools.partial(fit, learner, key=key, num_updates=7, num_tasks=2, log_every=3, progress=False)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)  # two programs, which may round differently
        jax.tree.map(close, run(device).state, run(host).state)
        assert reads == [updates * 2 * seeds for updates in (3, 3, 1)]
        reads.clear()


def test_inductive_episodes_are_read_ahead_too():
    arguments = {"ways": 3, "shots": 1, "queries": 2}
    keys = jax.random.split(KEY, 4)
    ahead = inductive(HostEpisodes(BANK, **arguments)).prepare(keys)
    jax.tree.map(
        np.testing.assert_array_equal, *(jax.vmap(sample)(keys) for sample in (ahead, inductive(episodes(BANK, **arguments))))
    )


def test_reading_ahead_is_traced_once(monkeypatch):
    traces, draw = [], images.draw_indices
    monkeypatch.setattr(images, "draw_indices", lambda *args, **sizes: traces.append(None) or draw(*args, **sizes))
    host = HostEpisodes(BANK, ways=3, shots=1, queries=2)
    for seed in range(3):
        host.prepare(jax.random.split(jax.random.key(seed), 4))
    assert len(traces) == 1


def test_host_episodes_check_their_arguments():
    with pytest.raises(ValueError, match="8-way episodes need 8 classes"):
        HostEpisodes(BANK, ways=8, shots=1, queries=1)
    with pytest.raises(ValueError, match=r"classes must lie in 0\.\.\d+, got \[ 0 99\]"):
        HostEpisodes(BANK, ways=2, shots=1, queries=1, classes=[0, 99])


def test_host_episodes_come_from_the_chosen_classes():
    chosen = [5, 1, 2]
    host = HostEpisodes(BANK, ways=3, shots=1, queries=2, classes=chosen, counts=[6, 3, 6])
    device = episodes(BANK[chosen], ways=3, shots=1, queries=2, counts=[6, 3, 6])
    jax.tree.map(np.testing.assert_array_equal, host(KEY), device(KEY))
