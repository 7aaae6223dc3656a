"""Small data sets in the layouts of the real ones, drawn here."""

import hashlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamljax.data import miniimagenet, omniglot

CHARACTERS = {  # archive -> characters, with the number in their file names
    "images_background": {"Beta/character01": 1, "Alpha/character02": 3, "Alpha/character01": 2},
    "images_evaluation": {"Gurmukhi/character01": 4, "Gurmukhi/character02": 5},
}
CLASSES = {"train": ["n03", "n01"], "val": ["n04"], "test": ["n02", "n05"]}


def encoded(pixels, suffix):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, suffix)
    return file.getvalue()


def noise(*shape, seed):
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


@pytest.fixture
def drawings():
    """PNG files of each character."""
    return {
        name: [encoded(noise(105, 105, seed=(number, drawing)) < 128, "png") for drawing in range(3)]
        for characters in CHARACTERS.values()
        for name, number in characters.items()
    }


@pytest.fixture
def omniglot_dir(tmp_path, monkeypatch, drawings):
    """The two archives of Omniglot, of five characters with three drawings each."""
    monkeypatch.setattr(omniglot, "CHARACTERS", {archive: len(names) for archive, names in CHARACTERS.items()})
    monkeypatch.setattr(omniglot, "DRAWINGS", 3)
    directory = tmp_path / "omniglot"
    directory.mkdir()
    for archive, characters in CHARACTERS.items():
        with zipfile.ZipFile(directory / f"{archive}.zip", "w") as file:
            for name, number in characters.items():
                for drawing in (2, 0, 1):
                    file.writestr(f"{archive}/{name}/{number:04d}_{drawing + 1:02d}.png", drawings[name][drawing])
            file.writestr(f"{archive}/.DS_Store", b"")
    return directory


@pytest.fixture
def miniimagenet_dir(tmp_path, monkeypatch):
    """The files of miniImageNet, of five classes with three images each, one of another size."""
    monkeypatch.setattr(miniimagenet, "IMAGES", 3)
    monkeypatch.setattr(miniimagenet, "CLASSES", {split: len(labels) for split, labels in CLASSES.items()})
    checksums = {split: hashlib.sha256("\n".join(sorted(labels)).encode()).hexdigest() for split, labels in CLASSES.items()}
    monkeypatch.setattr(miniimagenet, "CHECKSUMS", checksums)
    directory = tmp_path / "miniimagenet"
    (directory / "images").mkdir(parents=True)
    for split, labels in CLASSES.items():
        rows = ["filename,label"]
        for image in (2, 0, 1):
            for label in labels:
                size = (100, 60) if (label, image) == ("n01", 1) else (84, 84)
                pixels = noise(*size, 3, seed=(int(label[1:]), image))
                (directory / "images" / f"{label}{image}.jpg").write_bytes(encoded(pixels, "jpeg"))
                rows.append(f"{label}{image}.jpg,{label}")
        (directory / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return directory


@pytest.fixture
def real_data_dir():
    """The real data, laid out as `omniglot/*.zip` and `miniimagenet/*.csv`."""
    if "MAMLJAX_DATA_DIR" not in os.environ:
        pytest.skip("MAMLJAX_DATA_DIR is not set")
    return Path(os.environ["MAMLJAX_DATA_DIR"])
