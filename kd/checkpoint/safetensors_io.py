"""Weights and training states as safetensors, and weight files of others, read without running code.

A training state is one safetensors file: tensors by their path in the tree, everything else as JSON in the header.
"""

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kd.checkpoint.files import read_json, reading, write_atomically
from kd.errors import CheckpointError, require
from kd.text import plain

METADATA = "kd"  # kd's entry in the header of a safetensors file
_SAFETENSORS = "a readable .safetensors file"
_PICKLED = "a file of tensors alone, and kd runs no code from a file; save the state_dict as .safetensors"
_TENSOR, _ITEMS = "__tensor__", "__items__"


# ---- writing


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy as safetensors takes it: on the CPU, contiguous, in memory of its own."""
    return tensor.detach().cpu().contiguous().clone()


def header_of(metadata: Any) -> dict[str, str]:
    """Metadata as one entry: safetensors writes several in random order, and equal weights should be equal files."""
    return {METADATA: json.dumps(metadata, sort_keys=True)}


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a state dict as safetensors that ``timm.create_model(checkpoint_path=...)`` loads.

    `metadata` travels in the header: the network, its input, and the label smoothing it was trained with.
    Raises CheckpointError.
    """
    plain_weights = {name: on_cpu(tensor) for name, tensor in weights.items()}
    header = header_of(metadata)
    write_atomically(path, lambda temporary: save_file(plain_weights, temporary, header))


def split(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a training state's file. Raises TypeError for what could hold code."""
    tensors: dict[str, Tensor] = {}
    tree = _split(state, "", tensors)
    return tensors, {METADATA: json.dumps(tree)}


def _split(tree: Any, at: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON form of a tree of plain values; its tensors move into `tensors` under their path."""
    if isinstance(tree, Tensor):
        tensors[at] = on_cpu(tree)
        return {_TENSOR: at}
    if isinstance(tree, dict):  # as pairs: an optimizer's state has integer keys, which JSON would turn into text
        return {_ITEMS: [[key, _split(value, f"{at}/{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [_split(value, f"{at}/{i}", tensors) for i, value in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"a state holds tensors and plain values only; {at} is a {type(tree).__name__}")


# ---- reading


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises on the bytes of a broken file into a CheckpointError."""
    try:
        with reading(path):
            yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path}: not {what} ({type(error).__name__}: {plain(str(error).partition('. ')[0], 160)})"
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with _readable(path, _SAFETENSORS), safe_open(path, framework="pt") as file:
        yield file


def load_state(path: Path) -> dict[str, Any]:
    """Read a training state, as `split` made it; tuples come back as lists. Raises CheckpointError."""
    with _opened(path) as file:
        tree = json.loads((file.metadata() or {})[METADATA])
        return _join(tree, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)


def _join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_split`."""
    if isinstance(tree, list):
        return [_join(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    return {key: _join(value, tensors) for key, value in tree[_ITEMS]}


def weights_header(path: Path) -> dict[str, Any]:
    """Metadata that kd wrote with the weights in a safetensors file, {} where there is none. Raises CheckpointError."""
    with _opened(path) as file:
        return dict(json.loads((file.metadata() or {}).get(METADATA, "{}")))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor in a .safetensors or .pth file, or in the files of an index, by its dotted name.

    Of nested dicts, as training scripts save them, the keys of all levels make the name; lists and numbered entries,
    such as an optimizer's state, are left out. A .pth is read with ``weights_only=True``, so that no code runs, and its
    zip's checksums are checked, which ``torch.load`` does not do. Raises CheckpointError.
    """
    if (files := parts(path)) != [path]:
        weights = {name: tensor for file in files for name, tensor in read_weights(file).items()}
    elif path.suffix == ".safetensors":
        with _opened(path) as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    else:
        weights = dict(_named_tensors(_read_pickled(path)))
    _check_tensors(path, weights)
    return weights


def parts(path: Path) -> list[Path]:
    """The files of weights that a path stands for: itself, or those that an index (.index.json) lists beside it.

    Raises CheckpointError.
    """
    if not path.name.endswith(".index.json"):
        return [path]
    listed = read_json(path, ["weight_map"])["weight_map"]
    names = sorted(set(listed.values())) if isinstance(listed, dict) else []
    plain_names = all(isinstance(name, str) and Path(name).name == name for name in names)
    require(names and plain_names, f"{path}: lists no files beside it in weight_map", CheckpointError)
    return [path.with_name(name) for name in names]


def _read_pickled(path: Path) -> Any:
    with _readable(path, _PICKLED), warnings.catch_warnings(action="ignore"):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise CheckpointError(f"{path}: is damaged, the checksum of its part {damaged!r} differs")
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's scripts save their arguments as one
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                blocked = re.search(r"GLOBAL (\S+)", str(error))  # torch's advice is to run it
                why = f"it needs {plain(blocked[1], 80)}" if blocked else "it is damaged, or no file of torch.save"
                raise CheckpointError(f"{path}: not {_PICKLED} ({why})") from error


def _named_tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            if isinstance(key, str):
                yield from _named_tensors(value, f"{name}.{key}" if name else key)


def _check_tensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless this is a state dict of dense tensors that torch can compute with."""
    require(weights, f"{path}: holds no state_dict of tensors", CheckpointError)
    for name, value in weights.items():
        try:
            value.flatten()[:1].to("cpu", torch.complex64)
        except Exception as error:  # meta, sparse, nested, quantized or packed; each has an error of its own
            kind = f"{value.dtype}, {value.layout}, {value.device}"
            raise CheckpointError(f"{path}: {name} ({kind}) must be a dense tensor of common numbers") from error
