"""Layers for feature methods: which modules give feature maps, which is the classifier, and the View made from both.

    ours, theirs = needed({"maps"}, student_network, teacher_network)
    student, teacher = Student(student_network, features=ours.names), Teacher(teacher_network, features=theirs.names)
    seen = Seen(ours.view(student.model, student(x)), theirs.view(teacher.model, teacher(x)), target)

n: images, c: channels, h, w: height and width, l: tokens, d: dimensions, k: classes.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

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


def needed(
    needs: Collection[str],
    student: nn.Module,
    teacher: nn.Module,
    student_layers: Sequence[str] = (),
    teacher_layers: Sequence[str] = (),
) -> tuple[Taps, Taps] | None:
    """The taps of student and teacher for methods with these `needs`; None where logits are enough.

    Layers pair up by position. Without names these are timm's stages; where their numbers differ, stages that reduce
    the image by the same factor are paired, the deepest of several.

    Raises ValueError where a network states no stages or has not one linear classifier, where no stages pair up, or
    where as many layers of each are not named.
    """
    if not {"maps", "embedding", "weight"} & set(needs):
        return None
    ours: Sequence[str] = ()  # embedding and weight are read of networks without stages too
    theirs: Sequence[str] = ()
    if "maps" in needs:
        ours = student_layers or list(stages(student))
        theirs = teacher_layers or list(stages(teacher))
        if len(ours) != len(theirs) and not (student_layers or teacher_layers):
            ours, theirs = _of_equal_reduction(stages(student), stages(teacher))
        counts = f"{len(ours)} student layers and {len(theirs)} teacher layers"
        require(len(ours) == len(theirs), f"{counts}: must be equal", ValueError)
    return Taps(tuple(ours), classifier_name(student)), Taps(tuple(theirs), classifier_name(teacher))


def stages(model: nn.Module) -> dict[str, int]:
    """timm's stages, from shallow to deep: the factor by which each reduces the image. Raises ValueError for none."""
    info: Any = getattr(model, "feature_info", None)
    named = {entry["module"]: entry["reduction"] for entry in info or () if entry.get("module")}
    unstated = f"{type(model).__name__}: does not state its stages (timm's feature_info); name the layers"
    require(named, unstated, ValueError)
    return named


def _of_equal_reduction(student: dict[str, int], teacher: dict[str, int]) -> tuple[list[str], list[str]]:
    ours, theirs = ({factor: name for name, factor in each.items()} for each in (student, teacher))  # the last stays
    common = [factor for factor in ours if factor in theirs]
    reductions = f"student stages reduce by {list(ours)}, teacher stages by {list(theirs)}"
    require(common, f"{reductions}: none in common; name layers", ValueError)
    return [ours[factor] for factor in common], [theirs[factor] for factor in common]


def classifier_name(model: nn.Module) -> str:
    """The name of the linear module that gives the logits, as timm's get_classifier has it. Raises ValueError."""
    get_classifier: Any = getattr(model, "get_classifier", None)  # networks of other libraries have none
    advice = "has no get_classifier(): give it one that returns the linear layer of its logits"
    require(get_classifier, f"{type(model).__name__}: {advice}", ValueError)
    classifier = get_classifier()
    gives = f"{type(model).__name__}: get_classifier() gives {type(classifier).__name__}"
    linear = isinstance(getattr(classifier, "weight", None), Tensor)
    require(linear, f"{gives}, not one linear layer with a weight", ValueError)
    return next(name for name, module in model.named_modules() if module is classifier)


def list_layers(model: nn.Module, input_shape: Sequence[int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every module that gives a tensor for one input: name to (class, shape of the output), in order of first calls.

    Leaves the network in eval mode.
    """
    names = {module: name for name, module in model.named_modules() if name}
    layers: dict[str, tuple[str, tuple[int, ...]]] = {}

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if module in names and isinstance(output, Tensor):
            layers.setdefault(names[module], (type(module).__name__, tuple(output.shape)))

    with register_module_forward_hook(keep), torch.no_grad():
        model.eval()(torch.zeros(1, *input_shape))
    return layers


def as_map(name: str, feature: Tensor, model: nn.Module) -> Tensor:
    """A layer's output as (n, c, h, w): tokens laid out on their grid without class tokens, vectors as 1x1 maps."""
    if feature.ndim == 4:  # timm's networks whose maps end in channels say so
        last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return rearrange(feature, "n h w c -> n c h w") if last else feature
    if feature.ndim == 2:
        return rearrange(feature, "n d -> n d 1 1")
    gives = f"layer {name}: gives shape {tuple(feature.shape)}"
    require(feature.ndim == 3, f"{gives}: must be a map, tokens or a vector; name another layer", ValueError)
    tokens = feature[:, getattr(model, "num_prefix_tokens", 0) :]
    count, side = tokens.shape[1], math.isqrt(tokens.shape[1])
    height, width = getattr(getattr(model, "patch_embed", None), "grid_size", (side, side))
    require(height * width == count, f"{gives}: {count} tokens are not a grid of {height} x {width}", ValueError)
    return rearrange(tokens, "n (h w) d -> n d h w", h=height)


def _embedding(name: str, feature: Tensor) -> Tensor:
    if feature.ndim == 4 and feature.shape[2:] == (1, 1):
        return rearrange(feature, "n d 1 1 -> n d")
    reads = f"classifier {name}: reads shape {tuple(feature.shape)}"
    require(feature.ndim == 2, f"{reads}: must be (n, d), one embedding for each image", ValueError)
    return feature
