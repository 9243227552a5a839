"""Data sets in three splits: `load_data(config, seed)`.

A new data set is a function under `@family` in a file of this folder, and a recipe in recipes/data.
"""

from importlib import import_module
from pkgutil import iter_modules

from kd.config.schema import DataConfig
from kd.data.base import FAMILIES, Batch, Data, Preprocess, Split
from kd.data.class_order import in_order
from kd.data.mixing import Mixer, mixed_alike, mixer
from kd.errors import require

__all__ = ["FAMILIES", "Batch", "Data", "Mixer", "Preprocess", "Split", "load_data", "mixed_alike", "mixer"]

for _module in iter_modules(__path__):  # each registers the families that it defines
    import_module(f"{__name__}.{_module.name}")


def load_data(config: DataConfig, seed: int) -> Data:
    """The data set of a recipe. `seed`, the run's, decides augmentation only; splits follow config.split_seed.

    Raises ConfigError for a setting or a data set that cannot be used, ImageError for an unreadable file where
    data.verify is on.
    """
    families = ", ".join(sorted(FAMILIES))
    require(config.family in FAMILIES, f"data.family={config.family}: must be one of {families}")
    return in_order(FAMILIES[config.family](config, seed), config)
