"""miniImageNet as a data set of TensorFlow Datasets, `tfds.load("mini_imagenet")` once this module is imported.

The only module that needs TensorFlow Datasets to be imported.
"""

from pathlib import Path

import tensorflow_datasets as tfds

from mamljax.data import miniimagenet
from mamljax.data.decoding import decode


class MiniImagenet(tfds.core.GeneratorBasedBuilder):
    """The 100 classes of Ravi and Larochelle 2017, 600 images of 84x84x3 each, in the order of their file names."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"Put {miniimagenet.LAYOUT} into the directory miniimagenet there. The lists are at {miniimagenet.URL}; the images are "
        "those of ImageNet, which may be had for non-commercial research at https://image-net.org."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(miniimagenet.SIZE, miniimagenet.SIZE, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=sum(miniimagenet.CLASSES.values())),  # of all splits together
            "filename": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="miniImageNet for few-shot learning; the classes of the three splits are disjoint.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage=miniimagenet.URL,
            disable_shuffling=True,  # so that the images of a class can be read by themselves
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        lists = miniimagenet.read_lists(Path(dl_manager.manual_dir) / "miniimagenet")
        self.info.features["label"].names = list(lists)  # "train/n01532829"
        return {
            tfds_split: self._generate_examples({name: files for name, files in lists.items() if name.startswith(f"{split}/")})
            for split, tfds_split in miniimagenet.TFDS_SPLITS.items()
        }

    def _generate_examples(self, lists: dict) -> tfds.core.split_builder.SplitGenerator:
        files = [(name, file) for name, files in lists.items() for file in files]
        for number, (name, file) in enumerate(files):
            yield (
                number,
                {"image": decode(file, size=miniimagenet.SIZE, channels=3, name=file), "label": name, "filename": file.name},
            )
