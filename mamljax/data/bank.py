"""Banks of images: one memory-mapped array of every image of every class, made once and from then on only read."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
from numpy.lib.format import open_memmap

from mamljax.files import write_atomically

FORMAT = 1  # of a bank's files; one of another format is made again


class Bank(NamedTuple):
    """The images of a data set, in memory or mapped from a file."""

    images: np.ndarray  # [classes, images, H, W, C] uint8; zeros where a class has fewer images than another
    counts: np.ndarray  # [classes] int32, images of each class
    names: tuple[str, ...]  # of the classes
    checksum: str  # SHA-256 of the images


class Source(NamedTuple):
    """What a bank is made of."""

    names: tuple[str, ...]  # of the classes
    counts: tuple[int, ...]  # images of each class
    shape: tuple[int, int, int]  # H, W, C
    read: Callable[[int], np.ndarray]  # class number -> its images [count, H, W, C] uint8; called from several threads


class DataError(Exception):
    """A data set is missing, or not what it should be; the message says what to do."""


def default_cache_dir() -> Path:
    """The directory of all banks: `$MAMLJAX_CACHE_DIR`, or else `mamljax/banks` in the user's cache directory."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("MAMLJAX_CACHE_DIR", user_cache / "mamljax" / "banks"))


def prepared_bank(name: str, source: Callable[[], Source], cache_dir: str | Path | None = None) -> Bank:
    """Open a bank, after making it if it is not there yet.

    Another process that wants the same bank waits for the first to make it. A kill leaves nothing that looks like a bank.

    Args:
        name: of the bank's directory; must change whenever the images do.
        source: what to make it of, called only if it must be made.
        cache_dir: where banks lie, by default `default_cache_dir()`.

    Raises:
        DataError: whatever is wrong with the source; or the directory cannot be written.
    """
    cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
    directory = cache_dir / name
    bank = open_bank(directory)
    if bank is not None:
        return bank
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache_dir / f"{name}.lock"):
            bank = open_bank(directory)  # another process may have made it while this one waited
            if bank is None:
                _make_bank(directory, source())
                bank = open_bank(directory)
            return bank
    except OSError as error:
        raise DataError(
            f"cannot write the image bank {directory}: {error.strerror or error}. Make room, or choose another place with "
            "--cache-dir or MAMLJAX_CACHE_DIR."
        ) from error


def open_bank(directory: Path) -> Bank | None:
    """Map the images of a bank into memory; None if it is not there, not whole, or of another format."""
    try:
        meta = json.loads((directory / "bank.json").read_text())
        images = np.load(directory / "images.npy", mmap_mode="r")
    except (OSError, ValueError):
        return None
    if meta["format"] != FORMAT or list(images.shape) != meta["shape"]:
        return None
    return Bank(images, np.array(meta["counts"], np.int32), tuple(meta["names"]), meta["sha256"])


def _make_bank(directory: Path, source: Source) -> None:
    draft = directory.with_name(directory.name + ".draft")
    for leftover in (draft, directory):
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir()
    shape = (len(source.names), max(source.counts), *source.shape)
    images = open_memmap(draft / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    digest = hashlib.sha256()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, drawn in enumerate(pool.map(source.read, range(len(source.names)))):
            images[number, : len(drawn)] = drawn
            digest.update(images[number])
    images.flush()
    meta = {
        "format": FORMAT,
        "shape": list(shape),
        "counts": list(source.counts),
        "sha256": digest.hexdigest(),
        "names": list(source.names),
    }
    write_atomically(draft / "bank.json", json.dumps(meta) + "\n")
    draft.rename(directory)
