"""Layers for feature methods: which modules give feature maps, which is the classifier, and the View made from both.

    ours, theirs = tap_pair(student_network, teacher_network)
    student, teacher = Student(student_network, features=ours.names), Teacher(teacher_network, features=theirs.names)
    seen = Seen(ours.view(student.model, student(x)), theirs.view(teacher.model, teacher(x)), target)

n: images, c: channels, h, w: height and width, l: tokens, d: dimensions, k: classes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from kd.losses.methods.base import View
from kd.models.wrappers import INPUT, Output


@dataclass(frozen=True)
class Taps:
    """Where one network is tapped: layers whose outputs become maps, from shallow to deep, and the classifier."""

    layers: tuple[str, ...]
    classifier: str

    @property
    def names(self) -> tuple[str, ...]:
        """The `features` of a Teacher or Student."""
        return (*self.layers, self.classifier + INPUT)

    def view(self, model: nn.Module, output: Output) -> View:
        """The view of an output of the Teacher or Student that wraps `model` with these `names`."""
        module: Any = model.get_submodule(self.classifier)
        weight = module.weight
        return View(
            logits=output.logits,
            maps=[as_map(name, output.features[name], model) for name in self.layers],
            embedding=_embedding(self.classifier, output.features[self.classifier + INPUT]),
            weight=rearrange(weight, "k d 1 1 -> k d") if weight.ndim == 4 else weight,
            bias=module.bias,
        )


class Layer(NamedTuple):
    """One line of `list_layers`."""

    name: str
    kind: str
    shape: tuple[int, ...]  # of what it gives for one input


def tap(model: nn.Module, layers: Sequence[str] = ()) -> Taps:
    """The network's taps: `layers`, or timm's stages (`feature_info`), and the classifier.

    Raises ValueError where the network states neither stages nor one linear classifier.
    """
    return Taps(tuple(layers) or tuple(entry["module"] for entry in _stages(model)), classifier_name(model))


def needed(
    needs: Collection[str],
    student: nn.Module,
    teacher: nn.Module,
    student_layers: Sequence[str] = (),
    teacher_layers: Sequence[str] = (),
) -> tuple[Taps, Taps] | None:
    """The taps of student and teacher for methods with these `needs`; None where logits are enough.

    Raises ValueError as `tap_pair` does.
    """
    if "maps" in needs:
        return tap_pair(student, teacher, student_layers, teacher_layers)
    if {"embedding", "weight"} & set(needs):  # of networks without stages too
        return Taps((), classifier_name(student)), Taps((), classifier_name(teacher))
    return None


def tap_pair(
    student: nn.Module, teacher: nn.Module, student_layers: Sequence[str] = (), teacher_layers: Sequence[str] = ()
) -> tuple[Taps, Taps]:
    """The taps of student and teacher, whose layers pair up by position.

    Without named layers these are timm's stages. Where their numbers differ, stages that reduce the image by the same
    factor are paired, the deepest of several. Raises ValueError where no stages pair up, or as many layers of each are
    not named.
    """
    if student_layers or teacher_layers:
        ours, theirs = tap(student, student_layers), tap(teacher, teacher_layers)
        if len(ours.layers) != len(theirs.layers):
            raise ValueError(
                f"{len(ours.layers)} student layers and {len(theirs.layers)} teacher layers: must be equal"
            )
        return ours, theirs
    stages = _stages(student), _stages(teacher)
    if len(stages[0]) == len(stages[1]):
        return tap(student), tap(teacher)
    at = [{entry["reduction"]: entry["module"] for entry in each} for each in stages]  # of several, the last stays
    common = [reduction for reduction in at[0] if reduction in at[1]]
    if not common:
        raise ValueError(f"student stages reduce by {list(at[0])}, teacher stages by {list(at[1])}: name layers")
    return tap(student, [at[0][r] for r in common]), tap(teacher, [at[1][r] for r in common])


def classifier_name(model: nn.Module) -> str:
    """The name of the linear module that gives the logits, as timm's get_classifier has it. Raises ValueError."""
    get_classifier: Any = getattr(model, "get_classifier", lambda: None)  # networks of other libraries have none
    classifier = get_classifier()
    if not isinstance(getattr(classifier, "weight", None), Tensor):
        kind = type(classifier).__name__
        raise ValueError(f"{type(model).__name__}: get_classifier() gives {kind}, not one linear layer with a weight")
    return next(name for name, module in model.named_modules() if module is classifier)


def list_layers(model: nn.Module, input_shape: Sequence[int]) -> list[Layer]:
    """Every module that gives a tensor for one input of a shape, in the order of their first calls."""
    layers: dict[str, Layer] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            layers.setdefault(name, Layer(name, type(module).__name__, tuple(output.shape)))

    handles = [module.register_forward_hook(partial(keep, name)) for name, module in model.named_modules() if name]
    parameter, training = next(model.parameters()), model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return list(layers.values())


def as_map(name: str, feature: Tensor, model: nn.Module) -> Tensor:
    """A layer's output as (n, c, h, w): tokens laid out on their grid without class tokens, vectors as 1x1 maps."""
    if feature.ndim == 4:  # timm's networks whose maps end in channels say so
        last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return rearrange(feature, "n h w c -> n c h w") if last else feature
    if feature.ndim == 2:
        return rearrange(feature, "n d -> n d 1 1")
    if feature.ndim == 3:
        tokens = feature[:, getattr(model, "num_prefix_tokens", 0) :]
        height, width = _grid(name, tokens.shape[1], model)
        return rearrange(tokens, "n (h w) d -> n d h w", h=height, w=width)
    raise ValueError(f"layer {name}: gives shape {tuple(feature.shape)}, not a map, tokens or a vector; name another")


def _grid(name: str, tokens: int, model: nn.Module) -> tuple[int, int]:
    stated = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if stated is not None and math.prod(stated) == tokens:
        return tuple(stated)
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"layer {name}: gives {tokens} tokens, not a square and not the network's grid")
    return side, side


def _embedding(name: str, feature: Tensor) -> Tensor:
    if feature.ndim == 4 and feature.shape[2:] == (1, 1):
        return rearrange(feature, "n d 1 1 -> n d")
    if feature.ndim != 2:
        raise ValueError(f"classifier {name}: reads shape {tuple(feature.shape)}, not one embedding (n, d) an image")
    return feature


def _stages(model: nn.Module) -> list[dict[str, Any]]:
    info: Any = getattr(model, "feature_info", None)
    stages = [entry for entry in info or () if entry.get("module")]
    if not stages:
        raise ValueError(f"{type(model).__name__}: does not state its stages (timm's feature_info); name the layers")
    return stages
