"""Files that survive a kill: atomic writes, and training state in a format that can hold no code.

A state is one safetensors file: tensors by path, everything else as JSON in the header. It is written beside its
target, flushed to disk and renamed over it, so that a reader sees the old file or the new one and never half of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SCHEMA = 1
METADATA = "kd"  # the entry of a safetensors header that is ours
_TENSOR, _ITEMS = "__tensor__", "__items__"


class CheckpointError(ValueError):
    """A file that cannot be used: the message names the path and what is wrong with it."""


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file, then make it `path` in one step that a crash cannot split."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)  # the rename itself must reach the disk
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with suppress(OSError):  # a path that cannot be written may not be removable either
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write plain values as readable JSON, atomically; NaN is refused, since JSON has none."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_json(path: Path) -> Any:
    """Plain values from a JSON file. Raises CheckpointError when it is missing or torn."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def save_weights(path: Path, weights: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a model's state dict as safetensors that ``timm.create_model(checkpoint_path=...)`` loads.

    `metadata` travels in the header: what the network is, what it sees and with which smoothing it was trained. It is
    one entry, because safetensors writes several in random order, and equal weights should be equal files.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    header = {METADATA: json.dumps(metadata, sort_keys=True)}
    write_atomically(path, lambda temporary: save_file(plain, temporary, header))


def _split(tree: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON form of a tree of plain values; its tensors move into `tensors` under their path."""
    if isinstance(tree, Tensor):
        tensors[at] = tree.detach().cpu().contiguous().clone()
        return {_TENSOR: at}
    if isinstance(tree, dict):  # as pairs: an optimizer's state has integer keys, which JSON would turn to text
        return {_ITEMS: [[key, _split(value, f"{at}/{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [_split(value, f"{at}/{i}", tensors) for i, value in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"a state holds tensors and plain values only; {at} is a {type(tree).__name__}")


def _join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_split`; tuples come back as lists."""
    if isinstance(tree, list):
        return [_join(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    return {key: _join(value, tensors) for key, value in tree[_ITEMS]}


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write training state (nested dicts and lists of tensors and plain values) atomically."""
    tensors: dict[str, Tensor] = {}
    header = {METADATA: json.dumps({"schema": SCHEMA, "state": _split(state, "", tensors)})}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, header))


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote. Raises CheckpointError on a file that is not whole or not ours."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[METADATA])
            if header["schema"] != SCHEMA:
                raise CheckpointError(f"{path}: state of schema {header['schema']}, this kd reads {SCHEMA}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return _join(header["state"], tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a whole training state ({error})") from error
