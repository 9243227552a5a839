"""Data sets of the Hugging Face hub, read by timm; what else timm reads is `folder` here, or has no random access."""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from kd.config.schema import DataConfig
from kd.data.base import Data, family
from kd.data.image_files import Source, reason
from kd.data.streams import stream_data
from kd.errors import ConfigError, require


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
    opened = {"train": _open(config, "train"), "val": _open(config, "validation"), "test": _open(config, "test")}
    # the hub's test splits often come without labels, as -1
    given = {name: split for name, split in opened.items() if split and split[1].min() >= 0}
    classes = list(given["train"][0].reader.class_to_idx) if "train" in given else []
    require(len(classes) > 1, f"{setting}: needs a split 'train' whose 'label' has 2 or more named classes")
    return stream_data(config, seed, given, classes)


def _open(config: DataConfig, split: str) -> tuple[HubImages, np.ndarray] | None:
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
