"""The files of one stage: its newest checkpoints while it trains, its weights when it is done."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from kd.checkpoint.files import Unreadable, make_folder, sync, write_text, writing
from kd.checkpoint.manifest import (
    DONE,
    MANIFEST,
    Foreign,
    NewerSchema,
    check_file,
    check_owner,
    read_manifest,
    seal,
    verified,
)
from kd.checkpoint.safetensors_io import header_of, load_state, read_weights, save_weights, size_of, split
from kd.errors import CheckpointError

NEWEST = 2  # checkpoints that are kept: where the newest is damaged there is another
CHECKPOINTS, STATE, SELECTED = "checkpoints", "state.safetensors", "selected.safetensors"
_NAME = re.compile(r"update-(\d{8,18})(?:-(\d{1,9}))?")
UNBOUND: Mapping[str, str] = {}  # files of which nobody asks whose they are
_ABOUT = ("model", "num_classes", "label_smoothing", "smoothing")  # what a manifest repeats of the weights' metadata


@dataclass
class Checkpoint:
    """What `load` found: the training state, the selected weights where there are any, and newer ones that are
    known not to be whole.
    """

    path: Path
    state: dict[str, Any]
    selected: dict[str, Tensor] | None
    damaged: list[Path]


def found_in(folder: Path) -> list[Path]:
    """The checkpoints of a stage's folder, the newest first, whole or not."""
    try:
        named = [path for path in (folder / CHECKPOINTS).iterdir() if _NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder / CHECKPOINTS}: {error.strerror}") from error
    return sorted(named, key=_order, reverse=True)


def _order(path: Path) -> tuple[int, int]:
    """The update of a checkpoint, and which one of that update it is: a second may tell of its validation too."""
    found = _NAME.fullmatch(path.name)
    assert found
    return int(found[1]), int(found[2] or 1)


def _free_name(folder: Path, update: int) -> Path:
    """Where the next checkpoint of an update goes; never where one is."""
    name = f"update-{update:08d}"
    again = [_order(path)[1] for path in found_in(folder) if _order(path)[0] == update]
    return folder / CHECKPOINTS / (f"{name}-{max(again) + 1}" if again else name)


def clean(folder: Path) -> None:
    """Remove what dead processes left half written in a stage's folder."""
    for path in (*folder.glob(".*.tmp"), *(folder / CHECKPOINTS).glob(".*.tmp")):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def retire(paths: list[Path]) -> None:
    """Remove checkpoints; one that is half removed does not look like one. What resists is left for the next time."""
    for path in paths:
        hidden = path.with_name(f".{path.name}.old.tmp")
        with suppress(OSError):
            _remove(hidden)
            path.rename(hidden)
            _remove(hidden)


def save(
    folder: Path,
    update: int,
    state: dict[str, Any],
    selected: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
    of: Mapping[str, str] = UNBOUND,
) -> Path:
    """Write the checkpoint of an update into a stage's folder, verify it there, and only then remove those that are
    older than the newest two that are whole. Its manifest says `of` which stage and run it is.

    It is written beside its place, flushed to the disk, and renamed. Takes the memory of one copy of the state.
    Raises CheckpointError: an earlier checkpoint is then as it was.
    """
    metadata = metadata or {}
    target = _free_name(folder, update)
    temporary = target.with_name(f".{target.name}.tmp")
    tensors, header = split(state)
    files = {STATE: (tensors, header)}
    if selected is not None:
        plain = {name: tensor.contiguous() for name, tensor in selected.items()}  # channels last are not
        files[SELECTED] = (plain, header_of(metadata))
    try:
        with writing(target, sum(size_of(each) for each, _ in files.values())):
            make_folder(target.parent)
            clean(folder)
            temporary.mkdir()
            for name, (content, head) in files.items():
                save_file(content, temporary / name, head)
            text = seal(temporary, list(files), {**of, "update": update, "about": _about(metadata)})
            (temporary / MANIFEST).write_text(text, encoding="utf-8")
            for name in (*files, MANIFEST):
                sync(temporary / name)
            sync(temporary)
            temporary.rename(target)
            sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    verified(target / MANIFEST)
    retire(_superseded(folder, target))
    return target


def _superseded(folder: Path, newest: Path) -> list[Path]:
    """What is older than the NEWEST that are whole, of which `newest` is known to be one."""
    found, whole = found_in(folder), 0
    for i, path in enumerate(found):
        if whole == NEWEST:
            return found[i:]
        whole += path == newest or _is_whole(path)
    return []


def _is_whole(path: Path) -> bool:
    try:
        return bool(verified(path / MANIFEST))
    except CheckpointError:
        return False


def _about(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: metadata[key] for key in _ABOUT if key in metadata}


