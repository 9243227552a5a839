"""Atomic writes; reads that fail with one line."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kd.errors import CheckpointError, require
from kd.text import plain

# ---- writing


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and its parents, and flush their names to the disk."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors writes from Rust: its errors have all they know in their text.
        raise CheckpointError(f"cannot write {path}: {getattr(error, 'strerror', error)}") from error


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`: a crash leaves the old file or the new one.

    Raises CheckpointError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            make_directory(path.parent)
            write(temporary)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)  # the rename itself must reach the disk
    finally:
        with suppress(OSError):  # what cannot be written may not be removable either
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically. Raises CheckpointError."""
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write plain values as readable JSON, atomically. Raises CheckpointError; ValueError on NaN, which JSON lacks."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


# ---- reading


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a failed read into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def advised(advice: str) -> Iterator[None]:
    """Have a CheckpointError end in `advice`, what a user may do about it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {advice}" if advice else str(error)) from error


def read_json(path: Path, needs: Iterable[str] = ()) -> Any:
    """Plain values from a JSON file: an object with the keys `needs`, where any are given. Raises CheckpointError."""
    with reading(path):
        raw = path.read_bytes()
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({plain(str(error), 160)})") from error
    for key in needs:
        require(isinstance(values, dict) and key in values, f"{path}: has no entry {key!r}", CheckpointError)
    return values


def digest(path: Path) -> str:
    """The sha256 of a file, in hex. Raises CheckpointError."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
