"""Images of one's own: a folder for each class."""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from mamljax.checks import check_count
from mamljax.data.bank import Bank, DataError, Source, prepared_bank
from mamljax.data.decoding import DECODING, MODES, decode

SPLITS = ("train", "val", "test")
VAL_SHARE, TEST_SHARE = 0.16, 0.20  # of the classes, where the folders do not say; those of miniImageNet
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def image_folders(data_dir: str | Path, cache_dir: str | Path | None = None, *, size: int, channels: int) -> Bank:
    """Open the bank of the images in a directory of class folders; made at the first call, and again when a file changes.

    The directory holds either `train/`, `val/` and `test/` with a folder for each class, which is then named "train/cat", or
    the folders of the classes themselves, "cat". Hidden files and files without the suffix of an image are ignored. Classes
    are in the order of their names, images in the order of file names; each is resized to a square by a Lanczos filter,
    a large JPEG after it was decoded at a fraction of its size. Every class takes as much room as the largest.

    Args:
        data_dir: the directory; needed at each call.
        cache_dir: where banks lie.
        size: H and W of the bank's images.
        channels: C, 1 for grey or 3 for red, green and blue.

    Raises:
        DataError: the directory is not as above; a split or a class is empty; an image does not decode, or two splits share it.
        ValueError: size is below 1, channels is neither 1 nor 3, or the banks would lie among the classes.

    Warns:
        UserWarning: images that classes lack take a gigabyte and more, and three quarters of the bank; or one image lies in
            there twice.
    """
    check_count("size", size)
    if channels not in MODES:
        raise ValueError(f"channels must be 1 (grey) or 3 (red, green and blue), got {channels!r}.")
    data_dir = Path(data_dir)
    if cache_dir is not None and Path(cache_dir).resolve().is_relative_to(data_dir.resolve()):
        raise ValueError(f"the cache directory {cache_dir} lies in {data_dir}, whose folders are classes. Choose another one.")
    try:
        classes = _find_classes(data_dir)
        state = [(path.relative_to(data_dir).as_posix(), *_state(path)) for paths in classes.values() for path in paths]
    except OSError as error:
        raise DataError(
            f"cannot read {error.filename or data_dir}: {error.strerror}. Pass the directory of the class folders with "
            "--data-dir."
        ) from error
    # In the name of the bank: it is another one when a file changes, or how it is decoded.
    digest = hashlib.sha256(repr((DECODING, size, channels, state)).encode()).hexdigest()
    return prepared_bank(f"folders-{digest[:16]}", lambda: _source(classes, size, channels), cache_dir)


def split_folders(names: tuple[str, ...], *, seed: int = 0) -> Mapping[str, np.ndarray]:
    """Divide classes into "train", "val" and "test", as arrays of class numbers.

    Args:
        names: those of the bank. "train/cat" is for training; without such prefixes 64 / 16 / 20 % of the classes are
            drawn for the splits, but at least one for each.
        seed: of the random split.

    Raises:
        ValueError: a split would be empty.

    >>> split_folders(("test/owl", "train/cat", "train/dog", "val/bat"))["train"]
    array([1, 2])
    """
    if all("/" in name for name in names):
        prefixes = np.array([name.split("/")[0] for name in names])
        split = {part: np.flatnonzero(prefixes == part) for part in SPLITS}
    else:
        order = np.random.default_rng(seed).permutation(len(names))
        val, test = (max(1, round(share * len(names))) for share in (VAL_SHARE, TEST_SHARE))
        split = {"train": order[val + test :], "val": order[:val], "test": order[val : val + test]}
    empty = [part for part, numbers in split.items() if len(numbers) == 0]
    if empty:
        raise ValueError(f"no class of {len(names)} is left for {' and '.join(empty)}. Give at least one for each split.")
    return split


