"""Banks: made once, whole or not there, whoever else makes them and whatever ends the making."""

import errno
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mamljax.data import bank as bank_module
from mamljax.data.bank import Bank, DataError, Source, default_cache_dir, images_of, open_bank, prepared_bank, verify

COUNTS = (2, 3, 1)
NAMES = ("ant", "bee", "cat")


def pixels(number):
    return np.random.default_rng(number).integers(1, 256, size=(COUNTS[number], 4, 5, 3), dtype=np.uint8)


def source():
    return Source(NAMES, COUNTS, (4, 5, 3), pixels)


def no_source():
    raise AssertionError("the bank is made again")


@pytest.fixture
def made(tmp_path):
    return prepared_bank("small", source, tmp_path)


def test_holds_what_the_source_reads(made):
    assert made.images.shape == (3, 3, 4, 5, 3)
    assert made.names == NAMES
    np.testing.assert_array_equal(made.counts, COUNTS)
    for number, count in enumerate(COUNTS):
        np.testing.assert_array_equal(made.images[number, :count], pixels(number))
        assert not made.images[number, count:].any()
    assert made.checksum == hashlib.sha256(np.ascontiguousarray(made.images)).hexdigest()


def test_is_mapped_and_read_only(made):
    assert isinstance(made.images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        made.images[0] = 0


def test_is_made_once(made, tmp_path):
    again = prepared_bank("small", no_source, tmp_path)
    assert again.checksum == made.checksum
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "small.lock"]


def test_opens_where_nothing_can_be_written(made, tmp_path, monkeypatch):
    monkeypatch.setattr(bank_module.filelock, "FileLock", no_source)
    assert prepared_bank("small", no_source, tmp_path).names == NAMES


def damage_truncate(directory):
    os.truncate(directory / "images.npy", (directory / "images.npy").stat().st_size - 1)


def damage_lengthen(directory):
    with (directory / "images.npy").open("ab") as file:
        file.write(b"x")


def damage_header(directory):
    with (directory / "images.npy").open("r+b") as file:
        file.write(b"PK")


def damage_remove(directory):
    (directory / "images.npy").unlink()


def damage_json(directory):
    (directory / "bank.json").write_text("{")


def damage_json_list(directory):
    (directory / "bank.json").write_text("[]")


def damage_json_key(directory):
    (directory / "bank.json").write_text("{}")


def damage_format(directory):
    meta = json.loads((directory / "bank.json").read_text())
    (directory / "bank.json").write_text(json.dumps(meta | {"format": 0}))


def damage_shape(directory):
    np.save(directory / "images.npy", np.zeros((3, 3, 4, 5, 1), np.uint8))


def damage_dtype(directory):
    np.save(directory / "images.npy", np.zeros((3, 3, 4, 5, 3), np.int8))


