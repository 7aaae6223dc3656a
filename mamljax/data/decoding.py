"""Decoding of image files, while a bank is made."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mamljax.data.bank import DataError

if TYPE_CHECKING:
    from PIL import Image

DECODING = 4  # the way of it; folders that were decoded in another are prepared again
MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels
ORIENTATION = 0x0112  # the EXIF tag, whose values stand for what must be done to see the image upright
TURNS = dict(
    enumerate(("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"), 2)
)


def decode(file: Path | bytes, *, size: int, channels: int, name: str | Path, draft: bool = False) -> np.ndarray:
    """Decode an image, or the first frame of it, and resize it to a square by a Lanczos filter.

    It is turned as its EXIF data say, and lies on white where it is transparent.

    Args:
        file: its path, or what is in it.
        size: H and W of the result, whatever the proportions were.
        channels: C, 1 for grey or 3 for red, green and blue.
        name: of the image, for error messages.
        draft: whether a large JPEG may be decoded at a fraction of its size, four times `size` or more, before it is resized:
            several times as fast, and different by a grey level or so.

    Returns:
        [size, size, channels] uint8.

    Raises:
        DataError: it cannot be read or decoded; or Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError('reading images needs Pillow: pip install "mamljax[experiments]".') from error
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.mode in ("F", "I") or image.mode.startswith("I;"):  # Pillow would clip them
                raise DataError(f"the image {name} has more than 8 bits a channel. Convert it to 8 bits.")
            if draft:
                image.draft(None, (4 * size, 4 * size))
            # Pillow itself turns a TIFF, when it is loaded.
            turn = None if image.format == "TIFF" else TURNS.get(_orientation(image))
            upright = image.transpose(Image.Transpose[turn]) if turn else image
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            coloured = upright.convert("RGB")  # from which there is a way to grey for every mode
            resized = coloured.convert(MODES[channels]).resize((size, size), Image.Resampling.LANCZOS)
    except Image.DecompressionBombError as error:
        raise DataError(f"the image {name} is too large ({error}). Shrink it.") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"cannot decode the image {name} ({error}). Replace it by a whole one, or convert it.") from error
    return np.asarray(resized).reshape(size, size, channels)


def _orientation(image: "Image.Image") -> int:
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow raises many kinds of error for EXIF data that are broken, which an image may have and be whole
        return 1  # upright
