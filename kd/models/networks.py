"""Small networks that timm lacks, in timm's registry: ``timm.create_model("resnet20_cifar")`` after importing this.

n: images or vectors, c: channels, h, w: height and width, d: width of the last hidden layer, k: classes.
Every network gives logits (n, k), and with num_classes=0 the features (n, d) in front of its head.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from einops import rearrange, reduce
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class _Network(nn.Module):
    """timm's conventions around a linear head `fc` on averaged features.

    A subclass ends its construction with `reset_classifier` and gives `forward_features`.
    """

    def __init__(self, num_features: int, in_chans: int):
        super().__init__()
        self.num_features = self.head_hidden_size = num_features
        self.in_chans = in_chans

    def get_classifier(self) -> nn.Module:
        """The linear head."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one of `num_classes`; 0 for none. The pooling is always the average."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool={global_pool}: must be avg")
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Features (n, d) or (n, d, h, w)."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (n, d) or (n, d, h, w) to logits (n, k), or to (n, d) where `pre_logits`."""
        x = reduce(x, "n d ... -> n d", "mean")
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images or vectors to logits (n, k)."""
        return self.forward_head(self.forward_features(x))


def _stages(*widths_and_reductions: tuple[int, int]) -> list[dict[str, Any]]:
    """What timm calls feature_info: layer1, layer2 and so on, their channels, and how much smaller their maps are."""
    return [
        {"num_chs": width, "reduction": reduction, "module": f"layer{i}"}
        for i, (width, reduction) in enumerate(widths_and_reductions, start=1)
    ]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: the identity, or a 1x1 convolution where the shape changes."""

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or in_width != width:
            self.downsample = nn.Sequential(nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_width, h, w) to (n, width, h / stride, w / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(x)) + shortcut)


class CifarResNet(_Network):
    """The ResNet of depth 6 m + 2 for 32x32 images, of widths 16, 32 and 64 (He et al. 2016, §4.2).

    The two shortcuts that change shape are 1x1 convolutions (option B) where the paper pads with zeros (option A):
    the distillation literature measures this one (CRD, Tian et al. 2020: resnet56 72.34 % teaches resnet20, 69.06 %
    alone, on CIFAR-100), and the names of its parameters are theirs, so that their published weights load.

    Args:
        depth: layers with weights, without the shortcuts; 20, 32, 44, 56 or 110 in the paper.
        num_classes: classes; 0 for no head.
        in_chans: channels of the images.
    """

    def __init__(self, depth: int, num_classes: int = 100, in_chans: int = 3):
        super().__init__(64, in_chans)
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16, stride=1)
        self.layer2 = self._stage(blocks, 16, 32, stride=2)
        self.layer3 = self._stage(blocks, 32, 64, stride=2)
        self.feature_info = _stages((16, 1), (32, 2), (64, 4))
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(blocks: int, in_width: int, width: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_width, width, stride)
        return nn.Sequential(first, *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (n, c, h, w) to features (n, 64, h / 4, w / 4)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))


class Mlp(_Network):
    """Linear layers with ReLU between them, on vectors (n, l) or on flattened images (n, c, h, w).

    Args:
        hidden: widths of the hidden layers.
        num_classes: classes; 0 for no head.
        in_chans: channels of the images; 1 for vectors.
        img_size: height and width of the images, one number where they are equal; (1, l) for vectors.
    """

    def __init__(
        self, hidden: Sequence[int], num_classes: int = 10, in_chans: int = 3, img_size: int | Sequence[int] = 32
    ):
        super().__init__(hidden[-1], in_chans)
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        widths = [in_chans * prod(self.img_size), *hidden]
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)))
        self.feature_info = [
            {"num_chs": width, "reduction": 1, "module": f"layers.{i}"} for i, width in enumerate(hidden)
        ]
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(n, l) or (n, c, h, w) to the last hidden layer (n, d)."""
        return self.layers(rearrange(x, "n ... -> n (...)"))


class SmallCnn(_Network):
    """Three 3x3 convolutions with GroupNorm and ReLU, the last two after a halving.

    Without BatchNorm an image's logits depend on that image only, in training too.

    Args:
        widths: channels of each convolution.
        groups: groups of each GroupNorm.
        num_classes: classes; 0 for no head.
        in_chans: channels of the images, which are 28x28, 32x32 or alike.
    """

    def __init__(self, widths: tuple[int, int, int], groups: int, num_classes: int = 10, in_chans: int = 3):
        super().__init__(widths[2], in_chans)
        self.layer1 = self._layer(in_chans, widths[0], groups, stride=1)
        self.layer2 = self._layer(widths[0], widths[1], groups, stride=2)
        self.layer3 = self._layer(widths[1], widths[2], groups, stride=2)
        self.feature_info = _stages((widths[0], 1), (widths[1], 2), (widths[2], 4))
        self.reset_classifier(num_classes)

    @staticmethod
    def _layer(in_width: int, width: int, groups: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        return nn.Sequential(convolution, nn.GroupNorm(groups, width), nn.ReLU())

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (n, c, h, w) to features (n, d, h / 4, w / 4), rounded up."""
        return self.layer3(self.layer2(self.layer1(x)))


