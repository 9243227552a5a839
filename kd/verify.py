"""usage: python -m kd.verify run=DIR
       python -m kd.verify path=FILE

run=DIR    every checkpoint and every file of weights in a directory, against its manifest: a run, one of its stages,
           or a teacher in OUTPUT/teachers
path=FILE  one file of weights, against the manifest beside it; without a manifest it counts as whole where it can be
           read and has no NaN

Exit code 0 when all is whole, 1 when something is damaged, 2 when there is nothing to verify.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from kd.checkpoint.manifest import DONE, MANIFEST, check_file, read_manifest
from kd.cli.errors import run_command
from kd.config import arguments
from kd.errors import CheckpointError, ConfigError, require
from kd.text import shown

DAMAGED = 1


def rows(path: Path) -> list[tuple[bool, str]]:
    """Whether each manifest of a directory and all its files are whole, or one file of weights is; with its line."""
    from kd.checkpoint.store import CHECKPOINTS

    if path.is_file():
        beside = (path.with_name(DONE), path.with_name(MANIFEST), path.with_suffix(".json"))  # .json: a study's teacher
        manifests = [manifest for manifest in beside if manifest.exists() and manifest != path]  # nor an index of parts
        listed = [_row(manifest, partial(_listed, name=path.name)) for manifest in manifests]
        return listed or [_row(path, _readable)]
    checkpoints = path.rglob(f"{CHECKPOINTS}/update-*")  # one may have lost its manifest
    manifests = {*path.rglob(DONE), *path.rglob(MANIFEST), *(checkpoint / MANIFEST for checkpoint in checkpoints)}
    return [_row(manifest, _listed) for manifest in sorted(manifests)]


def _row(path: Path, check: Callable[[Path], str]) -> tuple[bool, str]:
    try:
        return True, f"whole    {shown(path)}  {check(path)}"
    except CheckpointError as error:
        return False, f"damaged  {shown(error)}"


def _listed(path: Path, name: str | None = None) -> str:
    """What a manifest says, once its files, or the one named, are seen to be whole. Raises CheckpointError."""
    manifest = read_manifest(path)
    names = [name] if name else list(manifest["files"])
    for each in names:
        check_file(path, manifest, each)
    about = [f"{key} {manifest[key]}" for key in ("stage", "run", "update", "updates", "schema") if key in manifest]
    return ", ".join([*about, *names])


def _readable(path: Path) -> str:
    """How many tensors a file of weights has. Raises CheckpointError where it cannot be read or has NaN."""
    import torch

    from kd.checkpoint.safetensors_io import read_weights

    weights = read_weights(path)
    nan = [name for name, value in weights.items() if bool(value.to(torch.complex64).isnan().any())]
    require(not nan, f"{path}: {len(nan)} tensors have NaN, such as {', '.join(nan[:3])}", CheckpointError)
    return f"{len(weights)} tensors, no manifest beside it"


def main(words: list[str]) -> int:
    """Print a line for each; returns the exit code."""
    values = arguments.read(words, {"run": "DIR", "path": "FILE"})
    if len(values) > 1:
        raise ConfigError(f"{' '.join(words)}: type one of run=DIR and path=FILE")
    (path,) = map(Path, values.values())
    seen = rows(path) if path.exists() else []
    if not seen:
        why = "holds no checkpoint or weights of kd" if path.exists() else "no such file or directory"
        raise ConfigError(f"{words[0]}: {why}")
    for _, line in seen:
        print(line)
    return 0 if all(whole for whole, _ in seen) else DAMAGED


if __name__ == "__main__":
    run_command("kd.verify", main, __doc__)
