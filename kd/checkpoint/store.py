"""A stage's files: its newest two checkpoints while it trains, its weights once it is finished."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from kd.checkpoint.files import advised, make_directory, sync, writing
from kd.checkpoint.manifest import ANYONE, DONE, MANIFEST, check_file, read_manifest, verified, write_manifest
from kd.checkpoint.safetensors_io import header_of, load_state, read_weights, save_weights, split
from kd.errors import CheckpointError

NEWEST = 2  # checkpoints to keep: where the newest is damaged there is another
CHECKPOINTS, STATE, SELECTED = "checkpoints", "state.safetensors", "selected.safetensors"


@dataclass
class Checkpoint:
    """A training state, with the selected weights where there are any."""

    path: Path
    state: dict[str, Any]
    selected: dict[str, Tensor] | None


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints in a stage's directory, the newest first, whole or not."""
    return sorted((directory / CHECKPOINTS).glob("update-*"), reverse=True)


def _new_path(directory: Path, update: int) -> Path:
    """The path of the next checkpoint of an update, whose name sorts behind all before it.

    A run that was stopped while it validated saves the same update once more, as update-00000120-2.
    """
    name = f"update-{update:08d}"
    earlier = [path for path in checkpoints_in(directory) if path.name.startswith(name)]
    return earlier[0].with_name(f"{earlier[0].name}-2") if earlier else directory / CHECKPOINTS / name


def save(
    directory: Path,
    update: int,
    state: dict[str, Any],
    selected: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
    owner: Mapping[str, str] = ANYONE,
) -> Path:
    """Write the checkpoint of an update, verify it on disk, and only then remove those before the newest two.

    It is written beside its place, flushed, and renamed. Takes the memory of one copy of the state.

    Args:
        directory: the stage's.
        update: optimizer steps so far; names the checkpoint.
        state: a tree of tensors and plain values.
        selected: the weights that are best on validation so far.
        metadata: what the header of `selected` says of the network.
        owner: the stage and run that the manifest names.

    Raises:
        CheckpointError: it could not be written; the earlier checkpoints are untouched.
    """
    target = _new_path(directory, update)
    temporary = target.with_name(f".{target.name}.tmp")
    files = {STATE: split(state)}
    if selected is not None:
        # safetensors takes no channels-last tensors.
        files[SELECTED] = {name: tensor.contiguous() for name, tensor in selected.items()}, header_of(metadata or {})
    try:
        with writing(target):
            make_directory(target.parent)
            clean(directory)
            temporary.mkdir()
            for name, (tensors, header) in files.items():
                save_file(tensors, temporary / name, header)
                sync(temporary / name)
            write_manifest(temporary / MANIFEST, files, {**owner, "update": update})
            temporary.rename(target)
            sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    verified(target / MANIFEST)
    _keep_newest(directory, target)
    return target


def _keep_newest(directory: Path, new: Path) -> None:
    """Remove what is older than the newest two that are whole: a damaged one is nothing to fall back to."""
    whole = 0
    for path in checkpoints_in(directory):
        if whole == NEWEST:
            remove(path)
            continue
        with suppress(CheckpointError):
            if path != new:  # which was verified just now
                verified(path / MANIFEST)
            whole += 1


def clean(directory: Path) -> None:
    """Remove what dead processes left half written in a stage's directory."""
    for path in (*directory.glob(".*.tmp"), *(directory / CHECKPOINTS).glob(".*.tmp")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a directory in such a way that, half removed, it does not look like a checkpoint."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    with suppress(OSError):  # what resists is left for the next time
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden)


def load(directory: Path, warn: Callable[[str], None], owner: Mapping[str, str] = ANYONE) -> Checkpoint | None:
    """The newest whole checkpoint in a stage's directory; None where there are none at all.

    `warn` gets one line where a newer one is damaged, of a newer kd or of another `owner`. Raises CheckpointError where
    none can be used.
    """
    problems: list[str] = []
    for path in checkpoints_in(directory):
        try:
            manifest = verified(path / MANIFEST, owner)
            selected = read_weights(path / SELECTED) if SELECTED in manifest["files"] else None
            checkpoint = Checkpoint(path, load_state(path / STATE), selected)
        except CheckpointError as error:  # kept until two newer ones are whole: it may be readable another time
            problems.append(str(error))
            continue
        if problems:
            warn(f"warning: {'; '.join(problems)}; falling back to {path}")
        return checkpoint
    if problems:
        raise CheckpointError(f"no checkpoint in {directory / CHECKPOINTS} can be read: {'; '.join(problems)}")
    return None


def advice(stage: str, directory: Path) -> str:
    """What to do about a stage whose files cannot be used."""
    if stage == "teacher":
        return f"move {directory} away and the teacher is trained again (resume=false leaves teachers as they are)"
    return "resume=false sets the run aside and trains again"


# ---- finished weights


def finish(
    directory: Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    metadata: Mapping[str, Any],
    about: Mapping[str, Any],
    owner: Mapping[str, str] = ANYONE,
) -> None:
    """Write a finished stage's weights, by name, and stage.json, their manifest; then remove its checkpoints.

    `about` is what else stage.json says. Raises CheckpointError.
    """
    for name, tensors in weights.items():
        save_weights(directory / f"{name}.safetensors", tensors, metadata)
    write_manifest(directory / DONE, [f"{name}.safetensors" for name in weights], {**about, **owner})
    remove(directory / CHECKPOINTS)


def finished(path: Path, advice: str = "", owner: Mapping[str, str] = ANYONE) -> dict[str, Any]:
    """stage.json of a finished stage, once the weights at `path` beside it are seen to be whole and the `owner`'s.

    Raises CheckpointError, ending in `advice`.
    """
    done = path.with_name(DONE)
    with advised(advice):
        manifest = read_manifest(done, owner)
        check_file(done, manifest, path.name)
    return manifest


def save_sealed(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write weights with a manifest of their own, NAME.json beside NAME.safetensors. Raises CheckpointError."""
    save_weights(path, weights, metadata)
    write_manifest(path.with_suffix(".json"), [path.name], {})


def read_sealed(path: Path, advice: str) -> dict[str, Tensor]:
    """The weights that `save_sealed` wrote. Raises CheckpointError, ending in `advice`, unless they are as written."""
    with advised(advice):
        verified(path.with_suffix(".json"))
        return read_weights(path)
