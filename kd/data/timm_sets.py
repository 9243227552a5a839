"""Data sets of the Hugging Face hub, read by timm; what else timm reads is `folder` here, or has no random access."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from kd.config.schema import DataConfig
from kd.data.base import Data, class_indices
from kd.data.image_files import decode, reason
from kd.data.streams import stream_data
from kd.errors import ConfigError


@dataclass(frozen=True)
class Reader:
    """timm's reader without timm's data set, which would go on to the next image where one cannot be read."""

    reader: Any
    split: str
    targets: np.ndarray

    def read(self, i: int) -> Image.Image:
        """Image i."""
        with self.reader[i][0] as file:
            return decode(file)

    def name(self, i: int) -> str:
        """Its split, position and, where the set has file names, its file."""
        return f"{self.split} image {i} {self.reader.filename(i) or ''}".rstrip()

    def identity(self, i: int) -> str:
        """The same: the hash of these sets covers their split, names and labels."""
        return self.name(i)


def timm(config: DataConfig, seed: int) -> Data:
    """data.dataset=hfds/NAME, kept in data.root: its splits train, validation and test, as `assign` deals with them."""
    if not config.dataset.startswith("hfds/"):
        raise ConfigError(
            f"data.dataset={config.dataset}: must be hfds/NAME; for files on this machine data.family=folder"
        )
    opened = {"train": _open(config, "train"), "val": _open(config, "validation"), "test": _open(config, "test")}
    # the hub's test splits often come without labels, as -1
    sources = {name: reader for name, reader in opened.items() if reader and reader.targets.min() >= 0}
    if "train" not in sources:
        raise ConfigError(f"data.dataset={config.dataset}: has no labelled split 'train'")
    classes = list(sources["train"].reader.class_to_idx)
    if len(classes) < 2:
        raise ConfigError(
            f"data.dataset={config.dataset}: has {len(classes)} named classes in 'label', needs at least 2"
        )
    return stream_data(config, seed, sources, classes, threads=1)


def _open(config: DataConfig, split: str) -> Reader | None:
    from timm.data.dataset_factory import create_dataset

    try:
        reader = create_dataset(config.dataset, root=config.root, split=split).reader
        labels = np.array(list(reader.iter_targets()))
    except Exception as error:  # the hub, the network, the disk: each library in between raises its own
        if "Unknown split" in str(error):
            return None
        raise ConfigError(
            f"data.dataset={config.dataset}: timm cannot open its split {split}: {reason(error)}"
        ) from error
    return Reader(reader, split, class_indices(f"data.dataset={config.dataset} {split}", labels))
