"""Teacher and Student around any network, and `build`, which makes or loads one for a data set or says why not.

n: images or vectors, k: classes. Wrapping an ``nn.Module`` needs torch only; names of networks need timm.
"""

from __future__ import annotations

import difflib
import logging
import textwrap
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd.errors import ConfigError
from kd.models.weights import check_classes, load, load_named


class Output(NamedTuple):
    """What a Teacher or Student gives: logits (n, k), and the features asked for by the name of their module."""

    logits: Tensor
    features: dict[str, Tensor]


INPUT = ":input"  # behind the name of a module, it means what the module takes instead of what it gives


class _Taps:
    """Forward hooks that keep what named modules give, or take, while `run` is running, and nothing afterwards.

    They are registered once, because torch.compile recompiles for every new hook.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.names = tuple(names)
        self.running: list[dict[str, tuple[Tensor, int]]] = []
        modules = {name: module for name, module in model.named_modules() if name}
        for name in self.names:
            module = name.removesuffix(INPUT)
            if module not in modules:
                raise ValueError(f"features={name!r}: no such module{_did_you_mean(module, modules)}")
            if name.endswith(INPUT):
                modules[module].register_forward_pre_hook(partial(self._keep_input, name))
            else:
                modules[module].register_forward_hook(partial(self._keep, name))

    def _keep_input(self, name: str, module: nn.Module, inputs: Any) -> None:
        if self.running:  # a copy, because the module may write into it, as a ReLU in place does
            first = inputs[0].clone() if inputs and isinstance(inputs[0], Tensor) else inputs
            self._keep(name, module, inputs, first)

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.running:  # else someone calls the network itself
            if not isinstance(output, Tensor):
                verb = "takes" if name.endswith(INPUT) else "gives"
                raise ValueError(f"features={name!r}: the module {verb} a {type(output).__name__}, not a tensor")
            self.running[-1][name] = (output, _writes(output))

    def run(self, model: nn.Module, inputs: tuple[Any, ...]) -> Output:
        self.running.append({})
        try:
            logits = model(*inputs)
        finally:
            kept = self.running.pop()
        if not isinstance(logits, Tensor):
            raise ValueError(f"the network gives a {type(logits).__name__}, not logits (n, k)")
        for name in self.names:
            if name not in kept:
                raise ValueError(f"features={name!r}: the forward pass does not call this module")
            feature, writes = kept[name]
            if _writes(feature) != writes:
                raise ValueError(f"features={name!r}: overwritten in place by a later module; name that one instead")
        return Output(logits, {name: kept[name][0] for name in self.names})


class Teacher(nn.Module):
    """A network that is learned from: in eval mode and without gradients whatever its surroundings do.

    It is held outside PyTorch's registries: `parameters`, `state_dict`, `train` and `requires_grad_`, of the teacher
    and of any parent, do not reach it, while `to`, `half` and their like do. The network itself is frozen, not a copy:
    give a deep copy of one that goes on training.

    Args:
        model: a network, or a timm name.
        features: names of modules, as in `named_modules`, whose outputs to give, or with ":input" behind the name
            their first inputs; of a module that runs more than once, the last.
        create_kwargs: arguments of timm.create_model, such as pretrained=True, where `model` is a name;
            checkpoint_path is read by kd, without code.

    Raises:
        TypeError: `model` is neither a network nor a name.
        CheckpointError: the file of checkpoint_path is no weights, or does not fit the network exactly.
        ValueError: a feature's name is unknown, checkpoint_path is no path, or pretrained weights meet another number
            of classes, for which timm would make a random head.
    """

    def __init__(self, model: nn.Module | str, *, features: Sequence[str] = (), **create_kwargs: Any):
        super().__init__()
        if (
            isinstance(model, str)
            and "pretrained" not in create_kwargs
            and create_kwargs.get("checkpoint_path") is None
        ):
            warnings.warn(
                f"Teacher({model!r}) has random weights: pretrained=True or checkpoint_path=...", stacklevel=2
            )
        model = _network(model, create_kwargs)
        if create_kwargs.get("pretrained"):
            weights: Any = model.pretrained_cfg
            published, classes = weights["num_classes"], model.num_classes
            if published != classes:
                raise ValueError(
                    f"num_classes={classes}: the pretrained weights have {published}; fine-tune them first"
                )
        self._taps = _Taps(model, features)
        self._held = (model.eval().requires_grad_(False),)  # modules in a tuple are not registered
        self.eval()

    def extra_repr(self) -> str:
        """The class of the network, for print(teacher)."""
        return type(self.model).__name__

    @property
    def model(self) -> nn.Module:
        """The frozen network."""
        return self._held[0]

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever the mode of the parent."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Teacher:
        self.model._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Output:
        """Logits (n, k) and features without gradient, from what the network takes."""
        if self.model.training:
            self.model.eval()  # someone reached in; BatchNorm must not move
        return self._taps.run(self.model, inputs)


class Student(nn.Module):
    """A network that learns; `student.model.state_dict()` is what timm loads.

    Args:
        model: a network, or a timm name.
        features: as the teacher's, with their graph.
        create_kwargs: as the teacher's.

    Raises:
        TypeError, CheckpointError: as the teacher does.
        ValueError: a feature's name is unknown, or checkpoint_path is no path.
    """

    def __init__(self, model: nn.Module | str, *, features: Sequence[str] = (), **create_kwargs: Any):
        super().__init__()
        self.model = _network(model, create_kwargs)
        self._taps = _Taps(self.model, features)

    def forward(self, *inputs: Any) -> Output:
        """Logits (n, k) and features from what the network takes."""
        return self._taps.run(self.model, inputs)


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
        checkpoint: path of weights (.safetensors, or .pth, .pt, .bin without code), which go before timm's.
        finetune: the weights will be trained further, so that a head of other classes is replaced by a fresh one and
            a first layer for other channels is adapted by timm.
        model_kwargs: further arguments of timm.create_model.

    Returns:
        The network in train mode, on the CPU.

    Raises:
        ConfigError: the name is unknown, the weights cannot be had or do not fit; one line that says what to type.
    """
    import timm

    shape, kwargs = tuple(input_shape), dict(model_kwargs or {})
    setting = f"{role}.model={name}" + (f" {role}.model_kwargs={kwargs}" if kwargs else "")
    _check_name(name, setting)
    if checkpoint == "":
        raise ConfigError(f"{role}.checkpoint=: must be the path of a .safetensors or .pth file")
    fetches = pretrained and checkpoint is None
    with _translated(setting, shape, role), _bounded_hub() if fetches or name.startswith("hf") else nullcontext():
        arguments = _arguments(name, shape, kwargs, num_classes)
        if fetches:
            _check_published(setting, arguments["pretrained_cfg"], num_classes, shape[0], role, finetune)
        model = timm.create_model(**arguments, pretrained=fetches, checkpoint_path=None)
    if checkpoint is not None:
        load(model, Path(checkpoint), num_classes, role, finetune)
    with _translated(setting, shape, role):
        _try_out(model, shape, num_classes)
    return model


