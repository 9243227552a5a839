"""Folders of images with one folder per class, ImageNet among them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kd.config.schema import DataConfig
from kd.data.base import Data
from kd.data.image_files import Files
from kd.data.streams import stream_data
from kd.errors import ConfigError

SPLITS = ("train", "val", "test")
READ = (".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".webp")
NOT_READ = (".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".pgm", ".ppm", ".tga", ".tif", ".tiff")
# Of two such folders side by side, either is a split; taken as classes they would make a data set of the wrong task.
LIKE_SPLITS = (*SPLITS, "dev", "eval", "testing", "training", "valid", "validation")


def folder(config: DataConfig, seed: int) -> Data:
    """The folder data.root, in one of these layouts.

    ROOT/train/CLASS/* with ROOT/val/, ROOT/test/ or both: these splits; `assign` says what each is used for.
    ROOT/CLASS/*: divided into train, val and test.

    Folders of splits and of classes may be links, as people lay out subsets; an image may be a link inside ROOT or its
    own folder, and none out of them.
    """
    root = data_root(config)
    given = [name for name in SPLITS if (root / name).is_dir()]
    alike = [name for name in _folders(root) if name.lower() in LIKE_SPLITS]
    if len(alike) > 1 and (strange := next((name for name in alike if name not in SPLITS), "")):
        raise ConfigError(f"data.root={root}: {strange}/: folders of splits are called train, val and test; rename it")
    if given and "train" not in given:
        raise ConfigError(f"data.root={root}: has {given[0]}/ but no train/")
    classes = _classes(root / given[0] if given else root)
    for name in given[1:]:
        _check_same(root, name, classes)
    sources = {name: scan(root, root / name, classes) for name in given} or {"train": scan(root, root, classes)}
    return stream_data(config, seed, sources, classes, threads=16)


def data_root(config: DataConfig) -> Path:
    """data.root, which has to be a folder."""
    what = "your images" if config.name == "folder" else config.name
    if not config.root:
        raise ConfigError(f"data.root is not set: give the folder that holds {what}, data.root=/path/to/it")
    root = Path(config.root)
    if not root.is_dir():
        wrong = "is a file" if root.exists() else "no such folder"
        raise ConfigError(f"data.root={config.root}: {wrong}; give the folder that holds {what}")
    return root


def _folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _classes(path: Path) -> list[str]:
    names = _folders(path)
    if len(names) < 2:
        raise ConfigError(
            f"data.root: {path} holds {len(names)} class folders, needs at least 2; images lie in "
            f"train/CLASS/*.jpg and val/CLASS/*.jpg, or in CLASS/*.jpg"
        )
    return names


def _check_same(root: Path, name: str, classes: list[str]) -> None:
    found = _classes(root / name)
    if found != classes:
        missing, extra = sorted({*classes} - {*found})[:3], sorted({*found} - {*classes})[:3]
        raise ConfigError(
            f"data.root={root}: train/ and {name}/ have different classes, "
            f"only in train/: {missing}, only in {name}/: {extra}"
        )


def scan(root: Path, split: Path, classes: list[str]) -> Files:
    """All images of a split, at any depth below their class folders, sorted by path."""
    paths, targets = [], []
    for target, label in enumerate(classes):
        found = sorted(_images(root, str(split / label)))
        if not found:
            raise ConfigError(f"data.root: class folder {str(split / label)!r} holds no JPEG, PNG or WEBP image")
        paths += [os.fsencode(os.path.relpath(path, root)) for path in found]
        targets += [target] * len(found)
    return Files(root, np.array(paths), np.array(targets))


def _images(root: Path, path: str) -> Iterator[str]:
    """Paths of the images below a class folder. Leaving one out in silence would change the data set."""
    left = [path]  # no recursion: it would end, and hold a descriptor for each level, at a thousand
    while left:
        with os.scandir(left.pop()) as entries:  # unlike os.walk it raises for a folder that may not be read
            for entry in entries:
                suffix = os.path.splitext(entry.name)[1].lower()
                hidden = entry.name.startswith(".")  # macOS puts ._cat.jpg beside cat.jpg
                if not hidden and (suffix in READ + NOT_READ or (entry.is_symlink() and entry.is_dir())):
                    if problem := _problem(root, entry, suffix):
                        raise ConfigError(f"data.root: {entry.path!r} {problem}")
                    yield entry.path
                elif entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)


def _problem(root: Path, entry: os.DirEntry[str], suffix: str) -> str:
    """Why an entry with the name of an image, or a link to a folder, is no image; nothing where it may be one."""
    if suffix in NOT_READ:
        return "is not JPEG, PNG or WEBP; convert or remove it"
    if entry.is_file(follow_symlinks=False):  # the folder says so: for a million images no call each
        return ""
    if entry.is_symlink():
        target = os.path.realpath(entry.path)
        if not os.path.exists(target):
            return "is a link to nothing; remove it"
        inside = (os.path.realpath(folder) for folder in (root, os.path.dirname(entry.path)))
        if not any(target.startswith(os.path.join(folder, "")) for folder in inside):
            return f"is a link out of the folder, to {target!r}; put the image itself there or remove it"
    if entry.is_dir():
        return f"is a {'link to a folder' if entry.is_symlink() else 'folder'}, must be an image; rename or remove it"
    return "" if entry.is_file() else "is no regular file; remove it"
