"""Large sets: images are decoded and augmented one at a time, by worker processes, as they are needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from kd.config.schema import DataConfig
from kd.data.base import Batch, Data, digest
from kd.data.image_files import Source, read
from kd.data.sample_rng import global_rng, sample_keys
from kd.data.subsets import draw
from kd.errors import ConfigError, ImageError

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class _View:
    """One split, under one transform, in one epoch: what the workers see."""

    split: StreamSplit
    epoch: int | None

    def __getitem__(self, index: int) -> tuple[int, Tensor, int] | ImageError:
        split = self.split
        image = read(split.source, int(split.indices[index]))
        if isinstance(image, ImageError):
            return image
        if self.epoch is None:
            return index, split.evaluation(image), int(split.targets[index])
        # transforms draw from all three global generators; with workers=0 those are the training process's own
        with global_rng(int(sample_keys(split.seed, self.epoch, torch.tensor(index)))):
            return index, split.augmentation(image), int(split.targets[index])


def _collate(samples: list[Any]) -> Batch | ImageError:
    """A batch, or the first error in it: raised here, in a worker, it would arrive inside a traceback of many lines."""
    for sample in samples:
        if isinstance(sample, ImageError):
            return sample
    index, images, targets = zip(*samples, strict=True)
    return Batch(torch.tensor(index), torch.stack(images), torch.tensor(targets))


@dataclass(frozen=True)
class StreamSplit:
    """Some images of a source; see `kd.data.base.Split`."""

    source: Source
    indices: np.ndarray  # (N,) position in the source
    targets: Tensor  # (N,) int64, on the CPU
    augmentation: Transform
    evaluation: Transform
    seed: int
    workers: int
    device: torch.device
    posterior: None = None  # nobody knows it of photographs

    @property
    def augments(self) -> bool:
        """Always: every training view is at least a random crop."""
        return True

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str) -> StreamSplit:
        """The same split with its batches on `device`."""
        return replace(self, device=torch.device(device))

    def subset(self, index: Tensor) -> StreamSplit:
        """The samples at these positions."""
        return replace(self, indices=self.indices[index.numpy()], targets=self.targets[index])

    def batches(self, plan: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        """One batch for every index tensor of `plan`."""
        loader = DataLoader(
            _View(self, epoch),  # type: ignore[arg-type]
            batch_sampler=(index.tolist() for index in plan),  # type: ignore[arg-type]
            num_workers=min(self.workers, len(plan)),
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # without one, iter(loader) draws from the global generator
        )
        for batch in loader:
            if isinstance(batch, ImageError):
                raise batch
            index, images, targets = batch
            yield Batch(index, images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True))


def transforms(config: DataConfig) -> tuple[Transform, Transform]:
    """timm's transforms for training and for evaluation, with the statistics of ImageNet and bilinear resizing."""
    from timm.data.transforms_factory import create_transform

    size = (3, config.image_size, config.image_size)
    try:
        augmentation: Any = create_transform(
            size,
            is_training=True,
            scale=(config.crop_scale, 1.0),
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment or None,
            re_prob=config.random_erase,
            re_mode="pixel",
            interpolation="bilinear",
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"data.auto_augment={config.auto_augment}: timm has no such policy; try rand-m9-mstd0.5, original or empty"
        ) from error
    evaluation: Any = create_transform(size, crop_pct=config.crop_pct, interpolation="bilinear")
    return augmentation, evaluation


def check_settings(config: DataConfig) -> None:
    """Refuse settings that would do nothing."""
    for name in ("shift", "noise"):
        if value := getattr(config, name):
            raise ConfigError(f"data.{name}={value}: only for small sets, {config.name} is streamed; must be 0")


def _problem(job: tuple[Source, int]) -> ImageError | None:
    image = read(*job)
    return image if isinstance(image, ImageError) else None


def verify(splits: Iterable[StreamSplit], threads: int) -> None:
    """Decode every image once; one ImageError for all that cannot be read."""
    from rich.console import Console
    from rich.progress import Progress

    jobs = [(split.source, int(i)) for split in splits for i in split.indices]
    console, bad, todo = Console(stderr=True), [], iter(jobs)
    with Progress(console=console, disable=not sys.stderr.isatty()) as bar, ThreadPoolExecutor(threads) as pool:
        task = bar.add_task("decoding every image", total=len(jobs))
        while chunk := list(islice(todo, 1024)):  # all at once would hold a future, and an image, for each
            bad += filter(None, pool.map(_problem, chunk))
            bar.advance(task, len(chunk))
    if bad:
        others = f" (and {len(bad) - 1} other files cannot be read)" if len(bad) > 1 else ""
        raise ImageError(f"{bad[0]}{others}")


def stream_data(
    config: DataConfig, seed: int, given: Mapping[str, Source], class_names: list[str], threads: int
) -> Data:
    """Data from the splits that a set comes with (see `assign`); `threads` may read a source at once."""
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    check_settings(config)
    parts = draw(config, {name: source.targets for name, source in given.items()}, class_names)
    shared = *transforms(config), seed, config.workers, torch.device("cpu")
    splits = {
        name: StreamSplit(given[part.given], part.index, torch.from_numpy(part.targets), *shared)
        for name, part in parts.items()
    }
    if config.verify:
        verify(splits.values(), threads)
    lines = [
        f"{name} {split.source.identity(int(i))} {label}\n".encode(errors="surrogateescape")
        for name, split in splits.items()
        for i, label in zip(split.indices, split.targets.tolist(), strict=True)
    ]
    return Data(
        name=config.name,
        **splits,
        class_names=class_names,
        input_shape=(3, config.image_size, config.image_size),
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        hash=digest(lines),
        omit_class=config.omit_class,
        val_is_given=parts["val"].given != "train",
    )
