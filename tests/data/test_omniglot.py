"""Omniglot from its archives: every character under its name, drawings in order, ink bright; bad archives refused."""

import io
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from mamljax.data.bank import DataError
from mamljax.data.omniglot import omniglot, split_omniglot

NAMES = ("Alpha/character01", "Alpha/character02", "Beta/character01", "Gurmukhi/character01", "Gurmukhi/character02")
TWO_IN_ALL = r"Put images_background.zip and images_evaluation.zip into"


def test_bank_of_archives(omniglot_dir, tmp_path, drawings):
    bank = omniglot(omniglot_dir, tmp_path)
    assert bank.names == NAMES
    assert bank.images.shape == (5, 3, 28, 28, 1)
    for name, images in zip(bank.names, bank.images, strict=True):
        for png, image in zip(drawings[name], images, strict=True):
            small = Image.open(io.BytesIO(png)).convert("L").resize((28, 28), Image.Resampling.LANCZOS)
            np.testing.assert_array_equal(image[..., 0], 255 - np.asarray(small))


def test_archives_are_needed_once(omniglot_dir, tmp_path):
    made = omniglot(omniglot_dir, tmp_path)
    assert omniglot("/nowhere", tmp_path).checksum == omniglot(None, tmp_path).checksum == made.checksum


def rewrite(path, change):
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    change(contents)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


LAST = "images_evaluation/Gurmukhi/character02/0005_03.png"


def break_missing(path):
    path.unlink()


def break_truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def break_flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 30] ^= 0xFF
    path.write_bytes(content)


def break_deflated_stream(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images_evaluation/Gurmukhi/character01/0004_01.png", bytes(1000))
    content = bytearray(path.read_bytes())
    content[content.index(b".png") + 4] ^= 0xFF
    path.write_bytes(content)


def break_directory(path):
    path.unlink()
    path.mkdir()


def break_no_drawings(path):
    rewrite(path, dict.clear)


def break_one_drawing_less(path):
    rewrite(path, lambda contents: contents.pop(LAST))


def break_one_character_less(path):
    rewrite(path, lambda contents: [contents.pop(name) for name in list(contents) if "character02" in name])


def break_a_png(path):
    rewrite(path, lambda contents: contents.update({LAST: contents[LAST][:50]}))


BREAKS = {
    break_missing: rf"images_evaluation.zip is missing. {TWO_IN_ALL} .*; they are at https://",
    break_truncate: r"cannot read the zip file .*images_evaluation.zip \(File is not a zip file\). Download it again from https://",
    break_flip_a_byte: r"cannot read the zip file .*\(Bad CRC-32 for file 'images_evaluation/.*/character01/0004_03.png'\)",
    break_deflated_stream: r"cannot read the zip file .*images_evaluation.zip \(Error -3 while decompressing",
    break_directory: r"cannot read the zip file .*Is a directory",
    break_no_drawings: r"should hold 2 characters with 3 drawings each, found 0 characters with no drawings. Download it again",
    break_one_drawing_less: r"should hold 2 characters with 3 drawings each, found 2 characters with 2 or 3 drawings",
    break_one_character_less: r"should hold 2 characters with 3 drawings each, found 1 characters with 3 drawings",
    break_a_png: rf"cannot decode the image {LAST} of .*images_evaluation.zip",
}


@pytest.mark.parametrize(("damage", "message"), BREAKS.items(), ids=[damage.__name__ for damage in BREAKS])
def test_bad_archives(omniglot_dir, tmp_path, damage, message):
    damage(omniglot_dir / "images_evaluation.zip")
    with pytest.raises(DataError, match=message):
        omniglot(omniglot_dir, tmp_path / "banks")
    assert not (tmp_path / "banks" / "omniglot-28").exists()


def test_the_real_archives(real_data_dir, tmp_path):
    bank = omniglot(real_data_dir / "omniglot", tmp_path)
    assert bank.images.shape == (1623, 20, 28, 28, 1)
    assert bank.checksum == "01c827169127b17e8a0187716225e30276d0aa19445dca28ac380f4ecd91e060"
    split = split_omniglot(bank.names, "vinyals")
    assert {part: len(numbers) for part, numbers in split.items()} == {"train": 1028, "val": 172, "test": 423}
    for part, numbers in split.items():
        lines = (real_data_dir / "omniglot" / "splits_vinyals" / f"{part}.txt").read_text().split()
        assert {bank.names[number] for number in numbers} == {line.rsplit("/", 1)[0] for line in lines}


NAMES_OF_1623 = tuple(f"Alphabet{number // 30}/character{number % 30:02d}" for number in range(1623))


def test_seeded_split():
    split = split_omniglot(NAMES_OF_1623, "seeded", seed=1)
    assert [len(split[part]) for part in ("train", "val", "test")] == [1100, 100, 423]
    np.testing.assert_array_equal(np.sort(np.concatenate(list(split.values()))), np.arange(1623))
    again, other = split_omniglot(NAMES_OF_1623, seed=1), split_omniglot(NAMES_OF_1623, seed=2)
    np.testing.assert_array_equal(split["test"], again["test"])
    assert (split["test"] != other["test"]).any()


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split must be one of \('seeded', 'vinyals'\), got 'seded'"):
        split_omniglot(("Greek/character01",), "seded")


def test_vinyals_split():
    names = ("Greek/character01", "Hebrew/character01", "Oriya/character02", "Gurmukhi/character41", "Gurmukhi/character42")
    split = {part: numbers.tolist() for part, numbers in split_omniglot(names, "vinyals").items()}
    assert split == {"train": [0, 3], "val": [1], "test": [2, 4]}


@pytest.mark.parametrize("package", ["tensorflow", "tensorflow_datasets"])
def test_without_files_and_tensorflow_datasets(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    otherwise = "Put images_background.zip and images_evaluation.zip .* into a directory and pass it with --data-dir"
    with pytest.raises(DataError, match=rf'TensorFlow Datasets needs pip install "mamljax\[prepare\]" .*{otherwise}'):
        omniglot(None, tmp_path)
