"""Image files as they come, from anywhere: what is decoded, what is refused, and what is said of it."""

from __future__ import annotations

import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from kd.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP")  # the fewer decoders a file can choose from, the fewer it can attack
# Of an image, by its header. Decoded it takes 3 bytes a pixel, 201 MB, in each worker and each of verify's 16 threads.
# Cameras make 50 megapixels, ImageNet's largest images 19; Pillow only warns, at 89 and refuses at 179.
MAX_PIXELS = 64 * 2**20
# Of the longer side to the shorter, which is resized to a fixed size: a line of 1 x 65535 pixels would become 4 GP.
MAX_ASPECT = 100

# Orientations of EXIF, tag 274: what turns the stored pixels into the picture.
ORIENTATION = 274
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow says on stderr what is refused below with the file's name, and what of EXIF it cannot read.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)


class Source(Protocol):
    """Images that are read when asked for."""

    @property
    def targets(self) -> np.ndarray:
        """Class of every image: (N,) int64."""
        ...

    def read(self, i: int) -> Image.Image:
        """Image i, decoded, as 8-bit RGB; whatever it raises becomes an ImageError."""
        ...

    def name(self, i: int) -> str:
        """Where image i is, for a message."""
        ...

    def identity(self, i: int) -> str:
        """What of image i goes into the hash of the data."""
        ...


def decode(file: IO[bytes], formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """An image as RGB, upright, as torchvision and timm make it so that published accuracies hold.

    Transparency is dropped and an animation gives its first frame. Unlike there, a rotation or reflection in EXIF is
    applied, and 16-bit grey levels are scaled to 8 bits instead of clipped at 255, which makes almost everything white.
    Raises ValueError for more than MAX_PIXELS or a side more than MAX_ASPECT times the other, before decoding, and what
    Pillow raises for anything that is not a whole image in one of these formats.
    """
    with Image.open(file, formats=formats) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} is more than {MAX_PIXELS} pixels")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(f"{width} x {height}: one side is more than {MAX_ASPECT} times the other")
        turn = _turn(image)
        if image.mode.startswith("I"):
            grey = Image.fromarray((np.asarray(image).astype(np.int64) // 257).astype(np.uint8))
            found = grey.convert("RGB")
        elif "transparency" in image.info:  # Pillow warns where a palette with transparency goes straight to RGB
            found = image.convert("RGBA").convert("RGB")
        else:
            found = image.convert("RGB")
    return found if turn is None else found.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    if "exif" not in image.info:
        return None
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # its parser raises anything; what cannot be read says nothing of the pixels, which are whole
        return None


def reason(error: Exception, formats: tuple[str, ...] = FORMATS) -> str:
    """Why an image could not be read, on one line and without its path."""
    if isinstance(error, UnidentifiedImageError):
        return f"not a {' or '.join(filter(None, (', '.join(formats[:-1]), formats[-1])))} image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def read(source: Source, i: int) -> Image.Image | ImageError:
    """Image i, or the error that names it: a file that cannot be read is never replaced by another."""
    try:
        return source.read(i)
    except Exception as error:  # decoders raise whatever they like on files they did not expect
        return ImageError(f"cannot read {source.name(i)!r}: {reason(error, getattr(source, 'formats', FORMATS))}")


def open_file(path: str) -> IO[bytes]:
    """A regular file, opened for reading; anything else raises ValueError at once, where a FIFO would wait forever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("is no regular file")
    return os.fdopen(descriptor, "rb")


@dataclass(frozen=True)
class Files:
    """Image files below a folder."""

    root: Path
    paths: np.ndarray  # relative to root; bytes, which all workers share: reading a list of str copies it to each
    targets: np.ndarray
    formats: tuple[str, ...] = FORMATS

    def read(self, i: int) -> Image.Image:
        """Image i."""
        with open_file(self.name(i)) as file:
            return decode(file, self.formats)

    def name(self, i: int) -> str:
        """Its path."""
        return os.path.join(self.root, os.fsdecode(self.paths[i].item()))

    def identity(self, i: int) -> str:
        """Its relative path and size, which do not change when the folder is moved."""
        return f"{os.fsdecode(self.paths[i].item())} {os.path.getsize(self.name(i))}"
