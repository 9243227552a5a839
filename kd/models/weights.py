"""A file of weights into a network: exactly, or one line that says what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kd.errors import ConfigError


def load(model: nn.Module, path: Path, num_classes: int, role: str, finetune: bool) -> None:
    """Load a file into the network, exactly; only when fine-tuning may the head be another, and is left fresh.

    Raises ConfigError.
    """
    setting = f"{role}.checkpoint={path}"
    weights = _read(path, setting)
    own, head = model.state_dict(), _head(model)
    misfits = [key for key in weights if key in own and weights[key].shape != own[key].shape]
    other_head = [key for key in misfits if key in head]
    _raise_first(setting, [key for key in misfits if key not in head], "tensors of another shape")
    if finetune and (other_head or not head & weights.keys()):
        weights = weights | {key: own[key] for key in head}
    elif other_head:
        for classes in weights[other_head[0]].shape[:1]:  # none of a single number
            check_classes(setting, classes, num_classes, role)
    _load_exactly(model, weights, setting)


def load_named(model: nn.Module, path: Path) -> None:
    """Load a file into a network that no recipe names, exactly. Raises CheckpointError."""
    from kd.checkpoint import read_weights
    from kd.errors import CheckpointError

    weights = read_weights(path)
    try:
        _load_exactly(model, weights, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def _load_exactly(model: nn.Module, weights: dict[str, Tensor], setting: str) -> None:
    from kd.checkpoint.safetensors_io import spoilt

    own = model.state_dict()
    misfits = [key for key in weights if key in own and weights[key].shape != own[key].shape]
    _raise_first(setting, misfits, "tensors of another shape")
    other_kind = [k for k, v in weights.items() if k in own and _kind(v) != _kind(own[k])]  # torch would convert them
    _raise_first(setting, other_kind, "tensors of another kind of number")
    found = model.load_state_dict(weights, strict=False)
    _raise_first(setting, found.missing_keys, "tensors missing")
    _raise_first(setting, found.unexpected_keys, "tensors that the network does not have")
    parameters, held = dict(model.named_parameters()), model.state_dict()
    wrong = [
        key
        for key, value in weights.items()  # a buffer may hold infinities, as attention masks do
        if spoilt(held[key], value) or (key in parameters and not bool(held[key].isfinite().all()))
    ]
    if wrong:
        dtype = str(held[wrong[0]].dtype).removeprefix("torch.")
        raise ConfigError(f"{setting}: {len(wrong)} tensors with NaN or infinite values as {dtype}, first {wrong[0]}")


def _read(path: Path, setting: str) -> dict[str, Tensor]:
    """The state dict in a file of weights, with the wrappings of training scripts removed as timm does."""
    from kd.checkpoint import read_weights
    from kd.errors import CheckpointError

    check_file(path, setting)
    try:
        return read_weights(path)
    except CheckpointError as error:
        said = str(error).removeprefix(f"{path}: ")
        raise ConfigError(f"{setting}: {said}") from error


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _head(model: nn.Module) -> set[str]:
    """The state dict keys of the classifier, of all of them where a network has more, as timm names them."""
    cfg: Any = model.pretrained_cfg
    names = cfg["classifier"] or ()
    prefixes = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    return {key for key in model.state_dict() if key.startswith(prefixes)}


def _raise_first(setting: str, keys: Sequence[str], what: str) -> None:
    if keys:
        raise ConfigError(
            f"{setting}: does not fit the network, {len(keys)} {what}, first {keys[0]}; it must be a file of this very "
            f"model, for as many channels as the data has"
        )


def check_file(path: Path, setting: str) -> None:
    """Raise ConfigError, naming the setting, where no file is."""
    from kd.checkpoint import regular
    from kd.errors import CheckpointError

    try:
        regular(path)
        path.open("rb").close()
    except OSError as error:
        raise ConfigError(f"{setting}: cannot be read ({error.strerror})") from error
    except CheckpointError as error:
        said = str(error).removeprefix(f"{path}: ").removesuffix(", must be a file")
        raise ConfigError(f"{setting}: {said}; give the path of a .safetensors or .pth file") from error


def check_classes(setting: str, found: int, num_classes: int, role: str) -> None:
    """Raise ConfigError for a head of other classes than the data has."""
    if found != num_classes:
        raise ConfigError(
            f"{setting}: its head has {found} classes, the data has {num_classes}: {role}.finetune=true trains a new "
            f"head, or give {role}.checkpoint=/path/to/weights.safetensors of {num_classes} classes"
        )