def _find_classes(data_dir: Path) -> dict[str, list[Path]]:
    """The image files of each class, all in the order of their names."""
    folders = _class_folders(data_dir)
    if set(SPLITS) <= folders.keys():
        further = sorted(folders.keys() - set(SPLITS))
        folders = {f"{part}/{name}": path for part in SPLITS for name, path in _class_folders(folders[part]).items()}
        if further:
            raise DataError(
                f"{data_dir} holds {', '.join(further)} beside {', '.join(SPLITS)}. Move it into one of these, or away."
            )
    elif present := [part for part in SPLITS if part in folders]:
        # A part was forgotten, more likely than that a class is called so.
        missing = [part for part in SPLITS if part not in folders]
        raise DataError(
            f"{data_dir} holds {' and '.join(present)}, but no {' and no '.join(missing)}. Divide the class folders among all "
            "three, or put them side by side."
        )
    elif len(folders) < len(SPLITS):
        raise DataError(f"{data_dir} holds {len(folders)} classes. Training, validation and test need one each, at least.")
    classes = {}
    for name, folder in sorted(folders.items()):
        classes[name] = images_of_class(folder)
    return classes


def images_of_class(folder: Path) -> list[Path]:
    """The image files in the folder of a class, in the order of their names.

    Raises:
        DataError: there are none, or there are further folders, of which it is not clear whether they are of that class; or it
            cannot be read.
    """
    try:
        found = sorted(_visible(folder))
    except OSError as error:
        raise DataError(f"cannot read the class folder {folder}: {error.strerror}.") from error
    if inside := [path for path in found if path.is_dir()]:
        raise DataError(
            f"the class folder {folder} holds the folder {inside[0].name}. Move its images up, or it away; folders of classes "
            "may be divided among train, val and test, all three."
        )
    images = [path for path in found if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not images:
        raise DataError(f"the class folder {folder} has no images ({' '.join(SUFFIXES)}). Put some into it or delete it.")
    return images


def _class_folders(folder: Path) -> dict[str, Path]:
    found = {path.name: path for path in _visible(folder) if path.is_dir()}
    if not found:
        raise DataError(
            f"{folder} holds no class folders. Put a folder with images of each class into it, or into train, val and test."
        )
    return found


def _visible(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if not path.name.startswith("."))


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _source(classes: dict[str, list[Path]], size: int, channels: int) -> Source:
    names, files = list(classes), list(classes.values())
    seen: dict[bytes, tuple[str, Path]] = {}  # part and file, by checksum
    twice: list[Path] = []
    counts = tuple(map(len, files))
    room = len(counts) * max(counts) * size * size * channels
    if room > 1e9 and len(counts) * max(counts) > 4 * sum(counts):
        largest = names[counts.index(max(counts))]
        warnings.warn(
            f"the images take {room / 1e9:.1f} GB, as each of {len(counts)} classes gets the room of {largest}, which has "
            f"{max(counts)} where they have {sum(counts) / len(counts):.0f} on average. Leave some of its images out.",
            stacklevel=2,
        )

    def read(index: int) -> np.ndarray:
        images = np.stack([decode(file, size=size, channels=channels, name=file, draft=True) for file in files[index]])
        part = names[index].split("/")[0] if "/" in names[index] else ""
        for file, image in zip(files[index], images, strict=True):
            other_part, other = seen.setdefault(hashlib.sha256(image).digest(), (part, file))  # by several threads
            # An image that lies in two parts would be trained on and tested with.
            if other_part != part:
                raise DataError(f"one image is both in {part} and in {other_part}: {file} and {other}. Delete one of them.")
            if other != file and not twice:  # of many, one is said
                twice.append(file)
                warnings.warn(
                    f"one image lies there twice, {file} and {other}, and there may be more: support and query set may share "
                    "it, or two classes, which may be of different splits. Delete one of them.",
                    stacklevel=2,
                )
        return images

    return Source(tuple(classes), counts, (size, size, channels), read)
