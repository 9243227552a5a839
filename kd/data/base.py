"""What every data set becomes: three splits with one interface, whatever they are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from kd.config.schema import DataConfig
from kd.errors import ConfigError


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
        """Class of every sample as it is trained or scored with: (N,) int64, on the CPU."""
        ...

    @property
    def posterior(self) -> Tensor | None:
        """The true p(class | sample) where the task's is known: (N, K) float64, on the CPU; never of wrong labels."""
        ...

    @property
    def augments(self) -> bool:
        """Whether a sample's training view is drawn at random and differs from epoch to epoch."""
        ...

    def __len__(self) -> int: ...

    def to(self, device: torch.device | str) -> Split:
        """The same split with its batches on `device`; like `Tensor.to` it returns, it does not change, the split."""
        ...

    def subset(self, index: Tensor) -> Split:
        """The samples at these int64 positions, (M,), which are now at 0 to M - 1."""
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
    omit_class: int | None = None  # for `transfer`
    val_is_given: bool = False  # the set comes with its validation split, and none is held out of train

    @property
    def num_classes(self) -> int:
        """How many classes there are, K."""
        return len(self.class_names)

    @cached_property
    def transfer(self) -> Data:
        """What a student and its control learn and select on: without `omit_class`, which the teacher knows and the
        test split keeps (Hinton et al. 2015, §3: the class is left out of the transfer set only).
        """
        if self.omit_class is None:
            return self
        kept = {name: getattr(self, name) for name in ("train", "val")}
        return replace(
            self, **{k: s.subset((s.targets != self.omit_class).nonzero().squeeze(1)) for k, s in kept.items()}
        )


def assign(
    config: DataConfig, targets: Mapping[str, np.ndarray], class_names: Sequence[str]
) -> dict[str, tuple[str, np.ndarray]]:
    """Where train, val and test come from: (which given split, which of its samples).

    `targets` has the labels of the splits that the set comes with, "train" among them. All three: used as they are.
    With one other: that one is the *test* split even where it is called val, as ImageNet's is, because a number on a
    split that was selected on means nothing; val is held out of train. Only train: test is held out of it, then val.
    """
    index = {name: np.arange(len(labels)) for name, labels in targets.items()}
    if len(targets) == 3:
        return {name: (name, index[name]) for name in targets}
    rest, parts = index["train"], {}
    if len(targets) == 2:
        (other,) = targets.keys() - {"train"}
        parts["test"] = (other, index[other])
    else:
        rest, test = hold_out(config, "test_fraction", targets["train"], class_names)
        parts["test"] = ("train", test)
    train, val = hold_out(config, "val_fraction", targets["train"][rest], class_names)
    return {"train": ("train", rest[train]), "val": ("train", rest[val]), **parts}


def hold_out(
    config: DataConfig, setting: str, targets: np.ndarray, class_names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (kept, held out), stratified by class, with every class in both: a function of the split seed."""
    from sklearn.model_selection import train_test_split

    share = getattr(config, setting)
    counts = np.bincount(targets, minlength=len(class_names))
    advice = f"data.{setting}={share}: cannot hold out images of every class of {config.name}"
    rarest = (
        f"{advice}, the smallest, {class_names[int(counts.argmin())]!r}, has {counts.min()}; raise it or add images"
    )
    everything = np.arange(len(targets))
    try:
        kept, held = train_test_split(everything, test_size=share, stratify=targets, random_state=config.split_seed)
    except ValueError as error:  # a single image of a class, or fewer places in a part than there are classes
        raise ConfigError(rarest) from error
    if len(np.unique(targets[kept])) < len(counts) or len(np.unique(targets[held])) < len(counts):
        raise ConfigError(rarest)
    return np.sort(kept), np.sort(held)


def class_indices(what: str, labels: np.ndarray, num_classes: int | None = None) -> np.ndarray:
    """The labels as int64. Raises ConfigError where they are no whole numbers, or outside 0 to num_classes - 1."""
    if labels.dtype.kind not in "iu":
        raise ConfigError(f"{what}: its labels are of type {labels.dtype}, must be whole numbers")
    labels = labels.astype(np.int64)
    if num_classes is not None and len(wrong := np.flatnonzero((labels < 0) | (labels >= num_classes))):
        raise ConfigError(f"{what}: label {labels[wrong[0]]} of image {wrong[0]}: must be 0 to {num_classes - 1}")
    return labels


def digest(parts: Sequence[bytes | np.ndarray]) -> str:
    """The sha256 of everything, in order."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return sha.hexdigest()
