"""Directories of images with one directory per class, ImageNet among them."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from kd.config.schema import DataConfig
from kd.data.base import Data, family
from kd.data.image_files import Files, files_below
from kd.data.streams import stream_data
from kd.errors import require

SPLITS = ("train", "val", "test")
READ = (".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
NOT_READ = (".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".pgm", ".ppm", ".tga", ".tif", ".tiff")
# Of two such directories side by side either is a split; taken as classes they would make another task.
LIKE_SPLITS = (*SPLITS, "dev", "eval", "testing", "training", "valid", "validation")


@family
def folder(config: DataConfig, seed: int) -> Data:
    """The directory data.root, in one of these layouts.

    ROOT/train/CLASS/* with ROOT/val/, ROOT/test/ or both: these splits; `subsets.draw` says what each is used for.
    ROOT/CLASS/*: divided into train, val and test.
    A val or test directory without class directories is left out, which `notes` say.

    Directories and images may be links, also out of ROOT, as DVC and the hub's snapshots have them.
    """
    root = Path(config.root or "")
    # Path("") would be the working directory
    require(
        config.root and root.is_dir(),
        f"data.root={config.root}: no such directory; give the one that holds the images, data.root=/path/to/it",
    )
    given = [name for name in SPLITS if (root / name).is_dir()]
    alike = [name for name in _directories(root) if name.lower() in LIKE_SPLITS]
    misnamed = sorted(set(alike) - set(SPLITS))
    require(
        len(alike) < 2 or not misnamed,
        f"data.root={root}: has {', '.join(misnamed)}; directories of splits must be named train, val and test",
    )
    require("train" in given or not given, f"data.root={root}: has {', '.join(given)} but no train")
    places = {name: root / name for name in given} or {"train": root}
    classes = _directories(places["train"])
    require(
        len(classes) > 1,
        f"data.root: {places['train']} holds {len(classes)} class directories, needs at least 2; images lie in "
        f"train/CLASS/*.jpg and val/CLASS/*.jpg, or in CLASS/*.jpg",
    )
    unlabelled = [name for name in places if name != "train" and not _labelled(places[name], classes)]
    for name in unlabelled:
        del places[name]
    absent_is_fine = config.missing_classes == "allow"
    for name, place in places.items():
        here = _directories(place)
        unmatched = sorted(set(here) - set(classes) if absent_is_fine else set(here) ^ set(classes))
        instead = "" if set(here) - set(classes) else f"; data.missing_classes=allow scores {name} without them"
        require(not unmatched, f"data.root={root}: train and {name} differ in the classes {unmatched}{instead}")
    sources = {name: scan(root, place, classes, absent_is_fine and name != "train") for name, place in places.items()}
    data = stream_data(config, seed, sources, classes)
    left_out = [f"warning  {root / name} has no class directories and is left out" for name in unlabelled]
    return replace(data, notes=(*left_out, *data.notes))


def _labelled(place: Path, classes: list[str]) -> bool:
    """Whether a split has class directories. Unlabelled images lie in it, or in one directory that is no class."""
    here = _directories(place)
    return len(here) > 1 or bool({*here} & {*classes})


def _directories(path: Path) -> list[str]:
    shown = [each for each in path.iterdir() if not each.name.startswith(".")]
    for each in shown:
        _require_target(each)
    return sorted(each.name for each in shown if each.is_dir())


def _require_target(path: str | Path) -> None:
    """Raise ConfigError for a link that leads nowhere: it may be a directory of images, left out in silence."""
    if os.path.islink(path) and not os.path.exists(path):
        missing = f"is a link to {os.readlink(path)!r}, which does not exist"
        require(False, f"data.root: {str(path)!r} {missing}; bring its target back or remove the link")


def scan(root: Path, split: Path, classes: list[str], absent_is_fine: bool) -> tuple[Files, np.ndarray]:
    """All images of a split, at any depth below their class directories, sorted by class, then path."""
    samples = []
    for target, label in enumerate(classes):
        images = sorted(_images(split / label)) if (split / label).is_dir() else []
        require(
            images or absent_is_fine,
            f"data.root: class directory {str(split / label)!r} holds no JPEG, PNG or WEBP image",
        )
        samples += [(path, target) for path in images]
    require(samples, f"data.root: {str(split)!r} holds no JPEG, PNG or WEBP image of any class")
    return files_below(root, samples)


def _images(class_directory: Path) -> Iterator[str]:
    """Paths of the images below a class directory. Leaving one out in silence would change the data set."""

    def fail(error: OSError) -> None:  # os.walk would pass over a directory that may not be read
        raise error

    for place, directories, files in os.walk(class_directory, onerror=fail, followlinks=True):
        for name in directories:
            path = os.path.join(place, name)
            loops = os.path.islink(path) and Path(place).resolve().is_relative_to(Path(path).resolve())
            require(not loops, f"data.root: {path!r} is a link to a directory above it; remove it")
        for name in files:
            path, suffix = os.path.join(place, name), os.path.splitext(name)[1].lower()
            require(suffix not in NOT_READ, f"data.root: {path!r} is not JPEG, PNG or WEBP; convert or remove it")
            if suffix in READ and not name.startswith("."):  # macOS puts ._cat.jpg beside cat.jpg
                yield path
            elif suffix not in READ:
                _require_target(path)
