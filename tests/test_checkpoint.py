"""Checkpoints: whole or not there, refused when they are another run's, passed over when damaged."""

import errno
import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mamljax import checkpoint
from mamljax.checkpoint import Checkpoints, read_newest
from mamljax.files import write_atomically
from mamljax.run_directory import CheckpointError, claim_directory, read_config
from mamljax.types import State

# Orbax leaves the failures of parts of a damaged checkpoint unretrieved.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TREE = State({"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.float32(1)}, opt=((), jnp.int32(7)))


def scaled(factor):
    return jax.tree.map(lambda leaf: leaf * factor, TREE)


def restored(directory, config=()):
    return Checkpoints(directory, dict(config)).restore(jax.eval_shape(lambda: TREE))


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def two(tmp_path):
    """A directory with checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path, {})
    for step in (1, 2):
        checkpoints.save(step, scaled(step))
    return tmp_path


def test_nothing_to_restore(tmp_path):
    assert restored(tmp_path) is None


def test_round_trip(two):
    step, tree = restored(two)
    assert step == 2
    assert isinstance(tree, State)
    assert_equal(tree, scaled(2))


def test_names_with_dots_and_empty_arrays(tmp_path):
    tree = {"a": {"b": jnp.zeros(2)}, "a.b": jnp.ones(2), "empty": jnp.zeros((0, 3))}
    Checkpoints(tmp_path, {}).save(1, tree)
    _, found = Checkpoints(tmp_path, {}).restore(jax.eval_shape(lambda: tree))
    assert_equal(found, tree)
    assert found["empty"].shape == (0, 3)


def test_a_checkpoint_of_an_earlier_version(tmp_path):
    """Its structure was left to Orbax."""
    on_host = jax.tree.map(np.asarray, TREE)
    seal = {"checksum": checkpoint._checksum(on_host), "shapes": checkpoint._shapes(on_host)}
    items = ocp.args.Composite(tree=ocp.args.StandardSave(on_host), seal=ocp.args.JsonSave(seal))
    Checkpoints(tmp_path, {})._manager.save(3, args=items)
    step, found = restored(tmp_path)
    assert step == 3
    assert_equal(found, TREE)


def test_random_keys_of_any_kind(tmp_path):
    tree = {"key": jax.random.key(3, impl="rbg"), "keys": jax.random.split(jax.random.key(4))}
    Checkpoints(tmp_path, {}).save(1, tree)
    _, found = Checkpoints(tmp_path, {}).restore(jax.eval_shape(lambda: tree))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), found, tree)))


def test_what_is_restored_is_bound_to_no_device(two):
    """Else a resumed run would compile another program than a fresh one, and might round differently."""
    assert not any(leaf.committed for leaf in jax.tree.leaves(restored(two)[1]))


def test_the_last_two_are_kept(two):
    Checkpoints(two, {}).save(3, scaled(3))
    assert sorted(path.name for path in (two / "steps").iterdir()) == ["2", "3"]


def damage_truncate(step):
    for path in step.rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_flip_a_byte(step):
    for path in step.rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)


def damage_remove_a_part(step):
    shutil.rmtree(step / "tree")


def damage_spoil_the_seal(step):
    (step / "seal" / "metadata").write_text("{")


DAMAGES = [damage_truncate, damage_flip_a_byte, damage_remove_a_part, damage_spoil_the_seal]


def test_one_that_may_not_be_read_is_no_damaged_one(two, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "a file")

    checkpoints = Checkpoints(two, {})
    monkeypatch.setattr(checkpoints, "_read", refuse)
    with pytest.raises(CheckpointError, match="meta-update 2 in .* cannot be read: Permission denied. Make its files readable"):
        checkpoints.restore(TREE)
    assert not (two / "damaged").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_falls_back_to_the_one_before_and_says_so(two, damage, capfd):
    damage(two / "steps" / "2")
    step, tree = restored(two)
    assert step == 1
    assert_equal(tree, scaled(1))
    assert "The checkpoint of meta-update 2 in" in capfd.readouterr().err
    checkpoints = Checkpoints(two, {})
    checkpoints.restore(TREE)
    checkpoints.save(2, scaled(5))  # the damaged one is out of the way, but not lost
    assert (two / "damaged" / "2").is_dir()
    assert_equal(restored(two)[1], scaled(5))


def test_values_that_do_not_match_their_checksum(two, capfd, monkeypatch):
    monkeypatch.setattr("mamljax.checkpoint._checksum", lambda tree: 0)
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read. Delete that directory"):
        restored(two)
    assert capfd.readouterr().err.count("its checksum does not match") == 2


def test_all_damaged(two):
    for step in (1, 2):
        damage_truncate(two / "steps" / str(step))
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        restored(two)


@pytest.mark.parametrize(
    ("like", "difference"),
    [
        (
            TREE._replace(params={"w": jnp.zeros((2, 4)), "b": jnp.float32(0)}),
            r"\.params\['w'\] it has float32\[2, 3\], expected float32\[2, 4\]",
        ),
        (TREE._replace(params={"w": jnp.zeros((2, 3))}), r"\.params\['b'\] it has float32\[\], expected nothing"),
        (TREE._replace(opt=((), jnp.float32(7))), r"\.opt\[1\] it has int32\[\], expected float32\[\]"),
    ],
)
def test_another_architecture_is_refused_at_its_first_difference(two, like, difference):
    with pytest.raises(CheckpointError, match=f"another model or method: at {difference}"):
        Checkpoints(two, {}).restore(like)


def test_another_configuration_is_refused(tmp_path):
    Checkpoints(tmp_path, {"inner_lr": 0.1, "seeds": 1, "sizes": (40, 40)}).save(1, TREE)
    Checkpoints(tmp_path, {"inner_lr": 0.1, "seeds": 1, "sizes": (40, 40)})
    with pytest.raises(CheckpointError, match=r"another configuration: it has {'inner_lr': 0.1}, this one {'inner_lr': 0.2}"):
        Checkpoints(tmp_path, {"inner_lr": 0.2, "seeds": 1, "sizes": (40, 40)})


def test_of_long_lists_in_a_configuration_a_few_entries_are_named(tmp_path):
    names = [f"class{number}" for number in range(1000)]
    Checkpoints(tmp_path, {"classes": {"train": names, "val": []}}).save(1, TREE)
    with pytest.raises(CheckpointError, match="it has {'classes': {'train': .'class0', ") as refused:
        Checkpoints(tmp_path, {"classes": {"train": names[1:], "val": names[:1]}})
    assert len(str(refused.value)) < 500 + len(str(tmp_path))
    with pytest.raises(CheckpointError, match="'class999'.*'renamed'"):
        Checkpoints(tmp_path, {"classes": {"train": [*names[:-1], "renamed"], "val": []}})


def test_an_entry_that_came_later_counts_as_its_default(tmp_path):
    claim_directory(tmp_path, {"shots": 1})
    (tmp_path / "results.json").write_text("{}")
    later = {"defaults": {"shots": 5, "penalty": 0.1}}
    claim_directory(tmp_path, {"shots": 1, "penalty": 0.1}, **later)
    for config in ({"shots": 1, "penalty": 0.2}, {"shots": 5, "penalty": 0.1}):
        with pytest.raises(CheckpointError, match="another configuration"):
            claim_directory(tmp_path, config, **later)


def test_a_run_goes_on_with_a_version_that_has_set_an_option_free(tmp_path):
    claim_directory(tmp_path, {"shots": 1, "precision": "float32"})
    claim_directory(tmp_path, {"shots": 1}, ignored=("precision",))
    with pytest.raises(CheckpointError, match="another configuration"):
        claim_directory(tmp_path, {"shots": 1})


def test_the_configuration_of_a_refused_command_is_replaced(tmp_path):
    claim_directory(tmp_path, {"shots": 30})
    claim_directory(tmp_path, {"shots": 1})
    assert read_config(tmp_path) == {"shots": 1}


@pytest.mark.parametrize("left", ["results.json", "checkpoints/maml/steps/10", "other keys"])
def test_that_of_any_other_is_kept(tmp_path, left):
    config = {"shots": 30, **({"of": "somebody else"} if left == "other keys" else {})}
    claim_directory(tmp_path, config)
    (tmp_path / "checkpoints" / "maml").mkdir(parents=True)
    if left.startswith("checkpoints"):
        (tmp_path / left).mkdir(parents=True)
    elif left == "results.json":
        (tmp_path / left).write_text("{}")
    with pytest.raises(CheckpointError, match="another configuration"):
        claim_directory(tmp_path, {"shots": 1})
    assert read_config(tmp_path) == config


@pytest.mark.parametrize("below", [".", "checkpoints/maml"])
def test_checkpoints_without_a_configuration_are_of_another_run(tmp_path, below):
    """Its directory was deleted while it was at work, for example."""
    (tmp_path / below / "steps" / "10").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds checkpoints of a run, but no config.json. Delete that directory"):
        claim_directory(tmp_path, {"shots": 1})
    assert not (tmp_path / "config.json").exists()


def test_a_configuration_that_cannot_be_read_is_there(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot read .*config.json: Is a directory. Mend that"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["null", "[]", "5", '"abc"'])
def test_a_configuration_that_is_no_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        claim_directory(tmp_path, {"shots": 1})


def test_a_reader_changes_nothing(two):
    """Neither the half-written checkpoint of a training that is under way, nor one that it cannot read."""
    half_written = two / "steps" / "3.orbax-checkpoint-tmp"
    half_written.mkdir()
    damage_truncate(two / "steps" / "2")
    step, tree = Checkpoints(two, None).restore(jax.eval_shape(lambda: TREE))
    assert step == 1
    assert_equal(tree, scaled(1))
    assert half_written.is_dir()
    assert (two / "steps" / "2").is_dir()


@pytest.mark.parametrize("replaced", [1, 2])
def test_a_reader_finds_what_replaced_the_checkpoints_that_it_has_listed(two, monkeypatch, capsys, replaced):
    """Once, and once more while it reads again."""
    read, writer, steps = Checkpoints._read, Checkpoints(two, {}), iter(range(3, 3 + 2 * replaced))

    def meanwhile(checkpoints, step, like):
        for newer in itertools.islice(steps, 2):
            writer.save(newer, scaled(newer))
        return read(checkpoints, step, like)

    monkeypatch.setattr(Checkpoints, "_read", meanwhile)
    step, tree = read_newest(two, jax.eval_shape(lambda: TREE))
    assert step == 2 + 2 * replaced
    assert_equal(tree, scaled(step))
    assert capsys.readouterr().err == ""


def test_a_reader_gives_up_in_the_end(two, monkeypatch):
    monkeypatch.setattr(Checkpoints, "restore", lambda checkpoints, like: (two / "nothing").stat())
    with pytest.raises(CheckpointError, match="are replaced faster than they can be read. Try again later."):
        read_newest(two, jax.eval_shape(lambda: TREE))


def test_nothing_to_read(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        Checkpoints(tmp_path, None)


def test_a_configuration_with_nan_is_its_own(tmp_path):
    for _ in range(2):
        claim_directory(tmp_path, {"value": float("nan")})


def test_spoilt_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is not JSON"):
        claim_directory(tmp_path, {})


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write to .*Choose another directory"):
        claim_directory(tmp_path / "file" / "run", {})


FULL = [OSError(errno.ENOSPC, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: " + 300 * "path" + " No space left")]


@pytest.mark.parametrize("error", FULL, ids=["Orbax", "tensorstore"])
def test_full_disk_keeps_earlier_checkpoints(two, monkeypatch, error):
    checkpoints = Checkpoints(two, {})

    def no_space(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoints._manager, "save", no_space)
    with pytest.raises(
        CheckpointError, match="cannot write the checkpoint of meta-update 3.*No space left.*earlier checkpoints are kept"
    ):
        checkpoints.save(3, scaled(3))
    assert restored(two)[0] == 2


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_threads_may_write_a_file_at_once(tmp_path):
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_atomically(path, str(number) * 1000), range(100)))
    assert len(path.read_text()) in (1000, 2000)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_another_process_is_writing_is_written_too(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace = Path.replace

    def meanwhile(draft, target):
        monkeypatch.setattr(Path, "replace", replace)
        monkeypatch.setattr("os.getpid", lambda: 1)
        write_atomically(path, "other")
        replace(draft, target)

    monkeypatch.setattr(Path, "replace", meanwhile)
    write_atomically(path, "mine")
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]
