"""Images of one's own: classes by folder, banks that follow the files, splits by folder or by lot."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mamljax.data import folders
from mamljax.data.bank import DataError
from mamljax.data.folders import image_folders, split_folders

FLAT = {"bee": ("b.png", "a.JPG"), "ant": ("a.png",), "cat": ("x.png", "y.gif", "z.bmp")}


def fill(directory, classes):
    for name, files in classes.items():
        (directory / name).mkdir(parents=True)
        for number, file in enumerate(files):
            pixels = np.random.default_rng((*name.encode(), number)).integers(256, size=(8, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(directory / name / file)
    return directory


@pytest.fixture
def flat(tmp_path):
    return fill(tmp_path / "flat", FLAT)


@pytest.fixture
def divided(tmp_path):
    classes = ("train/owl", "train/cat", "val/owl", "test/dog")
    return fill(tmp_path / "divided", dict.fromkeys(classes, ("1.png",)))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_bank_of_folders(flat, tmp_path, channels, mode):
    (flat / ".git").mkdir()
    (flat / "README.md").write_text("no class")
    (flat / "ant" / ".hidden.png").write_bytes(b"")
    (flat / "ant" / "notes.txt").write_text("no image")
    bank = image_folders(flat, tmp_path, size=5, channels=channels)
    assert bank.names == ("ant", "bee", "cat")
    np.testing.assert_array_equal(bank.counts, [1, 2, 3])
    assert bank.images.shape == (3, 3, 5, 5, channels)
    for name, images, count in zip(bank.names, bank.images, bank.counts, strict=True):
        for file, image in zip(sorted(FLAT[name]), images[:count], strict=True):
            with Image.open(flat / name / file) as drawn:
                small = drawn.convert(mode).resize((5, 5), Image.Resampling.LANCZOS)
            np.testing.assert_array_equal(image, np.asarray(small).reshape(5, 5, channels))


def test_names_tell_the_split(divided, tmp_path):
    assert image_folders(divided, tmp_path, size=5, channels=3).names == ("test/dog", "train/cat", "train/owl", "val/owl")


def change_touch(directory):
    os.utime(directory / "ant" / "a.png", ns=(0, 1))


def change_size(directory):
    stat = (directory / "ant" / "a.png").stat()
    with (directory / "ant" / "a.png").open("ab") as file:
        file.write(b"x")
    os.utime(directory / "ant" / "a.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_add(directory):
    Image.new("RGB", (8, 12)).save(directory / "ant" / "b.png")


def change_remove(directory):
    (directory / "cat" / "x.png").unlink()


def change_rename_a_class(directory):
    (directory / "cat").rename(directory / "dog")


CHANGES = [value for name, value in globals().items() if name.startswith("change_")]


def banks(directory):
    return {path.name for path in directory.iterdir() if path.is_dir()}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_files_makes_another_bank(flat, tmp_path, change):
    image_folders(flat, tmp_path / "banks", size=5, channels=3)
    change(flat)
    image_folders(flat, tmp_path / "banks", size=5, channels=3)
    assert len(banks(tmp_path / "banks")) == 2


def test_the_same_files_make_one_bank_for_each_shape(flat, tmp_path):
    for size, channels in ((5, 3), (5, 3), (6, 3), (5, 1)):
        image_folders(flat, tmp_path / "banks", size=size, channels=channels)
    moved = flat.rename(tmp_path / "moved")
    image_folders(moved, tmp_path / "banks", size=5, channels=3)
    assert len(banks(tmp_path / "banks")) == 3


def break_missing(directory):
    shutil.rmtree(directory)


def break_no_folders(directory):
    for name in FLAT:
        shutil.rmtree(directory / name)
    (directory / "image.png").touch()


def break_two_classes(directory):
    shutil.rmtree(directory / "cat")


def break_empty_class(directory):
    (directory / "ant" / "a.png").rename(directory / "ant" / "a.txt")


def break_folder_in_class(directory):
    (directory / "ant" / "sub").mkdir()


def break_image(directory):
    (directory / "ant" / "a.png").write_bytes(b"no image")


def break_empty_split(directory):
    for split in ("train", "val", "test"):
        (directory / split).mkdir()
    shutil.copytree(directory / "ant", directory / "train" / "ant")


def break_missing_split(directory):
    for name in FLAT:
        shutil.rmtree(directory / name)
    for split in ("train", "test"):
        (directory / split).mkdir()


def break_shared_image(directory):
    for number, split in enumerate(("train", "val", "test")):
        fill(directory / split, {f"{split}{number}": FLAT["cat"][: number + 1]})
    for name in FLAT:
        shutil.rmtree(directory / name)
    shutil.copy(directory / "train" / "train0" / "x.png", directory / "test" / "test2" / "again.png")


BREAKS = {
    break_shared_image: r"one image is both in (train and in test|test and in train): .*(x|again).png and .*\.png. Delete one",
    break_missing_split: r"flat holds train and test, but no val. Divide the class folders among all three",
    break_missing: r"cannot read .*flat: No such file or directory. Pass the directory of the class folders with --data-dir",
    break_no_folders: r"flat holds no class folders. Put a folder with images of each class into it, or into train, val and",
    break_two_classes: r"flat holds 2 classes. Training, validation and test need one each, at least",
    break_empty_class: r"the class folder .*ant has no images \(.bmp .*\). Put some into it or delete it",
    break_folder_in_class: r"the class folder .*ant holds the folder sub\. Move its images up, or it away",
    break_image: r"cannot decode the image .*ant/a.png",
    break_empty_split: r"flat/val holds no class folders",
}


@pytest.mark.parametrize(("damage", "message"), BREAKS.items(), ids=[damage.__name__ for damage in BREAKS])
def test_bad_folders(flat, tmp_path, damage, message):
    damage(flat)
    with pytest.raises(DataError, match=message):
        image_folders(flat, tmp_path / "banks", size=5, channels=3)


@pytest.mark.parametrize(
    ("size", "channels", "message"),
    [(0, 3, "size must be a whole number of at least 1, got 0"), (5, 2, r"channels must be 1 \(grey\) or 3 .*, got 2")],
)
def test_bad_shapes(flat, tmp_path, size, channels, message):
    with pytest.raises(ValueError, match=message):
        image_folders(flat, tmp_path, size=size, channels=channels)


def test_banks_do_not_go_among_the_classes(flat):
    with pytest.raises(ValueError, match=r"the cache directory .*banks lies in .*flat, whose folders are classes"):
        image_folders(flat, flat / "banks", size=5, channels=3)


def test_a_class_that_makes_all_others_large_is_named():
    classes = {"most": [Path("image.png")] * 1000, **{name: [Path("image.png")] for name in "abcde"}}
    with pytest.warns(UserWarning, match=r"take 6\.0 GB, as each of 6 classes gets the room of most, which has 1000 where"):
        folders._source(classes, size=1000, channels=1)
    folders._source(classes, size=100, channels=1)  # small enough


@pytest.mark.parametrize("copy", ["ant/again.png", "bee/b.png", "bee/linked.png"])
def test_an_image_that_lies_there_twice_is_named(flat, tmp_path, copy):
    original = flat / "ant" / "a.png"
    if "linked" in copy:
        (flat / copy).symlink_to(original)
    else:
        shutil.copy(original, flat / copy)
    with pytest.warns(UserWarning, match="one image lies there twice, .*(a.png|again.png|b.png|linked.png), and there may be"):
        image_folders(flat, tmp_path, size=5, channels=3)


@pytest.mark.parametrize(("total", "shares"), [(100, (64, 16, 20)), (3, (1, 1, 1)), (10, (6, 2, 2))])
def test_split_by_lot(total, shares):
    names = tuple(map(str, range(total)))
    split = split_folders(names, seed=1)
    assert tuple(len(split[part]) for part in ("train", "val", "test")) == shares
    np.testing.assert_array_equal(np.sort(np.concatenate(list(split.values()))), np.arange(total))
    np.testing.assert_array_equal(split["train"], split_folders(names, seed=1)["train"])


def test_split_by_lot_depends_on_the_seed():
    names = tuple(map(str, range(100)))
    assert (split_folders(names)["train"] != split_folders(names, seed=1)["train"]).any()


def test_split_by_folder(divided, tmp_path):
    bank = image_folders(divided, tmp_path, size=5, channels=3)
    split = {part: numbers.tolist() for part, numbers in split_folders(bank.names).items()}
    assert split == {"train": [1, 2], "val": [3], "test": [0]}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", "b"), "no class of 2 is left for train. Give at least one for each split"),
        (("train/a", "val/b"), "no class of 2 is left for test"),
        (("train/a",), "no class of 1 is left for val and test"),
    ],
)
def test_empty_splits(names, message):
    with pytest.raises(ValueError, match=message):
        split_folders(names)


def test_a_class_beside_the_splits_is_no_class(divided, tmp_path):
    (divided / "owls").mkdir()
    with pytest.raises(DataError, match="holds owls beside train, val, test. Move it into one of these, or away"):
        image_folders(divided, tmp_path / "banks", size=8, channels=3)
