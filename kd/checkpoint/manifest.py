"""Manifests: the sha256 and size of every file beside them, and of themselves.

A manifest is JSON in one canonical form, so that a changed byte of it, a blank too, is seen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.checkpoint.files import brief, digest, parse_json, read_bytes, regular
from kd.errors import CheckpointError

SCHEMA = 1
MANIFEST = "manifest.json"  # of one checkpoint
DONE = "stage.json"  # of the weights of a finished stage
_LARGEST = 2**24


class NewerSchema(CheckpointError):
    """Whole, but written by a later kd."""


class Foreign(CheckpointError):
    """Whole, but of another stage or of another run, or of nobody knows which."""


def _canonical(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def seal(folder: Path, names: list[str], about: dict[str, Any]) -> str:
    """The text of a manifest over files of a folder, with whatever else there is to say about them."""
    files = {name: {"sha256": digest(folder / name), "bytes": regular(folder / name)} for name in names}
    values = {key: value for key, value in about.items() if key != "sha256"} | {"schema": SCHEMA, "files": files}
    values["sha256"] = hashlib.sha256(_canonical(values)).hexdigest()
    return _canonical(values).decode()


def verified(path: Path) -> dict[str, Any]:
    """A manifest whose own bytes and whose files are as they were written, else CheckpointError.

    Raises NewerSchema, a CheckpointError, where a later kd wrote it.
    """
    values = read_manifest(path)
    for name in values["files"]:
        check_file(path, values, name)
    return values


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest whose own bytes are as they were written; its files are not looked at. Raises CheckpointError."""
    raw = read_bytes(path, _LARGEST)
    values = parse_json(raw, path)
    if not isinstance(values, dict) or "sha256" not in values:
        raise CheckpointError(f"{path}: is no manifest with checksums")
    rest = {key: value for key, value in values.items() if key != "sha256"}
    try:
        same = raw == _canonical(values) and values["sha256"] == hashlib.sha256(_canonical(rest)).hexdigest()
    except ValueError as error:  # a number too large to be written again
        raise CheckpointError(f"{path}: cannot be read ({brief(error)})") from error
    if not same:
        raise CheckpointError(f"{path}: its own sha256 is another")
    schema = values.get("schema")
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        text = f"{path}: has schema {json.dumps(schema)[:40]}, this kd reads {SCHEMA}"
        raise NewerSchema(f"{text}; it takes a newer kd") if newer else CheckpointError(text)
    if not _is_list_of_files(values.get("files")):
        raise CheckpointError(f"{path}: is not laid out as kd writes it")
    return values


def check_owner(path: Path, values: Mapping[str, Any], of: Mapping[str, str]) -> None:
    """Raise Foreign unless a manifest says `of` which stage and of which run it is."""
    if of and not of.keys() & values.keys():
        raise Foreign(f"{path}: was written by an earlier kd, which did not say of which stage and run it is")
    found = {key: values.get(key) for key in of}
    if found != of:
        raise Foreign(f"{path}: is of {_named(found)}, must be of {_named(of)}; restore the files that were here")


def _named(of: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {brief(ValueError(value))}" for key, value in of.items())


def _is_list_of_files(files: Any) -> bool:
    return (
        isinstance(files, dict)
        and bool(files)
        and all(isinstance(v, dict) and v.keys() == {"sha256", "bytes"} for v in files.values())
        and all(name == Path(name).name and not name.startswith(".") for name in files)
    )


def check_file(path: Path, values: dict[str, Any], name: str) -> None:
    """Raise CheckpointError unless a file beside the manifest is the one that it lists."""
    file, listed = path.with_name(name), values["files"].get(name)
    if listed is None:
        raise CheckpointError(f"{file}: is not listed in {path.name}")
    size = regular(file)
    if size != listed["bytes"]:
        raise CheckpointError(f"{file}: has {size:,} bytes, {brief_number(listed['bytes'])} were written")
    if (found := digest(file)) != listed["sha256"]:
        raise CheckpointError(f"{file}: has sha256 {found[:12]}…, {str(listed['sha256'])[:12]}… was written")


def brief_number(value: Any) -> str:
    """A number of a file, short whatever it is."""
    return f"{value:,}" if isinstance(value, int) and 0 <= value < 2**63 else json.dumps(value)[:40]
