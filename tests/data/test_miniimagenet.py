"""miniImageNet from its lists and images: the classes are checked against those of Ravi and Larochelle."""

import sys

import numpy as np
import pytest
from PIL import Image

from mamljax.data import miniimagenet as module
from mamljax.data.bank import DataError
from mamljax.data.folders import split_folders
from mamljax.data.miniimagenet import miniimagenet

NAMES = ("test/n02", "test/n05", "train/n01", "train/n03", "val/n04")


def test_bank_of_files(miniimagenet_dir, tmp_path):
    bank = miniimagenet(miniimagenet_dir, tmp_path)
    assert bank.names == NAMES
    assert bank.images.shape == (5, 3, 84, 84, 3)
    np.testing.assert_array_equal(bank.counts, 3)
    for name, images in zip(bank.names, bank.images, strict=True):
        for number, image in enumerate(images):
            file = Image.open(miniimagenet_dir / "images" / f"{name[-3:]}{number}.jpg")
            np.testing.assert_array_equal(image, np.asarray(file.resize((84, 84), Image.Resampling.LANCZOS)))


def test_files_are_needed_once(miniimagenet_dir, tmp_path):
    made = miniimagenet(miniimagenet_dir, tmp_path)
    assert miniimagenet("/nowhere", tmp_path).checksum == miniimagenet(None, tmp_path).checksum == made.checksum


def test_split_by_prefix():
    split = {part: numbers.tolist() for part, numbers in split_folders(NAMES).items()}
    assert split == {"train": [2, 3], "val": [4], "test": [0, 1]}


def edit(path, change):
    path.write_text(change(path.read_text()))


def break_missing_csv(directory):
    (directory / "val.csv").unlink()


def break_columns(directory):
    edit(directory / "val.csv", lambda text: text.replace("label", "class"))


def break_text(directory):
    (directory / "val.csv").write_bytes(b"\xff\xfe\xff")


def break_short_row(directory):
    edit(directory / "val.csv", lambda text: text + "alone.jpg\n")


def break_one_image_less(directory):
    edit(directory / "val.csv", lambda text: text.replace("n041.jpg,n04\n", ""))


def break_one_image_twice(directory):
    edit(directory / "val.csv", lambda text: text.replace("n041.jpg", "n040.jpg"))


def break_another_class(directory):
    edit(directory / "val.csv", lambda text: text.replace("n04\n", "n09\n"))


def break_swap_splits(directory):
    (directory / "val.csv").write_text((directory / "test.csv").read_text())


def break_empty(directory):
    edit(directory / "val.csv", lambda text: "filename,label\n")


def break_missing_image(directory):
    (directory / "images" / "n041.jpg").unlink()
    (directory / "images" / "n042.jpg").unlink()


def break_missing_images(directory):
    (directory / "images").rename(directory / "jpegs")


def break_image(directory):
    path = directory / "images" / "n041.jpg"
    path.write_bytes(path.read_bytes()[:300])


LISTS = (
    r"val.csv should list the 1 classes of the val split of Ravi and Larochelle 2017 \(checksum \w{12}\) with 3 images each, "
)
BREAKS = {
    break_missing_csv: r"cannot read .*val.csv: No such file or directory. Put train.csv, val.csv, test.csv and the directory",
    break_columns: r"val.csv is not a CSV with the columns filename and label \(KeyError\('label'\)\). Take it from https://",
    break_text: r"val.csv is not a CSV with the columns filename and label \(UnicodeDecodeError",
    break_short_row: LISTS + r"found 2 classes \(checksum \w{12}\) with 1 or 3 images. Take it from https://",
    break_one_image_less: LISTS + r"found 1 classes \(checksum \w{12}\) with 2 images",
    break_one_image_twice: LISTS + r"found 1 classes \(checksum \w{12}\) with 2 images",
    break_another_class: LISTS + r"found 1 classes \(checksum \w{12}\) with 3 images",
    break_swap_splits: LISTS + r"found 2 classes",
    break_empty: LISTS + r"found 0 classes \(checksum \w{12}\) with no images",
    break_missing_image: r"2 of 15 images are missing, .*n041.jpg for one. Unpack all images of miniImageNet into .*images",
    break_missing_images: r"cannot read .*images: No such file or directory. Put train.csv",
    break_image: r"cannot decode the image .*images/n041.jpg \(",
}


@pytest.mark.parametrize(("damage", "message"), BREAKS.items(), ids=[damage.__name__ for damage in BREAKS])
def test_bad_files(miniimagenet_dir, tmp_path, damage, message):
    damage(miniimagenet_dir)
    with pytest.raises(DataError, match=message):
        miniimagenet(miniimagenet_dir, tmp_path / "banks")
    assert not (tmp_path / "banks" / "miniimagenet-84").exists()


def test_the_real_lists(real_data_dir):
    for split, count in (("train", 64), ("val", 16), ("test", 20)):
        assert len(module._read_csv(real_data_dir / "miniimagenet" / f"{split}.csv", split)) == count
    with pytest.raises(DataError, match=r"should list the 16 classes of the val split .* with 600 images each"):
        module._read_csv(real_data_dir / "miniimagenet" / "test.csv", "val")


@pytest.mark.parametrize("package", ["tensorflow", "tensorflow_datasets"])
def test_without_files_and_tensorflow_datasets(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    otherwise = "Put train.csv, val.csv, test.csv and the directory images into a directory and pass it with --data-dir"
    with pytest.raises(DataError, match=rf'TensorFlow Datasets needs pip install "mamljax\[prepare\]" .*{otherwise}'):
        miniimagenet(None, tmp_path)
