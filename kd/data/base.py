"""What every data set becomes: three splits with one interface, whatever they are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kd.recipe import ConfigError


class ImageError(ValueError):
    """A file that cannot be read as an image: one line with its path and the reason."""


class Batch(NamedTuple):
    """Some samples of a split. `index` stays where the plan had it, the rest is on the split's device."""

    index: Tensor  # (B,) int64, position in the split
    images: Tensor  # (B, C, H, W) or (B, L) float32, normalised
    targets: Tensor  # (B,) int64


class Split(Protocol):
    """Samples in a fixed order. It never shuffles: the plan of the loop decides what comes when, and on which process.

    The augmentation of a sample is a function of (run seed, epoch, index) and of nothing else, so neither the batch
    a sample is in, nor the number of processes or workers, nor a resume changes it.
    """

    @property
    def targets(self) -> Tensor:
        """Class of every sample: (N,) int64, on the CPU."""
        ...

    def __len__(self) -> int: ...

    def to(self, device: torch.device | str) -> Split:
        """The same split with its batches on `device`; like `Tensor.to` it returns, it does not change, the split."""
        ...

    def batches(self, plan: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        """One batch for every int64 index tensor of `plan`; `epoch=None` is the evaluation view, not augmented."""
        ...


@dataclass(frozen=True)
class Data:
    """A data set, ready to train, select and test on.

    `mean` and `std` hold one value per channel, of pixels between 0 and 1 (of the values themselves for signals).
    `hash` says which samples with which labels are in which split: from the values of tensors, and from the sorted
    (relative path, size) of files, whose content is not read.
    """

    name: str
    train: Split
    val: Split
    test: Split
    class_names: list[str]
    input_shape: tuple[int, ...]  # (C, H, W) or (L,), what a model sees
    mean: tuple[float, ...]
    std: tuple[float, ...]
    hash: str

    @property
    def num_classes(self) -> int:
        """How many classes there are, K."""
        return len(self.class_names)


def hold_out(targets: np.ndarray, share: float, seed: int, setting: str) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (kept, held out), stratified by class: a function of the targets, the share and the seed."""
    from sklearn.model_selection import train_test_split

    advice = f"{setting}={share}: cannot hold out every class"
    counts = np.bincount(targets)
    if counts.min() < 2:
        raise ConfigError(f"{advice}, class {counts.argmin()} has {counts.min()} images and needs at least 2")
    try:
        kept, held = train_test_split(np.arange(len(targets)), test_size=share, stratify=targets, random_state=seed)
    except ValueError as error:  # fewer places in one of the parts than there are classes
        raise ConfigError(f"{advice}, there are {len(targets)} images of {len(counts)} classes") from error
    for part in (kept, held):
        missing = np.setdiff1d(targets, targets[part])
        if len(missing):
            raise ConfigError(f"{advice}, class {missing[0]} has only {counts[missing[0]]} images")
    return np.sort(kept), np.sort(held)


def digest(parts: Sequence[bytes | np.ndarray]) -> str:
    """The sha256 of everything, in order."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part if isinstance(part, bytes) else np.ascontiguousarray(part))
    return sha.hexdigest()
