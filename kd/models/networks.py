"""Small networks that timm lacks, in timm's registry: ``timm.create_model("resnet20_cifar")`` after importing this.

n: images or vectors, c: channels, h, w: height and width, d: width of the last hidden layer, k: classes.
Every network gives logits (n, k), and with num_classes=0 the features (n, d) in front of its head.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Any, ClassVar

import torch
from einops import rearrange, reduce
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, downsample_conv
from torch import Tensor, nn


class _Network(nn.Module, ABC):
    """timm's conventions around a linear head `fc` on averaged features.

    A subclass ends its construction with `reset_classifier` and gives `forward_features` and `cfg`.
    """

    cfg: ClassVar[dict[str, Any]]  # what timm should know of the network beside its input and its head's name

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = self.head_hidden_size = num_features

    def get_classifier(self) -> nn.Module:
        """The linear head."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one of `num_classes`; 0 for none. The pooling is always the average."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Features (n, d) or (n, d, h, w)."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (n, d) or (n, d, h, w) to logits (n, k), or to (n, d) where `pre_logits`."""
        x = reduce(x, "n d ... -> n d", "mean")
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images or vectors to logits (n, k)."""
        return self.forward_head(self.forward_features(x))


def _stages(*stages: tuple[str, int, int]) -> list[dict[str, Any]]:
    """What timm calls feature_info: modules, their channels, and how much smaller than the image their maps are."""
    return [{"module": name, "num_chs": width, "reduction": reduction} for name, width, reduction in stages]


class CifarResNet(_Network):
    """The ResNet of depth 6 m + 2 for 32x32 images, of widths 16, 32 and 64 (He et al. 2016, §4.2).

    The two shortcuts that change shape are 1x1 convolutions (option B) where the paper pads with zeros (option A):
    the distillation literature measures this one (CRD, Tian et al. 2020: resnet56 72.34 % teaches resnet20, 69.06 %
    alone, on CIFAR-100), and the names of its parameters are theirs, so that their published weights load.

    A block adds its shortcut and applies its ReLU in place, as timm's do, so that its bn1 and bn2 cannot be tapped.

    Args:
        depth: layers with weights, without the shortcuts; 20, 32, 44, 56 or 110 in the paper.
        num_classes: classes; 0 for no head.
        in_chans: channels of the images.
    """

    cfg: ClassVar = {"num_classes": 100, "first_conv": "conv1"}

    def __init__(self, depth: int, num_classes: int = 100, in_chans: int = 3):
        super().__init__(64)
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16, stride=1)
        self.layer2 = self._stage(blocks, 16, 32, stride=2)
        self.layer3 = self._stage(blocks, 32, 64, stride=2)
        self.feature_info = _stages(("layer1", 16, 1), ("layer2", 32, 2), ("layer3", 64, 4))
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(blocks: int, in_width: int, width: int, stride: int) -> nn.Sequential:
        shortcut = None if in_width == width else downsample_conv(in_width, width, kernel_size=1, stride=stride)
        first = BasicBlock(in_width, width, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(width, width) for _ in range(blocks - 1)))

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

    cfg: ClassVar = {"num_classes": 10, "fixed_input_size": True}

    def __init__(
        self, hidden: Sequence[int], num_classes: int = 10, in_chans: int = 3, img_size: int | Sequence[int] = 32
    ):
        super().__init__(hidden[-1])
        pixels = img_size**2 if isinstance(img_size, int) else prod(img_size)
        widths = in_chans * pixels, *hidden
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)))
        self.feature_info = _stages(*((f"layers.{i}", width, 1) for i, width in enumerate(hidden)))
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

    cfg: ClassVar = {"num_classes": 10, "first_conv": "layer1.0"}

    def __init__(self, widths: tuple[int, int, int], groups: int, num_classes: int = 10, in_chans: int = 3):
        super().__init__(widths[2])
        self.layer1 = self._layer(in_chans, widths[0], groups, stride=1)
        self.layer2 = self._layer(widths[0], widths[1], groups, stride=2)
        self.layer3 = self._layer(widths[1], widths[2], groups, stride=2)
        self.feature_info = _stages(("layer1", widths[0], 1), ("layer2", widths[1], 2), ("layer3", widths[2], 4))
        self.reset_classifier(num_classes)

    @staticmethod
    def _layer(in_width: int, width: int, groups: int, stride: int) -> nn.Sequential:
        convolution = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        return nn.Sequential(convolution, nn.GroupNorm(groups, width), nn.ReLU())

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (n, c, h, w) to features (n, d, h / 4, w / 4), rounded up."""
        return self.layer3(self.layer2(self.layer1(x)))


# Every network by name: its class, and what makes it this one. A new network is an entry here.
NETWORKS: dict[str, tuple[type[_Network], dict[str, Any]]] = {
    # for 32x32 images: 0.28, 0.47, 0.67, 0.86 and 1.74 M parameters with 100 classes
    **{f"resnet{depth}_cifar": (CifarResNet, {"depth": depth}) for depth in (20, 32, 44, 56, 110)},
    "mlp_nano": (Mlp, {"hidden": (24,)}),
    "mlp_tiny": (Mlp, {"hidden": (64,)}),
    "mlp_mini": (Mlp, {"hidden": (128, 128)}),
    "mlp_small": (Mlp, {"hidden": (256, 256)}),
    "mlp_wide": (Mlp, {"hidden": (1200, 1200)}),  # as wide as the teacher of Hinton et al. 2015, section 3
    "cnn_tiny": (SmallCnn, {"widths": (8, 16, 32), "groups": 4}),  # 6 k parameters with 10 classes and one channel
    "cnn_small": (SmallCnn, {"widths": (32, 64, 128), "groups": 8}),  # 0.09 M
}

# timm's defaults would say that weights of these networks were trained with ImageNet's values.
_NOT_SAID = dict.fromkeys(("mean", "std", "interpolation", "crop_pct", "crop_mode"))
# register_model reads this name; timm gives img_size to networks of a fixed input size.
default_cfgs = generate_default_cfgs(
    {
        name: {"input_size": (3, 32, 32), "classifier": "fc", **_NOT_SAID, **network.cfg}
        for name, (network, _) in NETWORKS.items()
    }
)


def _register(name: str, network: type[_Network], settings: dict[str, Any]) -> None:
    """Have timm.create_model(name) make the network."""

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(network, name, pretrained, **settings, **kwargs)

    create.__name__ = name  # by which timm registers it
    register_model(create)


for _name, (_class, _settings) in NETWORKS.items():
    _register(_name, _class, _settings)
