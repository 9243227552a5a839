"""What a study changes about the training images of any data set, tensors and streams alike: how many, how labelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kd.config.schema import DataConfig
from kd.data.base import assign, class_indices
from kd.errors import ConfigError


class Part(NamedTuple):
    """Where a split comes from."""

    given: str  # one of the splits that the set comes with
    index: np.ndarray  # (N,) which of its samples
    targets: np.ndarray  # (N,) int64, their classes, the wrong ones of data.label_noise included


def draw(config: DataConfig, targets: Mapping[str, np.ndarray], class_names: Sequence[str]) -> dict[str, Part]:
    """Train, val and test as `assign` deals them, then data.train_size and data.label_noise on the training images.

    A function of the split seed: teacher, student, control and every run of a study see the same wrong labels.
    """
    count = len(class_names)
    targets = {name: class_indices(f"{config.name} {name}", labels, count) for name, labels in targets.items()}
    if config.omit_class is not None and config.omit_class >= len(class_names):
        raise ConfigError(
            f"data.omit_class={config.omit_class}: must be ≤ {len(class_names) - 1}, {config.name} has "
            f"{len(class_names)} classes counted from 0"
        )
    parts = {
        name: Part(given, index, targets[given][index])
        for name, (given, index) in assign(config, targets, class_names).items()
    }
    given, index, labels = parts["train"]
    if config.train_size is not None:
        chosen = stratified(labels, config.train_size, config, class_names)
        index, labels = index[chosen], labels[chosen]
    parts["train"] = Part(given, index, wrong(labels, config.label_noise, config, len(class_names)))
    return parts


def stratified(targets: np.ndarray, size: int, config: DataConfig, class_names: Sequence[str]) -> np.ndarray:
    """Sorted positions of `size` samples, of each class as large a share as of another; a smaller size's are among
    a larger's.
    """
    if size > len(targets):
        raise ConfigError(
            f"data.train_size={size}: must be ≤ {len(targets)}, the training images of {config.name}; null takes all"
        )
    order = _random(config, 1).permutation(len(targets))
    share = np.empty(len(targets))  # of its class that comes no later than this sample
    for label in range(len(class_names)):
        own = order[targets[order] == label]
        share[own] = (np.arange(len(own)) + 0.5) / len(own)
    chosen = np.sort(order[np.argsort(share[order], kind="stable")[:size]])
    counts = np.bincount(targets[chosen], minlength=len(class_names))
    if counts.min() == 0:
        raise ConfigError(
            f"data.train_size={size}: leaves no training image of class {class_names[int(counts.argmin())]!r} of "
            f"{config.name}; raise it"
        )
    return chosen


def wrong(targets: np.ndarray, probability: float, config: DataConfig, num_classes: int) -> np.ndarray:
    """The labels, each with this probability replaced by one of the other classes, all equally likely.

    Symmetric noise. What is wrong at some probability is wrong in the same way at every greater one.
    """
    if probability == 0:
        return targets
    random = _random(config, 2)
    flipped = random.random_sample(len(targets)) < probability
    return np.where(flipped, (targets + random.randint(1, num_classes, len(targets))) % num_classes, targets)


def _random(config: DataConfig, purpose: int) -> np.random.RandomState:
    """Apart from the generator that split, which has the seed alone; of RandomState numpy keeps the stream for ever."""
    return np.random.RandomState([config.split_seed, purpose])
