"""Weights and training state on disk: safetensors as kd writes them, and strangers' files read without their code.

A state is one safetensors file: tensors by path, everything else as JSON in the header.
"""

from __future__ import annotations

import json
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

from kd.checkpoint.files import brief, parse_json, reading, regular, write_atomically
from kd.errors import CheckpointError

METADATA = "kd"  # the entry of a safetensors header that is ours
HEADER_BYTES = 2**25  # the library would read 100 MB of JSON; a network of 10,000 tensors has 1 MB
_SAFETENSORS = "a readable .safetensors file"
_NUMBERS = {  # and not 4 bits in half a byte, quantized ones, or bits without a meaning
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
}
_TENSOR, _ITEMS = "__tensor__", "__items__"


# ---- writing


def on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: each in memory of its own."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the tensors in a file; its header comes on top."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def header_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as one entry: safetensors writes several in random order, and equal weights should be equal files."""
    return {METADATA: json.dumps(metadata, sort_keys=True)}


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a model's state dict as safetensors that ``timm.create_model(checkpoint_path=...)`` loads.

    `metadata` travels in the header: what the network is, what it sees and with which smoothing it was trained.
    """
    plain = on_cpu(weights)
    write_atomically(path, lambda temporary: save_file(plain, temporary, header_of(metadata)), size_of(plain))


def split(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a state's file. Raises TypeError for what could hold code."""
    tensors: dict[str, Tensor] = {}
    tree = _split(state, "", tensors)
    return tensors, {METADATA: json.dumps(tree)}


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


# ---- reading


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """The bytes of a broken file lead a library to raise whatever they do: all of it is the file's fault, but for
    what the machine could not do.
    """
    try:
        with reading(path):
            yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: not {what} ({type(error).__name__}: {brief(error)})") from error


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Any]:
    """A safetensors file whose header is not larger than the file, nor than any network needs."""
    size = regular(path)
    with _readable(path, what):
        with path.open("rb") as file:
            claimed = int.from_bytes(file.read(8), "little")
        if claimed > min(size - 8, HEADER_BYTES):
            raise ValueError(f"its header claims {claimed:,} bytes of a file of {size:,}")
        with safe_open(path, framework="pt") as file:
            yield file


def load_state(path: Path) -> dict[str, Any]:
    """Read what `split` made and a checkpoint holds. Raises CheckpointError on a file that is not whole or not ours."""
    with _opened(path, "a whole training state") as file:
        header = json.loads((file.metadata() or {})[METADATA])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        state = _join(header, tensors)
        if not isinstance(state, dict):
            raise TypeError(f"is a {type(state).__name__}")
        return state


def _join(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_split`; tuples come back as lists."""
    if isinstance(tree, list):
        return [_join(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    return {key: _join(value, tensors) for key, value in tree[_ITEMS]}


def weights_header(path: Path) -> dict[str, Any]:
    """What kd wrote beside the weights in a safetensors file, {} where nothing. Raises CheckpointError."""
    with _opened(path, _SAFETENSORS) as file:
        found = parse_json((file.metadata() or {}).get(METADATA, "{}").encode(), path)
        if not isinstance(found, dict):
            raise TypeError(f"its metadata is a {type(found).__name__}")
        return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of weights, with the wrappings of training scripts removed as timm does.

    .safetensors, or .pth and its like without code: a zip's checksums are checked, which ``torch.load`` does not do,
    and neither it nor the tensors may unpack to more than twice the file. Raises CheckpointError.
    """
    from timm.models import load_state_dict

    size = regular(path)
    if path.suffix == ".safetensors":
        with _opened(path, _SAFETENSORS) as file:
            return _usual(path, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
    what = "a file of weights, or one that holds code, which kd never runs; save the state_dict as .safetensors"
    with _readable(path, what), warnings.catch_warnings(action="ignore"):
        if zipfile.is_zipfile(path):
            _check_zip(path, size)
        weights = _usual(path, load_state_dict(str(path), weights_only=True))
        if size_of(weights) > 2 * size:
            raise CheckpointError(f"{path}: its tensors claim {size_of(weights):,} bytes of a file of {size:,}")
        return weights


def _usual(path: Path, weights: Any) -> dict[str, Tensor]:
    """Raise CheckpointError unless this is a state dict of dense tensors with values that torch can compute with."""
    if not isinstance(weights, dict) or not weights or not all(isinstance(each, Tensor) for each in weights.values()):
        raise CheckpointError(f"{path}: holds no state_dict of tensors")
    for name, value in weights.items():
        other = [
            *(["torch.nested"] if value.is_nested else [] if value.layout is torch.strided else [value.layout]),
            *(["meta"] if value.is_meta else []),
            *([] if value.dtype in _NUMBERS else [value.dtype]),
        ]
        if other:
            raise CheckpointError(f"{path}: {name} is a {other[0]} tensor, must be a dense one of common numbers")
    return weights


def spoilt(held: Tensor, given: Tensor) -> bool:
    """Whether what a network holds of a tensor of a file has NaN, or infinities that the file does not have.

    A network's float32 has none for 1e300; of the float8 in a file torch does not say what is finite.
    """
    if not held.is_floating_point() and not held.is_complex():
        return False
    if held.isnan().any():
        return True
    infinite = held.isinf()
    return bool(infinite.any()) and bool((infinite & ~given.isinf()).any())


def _check_zip(path: Path, size: int) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > 2 * size:
            raise CheckpointError(f"{path}: unpacks to {unpacked:,} bytes, a file of {size:,}: no file of weights does")
        if len({entry.filename for entry in entries}) < len(entries):
            raise CheckpointError(f"{path}: has two parts of one name")
        if wrong := archive.testzip():
            raise CheckpointError(f"{path}: the checksum of its part {wrong!r} is another: the file is damaged")
