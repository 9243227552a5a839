"""Data sets that torchvision knows how to download and read."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kd.config.schema import DataConfig
from kd.data.base import Data, class_indices
from kd.data.folder import data_root
from kd.data.image_files import FORMATS, Files, reason
from kd.data.streams import stream_data
from kd.data.tensors import tensor_data
from kd.errors import ConfigError

BY_TRAIN = {"train": {"train": True}, "test": {"train": False}}
BY_SPLIT = {"train": {"split": "train"}, "test": {"split": "test"}}
BY_TRAINVAL = {"train": {"split": "trainval"}, "test": {"split": "test"}}
UNSPLIT = {"train": {}}

# torchvision class: the arguments of its training and of its test images. A new set is a line here.
SETS: dict[str, dict[str, dict[str, Any]]] = {
    "CIFAR10": BY_TRAIN,
    "CIFAR100": BY_TRAIN,
    "MNIST": BY_TRAIN,
    "FashionMNIST": BY_TRAIN,
    "KMNIST": BY_TRAIN,
    "USPS": BY_TRAIN,
    "SVHN": BY_SPLIT,
    "STL10": BY_SPLIT,
    "Country211": BY_SPLIT,
    "DTD": BY_SPLIT,
    "Flowers102": BY_SPLIT,
    "Food101": BY_SPLIT,
    "GTSRB": BY_SPLIT,
    "RenderedSST2": BY_SPLIT,
    "FGVCAircraft": BY_TRAINVAL,
    "OxfordIIITPet": BY_TRAINVAL,
    "Imagenette": {"train": {"split": "train"}, "test": {"split": "val"}},
    "Caltech101": UNSPLIT,
    "Caltech256": UNSPLIT,
    "EuroSAT": UNSPLIT,
    "SEMEION": UNSPLIT,
    "SUN397": UNSPLIT,
}


def torchvision(config: DataConfig, seed: int) -> Data:
    """data.dataset, one of SETS, in data.root. Sets that torchvision holds as one array become tensors."""
    if config.dataset not in SETS:
        near = difflib.get_close_matches(config.dataset, SETS, n=1, cutoff=0.4)
        raise ConfigError(
            f"data.dataset={config.dataset}: must be one of {', '.join(SETS)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    sets = {name: _open(config, arguments) for name, arguments in SETS[config.dataset].items()}
    classes = _class_names(sets["train"])
    if isinstance(getattr(sets["train"], "data", None), np.ndarray | Tensor):
        return tensor_data(config, seed, {name: (_pixels(s), _targets(s)) for name, s in sets.items()}, classes)
    formats = ("PPM",) if config.dataset == "GTSRB" else FORMATS  # what its authors published
    root = Path(config.root or "")
    sources = {name: Files(root, _paths(root, s), _targets(s), formats) for name, s in sets.items()}
    return stream_data(config, seed, sources, classes, threads=16)


def _open(config: DataConfig, arguments: dict[str, Any]) -> Any:
    from torchvision import datasets

    if not config.download:
        data_root(config)
    elif not config.root:
        raise ConfigError(
            f"data.root is not set: give the folder to download {config.dataset} to, data.root=/path/to/it"
        )
    try:
        return getattr(datasets, config.dataset)(config.root, download=config.download, **arguments)
    except ImportError as error:
        raise ConfigError(
            f"data.dataset={config.dataset}: torchvision needs a package for it: {reason(error)}"
        ) from error
    except (OSError, RuntimeError) as error:
        if config.download:
            raise ConfigError(f"data.download=true: cannot download {config.dataset}: {reason(error)}") from error
        raise ConfigError(
            f"data.root={config.root}: {config.dataset} is not there or not complete; "
            "give the folder that holds it, or data.download=true"
        ) from error
    except Exception as error:  # files that are not what their names say: their readers check little
        raise ConfigError(
            f"data.root={config.root}: {config.dataset} cannot be read, a file of it is damaged: {reason(error)}"
        ) from error


def _targets(dataset: Any) -> np.ndarray:
    """The labels, wherever this class keeps them, without decoding the images."""
    labels = None
    for name in ("targets", "labels", "_labels", "y"):
        if (labels := getattr(dataset, name, None)) is not None:
            break
    found = np.asarray(labels) if labels is not None else np.array([label for _, label in dataset._samples])
    return class_indices(f"data.dataset={type(dataset).__name__}", found)


def _paths(root: Path, dataset: Any) -> np.ndarray:
    """Where its images are, from the root on, wherever this class keeps that: kd decodes them itself, all alike."""
    for name in ("_image_files", "_images", "_samples", "samples"):
        if (found := getattr(dataset, name, None)) is not None:
            paths = [each[0] if isinstance(each, tuple) else each for each in found]
            break
    else:  # Caltech's two
        paths = [_caltech(dataset, label, number) for label, number in zip(dataset.y, dataset.index, strict=True)]
    relative = [os.path.relpath(path, root) for path in paths]
    for path in relative:  # some are read from a list beside the images
        if path.startswith(os.pardir):
            raise ConfigError(f"data.dataset={type(dataset).__name__}: {path!r} is outside of data.root")
    return np.array([os.fsencode(path) for path in relative])


def _caltech(dataset: Any, label: int, number: int) -> str:
    name = dataset.categories[label]
    if type(dataset).__name__ == "Caltech101":
        return os.path.join(dataset.root, "101_ObjectCategories", name, f"image_{number:04d}.jpg")
    return os.path.join(dataset.root, "256_ObjectCategories", name, f"{label + 1:03d}_{number:04d}.jpg")


def _class_names(dataset: Any) -> list[str]:
    names: Sequence[Any] = getattr(dataset, "classes", None) or range(int(_targets(dataset).max()) + 1)
    return [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]


def _pixels(dataset: Any) -> Tensor:
    """Its array as (N, C, H, W) uint8."""
    pixels = torch.as_tensor(dataset.data)
    if pixels.ndim == 3:
        return rearrange(pixels, "n h w -> n 1 h w")
    return rearrange(pixels, "n h w c -> n c h w") if pixels.shape[-1] == 3 else pixels
