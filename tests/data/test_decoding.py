"""Decoding: what Pillow gives for sound images of every kind, one error for all others."""

import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from mamljax.data.bank import DataError
from mamljax.data.decoding import decode

PIXELS = np.random.default_rng(0).integers(256, size=(6, 6, 3), dtype=np.uint8)


def encode(image, suffix="png", **options):
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


def test_same_size_is_unchanged(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(Image.fromarray(PIXELS)))
    np.testing.assert_array_equal(decode(tmp_path / "a.png", size=6, channels=3, name="a"), PIXELS)


def test_grey():
    found = decode(encode(Image.fromarray(PIXELS)), size=6, channels=1, name="a")
    np.testing.assert_array_equal(found[..., 0], np.asarray(Image.fromarray(PIXELS).convert("L")))


def test_other_proportions_become_square_by_lanczos():
    image = Image.fromarray(PIXELS[:4])
    expected = np.asarray(image.resize((3, 3), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(decode(encode(image), size=3, channels=3, name="a"), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_modes(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    found = decode(encode(image, "tiff"), size=6, channels=3, name="a")
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


def test_a_palette_with_transparency():
    image, opacity = Image.fromarray(PIXELS).quantize(4), np.array([0, 100, 200, 255])
    found = decode(encode(image, transparency=bytes(opacity.tolist())), size=6, channels=3, name="a")
    share = opacity[np.asarray(image)][..., None] / 255
    np.testing.assert_allclose(found, share * np.asarray(image.convert("RGB")) + (1 - share) * 255, atol=1)


def test_black_ink_on_transparent_black_is_black_on_white():
    pixels = np.zeros((6, 6, 4), np.uint8)
    pixels[2, :, 3] = 255
    found = decode(encode(Image.fromarray(pixels)), size=6, channels=1, name="a")
    assert (found[2] == 0).all()
    assert (np.delete(found, 2, axis=0) == 255).all()


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (8, 1), (3, 2), (6, 3)])
def test_photographs_are_upright(orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(encode(Image.fromarray(PIXELS), exif=exif), size=6, channels=3, name="a")
    np.testing.assert_array_equal(found, np.rot90(PIXELS, turns))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_kind_of_file_makes_no_difference_to_how_it_is_turned(orientation):
    """Some are turned by Pillow itself."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(PIXELS[:4])
    png, tiff = (decode(encode(image, kind, exif=exif), size=6, channels=3, name="a") for kind in ("png", "tiff"))
    np.testing.assert_array_equal(tiff, png)
    assert (orientation == 1) == np.array_equal(png, decode(encode(image), size=6, channels=3, name="a"))


def test_an_image_whose_exif_data_are_broken_is_whole():
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc\0")  # a text as resolution
    exif = b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 2) + entries + bytes(4)
    found = decode(encode(Image.fromarray(PIXELS), exif=exif), size=6, channels=3, name="a")
    np.testing.assert_array_equal(found, np.rot90(PIXELS, 3))
    garbage = encode(Image.fromarray(PIXELS), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(range(64)))
    np.testing.assert_array_equal(decode(garbage, size=6, channels=3, name="a"), PIXELS)


def test_a_large_jpeg_is_much_as_without_its_short_cut():
    smooth = Image.fromarray(PIXELS).resize((600, 400), Image.Resampling.BICUBIC)
    jpeg = encode(smooth, "jpeg", quality=95)
    found = decode(jpeg, size=20, channels=3, name="a", draft=True).astype(int)
    whole = Image.open(io.BytesIO(jpeg)).convert("RGB").resize((20, 20), Image.Resampling.LANCZOS)
    assert 0 < np.abs(found - np.asarray(whole)).max() <= 3
    np.testing.assert_array_equal(decode(jpeg, size=20, channels=3, name="a"), whole)


def test_every_mode_has_a_way_to_grey():
    image = Image.new("LAB", (6, 6), (128, 128, 128))
    assert decode(encode(image, "tiff"), size=6, channels=1, name="a").shape == (6, 6, 1)


def png_of_16_bits():
    return encode(Image.fromarray(np.arange(36, dtype=np.uint16).reshape(6, 6)))


def png_with_a_broken_chunk():
    png = encode(Image.fromarray(PIXELS))
    return png[:36] + b"\x05" + png[37:]  # a length; SyntaxError


def huge_bmp():
    bmp = encode(Image.fromarray(PIXELS), "bmp")
    return bmp[:18] + (100_000).to_bytes(4, "little") * 2 + bmp[26:]


BROKEN = {
    "empty": b"",
    "text": b"no image",
    "truncated": encode(Image.fromarray(PIXELS))[:60],
    "truncated jpeg": encode(Image.fromarray(PIXELS), "jpeg")[:-50],
    "chunk": png_with_a_broken_chunk(),
    "header": b"P6 6 x 255\n" + bytes(200),  # ValueError
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_names_an_image_that_does_not_decode(content):
    with pytest.raises(DataError, match=r"cannot decode the image it.png \(.*\)\. Replace it by a whole one"):
        decode(content, size=3, channels=3, name="it.png")


def test_an_image_that_is_too_large_is_not_called_broken():
    with pytest.raises(DataError, match=r"the image it.png is too large \(.*\)\. Shrink it"):
        decode(huge_bmp(), size=3, channels=3, name="it.png")


def test_refuses_more_than_8_bits():
    with pytest.raises(DataError, match="it.png has more than 8 bits a channel. Convert it to 8 bits"):
        decode(png_of_16_bits(), size=3, channels=1, name="it.png")


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        decode(tmp_path / "a.png", size=3, channels=1, name="a")


def test_without_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r'reading images needs Pillow: pip install "mamljax\[experiments\]"'):
        decode(b"", size=3, channels=1, name="a")
