"""Omniglot (Lake, Salakhutdinov, Tenenbaum 2015): 1,623 handwritten characters, 20 drawings of each."""

import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mamljax.checks import check_choice
from mamljax.data.bank import Bank, DataError, Source, prepared_bank
from mamljax.data.decoding import decode
from mamljax.data.from_tfds import prepared_builder, read_examples

SIZE = 28  # pixels, from 105
DRAWINGS = 20  # of each character
CHARACTERS = {"images_background": 964, "images_evaluation": 659}  # in each official archive
WANTED = "images_background.zip and images_evaluation.zip"
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
Contents = dict[str, dict[str, bytes]]  # the PNG files of each character "Alphabet/characterNN", by name and in its order


def omniglot(data_dir: str | Path | None = None, cache_dir: str | Path | None = None) -> Bank:
    """Open the bank of all 1,623 characters, 28x28x1, ink 255 on 0; made at the first call.

    It is made of the official archives `images_background.zip` and `images_evaluation.zip` if `data_dir` is given, or else
    by TensorFlow Datasets, which downloads them; the bank is the same. Images are resized by a Lanczos filter and inverted.
    The authors' code asks Pillow for the same, but of images of one bit a pixel Pillow always takes the nearest pixels.

    Args:
        data_dir: directory of the two archives; not needed once the bank is made.
        cache_dir: where banks lie.

    Raises:
        DataError: an archive is missing, broken or another one; or nothing can be downloaded.
    """
    source = _from_tfds if data_dir is None else lambda: _from_archives(Path(data_dir))
    return prepared_bank("omniglot-28", source, cache_dir)


def split_omniglot(names: tuple[str, ...], split: Split = "seeded", *, seed: int = 0) -> Mapping[str, np.ndarray]:
    """Divide the characters into "train", "val" and "test", as arrays of class numbers.

    Args:
        names: those of the bank, "Alphabet/characterNN".
        split: 1,100 / 100 / 423 characters at random, as the authors' code ("seeded"); or those of Vinyals et al. 2016
            ("vinyals"), 1,028 / 172 / 423, whose alphabets are disjoint but for one.
        seed: of the random split.

    Raises:
        ValueError: an unknown split.
    """
    check_choice("split", split, Split)
    if split == "seeded":
        order = np.random.default_rng(seed).permutation(len(names))
        return {"train": order[:1100], "val": order[1100:1200], "test": order[1200:]}
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for index, name in enumerate(names):
        alphabet = name.split("/")[0]
        late = alphabet == "Gurmukhi" and name > LAST_GURMUKHI_FOR_TRAINING
        part = "val" if alphabet in VALIDATION_ALPHABETS else "test" if late or alphabet in TEST_ALPHABETS else "train"
        parts[part].append(index)
    return {part: np.array(indices) for part, indices in parts.items()}


def _from_archives(data_dir: Path) -> Source:
    contents: Contents = {}
    for archive, expected in CHARACTERS.items():
        characters = _read_archive(data_dir / f"{archive}.zip")
        _check_counts(characters, expected, str(data_dir / f"{archive}.zip"))
        contents |= characters
    return _source(contents)


def _read_archive(path: Path) -> Contents:
    try:
        with zipfile.ZipFile(path) as archive:
            characters: Contents = {}
            for name in sorted(archive.namelist()):
                parts = name.split("/")
                if name.endswith(".png") and len(parts) == 4:  # images_background/Alphabet/characterNN/NNNN_DD.png
                    characters.setdefault("/".join(parts[1:3]), {})[f"{name} of {path}"] = archive.read(name)
            return characters
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. Put {WANTED} into {path.parent}; they are at {URL}.") from error
    except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read the zip file {path} ({error}). Download it again from {URL}.") from error


def _check_counts(characters: Contents, expected: int, place: str) -> None:
    drawings = sorted({len(files) for files in characters.values()})
    if len(characters) != expected or drawings != [DRAWINGS]:
        raise DataError(
            f"{place} should hold {expected} characters with {DRAWINGS} drawings each, found {len(characters)} characters with "
            f"{' or '.join(map(str, drawings)) or 'no'} drawings. Download it again from {URL}."
        )


def _source(contents: Contents) -> Source:
    names = tuple(sorted(contents))

    def read(index: int) -> np.ndarray:
        files = contents[names[index]].items()
        return np.stack([255 - decode(png, size=SIZE, channels=1, name=name) for name, png in files])  # ink is black there

    return Source(names, (DRAWINGS,) * len(names), (SIZE, SIZE, 1), read)


def _from_tfds() -> Source:
    def create() -> Any:
        import tensorflow_datasets as tfds

        return tfds.builder("omniglot")

    otherwise = f"Put {WANTED} ({URL}) into a directory and pass it with --data-dir."
    builder = prepared_builder(create, name="Omniglot", otherwise=otherwise)
    alphabets = builder.info.features["alphabet"].names
    contents: Contents = {}
    for split, expected in zip(("train", "test"), CHARACTERS.values(), strict=True):
        characters = _in_archive_order(read_examples(builder, split), split, alphabets)
        if characters is None:
            raise DataError(
                f"{builder.data_dir} is not Omniglot in its known order. Delete it to prepare it again. {otherwise}"
            )
        _check_counts(characters, expected, f"{split} of {builder.data_dir}")
        contents |= characters
    return _source(contents)


def _in_archive_order(examples: Iterable[Mapping[str, Any]], split: str, alphabets: Sequence[str]) -> Contents | None:
    """Bring the drawings, which TensorFlow Datasets has shuffled, into the order of their archive; None if that fails.

    File names are not stored, but the order is that of the MD5 hashes of the split and a key that holds the file name, such
    as "Greek_0_0394_01.png" for `Greek/character01/0394_01.png`. So the order tells the names.
    """
    # The characters in the order in which they are stored.
    found, pngs = [], []
    for example in examples:
        found.append((alphabets[example["alphabet"]], int(example["alphabet_char_id"]), int(example["label"])))
        pngs.append(example["image"])
    # The names that their files must have had, in the order of the hashes.
    stored = []
    for character in set(found):
        alphabet, number, label = character
        for drawing in range(1, DRAWINGS + 1):
            key = f"{alphabet}_{number}_{label + 1:04d}_{drawing:02d}.png"
            stored.append((hashlib.md5(f"{split}{key}".encode()).digest(), key, character))
    stored.sort()
    # It is the same order only if names and hashes are what they are taken for here.
    if [character for *_, character in stored] != found:
        return None
    contents: Contents = {}
    for (_, key, (alphabet, number, _)), png in sorted(zip(stored, pngs, strict=True), key=lambda pair: pair[0][1]):
        contents.setdefault(f"{alphabet}/character{number + 1:02d}", {})[key] = png
    return contents
