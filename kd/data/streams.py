"""Large data sets: worker processes decode and augment images one at a time, as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from kd.config.schema import DataConfig
from kd.data.base import Batch, Data, Split, digest, refuse_settings
from kd.data.image_files import Source
from kd.data.sample_rng import global_rng, sample_keys
from kd.data.subsets import draw
from kd.errors import ConfigError, ImageError

Transform = Callable[[Image.Image], Tensor]


def _collate(samples: list[Any]) -> Batch | ImageError:
    """A batch, or the first error in it: raised here, in a worker, it would arrive inside a traceback of many lines."""
    for sample in samples:
        if isinstance(sample, ImageError):
            return sample
    index, images, targets = zip(*samples, strict=True)
    return Batch(torch.tensor(index), torch.stack(images), torch.tensor(targets))


@dataclass(frozen=True, kw_only=True)
class StreamSplit(Split):
    """Some images of a source, decoded when they are asked for."""

    source: Source
    indices: np.ndarray  # (N,) position in the source
    augmentation: Transform
    evaluation: Transform
    seed: int
    workers: int
    device: torch.device

    def __getitem__(self, at: tuple[int, int | None]) -> tuple[int, Tensor, int] | ImageError:
        """A sample (index, image, target) in its view of an epoch: what a worker process is asked for."""
        index, epoch = at
        image, target = self.source.read(int(self.indices[index])), int(self.targets[index])
        if isinstance(image, ImageError):
            return image
        if epoch is None:
            return index, self.evaluation(image), target
        # transforms draw from all three global generators; with workers=0 those are the training process's own
        with global_rng(int(sample_keys(self.seed, epoch, torch.tensor(index)))):
            return index, self.augmentation(image), target

    def to(self, device: torch.device | str) -> StreamSplit:
        """The same split with its batches on `device`."""
        return replace(self, device=torch.device(device))

    def subset(self, index: Tensor) -> StreamSplit:
        """The samples at these positions."""
        return replace(self, indices=self.indices[index.numpy()], targets=self.targets[index])

    def batches(self, plan: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        """One batch for each index tensor of `plan`."""
        loader = DataLoader(
            self,  # type: ignore[arg-type]
            batch_sampler=([(i, epoch) for i in index.tolist()] for index in plan),  # type: ignore[arg-type]
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


def _unreadable(job: tuple[Source, int]) -> ImageError | None:
    source, i = job
    image = source.read(i)
    return image if isinstance(image, ImageError) else None


def verify(splits: Iterable[StreamSplit], threads: int) -> None:
    """Decode every image once. Raises one ImageError for all that cannot be read."""
    from rich.console import Console
    from rich.progress import track

    jobs = [(split.source, int(i)) for split in splits for i in split.indices]
    console = Console(stderr=True)
    show = {"total": len(jobs), "console": console, "disable": not console.is_terminal}
    with ThreadPool(threads) as pool:
        checked = pool.imap(_unreadable, jobs, chunksize=16)
        errors = [error for error in track(checked, "decoding every image", **show) if error]
    if errors:
        others = f" (and {len(errors) - 1} other files cannot be read)" if len(errors) > 1 else ""
        raise ImageError(f"{errors[0]}{others}")


def stream_data(
    config: DataConfig, seed: int, given: Mapping[str, Source], class_names: list[str], threads: int
) -> Data:
    """Data from the splits that a data set comes with (see `subsets.assign`).

    Args:
        config: the data section of a recipe.
        seed: the run's, for augmentation.
        given: the images of each split, "train" among them.
        class_names: names of the K classes.
        threads: how many threads may read a source at once.
    """
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    refuse_settings(config, ("shift", "noise"), f"only for small sets, {config.name} is streamed")
    parts = draw(config, {name: source.targets for name, source in given.items()}, class_names)
    augmentation, evaluation = transforms(config)
    splits = {
        name: StreamSplit(
            targets=torch.from_numpy(part.targets),
            augments=True,  # every training view is a random crop at least
            source=given[part.given],
            indices=part.index,
            augmentation=augmentation,
            evaluation=evaluation,
            seed=seed,
            workers=config.workers,
            device=torch.device("cpu"),
        )
        for name, part in parts.items()
    }
    if config.verify:
        verify(splits.values(), threads)
    lines = (
        f"{name} {split.source.identity(int(i))} {label}\n".encode(errors="surrogateescape")
        for name, split in splits.items()
        for i, label in zip(split.indices, split.targets.tolist(), strict=True)
    )
    return Data(
        name=config.name,
        **splits,
        class_names=class_names,
        input_shape=(3, config.image_size, config.image_size),
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        hash=digest(lines),
        omit_class=config.omit_class,
    )
