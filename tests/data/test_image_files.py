"""Image files: what is decoded, into which RGB values, and what is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from pictures import encoded, picture
from PIL import Image

from kd.data.image_files import MAX_PIXELS, Files, decode
from kd.errors import ImageError


def as_rgb(content):
    return np.asarray(decode(io.BytesIO(content))).astype(int)


# --- values


def test_modes_become_the_rgb_they_show():
    colour = np.asarray(picture(3)).astype(int)
    grey = np.asarray(picture(3).convert("L"))
    assert (as_rgb(encoded(picture(3), "PNG")) == colour).all()
    assert (as_rgb(encoded(Image.fromarray(grey), "PNG")) == grey[..., None]).all()
    cmyk = as_rgb(encoded(picture(3).convert("CMYK"), "JPEG", quality=100, subsampling=0))
    assert np.abs(cmyk - colour).mean() < 3
    palette = picture(3).convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    assert (as_rgb(encoded(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()
    transparent = as_rgb(encoded(palette, "PNG", transparency=bytes(range(256))))
    assert (transparent == np.asarray(palette.convert("RGB"))).all()
    alpha = picture(3).convert("RGBA")
    alpha.putalpha(Image.fromarray(grey))
    assert (as_rgb(encoded(alpha, "PNG")) == colour).all()  # dropped, not blended


def test_16_bit_greys_are_scaled_and_not_clipped():
    deep = (np.arange(64).reshape(8, 8) * 1040).astype(np.uint16)
    assert (as_rgb(encoded(Image.fromarray(deep), "PNG")) == (deep / 65535 * 255).astype(int)[..., None]).all()


def test_an_animation_gives_its_first_frame():
    frames = encoded(picture(3), "WEBP", save_all=True, append_images=[picture(4)], lossless=True)
    assert (as_rgb(frames) == np.asarray(picture(3))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_exif_rotates_is_turned_upright(orientation, kind):
    """The stored image is the upright one with EXIF's own words for each orientation applied backwards."""
    upright = np.asarray(picture(1).resize((8, 8)).resize((48, 32), Image.Resampling.NEAREST))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[kind]
    turned = as_rgb(encoded(Image.fromarray(stored), kind, exif=exif, **lossless))
    assert np.abs(turned - upright).mean() < 3


def exif_with(tag, kind, count, value):
    """EXIF of an image turned by 90 degrees, and one more entry."""
    entries = struct.pack("<HHIHH", 274, 3, 1, 6, 0) + struct.pack("<HHI", tag, kind, count) + value
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + bytes(4)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # as kd.data.image_files has it outside of tests
def test_exif_that_cannot_be_read_turns_nothing_and_strange_tags_hinder_nothing():
    plain = as_rgb(encoded(picture(1), "JPEG"))
    for exif in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03", b"Exif\0\0" + b"\xff" * 40):
        assert (as_rgb(encoded(picture(1), "JPEG", exif=exif)) == plain).all()
    text_as_resolution = exif_with(282, 2, 4, b"72\0\0")  # Pillow's own ImageOps.exif_transpose raises TypeError
    assert (as_rgb(encoded(picture(1), "JPEG", exif=text_as_resolution)) == np.rot90(plain, -1)).all()


# --- files that are refused


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


PNG = encoded(picture(0), "PNG")
NO_IMAGE = "not a JPEG, PNG or WEBP image"
BAD = {
    "truncated": (encoded(picture(0), "JPEG")[:-200], "image file is truncated"),
    "truncated png": (PNG[: len(PNG) // 2], "image file is truncated"),
    "flipped bit": (PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:], ""),
    "empty": (b"", NO_IMAGE),
    "gif": (encoded(picture(0), "GIF"), NO_IMAGE),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NO_IMAGE),  # Pillow would start Ghostscript
    "bomb": (encoded(Image.new("1", (8192, 8193)), "PNG"), f"8192 x 8193 is more than {MAX_PIXELS} pixels"),
    "long line": (encoded(Image.new("1", (16383, 1)), "PNG"), "or longer than 1 : 100"),
    "text bomb": (PNG[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 2**27)) + PNG[33:], "too large"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_is_no_whole_image_is_one_line_with_its_path(tmp_path, kind):
    content, why = BAD[kind]
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    error = Files(np.array([b"a.jpg"]), tmp_path).read(0)
    assert isinstance(error, ImageError)
    assert str(error).startswith(f"cannot read '{path}': ")
    assert why in str(error)
    assert "\n" not in str(error)


def test_the_largest_allowed_image_is_read_and_one_more_row_is_not(monkeypatch):
    monkeypatch.setattr("kd.data.image_files.MAX_PIXELS", 40 * 32)
    assert decode(io.BytesIO(PNG)).size == (40, 32)
    with pytest.raises(ValueError, match="40 x 33 is more than 1280 pixels"):
        decode(io.BytesIO(encoded(picture(0).resize((40, 33)), "PNG")))
    assert Image.MAX_IMAGE_PIXELS > MAX_PIXELS
