"""Data set, split and batch: the interface that every family of data sets fills, whatever its samples are made of."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from kd.config.schema import DataConfig
from kd.errors import require


class Batch(NamedTuple):
    """Some samples of a split. `index` stays on the device of the plan; the rest is on the split's device."""

    index: Tensor  # (B,) int64, position in the split
    images: Tensor  # (B, C, H, W) or (B, L) float32, normalised
    targets: Tensor  # (B,) int64
    teacher: Tensor | None = None  # the same images for a second network, where the split has its Preprocess


@dataclass(frozen=True)
class Preprocess:
    """What a network takes, and how an image becomes it. The names are those of timm's pretrained_cfg.

    crop_mode "whole" is that of sets held in memory: the whole image is resized, crop_pct does nothing.
    """

    shape: tuple[int, ...]  # (C, H, W) or (L,)
    mean: tuple[float, ...]  # (C,), of pixels between 0 and 1; (1,) of signals
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str


@dataclass(frozen=True, kw_only=True)
class Split(ABC):
    """Images in a fixed order. A split never shuffles: the plan of the training loop says what comes when, and where.

    The augmentation of a sample is a function of (run seed, epoch, index) and of nothing else. Neither the batch that a
    sample is in, nor the number of processes or workers, nor a resume changes it.
    """

    images: Any  # what is kept of them: a tensor of pixels, or an `image_files.Source` that reads them
    targets: Tensor  # (N,) int64 on the CPU: the class of each sample, as it is trained on or scored
    config: DataConfig
    seed: int  # the run's, for augmentation
    networks: tuple[Preprocess, ...]  # batch.images is for the first; batch.teacher for the second, where there is one
    augments: bool  # whether training views are drawn at random, and so differ between epochs
    posterior: Tensor | None = None  # (N, K) float64 on the CPU: the true p(class | sample), where the task knows it

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, index: Tensor) -> Self:
        """The samples at these positions, int64 (M,), as a split of their own: they are now at 0 to M - 1."""
        posterior = None if self.posterior is None else self.posterior[index]
        return replace(self, images=self.images[index], targets=self.targets[index], posterior=posterior)

    def rendered(self, *networks: Preprocess) -> Split:
        """The same samples for other networks, one or two. Both see one augmentation: geometry and colours are drawn
        once, and only then resized and normalised for each.
        """
        return replace(self, networks=networks)

    @abstractmethod
    def to(self, device: torch.device | str) -> Split:
        """The same split with its batches on `device`. Like `Tensor.to` it returns a split and changes none."""

    @abstractmethod
    def batches(self, plan: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        """One batch for each int64 index tensor of `plan`; `epoch=None` is the evaluation view, without augmentation.

        Raises ImageError for a file that cannot be read.
        """


@dataclass(frozen=True)
class Data:
    """A data set, ready to train, select and test on.

    `hash` identifies which samples with which labels are in which split: by the values of tensors, by the sorted
    (relative path, size) of files, whose content is not read.
    """

    config: DataConfig
    train: Split
    val: Split
    test: Split
    class_names: list[str]
    hash: str
    unreadable: int = 0  # images that data.unreadable=skip left out
    notes: tuple[str, ...] = ()  # lines about what was left out, to be said before training

    @property
    def preprocess(self) -> Preprocess:
        """What the network takes that these batches are for: the student's, unless `rendered` for another."""
        return self.train.networks[0]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W) or (L,), what a model sees."""
        return self.preprocess.shape

    @property
    def mean(self) -> tuple[float, ...]:
        """One value per channel, of pixels between 0 and 1 (of the values themselves for signals)."""
        return self.preprocess.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviations, like `mean`."""
        return self.preprocess.std

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.class_names)

    def rendered(self, network: Preprocess) -> Data:
        """The same data for another network."""
        if network == self.preprocess:
            return self
        splits = {name: getattr(self, name).rendered(network) for name in ("train", "val", "test")}
        return replace(self, **splits)

    @cached_property
    def transfer(self) -> Data:
        """What a student and its control train and select on: train and val without data.omit_class.

        The teacher knows that class and the test split keeps it (Hinton et al. 2015, section 3: the class is left out
        of the transfer set only).
        """
        omitted = self.config.omit_class
        if omitted is None:
            return self
        train, val = (s.subset((s.targets != omitted).nonzero().squeeze(1)) for s in (self.train, self.val))
        return replace(self, train=train, val=val)


# Images and labels (N,) of each split that a data set comes with, "train" among them.
Given = Mapping[str, tuple[Any, np.ndarray]]
FAMILIES: dict[str, Callable[[DataConfig, int], Data]] = {}


def family(load: Callable[[DataConfig, int], Data]) -> Callable[[DataConfig, int], Data]:
    """Register `load(config, seed)` as data.family=NAME, where NAME is the function's name.

    The run's `seed` decides augmentation only; splits follow `config.split_seed`.
    """
    FAMILIES[load.__name__] = load
    return load


def refuse_settings(config: DataConfig, names: Sequence[str], why: str) -> None:
    """Raise ConfigError for a setting of these that is on, since it would do nothing."""
    for name in names:
        value = getattr(config, name)
        require(not value, f"data.{name}={value}: {why}; leave it out")


def statistics(config: DataConfig, channels: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Mean and std of a Preprocess: data.mean and data.std, else those of the data set. Raises ConfigError."""
    for name in ("mean", "std"):
        given = getattr(config, name)
        wrong = f"data.{name}={given}: must be a list of one number, or of {channels}, the channels of {config.name}"
        require(len(given) in (0, 1, channels), wrong)
    return {"mean": for_channels(config.mean or mean, channels), "std": for_channels(config.std or std, channels)}


def for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value for each channel. Where there are others, as of a colour network made grey, each is their mean."""
    same = len(values) == channels
    return tuple(map(float, values)) if same else (math.fsum(values) / len(values),) * channels


def digest(parts: Iterable[bytes | np.ndarray]) -> str:
    """The sha256 of all parts, in order, in hex."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return sha.hexdigest()
