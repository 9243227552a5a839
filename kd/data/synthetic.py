"""Generated tasks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from kd.data.base import Data
from kd.data.randomness import global_rng
from kd.data.tensors import tensor_data
from kd.recipe import DataConfig


@cache  # generating takes 3 s
def _mnist1d() -> dict[str, Any]:
    from mnist1d.data import get_dataset_args, make_dataset

    with global_rng(0):  # it seeds the global generators with its own 42
        return make_dataset(get_dataset_args())


def mnist1d(config: DataConfig, seed: int) -> Data:
    """MNIST-1D (Greydanus and Kobak 2024): 4,000 and 1,000 signals of length 40, with the published seed and split.

    Generated, as its own loader would download a pickle and run what is in it.
    """
    made = _mnist1d()
    given = {
        "train": (torch.from_numpy(made["x"]).float(), made["y"]),
        "test": (torch.from_numpy(made["x_test"]).float(), made["y_test"]),
    }
    return tensor_data(config, seed, given, [str(digit) for digit in range(10)])