def weights_metadata(path: str | Path) -> dict[str, Any]:
    """What kd wrote beside the weights: model, num_classes, label_smoothing and smoothing; class_names, input_shape,
    mean and std (of pixels from 0 to 1), with which new images are prepared.

    Empty for a file without them and for other formats. Raises CheckpointError where there is no file, and when a
    .safetensors file is not one or says what kd never writes.
    """
    from kd.checkpoint import regular, weights_header
    from kd.errors import CheckpointError

    if Path(path).suffix != ".safetensors":
        regular(Path(path))
        return {}
    found = weights_header(Path(path))
    known = {key: found[key] for key in ("model", "label_smoothing", "smoothing") if key in found}
    if not _is_record(**known) or ("label_smoothing" in known) != ("smoothing" in known):
        allowed = "a model's name, label_smoothing >= 0 and < 1 with smoothing=uniform or others"
        raise CheckpointError(f"{path}: its metadata, {_brief(ValueError(known))}, is not what kd writes: {allowed}")
    return found


def _is_record(model: Any = "", label_smoothing: Any = "0", smoothing: Any = "uniform") -> bool:
    from kd.smoothing import SMOOTHINGS

    try:
        mass = float(label_smoothing)
    except (TypeError, ValueError, OverflowError):
        return False
    return isinstance(model, str) and 0 <= mass < 1 and isinstance(smoothing, str) and smoothing in SMOOTHINGS


