"""Large data sets: worker processes decode and augment images one at a time, as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import torch.nn.functional as F
from joblib import cpu_count
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from kd.config.schema import DataConfig
from kd.data.base import Batch, Data, Given, Preprocess, Split, digest, for_channels, refuse_settings, statistics
from kd.data.image_files import Source
from kd.data.sample_rng import global_rng, sample_keys
from kd.data.subsets import draw
from kd.errors import ConfigError, ImageError, require

Transform = Callable[[Image.Image], Tensor]


def _collate(samples: list[Any]) -> Any:
    """A batch, or the errors in it: raised here, in a worker, they would arrive inside a traceback of many lines."""
    return [sample for sample in samples if isinstance(sample, ImageError)] or Batch(*default_collate(samples))


@dataclass(frozen=True, kw_only=True)
class StreamSplit(Split):
    """Some images of a source, decoded when they are asked for."""

    images: Source
    device: torch.device

    @cached_property
    def transforms(self) -> list[tuple[Transform, Transform]]:
        """For training and for evaluation, of each network."""
        return [transforms(self.config, network, self.networks[0]) for network in self.networks]

    def __getitem__(self, at: tuple[int, int | None]) -> tuple[Any, ...] | ImageError:
        """A sample (index, image, target, and the teacher's image where networks are two) in its view of an epoch: what
        a worker process is asked for.
        """
        index, epoch = at
        image, target = self.images.read(index), int(self.targets[index])
        if isinstance(image, ImageError):
            return image
        views = []
        for augmentation, evaluation in self.transforms:
            if epoch is None:
                views.append(evaluation(image))
                continue
            # Transforms draw from all three global generators; with workers=0 those are the training process's own.
            # What they draw does not depend on the network's size: all see the same crop, flip and policy.
            with global_rng(int(sample_keys(self.seed, epoch, torch.tensor(index)))):
                views.append(augmentation(image))
        return index, views[0], target, *views[1:]

    def to(self, device: torch.device | str) -> StreamSplit:
        """The same split with its batches on `device`."""
        return replace(self, device=torch.device(device))

    def batches(self, plan: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        """One batch for each index tensor of `plan`."""
        for batch in self.load(plan, epoch):
            if isinstance(batch, list):
                raise batch[0]
            index, *moved = filter(torch.is_tensor, batch)
            yield Batch(index, *(each.to(self.device, non_blocking=True) for each in moved))

    def load(self, plan: Sequence[Tensor], epoch: int | None) -> Iterable[Any]:
        """A batch on the CPU for each index tensor of `plan`, or the list of its ImageErrors."""
        assert self.transforms  # made once here, and not by every worker
        return DataLoader(
            self,  # type: ignore[arg-type]
            batch_sampler=([(i, epoch) for i in index.tolist()] for index in plan),  # type: ignore[arg-type]
            num_workers=min(self.config.workers, len(plan), cpu_count()),  # more than cores only take memory
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # without one, iter(loader) draws from the global generator
        )


class Erasing(RandomErasing):
    """timm's, drawn at one network's height and width for every network."""

    def __init__(self, probability: float, size: Sequence[int]):
        super().__init__(probability, mode="pixel", device="cpu")
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        """The image (C, H, W) with the box of this draw, if there is one."""
        drawn = super().__call__(torch.full((3, *self.size), torch.nan))[: len(image)]
        drawn = F.interpolate(drawn[None], size=image.shape[1:])[0]
        return torch.where(drawn.isnan(), image, drawn)


def transforms(config: DataConfig, network: Preprocess, first: Preprocess) -> tuple[Transform, Transform]:
    """timm's transforms of a network for training and for evaluation. What policies fill in is the mean of the `first`
    network of a split, at whose size random erasing is drawn.
    """
    from timm.data.transforms import MaybeToTensor
    from timm.data.transforms_factory import create_transform
    from torchvision.transforms import Compose, Grayscale, Normalize

    grey = [Grayscale()] if network.shape[0] == 1 else []
    shared: dict[str, Any] = {"input_size": network.shape, "interpolation": network.interpolation}
    try:
        drawn: Any = create_transform(
            **shared,
            is_training=True,
            scale=(config.crop_scale, 1.0),
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment or None,
            mean=for_channels(first.mean, 3),
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"data.auto_augment={config.auto_augment}: timm has no such policy; try rand-m9-mstd0.5, original or empty"
        ) from error
    # Policies are drawn and applied in colour, so that a grey network's images are those of a colour network.
    mean, std = torch.tensor(network.mean), torch.tensor(network.std)
    steps = [*drawn.transforms[:-2], *grey, MaybeToTensor(), Normalize(mean, std)]
    if config.random_erase:
        steps.append(Erasing(config.random_erase, first.shape[1:]))
    values = {name: getattr(network, name) for name in ("mean", "std", "crop_pct", "crop_mode")}
    evaluation: Any = create_transform(**shared, **values)
    return Compose(steps), Compose([*grey, *evaluation.transforms])


def verify(splits: dict[str, StreamSplit]) -> dict[str, dict[int, ImageError]]:
    """Decode every image once, as training will: the errors of those that cannot be read, by split and position."""
    from rich.console import Console
    from rich.progress import track

    plans = {name: torch.arange(len(split)).split(16) for name, split in splits.items()}
    batches = (each for name, plan in plans.items() for each in zip(repeat(name), plan, splits[name].load(plan, None)))
    # on stderr, as what a command prints may be read by a program
    console, total = Console(stderr=True, emoji=False), sum(map(len, plans.values()))
    shown = track(batches, "decoding every image", total, console=console, disable=not console.is_terminal)
    errors: dict[str, dict[int, ImageError]] = {name: {} for name in splits}
    for name, index, batch in shown:
        if isinstance(batch, list):  # errors without their positions: once more, one by one
            again = {i: splits[name].images.read(i) for i in index.tolist()}
            errors[name] |= {i: each for i, each in again.items() if isinstance(each, ImageError)}
    return errors


def readable(
    config: DataConfig, splits: dict[str, StreamSplit], class_names: list[str]
) -> tuple[dict[str, StreamSplit], dict[str, Any]]:
    """The splits, and what `Data` says of images left out. A file lists all that cannot be read.

    Raises ImageError for them; with data.unreadable=skip ConfigError where a split loses all images of a class.
    """
    errors = verify(splits)
    lines = [str(error) for each in errors.values() for error in each.values()]
    if not lines:
        return splits, {}
    if config.unreadable == "stop":
        others = f" (and {len(lines) - 1} other files cannot be read; {listed(lines)} lists all)"
        raise ImageError(f"{lines[0]}{others if len(lines) > 1 else ''}")
    kept = {}
    for name, split in splits.items():
        kept[name] = split.subset(
            torch.tensor([i for i in range(len(split)) if i not in errors[name]], dtype=torch.long)
        )
        lost = set(split.targets.tolist()) - set(kept[name].targets.tolist())
        empty = ", ".join(repr(class_names[k]) for k in sorted(lost)[:3])
        require(not lost, f"data.unreadable=skip: no image of {empty} in {name} can be read; {lines[0]}")
    total = sum(map(len, splits.values()))
    note = f"warning  data.unreadable=skip leaves out {len(lines)} of {total} images, listed in {listed(lines)}"
    return kept, {"unreadable": len(lines), "notes": (note,)}


def listed(lines: list[str]) -> str:
    """The path of a new temporary file with these lines."""
    # a name may be no UTF-8
    with NamedTemporaryFile(
        "w", errors="surrogateescape", prefix="kd-unreadable-", suffix=".txt", delete=False
    ) as file:
        file.writelines(f"{line}\n" for line in lines)
    return file.name


def stream_data(config: DataConfig, seed: int, given: Given, class_names: list[str]) -> Data:
    """Data from the splits that a data set comes with (see `subsets.draw`).

    Args:
        config: the data section of a recipe.
        seed: the run's, for augmentation.
        given: images and labels of each split, "train" among them.
        class_names: names of the K classes.
    """
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    channels = config.channels or 3
    network = Preprocess(
        shape=(channels, config.image_size, config.image_size),
        **statistics(config, channels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        crop_mode=config.crop_mode,
    )
    refuse_settings(config, ("shift", "noise"), f"only for small sets, {config.name} is streamed")
    transforms(config, network, network)  # a policy that timm does not know is an error before any work
    splits = {
        name: StreamSplit(
            images=part.images,
            targets=torch.from_numpy(part.targets),
            config=config,
            seed=seed,
            networks=(network,),
            augments=True,  # every training view is a random crop at least
            device=torch.device("cpu"),
        )
        for name, part in draw(config, given, class_names).items()
    }
    left_out: dict[str, Any] = {}
    if config.verify or config.unreadable == "skip":
        splits, left_out = readable(config, splits, class_names)
    lines = (
        f"{name} {split.images.identity(i)} {label}\n".encode(errors="surrogateescape")
        for name, split in splits.items()
        for i, label in enumerate(split.targets.tolist())
    )
    return Data(
        config=config,
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        class_names=class_names,
        hash=digest(lines),
        **left_out,
    )
