"""Networks by name: `build` makes or loads one for a data set, or says in one line why it cannot."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import resolve_model_input_args
from torch import Tensor, nn

import kd.models.networks  # noqa: F401 (registers its names)
from kd.errors import ConfigError, require
from kd.models.weights import load_weights, other_classes
from kd.text import did_you_mean


def create(name: str, *, checkpoint_path: str | Path | None = None, **kwargs: Any) -> nn.Module:
    """timm.create_model, with a file of weights that kd reads, without running code.

    Raises:
        ConfigError: timm and kd know no such network.
        CheckpointError: the file cannot be read, or does not fit the network exactly.
    """
    _check_name(name, f"model={name!r}")
    network = timm.create_model(name, **kwargs)
    if checkpoint_path is not None:
        load_weights(network, Path(checkpoint_path))
    return network


def build(
    name: str,
    *,
    num_classes: int,
    input_shape: Sequence[int],
    role: str = "teacher",
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    finetune: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network of timm or of kd for a data set, checked with one image; never with a silent random head.

    Args:
        name: timm's name, "hf-hub:..." or "local-dir:...", or a name of kd.models.networks.
        num_classes: classes of the data.
        input_shape: (channels, height, width) of an image, or (length,) of a vector.
        role: "teacher" or "student", the section of the recipe that messages name.
        pretrained: start from timm's weights.
        checkpoint: path of weights (.safetensors, or .pth, .pt, .bin without code), which are taken instead of timm's.
        finetune: the weights will be trained further, so that a head of other classes is replaced by a fresh one and
            a first layer for other channels is adapted by timm.
        model_kwargs: further arguments of timm.create_model.

    Returns:
        The network in train mode, on the CPU.

    Raises:
        ConfigError: the name is unknown, or timm's weights cannot be had or do not fit.
        CheckpointError: the file cannot be read, or does not fit.
    """
    shape, kwargs = tuple(input_shape), dict(model_kwargs or {})
    setting = f"{role}.model={name}" + (f" {role}.model_kwargs={kwargs}" if kwargs else "")
    download = pretrained and checkpoint is None
    _check_name(name, setting)
    with _one_line(setting, shape, role), _quick_hub() if download or name.startswith("hf") else nullcontext():
        arguments = _arguments(name, shape, kwargs, num_classes)
        if download:
            _check_published(setting, arguments["pretrained_cfg"], num_classes, shape[0], role, finetune)
        model = timm.create_model(**arguments, pretrained=download, checkpoint_path=None)
        _try_out(model, shape, num_classes)
    if checkpoint is not None:
        load_weights(model, Path(checkpoint), finetune)
    return model


def _check_name(name: str, setting: str) -> None:
    """Raise ConfigError when timm does not know the network or the tag of its weights."""
    if ":" in name:
        return  # named on the hub or in a directory
    tagged = timm.list_models(include_tags=True)
    if not timm.is_model(name) or ("." in name and name not in tagged):
        near = did_you_mean(name, timm.list_models() + tagged, 3)
        raise ConfigError(f"{setting}: timm and kd know no such network{near}")


def _arguments(name: str, shape: tuple[int, ...], kwargs: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """What timm.create_model needs for such inputs; timm's rule says which networks take an img_size."""
    if len(shape) == 3:
        return resolve_model_input_args(name, {"input_size": shape}, num_classes=num_classes, **kwargs)
    # timm knows heights and widths only: a vector is an image one pixel high
    return resolve_model_input_args(name, {"in_chans": 1}, num_classes=num_classes, img_size=(1, *shape), **kwargs)


def _check_published(
    setting: str, weights: dict[str, Any], num_classes: int, channels: int, role: str, finetune: bool
) -> None:
    """Raise ConfigError when timm has no weights, or would quietly alter them to fit and they stay as they are."""
    published = weights["num_classes"], weights["input_size"][0]
    if not any(weights.get(source) for source in ("url", "file", "state_dict", "hf_hub_id")):
        wrong = f"timm has no weights for it; {role}.pretrained=false starts from random ones"
    elif finetune or published == (num_classes, channels):
        return
    elif published[0] != num_classes:
        wrong = other_classes(published[0], num_classes)
    else:
        wrong = f"its weights are for {published[1]} channels, the data has {channels}; {role}.finetune=true adapts it"
    raise ConfigError(f"{setting}: {wrong}")


def _try_out(model: nn.Module, shape: tuple[int, ...], num_classes: int) -> None:
    """Raise ValueError unless one input gives logits of `num_classes`."""
    with torch.no_grad():
        logits = model.eval()(torch.zeros(1, *shape))
    model.train()
    gives = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    require(gives == (1, num_classes), f"gives {gives} where logits (1, {num_classes}) are needed", ValueError)


@contextmanager
def _one_line(setting: str, shape: tuple[int, ...], role: str) -> Generator[None]:
    """Turn what timm, the hub and the network raise about a setting into one line that names it."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # every network has errors of its own for a wrong size or argument
        said = textwrap.shorten(str(error), 160) or type(error).__name__
        if isinstance(error, OSError):  # the hub's errors too
            offline = f"teacher.checkpoint=FILE, or {role}.model=local-dir:DIRECTORY"
            wrong = f"cannot be loaded ({said}); without network give {offline}"
        else:
            wrong = f"does not work for inputs of shape {shape} ({said})"
        vectors = "; mlp_nano, mlp_tiny, mlp_mini, mlp_small and mlp_wide take vectors" if len(shape) == 1 else ""
        raise ConfigError(f"{setting}: {wrong}{vectors}") from error


@contextmanager
def _quick_hub() -> Generator[None]:
    """Without network, fail within seconds and quietly; the hub's client retries for 45 s. Its cache still serves."""
    from huggingface_hub import constants
    from huggingface_hub.utils import http_backoff

    logger, offline = logging.getLogger("huggingface_hub"), constants.HF_HUB_OFFLINE
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # Any answer of the server, an error too, shows that there is a network, through proxies and mirrors as well.
        http_backoff("HEAD", constants.ENDPOINT, max_retries=1, timeout=10)
    except Exception:  # what its HTTP library raises differs between versions of the client
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logger.setLevel(level)
