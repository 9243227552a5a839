"""Mixup and CutMix: whole batches, from a seed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.config.schema import DataConfig
from kd.data.sample_rng import global_rng

Mixer = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def mixed_alike(mix: Mixer, images: Tensor, others: Tensor, seed: int) -> Tensor:
    """Another rendering (B, C, H', W') of images, mixed as `mix` mixes these with this seed: by the same shares and in
    the same places, whatever the size.
    """
    # sample 0 of a batch of two is mixed with sample 1: of ones and zeros it gives its share at every pixel
    planes = torch.tensor([1.0, 0.0], device=others.device).view(2, 1, 1, 1).expand(2, 1, *images.shape[2:])
    share, _ = mix(planes, torch.zeros(2, dtype=torch.int64, device=others.device), seed)
    if share is planes:  # no mixing
        return others
    share = F.interpolate(share[:1], size=others.shape[2:])
    return share * others + (1 - share) * others.roll(1, 0)


def mixer(config: DataConfig, num_classes: int) -> Mixer:
    """A function (images, targets, seed) -> (mixed images, (B, K) float32 probabilities).

    Sample i is mixed with sample i-1 of the batch, all with one coefficient drawn from Beta(value, value). Where both
    mixup and CutMix are on, the seed chooses one of them for the batch with equal probability; where both are off, the
    batch is returned as it is.
    """
    from torchvision.transforms import v2

    kinds = [(v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)]
    transforms = [kind(alpha=value, num_classes=num_classes) for kind, value in kinds if value > 0]
    if not transforms:
        return lambda images, targets, seed: (images, targets)
    choice = v2.RandomChoice(transforms)

    def mixed(images: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        with global_rng(seed):  # v2 draws from torch's global CPU generator, wherever the batch is
            return choice(images, targets)

    return mixed
