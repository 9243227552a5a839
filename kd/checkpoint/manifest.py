"""Manifests: the size and sha256 of every file beside them, and their own sha256.

A manifest is JSON in one canonical form, so that a change of any byte shows, even of white space.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kd.checkpoint.files import digest, read_json, write_text
from kd.errors import CheckpointError, require
from kd.text import plain

SCHEMA = 1
MANIFEST = "manifest.json"  # of one checkpoint
DONE = "stage.json"  # of the weights of a finished stage
ANYONE: Mapping[str, str] = {}  # an owner that no file is checked against


def _canonical(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _sealed(values: Mapping[str, Any]) -> bytes:
    """A manifest's bytes, with the sha256 of all its other entries."""
    others = {key: value for key, value in values.items() if key != "sha256"}
    return _canonical(others | {"sha256": hashlib.sha256(_canonical(others)).hexdigest()})


def write_manifest(path: Path, names: Iterable[str], about: Mapping[str, Any]) -> None:
    """Write a manifest of files beside it, atomically; `about` is what else it says. Raises CheckpointError."""
    files = {name: path.with_name(name) for name in names}
    listed = {name: {"sha256": digest(file), "bytes": file.stat().st_size} for name, file in files.items()}
    write_text(path, _sealed({**about, "schema": SCHEMA, "files": listed}).decode())


def read_manifest(path: Path, owner: Mapping[str, str] = ANYONE) -> dict[str, Any]:
    """A manifest whose own bytes are as written; its files are not looked at.

    Raises CheckpointError, also where a newer kd wrote it or its stage and run are not `owner`.
    """
    values = read_json(path, ("schema", "files"))
    require(path.read_bytes() == _sealed(values), f"{path}: is damaged (its own sha256 differs)", CheckpointError)
    newer = f"{path}: has schema {values['schema']}, this kd reads {SCHEMA}: use a newer kd"
    require(values["schema"] == SCHEMA, newer, CheckpointError)
    recorded = {key: values.get(key) for key in owner}
    other = f"{path}: is of {_named(recorded)}, must be of {_named(owner)}; restore the files that were here"
    require(recorded == owner, other, CheckpointError)
    return values


def _named(owner: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {plain(str(value), 80)}" for key, value in owner.items())


def check_file(path: Path, manifest: Mapping[str, Any], name: str) -> None:
    """Raise CheckpointError unless the file `name` beside the manifest is as written."""
    file, listed = path.with_name(name), manifest["files"].get(name)
    if listed is None:
        raise CheckpointError(f"{file}: is not listed in {path.name}")
    if (sha256 := digest(file)) != listed["sha256"]:
        raise CheckpointError(f"{file}: is damaged, has sha256 {sha256[:12]}…, must be {listed['sha256'][:12]}…")


def verified(path: Path, owner: Mapping[str, str] = ANYONE) -> dict[str, Any]:
    """A manifest that is as written, and so are all its files. Raises CheckpointError as `read_manifest` does."""
    manifest = read_manifest(path, owner)
    for name in manifest["files"]:
        check_file(path, manifest, name)
    return manifest
