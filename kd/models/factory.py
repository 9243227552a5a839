"""Networks by name: `build` makes or loads one for a data set, or says in one line why it cannot."""

import inspect
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import resolve_model_input_args
from torch import Tensor, nn

import kd.models.networks  # noqa: F401 (registers its names)
from kd.errors import ConfigError, require
from kd.models.classes import align, recorded
from kd.models.outputs import logits_of
from kd.models.weights import Say, load_weights, other_classes, unsaid
from kd.runtime.own_code import own_network
from kd.text import did_you_mean

_MISFITS = {  # as torch's load_state_dict words them
    "missing tensor": r'Missing key\(s\) in state_dict: "(.+?)"',
    "unexpected tensor": r'Unexpected key\(s\) in state_dict: "(.+?)"',
    "tensor of another shape": r"size mismatch for (.+?): ",
}


def create(
    name: str, *, checkpoint_path: str | Path | None = None, checkpoint_key: str | None = None, **kwargs: Any
) -> nn.Module:
    """timm.create_model, with a file of weights that kd reads, without running code, as `load_weights` does.

    Raises:
        ConfigError: timm and kd know no such network.
        CheckpointError: the file cannot be read, or does not fit the network exactly.
    """
    _own_or_known(name, f"model={name!r}")
    network = timm.create_model(name, **kwargs)
    if checkpoint_path is not None:
        load_weights(network, Path(checkpoint_path), key=checkpoint_key, say=warnings.warn)
    return network


def build(
    name: str,
    *,
    num_classes: int,
    input_shape: Sequence[int],
    class_names: Sequence[str] = (),
    section: str = "teacher.",
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_key: str | None = None,
    finetune: bool = False,
    weights_classes: Sequence[str] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    say: Say = unsaid,
) -> nn.Module:
    """A network of timm or of kd for a data set, checked with one image; never with a silent random head.

    Args:
        name: timm's name, "hf-hub:..." or "local-dir:...", a name of kd.models.networks, or FILE.py:NAME, a function or
            class that makes a network of one's own.
        num_classes: classes of the data.
        input_shape: (channels, height, width) of an image, or (length,) of a vector.
        class_names: of the data; the head of weights that record the same names in another order is put into this one.
        section: "teacher." or "student.", the section of the recipe that messages name, or "" for none.
        pretrained: start from timm's weights.
        checkpoint: path of weights (.safetensors, .pth, .pt or .bin, without code, or the .index.json of several),
            which are taken instead of timm's.
        checkpoint_key: the entry of that file with the network, where several fit.
        finetune: the weights will be trained further, so that a head of other classes is replaced by a fresh one and
            a first layer for other channels is adapted by timm.
        weights_classes: class names of the weights, in their order, in place of those that they record.
        model_kwargs: further arguments of timm.create_model, or of one's own function.
        say: is told in one line what was chosen, resampled or reordered in weights.

    Returns:
        The network in train mode, on the CPU.

    Raises:
        ConfigError: the name is unknown, timm's weights cannot be had or do not fit, or record other classes.
        CheckpointError: the file cannot be read, or does not fit.
    """
    shape, kwargs = tuple(input_shape), dict(model_kwargs or {})
    setting = f"{section}model={name}" + (f" {section}model_kwargs={kwargs}" if kwargs else "")
    own = _own_or_known(name, setting)
    download = pretrained and checkpoint is None and own is None  # one's own function loads its weights itself
    try:
        make = partial(_call, own) if own else partial(_create, name, shape, download, finetune)
        model, classes = make(num_classes, kwargs)
        _try_out(model, shape, num_classes)
    except Exception as error:  # every network has errors of its own for a wrong size or argument, the hub and timm too
        raise ConfigError(f"{setting}: {_what_failed(error, shape, section)}") from error
    # After loading: a download is not lost, finetune=true takes it from the hub's cache.
    if download and not finetune:  # timm would have made a fresh head without a word
        require(classes == num_classes, f"{setting}: {other_classes(classes, num_classes)}")
    if checkpoint is not None:
        load_weights(model, Path(checkpoint), finetune, key=checkpoint_key, section=section, say=say)
    if class_names and (download or checkpoint is not None):
        where = setting if download else f"{section}checkpoint={checkpoint}"
        align(model, weights_classes or recorded(model, checkpoint), class_names, shape, where, finetune, say)
    return model


