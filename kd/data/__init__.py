"""Images in three splits: `load_data(config, seed)`. A new data set is one function in one file, named in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable

from kd.config.schema import DataConfig
from kd.data.base import Batch, Data, Split
from kd.data.embedded import digits, mnist5k
from kd.data.folder import folder
from kd.data.mixing import Mixer, mixer
from kd.data.synthetic import mixture, mnist1d
from kd.data.timm_sets import timm
from kd.data.torchvision_sets import torchvision
from kd.errors import ConfigError, ImageError

__all__ = ["FAMILIES", "Batch", "Data", "ImageError", "Mixer", "Split", "load_data", "mixer"]

FAMILIES: dict[str, Callable[[DataConfig, int], Data]] = {
    "digits": digits,
    "mnist5k": mnist5k,
    "mnist1d": mnist1d,
    "mixture": mixture,
    "torchvision": torchvision,
    "folder": folder,
    "timm": timm,
}


def load_data(config: DataConfig, seed: int) -> Data:
    """The data set of a recipe. `seed`, the run's, decides augmentation only; splits follow config.split_seed."""
    if config.family not in FAMILIES:
        raise ConfigError(f"data.family={config.family}: must be one of {', '.join(FAMILIES)}")
    return FAMILIES[config.family](config, seed)
