"""Files and folders that appear in one step or not at all, and reading that says in one line what a file is not."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from safetensors import SafetensorError

from kd.errors import CheckpointError

JSON_BYTES = 2**26  # no JSON of kd's comes near it
DEEPEST = 100  # nesting of JSON; kd writes about 6
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link"}


class Unreadable(CheckpointError):
    """A file that is there and cannot be read now: whether it is whole is not known."""


# ---- writing


def sync(path: Path) -> None:
    """Have a file's content, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, their names on the disk too."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


@contextmanager
def writing(path: Path, needed: int) -> Iterator[None]:
    """Turn a failing write into a CheckpointError; where there is no room, it says how many bytes there are."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error))  # how safetensors tells of the same
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        text = f"cannot write {path}: {os.strerror(number) if number else error}"
        if number in FULL:
            text += f";{f' {needed:,} bytes needed,' if needed else ''} {_free(path):,} bytes free"
        raise CheckpointError(text) from error


def _free(path: Path) -> int:
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free


def write_atomically(path: Path, write: Callable[[Path], Any], needed: int = 0) -> None:
    """Let `write` fill a temporary file, then make it `path` in one step that a crash cannot split.

    `needed`: bytes that `write` writes, for the message where there is no room. Raises CheckpointError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path, needed):
            make_folder(path.parent)
            temporary.unlink(missing_ok=True)  # a link that a stranger put there would be written through
            write(temporary)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)  # the rename itself must reach the disk
    finally:
        with suppress(OSError):  # a path that cannot be written may not be removable either
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, atomically, whatever the locale. Raises CheckpointError."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), len(text))


def write_json(path: Path, value: Any) -> None:
    """Write plain values as readable JSON, atomically; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def open_in_place(path: Path) -> IO[str]:
    """Open a file of ours to append to it, made where there is none, its folder too.

    Whatever else stands there, a link too, is neither followed nor waited for: it is a CheckpointError. OSError as of
    `open`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path):
        regular(path, 0, follow=False)
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    return open(path, "a+", encoding="utf-8", opener=lambda name, mode: os.open(name, mode | flags, 0o666))


# ---- reading


def regular(path: Path, least: int = 1, follow: bool = True) -> int:
    """Bytes of a file that is a file: opening a pipe would wait forever. Raises CheckpointError for all others, for
    fewer than `least` bytes, and for a link unless it may `follow`.
    """
    try:
        status = os.stat(path, follow_symlinks=follow)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        known = isinstance(error, ValueError) or error.errno in ABSENT
        raise (CheckpointError if known else Unreadable)(f"{path}: {_no_such(error)}") from error
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise CheckpointError(f"{path}: is {_KINDS.get(kind, 'a device')}, must be a file")
    if status.st_size < least:
        raise CheckpointError(f"{path}: is empty")
    return status.st_size


def _no_such(error: Exception) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or str(error)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a failing read into an Unreadable: of the machine it says something, of the file nothing."""
    try:
        yield
    except (OSError, MemoryError) as error:
        raise Unreadable(f"{path}: cannot be read ({getattr(error, 'strerror', None) or brief(error)})") from error


def read_bytes(path: Path, most: int = JSON_BYTES) -> bytes:
    """The whole of a small file. Raises CheckpointError."""
    size = regular(path)
    if size > most:
        raise CheckpointError(f"{path}: has {size:,} bytes, more than the {most:,} that kd ever writes there")
    with reading(path):
        return path.read_bytes()


def parse_json(raw: bytes, path: Path) -> Any:
    """Plain values from the bytes of `path`. Raises CheckpointError where they are not JSON, or built to hurt."""
    try:
        value = json.loads(raw.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({brief(error)})") from error
    left = [(value, 0)]
    while left:
        inner, depth = left.pop()
        if depth > DEEPEST:
            raise CheckpointError(f"{path}: cannot be read (nested more than {DEEPEST} deep)")
        if isinstance(inner, dict | list):
            left += [(each, depth + 1) for each in (inner.values() if isinstance(inner, dict) else inner)]
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def read_json(path: Path) -> Any:
    """Plain values from a JSON file. Raises CheckpointError when it is missing, torn or no file."""
    return parse_json(read_bytes(path), path)


def digest(path: Path) -> str:
    """The sha256 of a file, in hex. Raises CheckpointError."""
    regular(path)
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def brief(error: BaseException) -> str:
    """What an error says, on one line of printable characters."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    return f"{text[:159]}…" if len(text) > 160 else text or type(error).__name__