def published(name: str, section: str, model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A network's pretrained_cfg, as timm, the hub or a directory has it. Raises ConfigError."""
    setting = f"{section}model={name}"
    if _own_or_known(name, setting):
        return {}  # what is not known without making it
    try:
        return dict(resolve_model_input_args(name, **model_kwargs)["pretrained_cfg"])
    except Exception as error:  # the hub and timm have errors of their own
        raise ConfigError(f"{setting}: {_what_failed(error, (), section)}") from error


def _own_or_known(name: str, setting: str) -> Callable[..., Any] | None:
    """One's own function that FILE.py:NAME names, None for a network of timm or kd.

    Raises ConfigError when nobody knows the network. Another name with a colon is on the hub or in a directory.
    """
    if own := own_network(name, setting):
        return own
    if ":" not in name and not timm.is_model(name):
        near = did_you_mean(name, timm.list_models() + timm.list_models(include_tags=True), 3)
        raise ConfigError(f"{setting}: timm and kd know no such network{near}")
    return None


def _call(own: Callable[..., Any], num_classes: int, kwargs: dict[str, Any]) -> tuple[nn.Module, int]:
    """The network that one's own function or class makes, with num_classes=K where it takes that, and its classes."""
    taken = inspect.signature(own).parameters
    takes = "num_classes" in taken or any(each.kind is each.VAR_KEYWORD for each in taken.values())
    model = own(**({"num_classes": num_classes} if takes else {}) | kwargs)
    require(isinstance(model, nn.Module), f"gives a {type(model).__name__}: must be an nn.Module", ValueError)
    return model, num_classes


def _create(
    name: str, shape: tuple[int, ...], download: bool, finetune: bool, num_classes: int, kwargs: dict[str, Any]
) -> tuple[nn.Module, Any]:
    """A network of timm or kd, and the number of classes of timm's weights for it."""
    arguments = _arguments(name, shape, kwargs, num_classes, as_they_are=download and not finetune)
    model = timm.create_model(**arguments, pretrained=download, checkpoint_path=None)
    return model, arguments["pretrained_cfg"].get("num_classes")


def _arguments(
    name: str, shape: tuple[int, ...], kwargs: dict[str, Any], num_classes: int, as_they_are: bool
) -> dict[str, Any]:
    """What timm.create_model needs for such inputs; timm's rule says which networks take an img_size.

    With weights taken `as_they_are` timm loads the first layer so, or raises; else it adapts that to the channels.
    """
    if len(shape) == 3:
        arguments = resolve_model_input_args(name, {"input_size": shape}, num_classes=num_classes, **kwargs)
    else:  # timm knows heights and widths only: a vector is an image one pixel high
        size = (1, *shape)
        arguments = resolve_model_input_args(name, {"in_chans": 1}, num_classes=num_classes, img_size=size, **kwargs)
    if as_they_are:
        cfg = arguments["pretrained_cfg"]
        size = (arguments.get("in_chans", shape[0]), *cfg["input_size"][1:])
        arguments["pretrained_cfg"] = {**cfg, "input_size": size}
    return arguments


def _try_out(model: nn.Module, shape: tuple[int, ...], num_classes: int) -> None:
    """Raise ValueError unless one input gives logits of `num_classes`."""
    with torch.no_grad():
        logits = logits_of(model.eval()(torch.zeros(1, *shape)))
    model.train()
    gives = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    require(gives == (1, num_classes), f"gives {gives} where logits (1, {num_classes}) are needed", ValueError)


def _what_failed(error: Exception, shape: tuple[int, ...], section: str) -> str:
    """One line of what timm, the hub or the network raised, and what helps."""
    said = textwrap.shorten(str(error), 160) or type(error).__name__
    if isinstance(error, OSError):  # the hub's errors too
        file = f"{section}checkpoint=FILE, or {section}model=local-dir:DIRECTORY"
        return f"cannot be loaded ({said}); without network give {file}"
    if channels := re.search(r"weight shape \(\d+, (\d+)\D.* is inconsistent with input_size", str(error)):
        differ = f"its weights are for {channels[1]} channels, the data has {shape[0]}"
        return f"{differ}; in a recipe teacher.finetune=true adapts it"
    misfits = {kind: re.search(pattern, str(error)) for kind, pattern in _MISFITS.items()}
    if firsts := [f"first {kind}: {first[1]}" for kind, first in misfits.items() if first]:
        return f"its weights do not fit the network: {'; '.join(firsts)}"
    vectors = "; mlp_nano, mlp_tiny, mlp_mini, mlp_small and mlp_wide take vectors" if len(shape) == 1 else ""
    return f"fails for inputs of shape {shape} ({said}){vectors}"