DAMAGES = [value for name, value in globals().items() if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bank_is_made_again(made, tmp_path, damage):
    damage(tmp_path / "small")
    assert open_bank(tmp_path / "small") is None
    again = prepared_bank("small", source, tmp_path)
    verify(again)
    assert again.checksum == made.checksum


def test_a_damaged_bank_stays_where_it_cannot_be_made_again(made, tmp_path):
    def gone(number):
        raise DataError("gone")

    damage_json(tmp_path / "small")
    with pytest.raises(DataError, match="gone"):
        prepared_bank("small", lambda: source()._replace(read=gone), tmp_path)
    assert (tmp_path / "small" / "images.npy").exists()
    assert not (tmp_path / "small.draft").exists()


def test_verify(made, tmp_path):
    verify(made)
    with (tmp_path / "small" / "images.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    changed = open_bank(tmp_path / "small")
    with pytest.raises(DataError, match=r"images of the bank .*small have the checksum .* Delete it, so that it is made again"):
        verify(changed)
    with pytest.raises(DataError, match="bank in memory"):
        verify(made._replace(images=np.zeros_like(made.images)))


def test_the_first_error_ends_the_making(tmp_path):
    started = []

    def read(number):
        started.append(number)
        raise DataError(f"class {number}")

    many = Source(tuple(map(str, range(1000))), (1,) * 1000, (1, 1, 1), read)
    with pytest.raises(DataError, match="class 0"):
        prepared_bank("many", lambda: many, tmp_path)
    assert len(started) < 100


def test_few_classes_are_in_memory_at_a_time():
    started = []

    def read(number):
        started.append(number)
        return np.full((1, 1, 1, 1), number, np.uint8)

    many = Source(tuple(map(str, range(200))), (1,) * 200, (1, 1, 1), read)
    for number, images in enumerate(bank_module._read_ahead(many)):
        assert images.item() == number
        assert len(started) <= number + os.cpu_count() + 1
    assert number == 199


def test_images_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    """A power cut leaves the whole bank or none: what still lay in a buffer when the file was synchronised would be lost."""
    sizes, fsync = [], os.fsync

    def spied_on(descriptor):
        assert not (tmp_path / "small").exists()
        sizes.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spied_on)
    prepared_bank("small", source, tmp_path)
    assert (tmp_path / "small" / "images.npy").stat().st_size in sizes


def test_a_full_disk(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot write the image bank .*small: No space left on device. Make room, or choose"):
        prepared_bank("small", source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["small.lock"]


def test_a_write_that_the_system_refuses(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot write the image bank .*small: File too large"):
            prepared_bank("small", source, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["small.lock"]


def test_a_place_that_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the image bank .*: Not a directory"):
        prepared_bank("small", source, tmp_path / "file" / "banks")


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("MAMLJAX_CACHE_DIR", "/banks")
    assert default_cache_dir() == Path("/banks")
    monkeypatch.delenv("MAMLJAX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_cache_dir() == Path("/cache/mamljax/banks")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "mamljax" / "banks"


MAKE = """
import pathlib, sys, time
import numpy as np
from mamljax.data.bank import Source, prepared_bank, verify

place, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])

def source():
    with (place / "made").open("a") as file:
        file.write("made\\n")
    return Source(("ant", "bee"), (1, 1), (1, 1, 1), read)

def read(number):
    time.sleep(seconds * number)
    return np.full((1, 1, 1, 1), number, np.uint8)

(place / f"ready{sys.argv[3]}").touch()
while not (place / "go").exists():
    time.sleep(0.01)
bank = prepared_bank("small", source, place / "banks")
verify(bank)
print(bank.images.sum())
"""


def start(place, seconds, name):
    command = [sys.executable, "-c", MAKE, str(place), str(seconds), str(name)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes_make_it_once(tmp_path):
    processes = [start(tmp_path, 0.5, name) for name in range(2)]
    wait_for(lambda: (tmp_path / "ready0").exists() and (tmp_path / "ready1").exists(), processes[0])
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs == ["1\n", "1\n"]
    assert (tmp_path / "made").read_text() == "made\n"


def test_a_kill_leaves_nothing_that_looks_like_a_bank(tmp_path):
    (tmp_path / "go").touch()
    process = start(tmp_path, 600, 0)
    wait_for((tmp_path / "banks" / "small.draft" / "images.npy").exists, process)
    process.kill()
    process.communicate()
    assert open_bank(tmp_path / "banks" / "small") is None
    process = start(tmp_path, 0, 0)
    assert process.communicate(timeout=60)[0] == "1\n"
    assert sorted(path.name for path in (tmp_path / "banks").iterdir()) == ["small", "small.lock"]


def test_images_of_some_classes_are_a_view_where_they_can_be():
    bank = Bank(np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1, 1), np.ones(6, np.int32), tuple("abcdef"), "")
    for classes, shared in (([1, 2, 3], True), ([3, 1], False), ([5], True), ([0, 2], False)):
        images = images_of(bank, np.array(classes))
        np.testing.assert_array_equal(images.ravel(), classes)
        assert np.shares_memory(images, bank.images) == shared
