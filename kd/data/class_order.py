"""Order of the classes: the data set's own, timm's, or that of a file of names."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kd.config.schema import DataConfig
from kd.data.base import Data, Split, digest
from kd.errors import ConfigError, require
from kd.text import did_you_mean, plain


def natural(names: Sequence[str]) -> list[int]:
    """Positions of the names in the order in which timm numbers the class directories of a folder."""
    from timm.utils.misc import natural_key

    # names that differ in case only are equal to timm, which leaves their order to chance
    return sorted(range(len(names)), key=lambda k: (natural_key(names[k]), names[k]))


def in_order(data: Data, config: DataConfig) -> Data:
    """The data with its classes numbered as data.class_order says; each split keeps its images.

    Raises ConfigError where a file does not name exactly the classes of the data.
    """
    if config.class_order == "sorted":
        return data
    names = data.class_names
    order = natural(names) if config.class_order == "natural" else _from_file(config, names)
    if order == list(range(len(names))):
        return data
    names, new = [names[k] for k in order], torch.tensor(order).argsort()

    def renumbered(split: Split) -> Split:
        posterior = None if split.posterior is None else split.posterior[:, order]
        return replace(split, targets=new[split.targets], posterior=posterior)

    train, val, test = (renumbered(split) for split in (data.train, data.val, data.test))
    digested = digest(["\n".join([data.hash, *names]).encode()])
    return replace(data, train=train, val=val, test=test, class_names=names, hash=digested)


def _from_file(config: DataConfig, names: Sequence[str]) -> list[int]:
    name, setting = config.class_order, f"data.class_order={config.class_order}"
    # as timm does, which also looks for a class map in the data set's directory
    path = next((path for path in (Path(name), Path(config.root or "", name)) if path.is_file()), None)
    near = did_you_mean(name, ("sorted", "natural"))
    require(path, f"{setting}: must be sorted, natural, or a file of class names, one on a line{near}")
    assert path is not None
    return [names.index(name) for name in read_names(path, names, setting)]


def read_names(path: Path, wanted: Sequence[str], setting: str) -> list[str]:
    """The class names of a text file, one on a line, as in timm's class maps. Raises ConfigError unless each of the
    data's, `wanted`, is there once.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").strip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: cannot be read as UTF-8 text, one class name on a line ({error})") from error
    fits, differs = set(names) == set(wanted), difference(names, wanted)
    require(fits, f"{setting}: must name the classes of the data; {differs}")
    require(len(names) == len(wanted), f"{setting}: must name each class of the data once")
    return names


def difference(names: Sequence[str], wanted: Sequence[str]) -> str:
    """How two lists of class names differ, by the first name of each that the other lacks; `wanted` are the data's."""
    here, there = set(names), set(wanted)
    extra = [f"it has {plain(name, 80)!r}, which the data lacks" for name in names if name not in there]
    missing = [f"the data has {plain(name, 80)!r}, which it lacks" for name in wanted if name not in here]
    return "; ".join(extra[:1] + missing[:1])