def load(folder: Path, warn: Callable[[str], None], advice: str, of: Mapping[str, str] = UNBOUND) -> Checkpoint | None:
    """The newest whole checkpoint of a stage's folder; None where it has none at all.

    `warn` gets one line where a newer one is damaged, `advice` ends the message where all are. Raises CheckpointError
    when no checkpoint is whole, and when the newest whole one is of a later kd, or not `of` this stage of this run.
    """
    if (old := folder / STATE).exists():
        raise CheckpointError(f"{old}: was saved by an earlier kd, which this one cannot read; {advice}")
    wrong: dict[Path, str] = {}
    damaged: list[Path] = []
    for path in found_in(folder):
        try:
            state, selected = _read(path, of)
        except NewerSchema:
            raise
        except Foreign as error:
            raise CheckpointError(f"{error}; {advice}") from error
        except CheckpointError as error:
            wrong[path] = str(error)
            damaged += [] if isinstance(error, Unreadable) else [path]
            continue
        if wrong:
            warn(f"warning: {'; '.join(wrong.values())}; the checkpoint before it is taken, {path}")
        return Checkpoint(path, state, selected, damaged)
    if wrong:
        said = "is whole" if damaged else "can be read now"
        advice = advice if damaged else "once they can be, the same command goes on"
        raise CheckpointError(f"no checkpoint in {folder / CHECKPOINTS} {said}: {'; '.join(wrong.values())}; {advice}")
    return None


def _read(path: Path, of: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    manifest = verified(path / MANIFEST)
    check_owner(path / MANIFEST, manifest, of)
    if manifest.get("update") != _order(path)[0]:
        raise CheckpointError(f"{path / MANIFEST}: is of another update than its folder")
    if STATE not in manifest["files"]:
        raise CheckpointError(f"{path / MANIFEST}: lists no {STATE}")
    try:
        selected = read_weights(path / SELECTED) if SELECTED in manifest["files"] else None
        return load_state(path / STATE), selected
    except CheckpointError as error:  # the bytes are those that were written: libraries run out of files or memory too
        raise Unreadable(str(error)) from error


def belongs(folder: Path, advice: str, of: Mapping[str, str]) -> None:
    """Raise CheckpointError, ending in `advice`, where something whole in a stage's folder is not `of` it."""
    for path in (folder / DONE, *(path / MANIFEST for path in found_in(folder))):
        try:
            check_owner(path, read_manifest(path), of)
        except Foreign as error:
            raise CheckpointError(f"{error}; {advice}") from error
        except CheckpointError:  # torn or missing: `load` and `finished` say what of it
            continue


def advice(name: str, folder: Path) -> str:
    """What to do about a stage, by its name, whose files cannot be used."""
    if name == "teacher":
        return f"move {folder} away and the teacher is trained again (resume=false leaves teachers as they are)"
    return "resume=false sets the run aside and trains again"


def finish(
    folder: Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, Any],
    about: dict[str, Any],
    of: Mapping[str, str] = UNBOUND,
) -> None:
    """Write a finished stage's weights, by name, and stage.json, their manifest; then remove its checkpoints.

    `about` is what else stage.json says, `of` whose they are. Raises CheckpointError.
    """
    for name, tensors in weights.items():
        save_weights(folder / f"{name}.safetensors", tensors, metadata)
    write_manifest(
        folder / DONE, [f"{name}.safetensors" for name in weights], {**about, **of, "about": _about(metadata)}
    )
    retire([folder / CHECKPOINTS])


def write_manifest(path: Path, names: list[str], about: dict[str, Any]) -> None:
    """Write a manifest, atomically, over files beside it. Raises CheckpointError."""
    write_text(path, seal(path.parent, names, about))


def save_sealed(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write weights with a manifest of their own, NAME.json beside NAME.safetensors. Raises CheckpointError."""
    save_weights(path, weights, metadata)
    write_manifest(path.with_suffix(".json"), [path.name], {"about": _about(metadata)})


def read_sealed(path: Path, advice: str) -> dict[str, Tensor]:
    """The weights that `save_sealed` wrote. Raises CheckpointError, ending in `advice`, unless they are as written."""
    try:
        verified(path.with_suffix(".json"))
        return read_weights(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {advice}") from error


def finished(path: Path, advice: str = "", of: Mapping[str, str] = UNBOUND) -> dict[str, Any]:
    """What stage.json says of a stage, once it and the weights at `path` beside it are seen to be as written, and to
    be `of` the stage and run that they should be.

    Raises CheckpointError, ending in `advice`.
    """
    try:
        manifest = read_manifest(path.with_name(DONE))
        check_owner(path.with_name(DONE), manifest, of)
        check_file(path.with_name(DONE), manifest, path.name)
        if not isinstance(manifest.get("seconds"), int | float) or not isinstance(manifest.get("selected"), dict):
            raise CheckpointError(f"{path.with_name(DONE)}: is not laid out as kd writes it")
    except NewerSchema:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {advice}" if advice else str(error)) from error
    return manifest