def _network(model: nn.Module | str, create_kwargs: dict[str, Any]) -> nn.Module:
    if not isinstance(model, nn.Module | str):
        found = textwrap.shorten(repr(model), 80)
        raise TypeError(f"model={found}: must be an nn.Module or the name of a network, is a {type(model).__name__}")
    if not isinstance(model, str):
        if create_kwargs:
            raise ValueError(f"{', '.join(create_kwargs)}: only for networks given by name")
        return model
    try:
        import timm

        import kd.models.networks  # noqa: F401 (registers its names)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"a network by name, {model!r}, needs {error.name}: pip install 'kd-torch[train]'"
        ) from error
    _check_name(model, f"model={model!r}")
    kwargs = dict(create_kwargs)
    path = kwargs.pop("checkpoint_path", None)  # timm's reader would say in its own words what is no file of weights
    if path is not None and (not isinstance(path, str | Path) or path == ""):
        raise ValueError(f"checkpoint_path={path!r}: must be the path of a .safetensors or .pth file")
    network = timm.create_model(model, **kwargs)
    if path is not None:
        load_named(network, Path(path))
    return network


def _writes(tensor: Tensor) -> int:
    """How often the tensor's memory was written in place; neither inference mode nor compiled code counts."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(dict.fromkeys(names)), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else ""


def _brief(error: BaseException) -> str:
    return textwrap.shorten(str(error), 160) or type(error).__name__


def _check_name(name: str, setting: str) -> None:
    """Raise ConfigError when timm does not know the network or the tag of its weights."""
    import timm

    import kd.models.networks  # noqa: F401 (registers its names)

    if ":" in name:
        return  # named on the hub or in a folder
    if not timm.is_model(name) or ("." in name and name not in timm.list_models(include_tags=True)):
        near = _did_you_mean(name, timm.list_models() + timm.list_models(include_tags=True))
        raise ConfigError(f"{setting}: timm and kd know no such network{near}")


def _arguments(name: str, shape: tuple[int, ...], kwargs: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """What timm.create_model needs for such inputs; timm's rule says which networks take an img_size."""
    from timm.models import resolve_model_input_args

    if len(shape) == 3:
        return resolve_model_input_args(name, {"input_size": shape}, num_classes=num_classes, **kwargs)
    return resolve_model_input_args(name, {"in_chans": 1}, num_classes=num_classes, img_size=shape, **kwargs)


def _check_published(
    setting: str, weights: dict[str, Any], num_classes: int, channels: int, role: str, finetune: bool
) -> None:
    """Raise ConfigError when timm has no weights, or would quietly alter them to fit and they stay as they are."""
    if not any(weights.get(source) for source in ("url", "file", "state_dict", "hf_hub_id")):
        raise ConfigError(f"{setting}: timm has no weights for it; {role}.pretrained=false starts from random ones")
    if finetune:
        return
    check_classes(setting, weights["num_classes"], num_classes, role)
    if weights["input_size"][0] != channels:
        raise ConfigError(
            f"{setting}: its weights are for {weights['input_size'][0]} channels, the data has {channels}: "
            f"{role}.finetune=true trains an adapted first layer"
        )


def _try_out(model: nn.Module, shape: tuple[int, ...], num_classes: int) -> None:
    """Raise ValueError unless one input gives logits of `num_classes`."""
    with torch.no_grad():
        logits = model.eval()(torch.zeros(1, *shape))
    model.train()
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != (1, num_classes):
        raise ValueError(f"gives {found} where logits (1, {num_classes}) are needed")


@contextmanager
def _translated(setting: str, shape: tuple[int, ...], role: str) -> Generator[None]:
    """Turn what timm and the network raise about a setting into one line that names it."""
    try:
        yield
    except ConfigError:
        raise
    except OSError as error:
        advice = {  # a student has no checkpoint of its own
            "teacher": "without network, teacher.checkpoint=/path/to/weights.safetensors",
            "student": "without network, student.pretrained=false or student.model=local-dir:/path/to/a/folder",
        }[role]
        wrong = _brief(error) if "local-dir:" in setting else f"cannot be fetched ({type(error).__name__})"
        raise ConfigError(f"{setting}: {wrong}; {advice}") from error
    except (RuntimeError, TypeError, ValueError, AssertionError, LookupError) as error:
        vectors = "; mlp_nano, mlp_tiny, mlp_mini, mlp_small and mlp_wide take vectors" if len(shape) == 1 else ""
        raise ConfigError(f"{setting}: does not work for inputs of shape {shape} ({_brief(error)}){vectors}") from error


@contextmanager
def _bounded_hub() -> Generator[None]:
    """Without network, answer within seconds and quietly; the hub's client retries for 45 s. Its cache still serves."""
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
