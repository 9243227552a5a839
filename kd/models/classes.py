"""Class names of weights: compared with the data's, and a head put into the data's order."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd.data.class_order import difference
from kd.models.weights import head_keys, weights_metadata


def recorded(model: nn.Module, checkpoint: str | Path | None) -> list[str]:
    """The names of a network's outputs: as kd wrote them into the file, or as the `label_names` of timm's weights.

    [] where nothing is recorded.
    """
    if checkpoint is not None:
        return list(weights_metadata(checkpoint).get("class_names", ()))
    cfg: Any = getattr(model, "pretrained_cfg", {})
    names = cfg.get("label_names") or ()
    return [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else list(names)


def align(
    model: nn.Module, names: Sequence[str], wanted: Sequence[str], shape: Sequence[int], finetune: bool = False
) -> str:
    """Put the outputs of a network, which are called `names`, into the order of the data's classes, `wanted`.

    The rows of its head move, so that what reads the head, and training it further, sees the data's order too.

    Args:
        model: the network, on the CPU.
        names: of its outputs; where there are none, or one for each of another number of outputs, nothing is compared.
        wanted: the data's class names.
        shape: of an input.
        finetune: it will be trained further, so that a head of other classes is a start like any other.

    Returns:
        Why the network cannot be used, as a clause; '' where it can.
    """
    if list(names) == list(wanted) or len(names) != len(wanted):
        return ""
    if sorted(names) != sorted(wanted):
        return "" if finetune else f"its weights are for other classes: {difference(names, wanted)}"
    place = {name: k for k, name in enumerate(names)}
    order = torch.tensor([place[name] for name in wanted])
    tensors = model.state_dict()
    rows = [tensors[key] for key in sorted(head_keys(model)) if tensors[key].shape[:1] == order.shape]
    if rows and len(place) == len(names):  # one name twice says of neither output which it is
        images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        before = _logits(model, images)[:, order]
        for tensor in rows:
            tensor.copy_(tensor[order])
        if torch.allclose(_logits(model, images), before, rtol=1e-3, atol=1e-4):
            return ""
    return "its classes are the data's in another order, and its head is none that kd can reorder"


@torch.no_grad()
def _logits(model: nn.Module, images: Tensor) -> Tensor:
    logits = model.eval()(images)
    model.train()
    return logits


def reordered(names: Sequence[str], wanted: Sequence[str]) -> str:
    """What `align` did, as a clause; '' where it had nothing to do."""
    if list(names) == list(wanted) or sorted(names) != sorted(wanted):
        return ""
    k = next(k for k, (own, other) in enumerate(zip(names, wanted, strict=True)) if own != other)
    return f"record the data's classes in another order, first {names[k]!r} for {wanted[k]!r}: put in order by name"
