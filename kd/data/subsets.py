"""Splits and subsets, for every family alike: which samples are in train, val and test, how many, how labelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from kd.config.schema import DataConfig
from kd.data.base import Given
from kd.errors import require


class Part(NamedTuple):
    """The samples of a split."""

    images: Any  # N of them, a tensor or an `image_files.Source`
    targets: np.ndarray  # (N,) int64, their classes, wrong ones of data.label_noise included

    def take(self, positions: np.ndarray) -> Part:
        """The samples at these positions of the part."""
        return Part(self.images[positions], self.targets[positions])


def draw(config: DataConfig, given: Given, class_names: Sequence[str]) -> dict[str, Part]:
    """Train, val and test, with data.train_size and data.label_noise on the training samples.

    Three given splits are used as they are. Of two, the other than train is the *test* split even where it is called
    val, as ImageNet's is, because a score on a split that was selected on means nothing; val is held out of train.
    Where only train is given, test is held out of it, then val.

    A function of the split seed: teacher, student, control and every run of a study see the same wrong labels.

    Args:
        config: the data section of a recipe.
        given: images and labels of each split that the data set comes with.
        class_names: names of the K classes.

    Raises:
        ConfigError: a setting leaves a split without a class.
    """
    last = len(class_names) - 1
    parts = {name: Part(images, np.asarray(labels, dtype=np.int64)) for name, (images, labels) in given.items()}
    for part in parts.values():
        assert 0 <= part.targets.min() <= part.targets.max() <= last, "labels must be 0 to K - 1"
    omitted = config.omit_class or 0
    require(omitted <= last, f"data.omit_class={omitted}: must be ≤ {last}, the last class of {config.name}")
    if len(parts) == 1:
        parts["train"], parts["test"] = hold_out(config, "test_fraction", parts["train"], class_names)
    if len(parts) == 2:
        train, (test,) = parts.pop("train"), parts.values()
        train, val = hold_out(config, "val_fraction", train, class_names)
        parts = {"train": train, "val": val, "test": test}
    train = parts["train"]
    if config.train_size is not None:
        train = train.take(stratified(train.targets, config.train_size, config, class_names))
    parts["train"] = train._replace(targets=with_label_noise(train.targets, config, len(class_names)))
    return parts


def hold_out(config: DataConfig, setting: str, part: Part, class_names: Sequence[str]) -> tuple[Part, Part]:
    """A part as (kept, held out) in sorted order, stratified, every class in both: a function of the split seed.

    With data.missing_classes=allow a class of few images may be in kept only.
    """
    from sklearn.model_selection import train_test_split

    share, positions, halves = getattr(config, setting), np.arange(len(part.targets)), []
    with suppress(ValueError):  # a class of one sample, or fewer places in a part than there are classes
        halves = train_test_split(positions, test_size=share, stratify=part.targets, random_state=config.split_seed)
    counts = np.bincount(part.targets, minlength=len(class_names))
    everywhere = halves and all(len(np.unique(part.targets[half])) == len(counts) for half in halves)
    if not everywhere and config.missing_classes == "allow" and counts.min():
        held_out = _by_share(part.targets, _random(config, 3))[: math.ceil(share * len(positions))]
        halves = [np.setdiff1d(positions, held_out), held_out]
        everywhere = len(np.unique(part.targets[halves[0]])) == len(counts)
    require(
        everywhere,
        f"data.{setting}={share}: cannot hold out images of every class of {config.name}, the smallest, "
        f"{class_names[int(counts.argmin())]!r}, has {counts.min()}; raise it, add images, or type "
        f"data.missing_classes=allow",
    )
    kept, held_out = (part.take(np.sort(half)) for half in halves)
    return kept, held_out


def stratified(targets: np.ndarray, size: int, config: DataConfig, class_names: Sequence[str]) -> np.ndarray:
    """Sorted positions of `size` samples, the same share of each class; a smaller choice is part of a larger one."""
    chosen = np.sort(_by_share(targets, _random(config, 1))[:size])
    require(
        size <= len(targets) and len(np.unique(targets[chosen])) == len(class_names),
        f"data.train_size={size}: must be ≤ {len(targets)}, the training images of {config.name}, and enough for "
        f"one of every class",
    )
    return chosen


def _by_share(targets: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """All positions in a random order whose every beginning has about the same share of each class."""
    order = random.permutation(len(targets))
    share = np.empty(len(targets))  # of its class that comes no later than this sample
    for label in np.unique(targets):
        own = order[targets[order] == label]
        share[own] = (np.arange(len(own)) + 0.5) / len(own)
    return order[np.argsort(share[order], kind="stable")]


def with_label_noise(targets: np.ndarray, config: DataConfig, num_classes: int) -> np.ndarray:
    """Labels (N,), each replaced with probability data.label_noise by another class, all equally likely.

    What is wrong at one probability is wrong in the same way at every greater one.
    """
    random = _random(config, 2)
    flipped = random.random_sample(len(targets)) < config.label_noise
    return np.where(flipped, (targets + random.randint(1, num_classes, len(targets))) % num_classes, targets)


def _random(config: DataConfig, purpose: int) -> np.random.RandomState:
    """A generator apart from the one that divided the splits. Numpy keeps the stream of RandomState for ever."""
    return np.random.RandomState([config.split_seed, purpose])
