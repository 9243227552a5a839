"""Teacher and Student: wrappers around any network that give its logits and the outputs of named modules.

n: images or vectors, k: classes. Wrapping an ``nn.Module`` needs torch only; networks by name need timm.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd.errors import require
from kd.models.outputs import logits_of
from kd.text import did_you_mean


class Output(NamedTuple):
    """Output of a Teacher or Student: logits (n, k), and the requested features by the name of their module."""

    logits: Tensor
    features: dict[str, Tensor]


INPUT = ":input"  # suffix to the name of a module: its input instead of its output


class _Hooks:
    """Forward hooks that keep the outputs, or inputs, of named modules during `run`, and nothing afterwards.

    They are registered once, because torch.compile recompiles for every new hook.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.names = tuple(names)
        self.kept: dict[str, tuple[Tensor, int]] | None = None  # None outside `run`
        modules = {name: module for name, module in model.named_modules() if name}
        for name in self.names:
            module = name.removesuffix(INPUT)
            near = did_you_mean(module, modules, 3)
            require(module in modules, f"features={name!r}: no such module{near}", ValueError)
            if name.endswith(INPUT):
                modules[module].register_forward_pre_hook(partial(self._keep_input, name), with_kwargs=True)
            else:
                modules[module].register_forward_hook(partial(self._keep, name))

    def _keep_input(self, name: str, module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        if self.kept is not None:  # a copy, because the module may overwrite its input, as an in-place ReLU does
            first = next(iter((*inputs, *named.values())), None)
            self._keep(name, module, inputs, first.clone() if isinstance(first, Tensor) else first)

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.kept is not None:  # otherwise the network is called directly, past its wrapper
            _check_tensor(output, f"features={name!r}: the module gives")
            self.kept[name] = (output, _writes(output))

    def run(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Output:
        kept = self.kept = {}
        logits = logits_of(model(*inputs, **named))
        self.kept = None
        _check_tensor(logits, "logits (n, k): the network gives")
        for name in self.names:
            require(name in kept, f"features={name!r}: the forward pass does not call this module", ValueError)
            feature, writes = kept[name]
            overwritten = f"features={name!r}: overwritten in place by a later module; name that one instead"
            require(_writes(feature) == writes, overwritten, ValueError)
        return Output(logits, {name: kept[name][0] for name in self.names})


class Teacher(nn.Module):
    """A frozen network to learn from: always in eval mode, and without gradients.

    Called as the network is, also by keyword, it returns an ``Output``: logits (n, k), and the requested features by
    name. A network may return its logits, or an output with `logits`, as those of Hugging Face's transformers do.

    The network is not a registered submodule: `parameters`, `state_dict`, `train` and `requires_grad_`, of the teacher
    and of any parent module, do not reach it; `to`, `half` and the like do. The network that you pass is frozen itself,
    without a copy: to train it further, pass a deep copy.

    Args:
        model: a network, or the name of a timm model.
        features: names of modules, as in `named_modules`, whose outputs to return; "NAME:input" returns the module's
            first input. For a module that runs more than once, the last call counts.
        create_kwargs: arguments of timm.create_model, such as pretrained=True, where `model` is a name. kd reads the
            file of checkpoint_path itself, without running code from it.

    Raises:
        TypeError: `model` is neither a network nor a name.
        CheckpointError: the file of checkpoint_path cannot be read, or does not fit the network exactly.
        ValueError: the name of the model or of a feature is unknown, or num_classes differs from that of the
            pretrained weights (timm would then make a random head).
    """

    def __init__(self, model: nn.Module | str, *, features: Sequence[str] = (), **create_kwargs: Any):
        super().__init__()
        if isinstance(model, str) and not {"pretrained", "checkpoint_path"} & create_kwargs.keys():
            random = f"Teacher({model!r}) has random weights: pass pretrained=True or checkpoint_path=PATH"
            warnings.warn(random, stacklevel=2)
        model = _network(model, create_kwargs)
        if create_kwargs.get("pretrained"):
            weights: Any = model.pretrained_cfg
            published, classes = weights["num_classes"], model.num_classes
            differ = f"num_classes={classes}: the pretrained weights have {published} classes; fine-tune first"
            require(published == classes, differ, ValueError)
        self._hooks = _Hooks(model, features)
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
    def forward(self, *inputs: Any, **named: Any) -> Output:
        """Logits (n, k) and features, without gradient, of the network's own inputs."""
        if self.model.training:
            self.model.eval()  # someone called model.train(); BatchNorm's statistics must not move
        return self._hooks.run(self.model, inputs, named)


class Student(nn.Module):
    """A network that learns, called as a Teacher is; `student.model.state_dict()` is what timm loads.

    Args:
        model: a network, or the name of a timm model.
        features: as for Teacher; their gradients flow into the network.
        create_kwargs: as for Teacher.

    Raises:
        TypeError, CheckpointError: as Teacher does.
        ValueError: the name of the model or of a feature is unknown.
    """

    def __init__(self, model: nn.Module | str, *, features: Sequence[str] = (), **create_kwargs: Any):
        super().__init__()
        self.model = _network(model, create_kwargs)
        self._hooks = _Hooks(self.model, features)

    def forward(self, *inputs: Any, **named: Any) -> Output:
        """Logits (n, k) and features of the network's own inputs."""
        return self._hooks.run(self.model, inputs, named)


def _network(model: nn.Module | str, create_kwargs: dict[str, Any]) -> nn.Module:
    if isinstance(model, nn.Module):
        require(not create_kwargs, f"{', '.join(create_kwargs)}: allowed only if model is a name", ValueError)
        return model
    wrong = f"model: must be an nn.Module or the name of a network, got {type(model).__name__}"
    require(isinstance(model, str), wrong, TypeError)
    from kd.models.factory import create  # here: a network by name needs timm, an nn.Module does not

    return create(model, **create_kwargs)


def _check_tensor(value: object, what: str) -> None:
    require(isinstance(value, Tensor), f"{what} a {type(value).__name__}: must be a tensor", ValueError)


def _writes(tensor: Tensor) -> int:
    """How often the tensor's memory was written in place; neither inference mode nor compiled code counts."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version
