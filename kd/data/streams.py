"""Large data sets: worker processes decode and augment images one at a time, as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from kd.config.schema import DataConfig
from kd.data.base import Batch, Data, Given, Split, digest, refuse_settings
from kd.data.image_files import Source
from kd.data.sample_rng import global_rng, sample_keys
from kd.data.subsets import draw
from kd.errors import ConfigError, ImageError

Transform = Callable[[Image.Image], Tensor]


def _collate(samples: list[Any]) -> Any:
    """A batch, or the errors in it: raised here, in a worker, they would arrive inside a traceback of many lines."""
    return [sample for sample in samples if isinstance(sample, ImageError)] or Batch(*default_collate(samples))


@dataclass(frozen=True, kw_only=True)
class StreamSplit(Split):
    """Some images of a source, decoded when they are asked for."""

    images: Source
    augmentation: Transform
    evaluation: Transform
    device: torch.device

    def __getitem__(self, at: tuple[int, int | None]) -> tuple[int, Tensor, int] | ImageError:
        """A sample (index, image, target) in its view of an epoch: what a worker process is asked for."""
        index, epoch = at
        image, target = self.images.read(index), int(self.targets[index])
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

    def batches(self, plan: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        """One batch for each index tensor of `plan`."""
        for batch in self.load(plan, epoch):
            if isinstance(batch, list):
                raise batch[0]
            index, images, targets = batch
            yield Batch(index, images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True))

    def load(self, plan: Sequence[Tensor], epoch: int | None) -> Iterable[Any]:
        """A batch on the CPU for each index tensor of `plan`, or the list of its ImageErrors."""
        return DataLoader(
            self,  # type: ignore[arg-type]
            batch_sampler=([(i, epoch) for i in index.tolist()] for index in plan),  # type: ignore[arg-type]
            num_workers=min(self.config.workers, len(plan)),
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # without one, iter(loader) draws from the global generator
        )


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


def verify(splits: Iterable[StreamSplit]) -> None:
    """Decode every image once, as training will. Raises one ImageError for all that cannot be read."""
    from rich.console import Console
    from rich.progress import track

    plans = [(split, torch.arange(len(split)).split(16)) for split in splits]
    total = sum(len(plan) for _, plan in plans)
    batches = (batch for split, plan in plans for batch in split.load(plan, None))
    # on stderr, as what a command prints may be read by a program
    console = Console(stderr=True)
    shown = track(batches, "decoding every image", total, console=console, disable=not console.is_terminal)
    errors = [error for batch in shown if isinstance(batch, list) for error in batch]
    if errors:
        others = f" (and {len(errors) - 1} other files cannot be read)" if len(errors) > 1 else ""
        raise ImageError(f"{errors[0]}{others}")


def stream_data(config: DataConfig, seed: int, given: Given, class_names: list[str]) -> Data:
    """Data from the splits that a data set comes with (see `subsets.draw`).

    Args:
        config: the data section of a recipe.
        seed: the run's, for augmentation.
        given: images and labels of each split, "train" among them.
        class_names: names of the K classes.
    """
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    refuse_settings(config, ("shift", "noise"), f"only for small sets, {config.name} is streamed")
    augmentation, evaluation = transforms(config)
    splits = {
        name: StreamSplit(
            images=part.images,
            targets=torch.from_numpy(part.targets),
            config=config,
            seed=seed,
            augments=True,  # every training view is a random crop at least
            augmentation=augmentation,
            evaluation=evaluation,
            device=torch.device("cpu"),
        )
        for name, part in draw(config, given, class_names).items()
    }
    if config.verify:
        verify(splits.values())
    lines = (
        f"{name} {split.images.identity(i)} {label}\n".encode(errors="surrogateescape")
        for name, split in splits.items()
        for i, label in enumerate(split.targets.tolist())
    )
    return Data(
        config=config,
        **splits,
        class_names=class_names,
        input_shape=(3, config.image_size, config.image_size),
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        hash=digest(lines),
    )
