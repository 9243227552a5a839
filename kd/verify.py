"""``python -m kd.verify verify PATH ...``: what a folder or file of kd's is, and whether it is whole."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kd.cli.errors import fail, one_line_errors
from kd.text import shown

if TYPE_CHECKING:
    from torch import Tensor

HELP = """usage: python -m kd.verify verify PATH [PATH ...]

PATH is the folder of a run or a stage, one checkpoint of a stage, or a file of weights. Prints what each holds, and
whether its bytes are those that were written. A run's teacher has a folder of its own, in teachers/. A file of weights
without kd's manifest beside it has no checksum to be held against: it is whole where it can be read, has no NaN, and
float32 can hold its values. Exit code 0 when all is whole, 1 when something is not, 2 when there is no such thing."""
DAMAGED = 1  # exit code; 2, for what is not there, is cli's


class Row(NamedTuple):
    """One file and what is known of it; `wrong` is empty where it is whole."""

    path: Path
    what: str = ""
    size: int = 0
    sha256: str = ""
    wrong: str = ""


def rows(path: Path) -> list[Row]:
    """Everything at a path, [] where there is nothing of kd's."""
    if not path.is_dir():
        return [_weights(path)]
    parent = _place(path).parent
    if (path / "manifest.json").exists() or parent.name == "checkpoints":
        return list(_listed(path / "manifest.json", _owner(parent.parent)))
    if not any((path / name).exists() for name in ("run.json", "result.json")):
        return list(_stage(path))
    found = [_json(path / name) for name in ("run.json", "result.json") if (path / name).exists()]
    stages = [row for folder in sorted(path.iterdir()) if folder.is_dir() for row in _stage(folder)]
    return found + stages


def _place(path: Path) -> Path:
    """The path from the root, without "..": its names and its parents say what stands there."""
    return Path(os.path.abspath(path))


def _json(path: Path) -> Row:
    from kd.checkpoint import read_json, regular
    from kd.errors import CheckpointError

    try:
        read_json(path)
        return Row(path, "JSON, without a checksum", regular(path))
    except CheckpointError as error:
        return Row(path, wrong=str(error))


def _stage(folder: Path) -> Iterator[Row]:
    """The finished weights and the checkpoints of a stage; nothing for any other folder."""
    from kd.checkpoint.store import found_in

    of = _owner(folder)
    if (folder / "stage.json").exists():
        yield from _listed(folder / "stage.json", of)
    for path in found_in(folder):
        yield from _listed(path / "manifest.json", of)


def _owner(folder: Path) -> dict[str, str]:
    """Whose a stage's files must be, as far as its place tells: its name, and the run.json or the teachers around."""
    from kd.checkpoint import read_json
    from kd.config.schema import content_hash
    from kd.errors import CheckpointError
    from kd.training.run import STAGES

    folder = _place(folder)
    if folder.parent.name == "teachers":
        return {"stage": "teacher", "run": folder.name}
    card = folder.with_name("run.json")
    if folder.name not in STAGES or not card.exists():
        return {}
    try:
        return {"stage": folder.name, "run": content_hash(read_json(card))}
    except CheckpointError:  # its own row says so
        return {"stage": folder.name}


def _listed(path: Path, of: dict[str, str]) -> Iterator[Row]:
    """A manifest and the files that it lists."""
    from kd.checkpoint import regular
    from kd.checkpoint.manifest import check_file, check_owner, read_manifest
    from kd.errors import CheckpointError

    try:
        values = read_manifest(path)
        check_owner(path, values, of)
        yield Row(path, _about(values), regular(path), str(values["sha256"]))
    except CheckpointError as error:
        yield Row(path, wrong=str(error))
        return
    for name, listed in values["files"].items():
        try:
            check_file(path, values, name)
            yield Row(path.with_name(name), "", listed["bytes"], listed["sha256"])
        except CheckpointError as error:
            yield Row(path.with_name(name), wrong=str(error))


def _about(values: dict[str, Any]) -> str:
    """What a manifest says, or the metadata of weights: network, classes, smoothing, update, schema."""
    about = values["about"] if isinstance(values.get("about"), dict) else values
    parts = [about.get("model"), f"{about['num_classes']} classes" if "num_classes" in about else None]
    if "label_smoothing" in about:
        parts.append(f"smoothing {about['label_smoothing']} {about.get('smoothing')}")
    counted = values.get("update", values.get("updates"))
    parts += [f"update {counted}" if counted is not None else None, _schema(values)]
    return "".join(c if c.isprintable() else " " for c in ", ".join(str(part)[:80] for part in parts if part))


def _schema(values: dict[str, Any]) -> str:
    return f"schema {values['schema']}" if "schema" in values else ""


def _weights(path: Path) -> Row:
    """One file of weights, held against the manifest beside it where there is one."""
    from kd.checkpoint import read_weights, regular
    from kd.checkpoint.files import digest
    from kd.checkpoint.manifest import DONE, MANIFEST, check_file, check_owner, read_manifest
    from kd.checkpoint.safetensors_io import spoilt
    from kd.checkpoint.store import CHECKPOINTS
    from kd.errors import CheckpointError
    from kd.models.weights import weights_metadata

    try:
        folder = _place(path).parent
        of_checkpoint = folder.parent.name == CHECKPOINTS
        ours = MANIFEST if of_checkpoint else DONE
        about, beside = "", [path.with_name(ours)] if path.with_name(ours).exists() else []
        if beside:
            manifest = read_manifest(beside[0])
            check_owner(beside[0], manifest, _owner(folder.parent.parent if of_checkpoint else folder))
            check_file(beside[0], manifest, path.name)
            about = _about(manifest)
        elif path.suffix == ".safetensors":
            about = _about(weights_metadata(path))
        weights = read_weights(path)
        first = next((name for name, value in weights.items() if spoilt(_held(value), value)), "")
        said = f"{about or f'{len(weights)} tensors'}{'' if beside else ', no manifest beside it'}"
        wrong = f"{path}: {first} has NaN, or values beyond float32" if first else ""
        return Row(path, said, regular(path), digest(path), wrong)
    except CheckpointError as error:
        return Row(path, wrong=str(error))


def _held(value: Tensor) -> Tensor:
    """The tensor as a network holds it."""
    return value.float() if value.is_floating_point() else value


def verify(paths: list[Path]) -> int:
    """Print what there is at each path; returns the exit code."""
    found = {path: rows(path) if path.exists() else [] for path in paths}
    for path, listed in found.items():
        if not listed:
            fail(f"{path}: " + ("holds no run, stage or checkpoint" if path.exists() else "no such file or folder"))
    for row in (row for listed in found.values() for row in listed):
        if row.wrong:
            print(f"damaged  {shown(row.wrong)}")
        else:
            digest = f"sha256 {row.sha256}  " if row.sha256 else ""
            print(f"whole    {shown(row.path)}  {row.size:,} bytes  {digest}{row.what}")
    return DAMAGED if any(row.wrong for listed in found.values() for row in listed) else 0


def main(words: list[str]) -> int:
    """Read the command line and verify."""
    if not words or {"-h", "--help"} & set(words):
        print(HELP)
        return 0
    if words[0] != "verify" or len(words) == 1 or any(word.startswith("-") for word in words):
        fail(f"{' '.join(words)}: type verify PATH [PATH ...]; --help says more")
    return verify([Path(word) for word in words[1:]])


if __name__ == "__main__":
    with one_line_errors("kd.checkpoint"):
        sys.exit(main(sys.argv[1:]))
