"""``python -m kd.verify run=DIR``: what a run directory or a file of weights holds, and whether it is whole."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kd.cli.errors import one_line_errors
from kd.config import arguments
from kd.errors import CheckpointError, ConfigError
from kd.text import shown

HELP = """usage: python -m kd.verify run=DIR
       python -m kd.verify path=FILE

run=DIR    every checkpoint and every file of weights in a directory, against its manifest: a run, one of its stages,
           or a teacher in OUTPUT/teachers
path=FILE  one file of weights, against the manifest beside it; without a manifest it counts as whole where it can be
           read, has no NaN, and float32 can hold its values

Exit code 0 when all is whole, 1 when something is damaged, 2 when there is nothing to verify."""
DAMAGED = 1


class Row(NamedTuple):
    """One file: what is known of it, or what is wrong."""

    path: Path
    what: str
    wrong: str = ""


def rows(path: Path) -> list[Row]:
    """A row for every file of kd's in a directory, or for one file of weights."""
    if path.is_file():
        return [_row(path, _weights)]
    from kd.checkpoint.manifest import DONE, MANIFEST
    from kd.checkpoint.store import CHECKPOINTS

    manifests = {*path.rglob(DONE), *path.rglob(MANIFEST)}
    manifests |= {each / MANIFEST for each in path.rglob(f"{CHECKPOINTS}/update-*")}  # which may have lost theirs
    json_files = [*path.rglob("run.json"), *path.rglob("result.json")]
    return [_row(each, _json) for each in json_files] + [row for each in sorted(manifests) for row in _listed(each)]


def _row(path: Path, describe: Any, *arguments: Any) -> Row:
    try:
        return Row(path, describe(path, *arguments))
    except CheckpointError as error:
        return Row(path, "", str(error))


def _json(path: Path) -> str:
    from kd.checkpoint.files import read_json

    read_json(path)
    return "JSON, without a checksum"


def _listed(path: Path) -> Iterator[Row]:
    """A manifest and the files that it lists."""
    from kd.checkpoint.manifest import read_manifest

    yield (row := _row(path, _manifest))
    if not row.wrong:
        manifest = read_manifest(path)
        for name in manifest["files"]:
            yield _row(path.with_name(name), _file, path, manifest)


def _manifest(path: Path) -> str:
    from kd.checkpoint.manifest import read_manifest

    manifest = read_manifest(path)
    about = manifest.get("about", {})
    known = {**about, **{key: manifest[key] for key in ("stage", "update", "updates", "schema") if key in manifest}}
    return ", ".join(f"{key} {shown(value)}" for key, value in known.items())


def _file(path: Path, manifest_path: Path, manifest: dict[str, Any]) -> str:
    from kd.checkpoint.manifest import check_file

    check_file(manifest_path, manifest, path.name)
    return f"{manifest['files'][path.name]['bytes']:,} bytes, sha256 {manifest['files'][path.name]['sha256']}"


def _weights(path: Path) -> str:
    """A file of weights, against the manifest beside it where there is one."""
    from kd.checkpoint.files import digest, file_size
    from kd.checkpoint.manifest import DONE, MANIFEST, read_manifest
    from kd.checkpoint.safetensors_io import read_weights, spoilt

    weights = read_weights(path)
    for name, value in weights.items():
        if spoilt(value.float() if value.is_floating_point() else value, value):
            raise CheckpointError(f"{path}: {name} has NaN, or values beyond float32")
    beside = [path.with_name(name) for name in (DONE, MANIFEST) if path.with_name(name).exists()]
    if beside:
        return f"{_file(path, beside[0], read_manifest(beside[0]))}, {_manifest(beside[0])}"
    return f"{file_size(path):,} bytes, sha256 {digest(path)}, {len(weights)} tensors, no manifest beside it"


def main(words: list[str]) -> int:
    """Print what there is; returns the exit code."""
    if not words or {"-h", "--help"} & set(words):
        print(HELP)
        return 0
    values = arguments.read(words, {"run": "DIR", "path": "FILE"})
    if len(values) > 1:
        raise ConfigError(f"{' '.join(words)}: type one of run=DIR and path=FILE")
    ((key, value),) = values.items()
    path = Path(value)
    if not (path.is_dir() if key == "run" else path.is_file()):
        raise ConfigError(f"{key}={value}: no such {'directory' if key == 'run' else 'file'}")
    seen = rows(path)
    if not seen:
        raise ConfigError(f"{key}={value}: holds no run, checkpoint or weights of kd's")
    for row in seen:
        print(f"damaged  {shown(row.wrong)}" if row.wrong else f"whole    {shown(row.path)}  {row.what}")
    return DAMAGED if any(row.wrong for row in seen) else 0


if __name__ == "__main__":
    with one_line_errors("kd.verify"):
        sys.exit(main(sys.argv[1:]))
