"""Decoding of image files, while a bank is made."""

import io
from pathlib import Path

import numpy as np

from mamljax.data.bank import DataError

DECODING = 2  # the way of it; folders that were decoded in another are prepared again
MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels


def decode(file: Path | bytes, *, size: int, channels: int, name: str | Path) -> np.ndarray:
    """Decode an image, or the first frame of it, and resize it to a square by a Lanczos filter.

    It is turned as its EXIF data say, and lies on white where it is transparent.

    Args:
        file: its path, or what is in it.
        size: H and W of the result, whatever the proportions were.
        channels: C, 1 for grey or 3 for red, green and blue.
        name: of the image, for error messages.

    Returns:
        [size, size, channels] uint8.

    Raises:
        DataError: it cannot be read or decoded; or Pillow is missing.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError('reading images needs Pillow: pip install "mamljax[experiments]".') from error
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.mode in ("F", "I") or image.mode.startswith("I;"):
                raise DataError(
                    f"the image {name} has more than 8 bits a channel. Convert it to 8 bits."
                )  # Pillow would clip them
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            resized = upright.convert(MODES[channels]).resize((size, size), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot decode the image {name} ({error}). Replace it by a whole one.") from error
    return np.asarray(resized).reshape(size, size, channels)
