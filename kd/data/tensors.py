"""Small data sets: a split is one tensor on the device, augmented a batch at a time with one draw per sample.

torchvision's batched transforms draw one parameter for a whole batch, which is why these are our own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kd.config.schema import DataConfig
from kd.data.base import Batch, Data, Given, Preprocess, Split, digest, refuse_settings, statistics
from kd.data.sample_rng import mix, normals, sample_keys, uniforms
from kd.data.subsets import draw
from kd.errors import require

MODES = ("bilinear", "bicubic")  # of interpolation with antialiasing, as torch has them


def unit(images: Tensor) -> Tensor:
    """Pixels between 0 and 1: uint8 is divided by 255, float32 is taken as it is."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def translate(images: Tensor, offset: Tensor, dim: int) -> Tensor:
    """Move sample i by offset[i] along `dim`, filling with zeros: (B, ...), (B,) -> (B, ...)."""
    shape = [1] * images.ndim
    shape[dim] = length = images.shape[dim]
    source = torch.arange(length, device=images.device).view(shape) - offset.view(-1, *[1] * (images.ndim - 1))
    inside = (source >= 0) & (source < length)
    return torch.take_along_dim(images, source.clamp(0, length - 1), dim) * inside


@dataclass(frozen=True, kw_only=True)
class TensorSplit(Split):
    """A split that fits in memory."""

    images: Tensor  # (N, C, H, W) or (N, L), uint8 or float32, as stored

    def __post_init__(self):
        for network in self.networks:
            setting = f"data.interpolation={network.interpolation}"
            require(network.interpolation in MODES, f"{setting}: sets held in memory take {' or '.join(MODES)}")

    @cached_property
    def _statistics(self) -> list[tuple[Tensor, Tensor]]:
        """Mean and standard deviation for each network, (C, 1, 1), or (1,) for signals."""
        shape = (-1, 1, 1) if self.images.ndim == 4 else (-1,)
        made = [torch.tensor([each.mean, each.std], dtype=torch.float32) for each in self.networks]
        return [(mean.view(shape), std.view(shape)) for mean, std in (each.to(self.images.device) for each in made)]

    def to(self, device: torch.device | str) -> TensorSplit:
        """The same split with its images on `device`."""
        return replace(self, images=self.images.to(device))

    def batches(self, plan: Sequence[Tensor], epoch: int | None) -> Iterator[Batch]:
        """One batch for each index tensor of `plan`."""
        device = self.images.device
        for index in plan:
            images, *teacher = self._views(index.to(device), epoch)
            yield Batch(index, images, self.targets[index.cpu()].to(device), *teacher)

    def _views(self, index: Tensor, epoch: int | None) -> list[Tensor]:
        """The samples as each network takes them."""
        images = self.images[index]
        if epoch is None:
            return self._model_inputs(images)
        keys = sample_keys(self.seed, epoch, index)
        views = self._model_inputs(self._move(images, keys))
        if self.config.noise == 0:
            return views
        # mix(keys) is no element of the streams that _move reads: shifts stay the same with and without noise
        noise = self.config.noise * normals(mix(keys), views[0][0].numel()).view_as(views[0])
        # in units of the first network: the others see the same noise in the pixels
        scales = [self._statistics[0][1] / std for _, std in self._statistics]
        resized = [noise if view.shape == noise.shape else F.interpolate(noise, view.shape[2:]) for view in views]
        return [view + scale * own for view, scale, own in zip(views, scales, resized, strict=True)]

    def _move(self, images: Tensor, keys: Tensor) -> Tensor:
        """Shift and flip, on the stored pixels."""
        shift, draws = self.config.shift, uniforms(keys, 3)
        if shift:
            for dim in (-1, -2) if images.ndim == 4 else (-1,):  # x and y, or along a signal
                offset = (draws[:, dim] * (2 * shift + 1)).long() - shift
                images = translate(images, offset, dim)
        if self.config.hflip:
            flipped = rearrange(draws[:, 0] < self.config.hflip, "b -> b 1 1 1")
            images = torch.where(flipped, images.flip(-1), images)
        return images

    def _model_inputs(self, images: Tensor) -> list[Tensor]:
        """Normalise and resize. Normalised first, as a small image is cheaper; both are linear, the order is free."""
        inputs = []
        for network, (mean, std) in zip(self.networks, self._statistics, strict=True):
            own = (unit(images) - mean) / std
            if own.shape[1:] != network.shape:
                # antialias: otherwise most pixels are ignored where the image shrinks; nothing changes where it grows
                own = F.interpolate(own, size=network.shape[1:], mode=network.interpolation, antialias=True)
            inputs.append(own)
        return inputs


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over all samples and places, (C,) float64; (1,) for signals."""
    if images.ndim == 2:
        images = rearrange(images, "n l -> n 1 l")
    total = squares = torch.zeros(images.shape[1], dtype=torch.float64)
    for part in images.split(4096):  # float64 copies of all of CIFAR would take 1.2 GB
        values = rearrange(unit(part).double(), "n c ... -> c (n ...)")
        total, squares = total + values.sum(1), squares + values.square().sum(1)
    count = images.numel() / images.shape[1]
    mean = total / count
    return mean, (squares / count - mean.square()).sqrt()


def tensor_data(config: DataConfig, seed: int, given: Given, class_names: list[str]) -> Data:
    """Data from the splits that a data set comes with (see `subsets.draw`).

    Args:
        config: the data section of a recipe.
        seed: the run's, for augmentation.
        given: stored images, uint8 or float32, and labels of each split, "train" among them.
        class_names: names of the K classes.
    """
    shape = tuple(given["train"][0].shape[1:])
    streamed = "color_jitter", "random_erase", "auto_augment", "channels"
    refuse_settings(config, streamed, f"only for streamed sets, {config.name} is held in memory")
    if len(shape) == 1:
        refuse_settings(config, ("hflip", "mixup", "cutmix"), f"only for images, {config.name} holds signals")
    require(config.crop_mode == "center", f"data.crop_mode={config.crop_mode}: only for streamed sets; leave it out")
    stored_size = f"must be < {shape[-1]}, the stored size of {config.name}"
    require(config.shift < shape[-1], f"data.shift={config.shift}: {stored_size}")
    parts = draw(config, given, class_names)
    mean, std = channel_statistics(parts["train"].images)
    network = Preprocess(
        shape=(shape[0], config.image_size, config.image_size) if len(shape) == 3 else shape,
        **statistics(config, shape[0] if len(shape) == 3 else 1, mean.tolist(), std.tolist()),
        interpolation=config.interpolation,
        crop_pct=1.0,
        crop_mode="whole",
    )
    splits = {
        name: TensorSplit(
            images=part.images,
            targets=torch.from_numpy(part.targets),
            config=config,
            seed=seed,
            augments=bool(config.shift or config.hflip or config.noise),
            networks=(network,),
        )
        for name, part in parts.items()
    }
    return Data(
        config=config,
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        class_names=class_names,
        hash=digest(values.numpy() for split in splits.values() for values in (split.images, split.targets)),
    )
