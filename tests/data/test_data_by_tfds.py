"""Banks made through TensorFlow Datasets are those made of the files; every way to fail says what to do instead."""

import shutil
import warnings
import zipfile

import numpy as np
import pytest

from mamljax.data import miniimagenet as miniimagenet_module
from mamljax.data import omniglot as omniglot_module
from mamljax.data.bank import DataError
from mamljax.data.miniimagenet import miniimagenet
from mamljax.data.omniglot import omniglot

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tfds = pytest.importorskip("tensorflow_datasets")
    import requests
    from tensorflow_datasets.image_classification import omniglot as tfds_omniglot

    from mamljax.data.miniimagenet_tfds import MiniImagenet

pytestmark = pytest.mark.filterwarnings("ignore")  # of TensorFlow

ZIPS = "Put images_background.zip and images_evaluation.zip .* into a directory and pass it with --data-dir"
FILES = "Put train.csv, val.csv, test.csv and the directory images into a directory and pass it with --data-dir"


@pytest.fixture(autouse=True)
def tfds_dir(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


@pytest.fixture
def downloads(omniglot_dir, tmp_path, monkeypatch):
    """What TensorFlow Datasets would download and extract."""
    monkeypatch.setattr(tfds_omniglot, "_NUM_CLASSES", 5)
    monkeypatch.setattr(tfds_omniglot, "_NUM_ALPHABETS", 3)
    places = {"train": "images_background", "eval": "images_evaluation", "small1": "images_background"}
    places["small2"] = "images_background"
    for part, archive in places.items():
        with zipfile.ZipFile(omniglot_dir / f"{archive}.zip") as file:
            file.extractall(tmp_path / "extracted" / part)
            (tmp_path / "extracted" / part / archive / ".DS_Store").unlink()
    directories = {part: str(tmp_path / "extracted" / part) for part in places}
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda self, urls: directories)
    return directories


def assert_same(one, other):
    assert one.names == other.names
    assert one.checksum == other.checksum
    np.testing.assert_array_equal(one.images, other.images)


def prepare(builder, num_shards):
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=num_shards))
    assert builder.info.splits["train"].num_shards == num_shards


@pytest.mark.parametrize("num_shards", [1, 3])
def test_omniglot_is_that_of_the_archives(omniglot_dir, downloads, tmp_path, num_shards):
    prepare(tfds.builder("omniglot"), num_shards)
    assert_same(omniglot(None, tmp_path / "tfds_banks"), omniglot(omniglot_dir, tmp_path / "banks"))


def test_omniglot_in_another_order_is_refused(downloads, tmp_path, monkeypatch):
    in_order = omniglot_module.read_examples
    monkeypatch.setattr(omniglot_module, "read_examples", lambda builder, split: list(in_order(builder, split))[::-1])
    with pytest.raises(DataError, match=f"omniglot/3.0.0 is not Omniglot in its known order. Delete it .* {ZIPS}"):
        omniglot(None, tmp_path)


def test_omniglot_with_a_character_less_is_refused(downloads, tmp_path, monkeypatch):
    monkeypatch.setattr(omniglot_module, "CHARACTERS", {"images_background": 4, "images_evaluation": 2})
    with pytest.raises(DataError, match="train of .* should hold 4 characters with 3 drawings each, found 3 characters"):
        omniglot(None, tmp_path)


def test_omniglot_without_a_network(tmp_path, monkeypatch):
    def download(self, urls):
        raise requests.exceptions.ConnectionError("Failed to resolve 'github.com'")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", download)
    message = rf"TensorFlow Datasets cannot prepare Omniglot \(ConnectionError: Failed to resolve 'github.com'\). {ZIPS}"
    with pytest.raises(DataError, match=message):
        omniglot(None, tmp_path)


@pytest.fixture
def manual(miniimagenet_dir, tfds_dir):
    """The files of miniImageNet where TensorFlow Datasets looks for them."""
    place = tfds_dir / "downloads" / "manual" / "miniimagenet"
    shutil.copytree(miniimagenet_dir, place)
    return place


@pytest.mark.parametrize("num_shards", [1, 3])
def test_miniimagenet_is_that_of_the_files(miniimagenet_dir, manual, tmp_path, num_shards):
    prepare(MiniImagenet(), num_shards)
    assert_same(miniimagenet(None, tmp_path / "tfds_banks"), miniimagenet(miniimagenet_dir, tmp_path / "banks"))


def test_the_builder_gives_images_labels_and_file_names(manual, tmp_path):
    bank = miniimagenet(None, tmp_path)
    builder = MiniImagenet()
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 6, "validation": 3, "test": 6}
    examples = list(tfds.as_numpy(builder.as_dataset(split="train")))
    assert [example["filename"].decode() for example in examples] == [f"n0{n}{image}.jpg" for n in (1, 3) for image in range(3)]
    label = builder.info.features["label"]
    for number, example in enumerate(examples):
        assert label.int2str(example["label"]) == ("train/n01", "train/n03")[number // 3]
        np.testing.assert_array_equal(example["image"], bank.images[example["label"], number % 3])


def test_miniimagenet_without_files(miniimagenet_dir, tmp_path):
    with pytest.raises(DataError, match=rf"(?s)Manual directory .*manual does not exist .* miniimagenet there.* {FILES}"):
        miniimagenet(None, tmp_path)


def test_miniimagenet_with_a_wrong_list(manual, tmp_path):
    shutil.copy(manual / "test.csv", manual / "val.csv")
    with pytest.raises(DataError, match=r"^.*manual/miniimagenet/val.csv should list the 1 classes of the val split"):
        miniimagenet(None, tmp_path)


def test_miniimagenet_with_a_broken_image(manual, tmp_path):
    (manual / "images" / "n041.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="^cannot decode the image .*n041.jpg"):
        miniimagenet(None, tmp_path)


def test_miniimagenet_in_another_order_is_refused(manual, tmp_path, monkeypatch):
    in_order = miniimagenet_module.read_examples
    monkeypatch.setattr(miniimagenet_module, "read_examples", lambda builder, split: in_order(builder, split.split("[")[0]))
    with pytest.raises(DataError, match="mini_imagenet/1.0.0 is not in the order of its classes. Delete it"):
        miniimagenet(None, tmp_path)
