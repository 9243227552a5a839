"""Image files: which are decoded, how they become RGB, and the one line about a file that cannot be read."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from kd.errors import ImageError

# Pillow picks the decoder by a file's content, whatever its name. The fewer there are to pick, the fewer can be
# attacked. PPM is what torchvision's GTSRB comes as.
FORMATS = ("JPEG", "PNG", "WEBP", "PPM")
# Of an image, by its header. Decoded it takes 3 bytes a pixel, 201 MB, in each worker and each of verify's 16 threads.
# Cameras make 50 megapixels, ImageNet's largest images 19; Pillow only warns at 89 and refuses at 179.
MAX_PIXELS = 64 * 2**20
# Of the longer side to the shorter, which is resized to a fixed size: a line of 1 x 65535 pixels would become 4 GP.
MAX_ASPECT = 100

# Pillow prints these for what is refused below with the file's name, and for EXIF that turns nothing.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)


@dataclass(frozen=True)
class Source(ABC):
    """Images that are read when they are asked for."""

    images: np.ndarray  # (N,) where each is, as the subclass has it

    def __getitem__(self, index: Any) -> Source:
        """The images at these positions, (M,)."""
        return replace(self, images=self.images[index])

    @abstractmethod
    def name(self, i: int) -> str:
        """Where image i is, for a message."""

    def identity(self, i: int) -> str:
        """What of image i goes into the hash of the data."""
        return self.name(i)

    def open(self, i: int) -> IO[bytes]:
        """The encoded bytes of image i."""
        return open(self.name(i), "rb")

    def read(self, i: int) -> Image.Image | ImageError:
        """Image i, or the error that names it: a file that cannot be read is never replaced by another."""
        try:
            with self.open(i) as file:
                return decode(file)
        except Exception as error:  # decoders raise whatever they like on files that they did not expect
            return ImageError(f"cannot read {self.name(i)!r}: {reason(error)}")


@dataclass(frozen=True)
class Files(Source):
    """Image files, by their paths relative to a folder.

    The paths are an array of bytes, which all workers share: reading a list of str copies it to each.
    """

    root: Path

    def name(self, i: int) -> str:
        """Its path."""
        return os.path.join(self.root, os.fsdecode(self.images[i].item()))

    def identity(self, i: int) -> str:
        """Its relative path and size, which do not change when the folder is moved."""
        return f"{os.fsdecode(self.images[i].item())} {os.path.getsize(self.name(i))}"


def files_below(root: Path, samples: Iterable[tuple[str, int]]) -> tuple[Files, np.ndarray]:
    """Images and classes of these (path, class); the paths are kept relative to root."""
    paths, targets = zip(*samples, strict=True)
    return Files(np.array([os.fsencode(os.path.relpath(path, root)) for path in paths]), root), np.array(targets)


def decode(file: IO[bytes]) -> Image.Image:
    """An image as RGB, upright, in the values of torchvision and timm so that published accuracies hold.

    Transparency is dropped and an animation gives its first frame. Unlike there, a rotation or reflection in EXIF is
    applied, and 16-bit grey levels are scaled to 8 bits instead of clipped at 255, which makes almost everything white.
    Raises ValueError for more than MAX_PIXELS or a side more than MAX_ASPECT times the other, before decoding, and what
    Pillow raises for anything that is not a whole image in one of these formats.
    """
    with Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(f"{width} x {height} is more than {MAX_PIXELS} pixels, or longer than 1 : {MAX_ASPECT}")
        orientation = _orientation(image)
        if image.mode.startswith("I"):
            grey = Image.fromarray((np.asarray(image).astype(np.int64) // 257).astype(np.uint8))
            rgb = grey.convert("RGB")
        elif "transparency" in image.info:  # Pillow warns where a palette with transparency goes straight to RGB
            rgb = image.convert("RGBA").convert("RGB")
        else:
            rgb = image.convert("RGB")
    if orientation != 1:
        # Alone: with the other tags, which Pillow would write back, it fails on photographs whose EXIF it can only
        # read (python-pillow issue 8965).
        rgb.info.clear()
        rgb.getexif()[ExifTags.Base.Orientation] = orientation
        ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def _orientation(image: Image.Image) -> int:
    if "exif" in image.info:
        with suppress(Exception):  # its parser raises anything; unreadable EXIF says nothing about whole pixels
            return image.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def reason(error: Exception) -> str:
    """Why something could not be read, on one line and without its path."""
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG or WEBP image"
    if isinstance(error, FileNotFoundError) and os.path.islink(error.filename or ""):
        return f"a link to {os.readlink(error.filename)!r}, which does not exist"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
