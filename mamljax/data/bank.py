"""Banks of images: one memory-mapped array of every image of every class, made once and from then on only read."""

import hashlib
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
from numpy.lib import format as npy
from tqdm import tqdm

from mamljax.files import user_cache, write_atomically

FORMAT = 1  # of a bank's files; one of another format is made again


class Bank(NamedTuple):
    """The images of a data set, in memory or mapped from a file."""

    images: np.ndarray  # [classes, images, H, W, C] uint8; zeros where a class has fewer images than another
    counts: np.ndarray  # [classes] int32, images of each class
    names: tuple[str, ...]  # of the classes
    checksum: str  # SHA-256 of the images


def images_of(bank: Bank, classes: np.ndarray) -> np.ndarray:
    """The images of some classes, read-only; where these follow each other, a view, without a copy."""
    if len(classes) and (np.diff(classes) == 1).all():
        return bank.images[classes[0] : classes[-1] + 1]
    chosen = bank.images[classes]
    chosen.flags.writeable = False  # so that samplers need no copy of their own
    return chosen


class Source(NamedTuple):
    """What a bank is made of. Reading it raises `DataError`, never `OSError`, which is the bank's own."""

    names: tuple[str, ...]  # of the classes
    counts: tuple[int, ...]  # images of each class
    shape: tuple[int, int, int]  # H, W, C
    read: Callable[[int], np.ndarray]  # index of a class -> its images [count, H, W, C] uint8; called from several threads


class DataError(Exception):
    """A data set is missing, or not what it should be; the message says what to do."""


def default_cache_dir() -> Path:
    """The directory of all banks: `$MAMLJAX_CACHE_DIR`, or else `mamljax/banks` in the user's cache directory."""
    return Path(os.environ.get("MAMLJAX_CACHE_DIR") or user_cache() / "mamljax" / "banks")


def prepared_bank(name: str, source: Callable[[], Source], cache_dir: str | Path | None = None) -> Bank:
    """Open a bank, after making it if it is not there yet.

    Another process that wants the same bank waits for the first to make it. A kill leaves nothing that looks like a bank.

    Args:
        name: of the bank's directory; must change whenever the images do.
        source: what to make it of, called only if it must be made.
        cache_dir: where banks lie, by default `default_cache_dir()`.

    Raises:
        DataError: whatever is wrong with the source; or the bank cannot be written.
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
            if bank is None:
                raise DataError(f"the image bank {directory} could not be read just after it was made. Start again.")
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
        images = npy.open_memmap(directory / "images.npy", mode="r")
        size = (directory / "images.npy").stat().st_size
        sound = meta["format"] == FORMAT and list(images.shape) == meta["shape"] and images.dtype == np.uint8
        if not sound or size != images.offset + images.nbytes:
            return None
        return Bank(images, np.array(meta["counts"], np.int32), tuple(meta["names"]), meta["sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def verify(bank: Bank) -> None:
    """Read all images and compare them with the checksum of what was written; seconds for a large bank.

    Raises:
        DataError: they differ; opening a bank looks at its size alone.
    """
    digest = hashlib.sha256()
    for images in bank.images:
        digest.update(np.ascontiguousarray(images))
    if digest.hexdigest() != bank.checksum:
        file = getattr(bank.images, "filename", None)
        place = "in memory" if file is None else Path(file).parent
        raise DataError(
            f"the images of the bank {place} have the checksum {digest.hexdigest()}, but {bank.checksum} when they were made. "
            "Delete it, so that it is made again."
        )


def _make_bank(directory: Path, source: Source) -> None:
    # Made beside its place and renamed when it is whole, so that a bank which is there can be trusted.
    draft = directory.with_name(directory.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
    draft.mkdir()
    try:
        meta = _write_images(draft / "images.npy", source, label=f"preparing {directory.name}")
        write_atomically(draft / "bank.json", json.dumps(meta) + "\n")
        shutil.rmtree(directory, ignore_errors=True)  # one that open_bank() refused
        draft.rename(directory)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _write_images(path: Path, source: Source, label: str) -> dict[str, object]:
    """Write all images, a class at a time, and return what to say of them in bank.json.

    Not through a memory map, where a full disk is a fatal signal instead of an error.
    """
    shape = (len(source.names), max(source.counts), *source.shape)
    digest = hashlib.sha256()
    bar = tqdm(total=len(source.names), desc=label, unit="class", mininterval=0.2 if sys.stderr.isatty() else 5.0)
    with path.open("wb") as file, bar:
        npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for count, drawn in zip(source.counts, _read_ahead(source), strict=True):
            images = np.zeros(shape[1:], np.uint8)
            images[:count] = drawn
            file.write(images)
            digest.update(images)
            bar.update()
        file.flush()
        os.fsync(file.fileno())
    return {
        "format": FORMAT,
        "shape": list(shape),
        "counts": list(source.counts),
        "sha256": digest.hexdigest(),
        "names": list(source.names),
    }


def _read_ahead(source: Source) -> Iterator[np.ndarray]:
    """Read the classes in order, in threads, which hold no more than a few classes at a time."""
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[np.ndarray]] = deque()
        for index in range(len(source.names)):
            ahead.append(pool.submit(source.read, index))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
