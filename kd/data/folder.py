"""Folders of images with one folder per class, ImageNet among them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kd.config.schema import DataConfig
from kd.data.base import Data, family
from kd.data.image_files import Files
from kd.data.streams import stream_data
from kd.errors import ConfigError

SPLITS = ("train", "val", "test")
READ = (".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
NOT_READ = (".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".pgm", ".ppm", ".tga", ".tif", ".tiff")
# Of two such folders side by side, either is a split; taken as classes they would make a data set of the wrong task.
LIKE_SPLITS = (*SPLITS, "dev", "eval", "testing", "training", "valid", "validation")


@family
def folder(config: DataConfig, seed: int) -> Data:
    """The folder data.root, in one of these layouts.

    ROOT/train/CLASS/* with ROOT/val/, ROOT/test/ or both: these splits; `subsets.assign` says what each is used for.
    ROOT/CLASS/*: divided into train, val and test.

    Folders of splits and of classes may be links, as people lay out subsets. An image may be a link to a file inside
    ROOT or beside it; a link to elsewhere is refused.
    """
    root = data_root(config)
    given = [name for name in SPLITS if (root / name).is_dir()]
    alike = [name for name in _folders(root) if name.lower() in LIKE_SPLITS]
    misnamed = [name for name in alike if name not in SPLITS]
    if len(alike) > 1 and misnamed:
        raise ConfigError(f"data.root={root}: {misnamed[0]}/: folders of splits are called train, val and test; rename")
    if given and "train" not in given:
        raise ConfigError(f"data.root={root}: has {given[0]}/ but no train/")
    places = {name: root / name for name in given} or {"train": root}
    classes = _classes(places["train"])
    for name, place in places.items():
        if unmatched := set(classes) ^ set(_classes(place)):
            raise ConfigError(f"data.root={root}: train/ and {name}/ differ in the class {min(unmatched)!r}")
    sources = {name: scan(root, place, classes) for name, place in places.items()}
    return stream_data(config, seed, sources, classes, threads=16)


def data_root(config: DataConfig) -> Path:
    """data.root. Raises ConfigError unless it is a folder."""
    if not config.root or not Path(config.root).is_dir():
        what = "your images" if config.name == "folder" else config.name
        wrong = f"={config.root}: no such folder" if config.root else " is not set"
        raise ConfigError(f"data.root{wrong}; give the folder that holds {what}, data.root=/path/to/it")
    return Path(config.root)


def _folders(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))


def _classes(path: Path) -> list[str]:
    names = _folders(path)
    if len(names) < 2:
        raise ConfigError(
            f"data.root: {path} holds {len(names)} class folders, needs at least 2; images lie in "
            f"train/CLASS/*.jpg and val/CLASS/*.jpg, or in CLASS/*.jpg"
        )
    return names


def scan(root: Path, split: Path, classes: list[str]) -> Files:
    """All images of a split, at any depth below their class folders, sorted by class, then path."""
    paths, targets = [], []
    for target, label in enumerate(classes):
        images = sorted(_images(root, split / label))
        if not images:
            raise ConfigError(f"data.root: class folder {str(split / label)!r} holds no JPEG, PNG or WEBP image")
        paths += [os.fsencode(os.path.relpath(path, root)) for path in images]
        targets += [target] * len(images)
    return Files(np.array(targets), root, np.array(paths))


def _images(root: Path, class_folder: Path) -> Iterator[str]:
    """Paths of the images below a class folder. Leaving one out in silence would change the data set."""

    def fail(error: OSError) -> None:  # os.walk would pass over a folder that may not be read
        raise error

    for place, folders, files in os.walk(class_folder, onerror=fail):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        # macOS puts ._cat.jpg beside cat.jpg
        images = [name for name in files if _suffix(name) in READ + NOT_READ and not name.startswith(".")]
        for path in (os.path.join(place, name) for name in links + images):
            if problem := _problem(root, path):
                raise ConfigError(f"data.root: {path!r} {problem}")
            yield path


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _problem(root: Path, path: str) -> str:
    """Why a link to a folder, or a file with the name of an image, cannot be used; empty where it can."""
    if not os.path.islink(path):
        return "is not JPEG, PNG or WEBP; convert or remove it" if _suffix(path) in NOT_READ else ""
    target = os.path.realpath(path)
    if os.path.isdir(target):
        return f"is a link to a folder, {target!r}; put the images there or remove it"
    inside = tuple(os.path.join(os.path.realpath(place), "") for place in (root, os.path.dirname(path)))
    return "" if target.startswith(inside) else f"is a link out of the folder, to {target!r}; put the image there"
