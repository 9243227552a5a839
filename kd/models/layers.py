"""Layers for feature methods: which modules give feature maps, which is the classifier, and the View made from both.

    ours, theirs = tap_pair(student_network, teacher_network)
    student, teacher = Student(student_network, features=ours.names), Teacher(teacher_network, features=theirs.names)
    seen = Seen(ours.view(student.model, student(x)), theirs.view(teacher.model, teacher(x)), target)

n: images, c: channels, h, w: height and width, l: tokens, d: dimensions, k: classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from kd.errors import require
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
        counts = f"{len(ours.layers)} student layers and {len(theirs.layers)} teacher layers"
        require(len(ours.layers) == len(theirs.layers), f"{counts}: must be equal", ValueError)
        return ours, theirs
    stages = _stages(student), _stages(teacher)
    if len(stages[0]) == len(stages[1]):
        return tap(student), tap(teacher)
    at = [{entry["reduction"]: entry["module"] for entry in each} for each in stages]  # of several, the last stays
    common = [reduction for reduction in at[0] if reduction in at[1]]
    reductions = f"student stages reduce by {list(at[0])}, teacher stages by {list(at[1])}"
    require(common, f"{reductions}: name layers", ValueError)
    return tap(student, [at[0][r] for r in common]), tap(teacher, [at[1][r] for r in common])


def classifier_name(model: nn.Module) -> str:
    """The name of the linear module that gives the logits, as timm's get_classifier has it. Raises ValueError."""
    get_classifier: Any = getattr(model, "get_classifier", lambda: None)  # networks of other libraries have none
    classifier = get_classifier()
    gives = f"{type(model).__name__}: get_classifier() gives {type(classifier).__name__}"
    linear = isinstance(getattr(classifier, "weight", None), Tensor)
    require(linear, f"{gives}, not one linear layer with a weight", ValueError)
    return next(name for name, module in model.named_modules() if module is classifier)


def list_layers(model: nn.Module, input_shape: Sequence[int]) -> list[Layer]:
    """Every module that gives a tensor for one input of a shape, in the order of their first calls."""
    layers: dict[str, Layer] = {}

    def keep(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            layers.setdefault(name, Layer(name, type(module).__name__, tuple(output.shape)))

    model = copy.deepcopy(model).eval()  # the hooks go with the copy
    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(partial(keep, name))
    parameter = next(model.parameters())
    with torch.no_grad():
        model(torch.zeros(1, *input_shape, device=parameter.device, dtype=parameter.dtype))
    return list(layers.values())


def as_map(name: str, feature: Tensor, model: nn.Module) -> Tensor:
    """A layer's output as (n, c, h, w): tokens laid out on their grid without class tokens, vectors as 1x1 maps."""
    if feature.ndim == 4:  # timm's networks whose maps end in channels say so
        last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return rearrange(feature, "n h w c -> n c h w") if last else feature
    if feature.ndim == 2:
        return rearrange(feature, "n d -> n d 1 1")
    gives = f"layer {name}: gives shape {tuple(feature.shape)}"
    require(feature.ndim == 3, f"{gives}, not a map, tokens or a vector; name another", ValueError)
    tokens = feature[:, getattr(model, "num_prefix_tokens", 0) :]
    count = tokens.shape[1]
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", (0, 0))
    if math.prod(grid) != count:  # a network without a stated grid, or a layer after a merging of tokens
        grid = math.isqrt(count), math.isqrt(count)
    require(
        math.prod(grid) == count, f"{gives}: {count} tokens are not a square and not the network's grid", ValueError
    )
    return rearrange(tokens, "n (h w) d -> n d h w", h=grid[0], w=grid[1])


def _embedding(name: str, feature: Tensor) -> Tensor:
    if feature.ndim == 4 and feature.shape[2:] == (1, 1):
        return rearrange(feature, "n d 1 1 -> n d")
    reads = f"classifier {name}: reads shape {tuple(feature.shape)}"
    require(feature.ndim == 2, f"{reads}, not one embedding (n, d) an image", ValueError)
    return feature


def _stages(model: nn.Module) -> list[dict[str, Any]]:
    info: Any = getattr(model, "feature_info", None)
    stages = [entry for entry in info or () if entry.get("module")]
    unstated = f"{type(model).__name__}: does not state its stages (timm's feature_info); name the layers"
    require(stages, unstated, ValueError)
    return stages
