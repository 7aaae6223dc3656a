"""Omniglot (Lake, Salakhutdinov, Tenenbaum 2015): 1,623 handwritten characters, 20 drawings of each."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from mamljax.data.bank import Bank, DataError, Source, prepared_bank

SIZE = 28  # pixels, from 105
DRAWINGS = 20  # of each character
CHARACTERS = {"images_background": 964, "images_evaluation": 659}  # in each official archive
URL = "https://github.com/brendenlake/omniglot/tree/master/python"
# The split of Vinyals et al. 2016 (matching networks): all alphabets but these are for training.
VALIDATION_ALPHABETS = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
TEST_ALPHABETS = (
    "Kannada",
    "Keble",
    "Malayalam",
    "Manipuri",
    "Mongolian",
    "Old_Church_Slavonic_(Cyrillic)",
    "Oriya",
    "Sylheti",
    "Syriac_(Serto)",
    "Tengwar",
    "Tibetan",
    "ULOG",
)
LAST_GURMUKHI_FOR_TRAINING = "Gurmukhi/character41"  # the one alphabet that the split divides

Split = Literal["seeded", "vinyals"]


def omniglot(data_dir: str | Path | None = None, cache_dir: str | Path | None = None) -> Bank:
    """Open the bank of all 1,623 characters, 28x28x1, ink 255 on 0; made at the first call.

    It is made of the official archives `images_background.zip` and `images_evaluation.zip` if `data_dir` is given, or else
    by TensorFlow Datasets, which downloads them. Images are resized by a Lanczos filter and inverted, as in the authors' code.

    Args:
        data_dir: directory of the two archives; not needed once the bank is made.
        cache_dir: where banks lie.

    Raises:
        DataError: an archive is missing, broken or another one; or nothing can be downloaded.
    """
    source = (lambda: _from_archives(Path(data_dir))) if data_dir else _from_tfds
    return prepared_bank("omniglot-28", source, cache_dir)


def split_omniglot(names: tuple[str, ...], split: Split = "seeded", *, seed: int = 0) -> Mapping[str, np.ndarray]:
    """Divide the characters into "train", "val" and "test", as arrays of class numbers.

    Args:
        names: those of the bank, "Alphabet/characterNN".
        split: 1,100 / 100 / 423 characters at random, as the authors' code ("seeded"); or those of Vinyals et al. 2016
            ("vinyals"), 1,028 / 172 / 423, whose alphabets are disjoint but for one.
        seed: of the random split.
    """
    if split == "seeded":
        order = np.random.default_rng(seed).permutation(len(names))
        return {"train": order[:1100], "val": order[1100:1200], "test": order[1200:]}
    parts = {"train": [], "val": [], "test": []}
    for number, name in enumerate(names):
        alphabet = name.split("/")[0]
        late = alphabet == "Gurmukhi" and name > LAST_GURMUKHI_FOR_TRAINING
        part = "val" if alphabet in VALIDATION_ALPHABETS else "test" if late or alphabet in TEST_ALPHABETS else "train"
        parts[part].append(number)
    return {part: np.array(numbers) for part, numbers in parts.items()}


def _from_archives(data_dir: Path) -> Source:
    contents = {}
    for archive, expected in CHARACTERS.items():
        path = data_dir / f"{archive}.zip"
        characters = _read_archive(path)
        drawings = {len(images) for images in characters.values()}
        if len(characters) != expected or drawings != {DRAWINGS}:
            raise DataError(
                f"{path} should hold {expected} characters with {DRAWINGS} drawings each, found {len(characters)} characters "
                f"with {sorted(drawings)} drawings. Download it again from {URL}."
            )
        contents |= characters
    names = tuple(sorted(contents))
    return _source(names, lambda number: contents[names[number]])


def _read_archive(path: Path) -> dict[str, list[bytes]]:
    """The PNG files of each character, in the order of their names."""
    try:
        with zipfile.ZipFile(path) as archive:
            characters = {}
            for name in sorted(archive.namelist()):
                parts = name.split("/")
                if name.endswith(".png") and len(parts) == 4:  # images_background/Alphabet/characterNN/NNNN_DD.png
                    characters.setdefault("/".join(parts[1:3]), []).append(archive.read(name))
            return characters
    except FileNotFoundError as error:
        wanted = " and ".join(f"{archive}.zip" for archive in CHARACTERS)
        raise DataError(f"{path} is missing. Put {wanted} into {path.parent}; they are at {URL}.") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError) as error:
        raise DataError(f"{path} is not a whole zip file ({error}). Download it again from {URL}.") from error


def _source(names: tuple[str, ...], encoded: object) -> Source:
    return Source(names, (DRAWINGS,) * len(names), (SIZE, SIZE, 1), lambda number: np.stack([_ink(x) for x in encoded(number)]))


def _ink(png: bytes) -> np.ndarray:
    """Decode, shrink and invert one drawing: [28, 28, 1] uint8."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return 255 - np.asarray(image)[..., None]


def _from_tfds() -> Source:
    raise DataError("TFDS")
