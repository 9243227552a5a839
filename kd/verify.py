"""usage: python -m kd.verify run=DIR
       python -m kd.verify path=FILE

run=DIR    every checkpoint and every file of weights in a directory, against its manifest: a run, one of its stages,
           or a teacher in OUTPUT/teachers
path=FILE  one file of weights, against the manifest beside it; without a manifest it counts as whole where it can be
           read and has no NaN

Exit code 0 when all is whole, 1 when something is damaged, 2 when there is nothing to verify.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kd.cli.errors import run_command
from kd.config import arguments
from kd.errors import CheckpointError, ConfigError
from kd.text import shown

DAMAGED = 1


class Row(NamedTuple):
    """One file: what is known of it, or what is wrong."""

    path: Path
    what: str
    wrong: str = ""


def rows(path: Path) -> list[Row]:
    """A row for every manifest in a directory and every file that it lists, or for one file of weights."""
    from kd.checkpoint.manifest import DONE, MANIFEST
    from kd.checkpoint.store import CHECKPOINTS

    if path.is_file():
        return [_weights(path)]
    checkpoints = path.rglob(f"{CHECKPOINTS}/update-*")  # one may have lost its manifest
    manifests = {*path.rglob(DONE), *path.rglob(MANIFEST), *(checkpoint / MANIFEST for checkpoint in checkpoints)}
    return [row for manifest in sorted(manifests) for row in _listed(manifest)]


def _listed(path: Path) -> Iterator[Row]:
    """A manifest and the files that it lists."""
    from kd.checkpoint.manifest import check_file, read_manifest

    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        yield Row(path, "", str(error))
        return
    about = {key: manifest[key] for key in ("stage", "run", "update", "updates", "schema") if key in manifest}
    yield Row(path, ", ".join(f"{key} {value}" for key, value in about.items()))
    for name, listed in manifest["files"].items():
        wrong = ""
        try:
            check_file(path, manifest, name)
        except CheckpointError as error:
            wrong = str(error)
        yield Row(path.with_name(name), f"{listed['bytes']:,} bytes, sha256 {listed['sha256']}", wrong)


def _weights(path: Path) -> Row:
    """A file of weights: its row in the manifest beside it, where there is one."""
    import torch

    from kd.checkpoint.files import digest
    from kd.checkpoint.manifest import DONE, MANIFEST
    from kd.checkpoint.safetensors_io import read_weights

    beside = (path.with_name(DONE), path.with_name(MANIFEST), path.with_suffix(".json"))  # .json: a study's teacher
    for row in (row for manifest in beside if manifest.exists() for row in _listed(manifest)):
        if row.path == path or row.wrong:
            return row
    try:
        weights = read_weights(path)
    except CheckpointError as error:
        return Row(path, "", str(error))
    nan = [name for name, value in weights.items() if bool(value.to(torch.complex64).isnan().any())]
    wrong = f"{path}: {len(nan)} tensors have NaN, first {nan[0]}" if nan else ""
    said = f"{path.stat().st_size:,} bytes, sha256 {digest(path)}, {len(weights)} tensors, no manifest beside it"
    return Row(path, said, wrong)


def main(words: list[str]) -> int:
    """Print what there is; returns the exit code."""
    values = arguments.read(words, {"run": "DIR", "path": "FILE"})
    if len(values) > 1:
        raise ConfigError(f"{' '.join(words)}: type one of run=DIR and path=FILE")
    (path,) = map(Path, values.values())
    seen = rows(path) if path.exists() else []
    if not seen:
        raise ConfigError(f"{words[0]}: {'holds nothing of kd' if path.exists() else 'no such file or directory'}")
    for row in seen:
        print(f"damaged  {shown(row.wrong)}" if row.wrong else f"whole    {shown(row.path)}  {row.what}")
    return DAMAGED if any(row.wrong for row in seen) else 0


if __name__ == "__main__":
    run_command("kd.verify", main, __doc__)
