"""miniImageNet (Vinyals et al. 2016), split as by Ravi and Larochelle 2017: 100 classes of ImageNet, 600 images of each."""

import csv
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from mamljax.data.bank import Bank, DataError, Source, prepared_bank
from mamljax.data.decoding import decode
from mamljax.data.from_tfds import prepared_builder, read_examples

SIZE = 84  # pixels
IMAGES = 600  # of each class
CLASSES = {"train": 64, "val": 16, "test": 20}
CHECKSUMS = {  # SHA-256 of the sorted ids of the classes, one a line
    "train": "0f107a65ea80bf1e1d1e5e18d368f0d007e3e4c1885f33cc071363997e3814e9",
    "val": "489f8af43b2560094c8766f36213842de429622b67b5e9fed1277ebb99806f7d",
    "test": "0db5287e659efd3391c100c88f40df0f66510dfa9be94b8d0ecc66498f4e9810",
}
TFDS_SPLITS = {"train": "train", "val": "validation", "test": "test"}
URL = "https://github.com/twitter-research/meta-learning-lstm/tree/master/data/miniImagenet"
LAYOUT = "train.csv, val.csv, test.csv and the directory images"


def miniimagenet(data_dir: str | Path | None = None, cache_dir: str | Path | None = None) -> Bank:
    """Open the bank of all 100 classes, 600 images of 84x84x3 each; made at the first call.

    It is made of `{train,val,test}.csv` (columns filename and label) and `images/*.jpg` if `data_dir` is given, or else by
    TensorFlow Datasets of the same files in its directory of manual downloads. Images of another size are resized by a
    Lanczos filter. Classes are named "train/n01532829" and in the order of these names, images in the order of file names;
    `folders.split_folders` divides them.

    Args:
        data_dir: directory of the files above; not needed once the bank is made.
        cache_dir: where banks lie.

    Raises:
        DataError: a file is missing or does not decode; or the classes are not those of Ravi and Larochelle.
    """
    source = _from_tfds if data_dir is None else lambda: _from_files(Path(data_dir))
    return prepared_bank("miniimagenet-84", source, cache_dir)


def read_lists(data_dir: Path) -> dict[str, list[Path]]:
    """Read the three CSVs: the image files of each class, "train/n01532829", all in the order of their names.

    Raises:
        DataError: a CSV or an image is missing; or the classes are not those of Ravi and Larochelle.
    """
    classes = {}
    for split in CLASSES:
        for label, filenames in _read_csv(data_dir / f"{split}.csv", split).items():
            classes[f"{split}/{label}"] = [data_dir / "images" / filename for filename in sorted(filenames)]
    try:
        present = {path.name for path in (data_dir / "images").iterdir()}
    except OSError as error:
        raise DataError(f"cannot read {data_dir / 'images'}: {error.strerror}. Put {LAYOUT} into {data_dir}.") from error
    missing = [path for files in classes.values() for path in files if path.name not in present]
    if missing:
        raise DataError(
            f"{len(missing)} of {IMAGES * len(classes)} images are missing, {missing[0]} for one. Unpack all images of "
            f"miniImageNet into {data_dir / 'images'}."
        )
    return dict(sorted(classes.items()))


def _read_csv(path: Path, split: str) -> dict[str, set[str]]:
    """The file names of each class of a split, by its id."""
    classes: dict[str, set[str]] = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                classes.setdefault(row["label"], set()).add(row["filename"])
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Put {LAYOUT} into {path.parent}; lists: {URL}.") from error
    except (csv.Error, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a CSV with the columns filename and label ({error!r}). Take it from {URL}.") from error
    counts = sorted({len(filenames) for filenames in classes.values()})
    checksum = hashlib.sha256("\n".join(sorted(map(str, classes))).encode()).hexdigest()
    if (len(classes), counts, checksum) != (CLASSES[split], [IMAGES], CHECKSUMS[split]):
        raise DataError(
            f"{path} should list the {CLASSES[split]} classes of the {split} split of Ravi and Larochelle 2017 (checksum "
            f"{CHECKSUMS[split][:12]}) with {IMAGES} images each, found {len(classes)} classes (checksum {checksum[:12]}) with "
            f"{' or '.join(map(str, counts)) or 'no'} images. Take it from {URL}."
        )
    return classes


def _from_files(data_dir: Path) -> Source:
    lists = list(read_lists(data_dir).items())

    def read(index: int) -> np.ndarray:
        return np.stack([decode(file, size=SIZE, channels=3, name=file) for file in lists[index][1]])

    return Source(tuple(name for name, _ in lists), (IMAGES,) * len(lists), (SIZE, SIZE, 3), read)


def _from_tfds() -> Source:
    def create() -> Any:
        from mamljax.data.miniimagenet_tfds import MiniImagenet

        return MiniImagenet()

    otherwise = f"Put {LAYOUT} into a directory and pass it with --data-dir; lists: {URL}."
    builder = prepared_builder(create, name="miniImageNet", otherwise=otherwise)
    names = tuple(builder.info.features["label"].names)

    def read(index: int) -> np.ndarray:
        split = names[index].split("/")[0]
        # Classes lie there one after the other, as nothing was shuffled: each is a slice of its split.
        first = IMAGES * [name for name in names if name.startswith(f"{split}/")].index(names[index])
        examples = list(read_examples(builder, f"{TFDS_SPLITS[split]}[{first}:{first + IMAGES}]"))
        if {example["label"] for example in examples} != {index}:
            raise DataError(f"{builder.data_dir} is not in the order of its classes. Delete it, so that it is prepared again.")
        return np.stack([decode(example["image"], size=SIZE, channels=3, name=names[index]) for example in examples])

    return Source(names, (IMAGES,) * len(names), (SIZE, SIZE, 3), read)
