"""Reading data sets that TensorFlow Datasets has prepared; it and TensorFlow are imported only here and when needed."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from mamljax.data.bank import DataError


def prepared_builder(create: Callable[[], Any], *, name: str, otherwise: str) -> Any:
    """Make a builder of TensorFlow Datasets and let it download and prepare its data set, if it has not.

    Args:
        create: builds it; may import TensorFlow Datasets.
        name: of the data set, for error messages.
        otherwise: what to do without TensorFlow Datasets.

    Raises:
        DataError: TensorFlow Datasets is missing or cannot prepare the data set.
    """
    try:
        import tensorflow as tf
        import tensorflow_datasets  # noqa: F401
    except ImportError as error:
        raise DataError(f'{name} by TensorFlow Datasets needs pip install "mamljax[prepare]" ({error}). {otherwise}') from error
    with contextlib.suppress(RuntimeError):  # the caller has used TensorFlow already
        tf.config.set_visible_devices([], "GPU")  # or it takes the memory of all of them
    try:
        builder = create()
        builder.download_and_prepare()
    except DataError:
        raise
    except Exception as error:  # of many kinds: no network, no room, a changed archive
        raise DataError(f"TensorFlow Datasets cannot prepare {name} ({type(error).__name__}: {error}). {otherwise}") from error
    return builder


def read_examples(builder: Any, split: str) -> Iterator[dict[str, Any]]:
    """Read the examples of a split in the order in which they are stored, images as the bytes of their files."""
    import tensorflow_datasets as tfds

    # One file after the other, which is the order that was stored; and no copy of the whole data set in memory.
    config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    decoders = {"image": tfds.decode.SkipDecoding()}
    yield from tfds.as_numpy(builder.as_dataset(split=split, read_config=config, decoders=decoders))
