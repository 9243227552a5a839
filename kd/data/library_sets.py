"""Data sets that libraries read: torchvision's, which it downloads, and the Hugging Face hub's, through timm.

What else timm reads is `folder` here, or has no random access.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kd.config.schema import DataConfig
from kd.data.base import Data, family
from kd.data.image_files import Source, files_below, reason
from kd.data.streams import stream_data
from kd.data.tensors import tensor_data
from kd.errors import ConfigError, require
from kd.text import did_you_mean

BY_TRAIN = {"train": {"train": True}, "test": {"train": False}}
BY_SPLIT = {"train": {"split": "train"}, "test": {"split": "test"}}
BY_TRAINVAL = {"train": {"split": "trainval"}, "test": {"split": "test"}}
UNSPLIT = {"train": {}}

# torchvision's class: the arguments of its training and of its test images.
SETS: dict[str, dict[str, dict[str, Any]]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "USPS"), BY_TRAIN),
    **dict.fromkeys(("SVHN", "STL10", "Country211", "DTD", "Flowers102"), BY_SPLIT),
    **dict.fromkeys(("Food101", "GTSRB", "RenderedSST2"), BY_SPLIT),
    **dict.fromkeys(("FGVCAircraft", "OxfordIIITPet"), BY_TRAINVAL),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "SEMEION", "SUN397"), UNSPLIT),
    "Imagenette": {"train": {"split": "train"}, "test": {"split": "val"}},
}


@family
def torchvision(config: DataConfig, seed: int) -> Data:
    """data.dataset, one of SETS, in data.root. Sets that torchvision holds as one array become tensors."""
    allowed = f"must be one of {', '.join(SETS)}{did_you_mean(config.dataset, SETS)}"
    require(config.dataset in SETS, f"data.dataset={config.dataset}: {allowed}")
    sets = {name: _torchvision_set(config, arguments) for name, arguments in SETS[config.dataset].items()}
    if isinstance(vars(sets["train"]).get("data"), np.ndarray | Tensor):
        arrays = {name: _array(each) for name, each in sets.items()}
        return tensor_data(config, seed, arrays, _class_names(sets["train"], arrays["train"][1]))
    files = {name: files_below(Path(config.root or ""), _samples(each)) for name, each in sets.items()}
    return stream_data(config, seed, files, _class_names(sets["train"], files["train"][1]))


def _torchvision_set(config: DataConfig, arguments: dict[str, Any]) -> Any:
    from torchvision import datasets

    kind = getattr(datasets, config.dataset)
    # torchvision's own loader gives the pixels; this one leaves an image as its path, which kd decodes like any other
    loader = {"loader": str} if "loader" in inspect.signature(kind).parameters else {}
    try:
        return kind(config.root, download=config.download, **loader, **arguments)
    except Exception as error:  # the network, the disk, a missing package, a damaged file: each raises its own
        raise ConfigError(
            f"data.root={config.root}: torchvision cannot read {config.dataset} there ({reason(error)}); "
            f"give the folder that holds it, or data.download=true"
        ) from error


def _array(dataset: Any) -> tuple[Tensor, np.ndarray]:
    """Its pixels as (N, C, H, W) uint8, and its labels."""
    pixels = torch.as_tensor(dataset.data)
    if pixels.ndim == 3:
        pixels = rearrange(pixels, "n h w -> n 1 h w")
    elif pixels.shape[-1] == 3:
        pixels = rearrange(pixels, "n h w c -> n c h w")
    return pixels, np.asarray(dataset.targets if "targets" in vars(dataset) else dataset.labels)


def _samples(dataset: Any) -> Iterable[tuple[str, int]]:
    """(path, label) of every image, without decoding any."""
    match type(dataset).__name__:
        case "GTSRB":  # these two take no loader and decode each image that they are asked for
            yield from dataset._samples
        case "OxfordIIITPet":
            yield from zip(dataset._images, dataset._labels, strict=True)
        case "Caltech101" | "Caltech256":  # these two give images that Pillow has opened and not decoded yet
            for i in range(len(dataset)):
                image, label = dataset[i]
                with image:
                    yield image.filename, label
        case _:
            yield from (dataset[i] for i in range(len(dataset)))


def _class_names(dataset: Any, targets: np.ndarray) -> list[str]:
    names = getattr(dataset, "classes", None) or range(int(targets.max()) + 1)
    return [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]


@dataclass(frozen=True)
class HubImages(Source):
    """timm's reader without timm's data set, which would go on to the next image where one cannot be read."""

    reader: Any
    split: str

    def name(self, i: int) -> str:
        """Its split, position there and, where the data set has file names, its file."""
        place = int(self.images[i])
        return f"{self.split} image {place} {self.reader.filename(place) or ''}".rstrip()

    def open(self, i: int) -> IO[bytes]:
        """The bytes of image i."""
        return self.reader[int(self.images[i])][0]


@family
def timm(config: DataConfig, seed: int) -> Data:
    """data.dataset=hfds/NAME, kept in data.root: its splits train, validation and test, see `subsets.draw`."""
    setting = f"data.dataset={config.dataset}"
    hub = config.dataset.startswith("hfds/")
    require(hub, f"{setting}: must be hfds/NAME; for files on this machine data.family=folder")
    opened = {"train": _split(config, "train"), "val": _split(config, "validation"), "test": _split(config, "test")}
    # the hub's test splits often come without labels, as -1
    given = {name: split for name, split in opened.items() if split and split[1].min() >= 0}
    classes = list(given["train"][0].reader.class_to_idx) if "train" in given else []
    require(len(classes) > 1, f"{setting}: needs a split 'train' whose 'label' has 2 or more named classes")
    return stream_data(config, seed, given, classes)


def _split(config: DataConfig, split: str) -> tuple[HubImages, np.ndarray] | None:
    from timm.data.dataset_factory import create_dataset

    try:
        reader = create_dataset(config.dataset, root=config.root, split=split).reader
        targets = np.array(list(reader.iter_targets()))
        return HubImages(np.arange(len(targets)), reader, split), targets
    except Exception as error:  # the hub, the network, the disk: each library in between raises its own
        if "Unknown split" in str(error):
            return None
        raise ConfigError(
            f"data.dataset={config.dataset}: timm cannot open its split {split}: {reason(error)}"
        ) from error