_CIFAR: dict[str, Any] = {"input_size": (3, 32, 32), "num_classes": 100, "first_conv": "conv1", "classifier": "fc"}
_CNN: dict[str, Any] = {"input_size": (3, 32, 32), "num_classes": 10, "first_conv": "layer1.0", "classifier": "fc"}
_MLP: dict[str, Any] = {"input_size": (3, 32, 32), "num_classes": 10, "fixed_input_size": True, "classifier": "fc"}

# register_model reads this name, and takes timm's img_size for networks of a fixed input size.
default_cfgs = generate_default_cfgs(
    {
        **{f"resnet{depth}_cifar": _CIFAR for depth in (20, 32, 44, 56, 110)},
        **{f"mlp_{size}": _MLP for size in ("nano", "tiny", "mini", "small", "wide")},
        **{f"cnn_{size}": _CNN for size in ("tiny", "small")},
    }
)


def _mlp(variant: str, hidden: Sequence[int], pretrained: bool, **kwargs) -> nn.Module:
    size = kwargs.get("img_size")
    if size is not None and not isinstance(size, int) and len(size) == 1:
        kwargs["img_size"] = (1, *size)  # timm knows heights and widths only: a vector is an image one pixel high
    return build_model_with_cfg(Mlp, variant, pretrained, hidden=hidden, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs) -> nn.Module:
    """ResNet-20 for 32x32 images, 0.28 M parameters with 100 classes."""
    return build_model_with_cfg(CifarResNet, "resnet20_cifar", pretrained, depth=20, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs) -> nn.Module:
    """ResNet-32 for 32x32 images, 0.47 M parameters with 100 classes."""
    return build_model_with_cfg(CifarResNet, "resnet32_cifar", pretrained, depth=32, **kwargs)


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs) -> nn.Module:
    """ResNet-44 for 32x32 images, 0.67 M parameters with 100 classes."""
    return build_model_with_cfg(CifarResNet, "resnet44_cifar", pretrained, depth=44, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs) -> nn.Module:
    """ResNet-56 for 32x32 images, 0.86 M parameters with 100 classes."""
    return build_model_with_cfg(CifarResNet, "resnet56_cifar", pretrained, depth=56, **kwargs)


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs) -> nn.Module:
    """ResNet-110 for 32x32 images, 1.74 M parameters with 100 classes."""
    return build_model_with_cfg(CifarResNet, "resnet110_cifar", pretrained, depth=110, **kwargs)


@register_model
def mlp_nano(pretrained: bool = False, **kwargs) -> nn.Module:
    """One hidden layer of 24."""
    return _mlp("mlp_nano", (24,), pretrained, **kwargs)


@register_model
def mlp_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """One hidden layer of 64."""
    return _mlp("mlp_tiny", (64,), pretrained, **kwargs)


@register_model
def mlp_mini(pretrained: bool = False, **kwargs) -> nn.Module:
    """Two hidden layers of 128."""
    return _mlp("mlp_mini", (128, 128), pretrained, **kwargs)


@register_model
def mlp_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """Two hidden layers of 256."""
    return _mlp("mlp_small", (256, 256), pretrained, **kwargs)


@register_model
def mlp_wide(pretrained: bool = False, **kwargs) -> nn.Module:
    """Two hidden layers of 1200, as wide as the teacher of Hinton et al. 2015, §3."""
    return _mlp("mlp_wide", (1200, 1200), pretrained, **kwargs)


@register_model
def cnn_tiny(pretrained: bool = False, **kwargs) -> nn.Module:
    """Three convolutions of 8, 16 and 32 with GroupNorm, 6 k parameters with 10 classes and one channel."""
    return build_model_with_cfg(SmallCnn, "cnn_tiny", pretrained, widths=(8, 16, 32), groups=4, **kwargs)


@register_model
def cnn_small(pretrained: bool = False, **kwargs) -> nn.Module:
    """Three convolutions of 32, 64 and 128 with GroupNorm, 0.09 M parameters with 10 classes."""
    return build_model_with_cfg(SmallCnn, "cnn_small", pretrained, widths=(32, 64, 128), groups=8, **kwargs)
