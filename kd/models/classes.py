"""Class names of weights: compared with the data's, and a head put into the data's order."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd.config.schema import TeacherConfig
from kd.data.class_order import difference, read_names
from kd.errors import ConfigError, require
from kd.models.weights import Say, head_keys, unsaid, weights_metadata


def recorded(model: nn.Module, checkpoint: str | Path | None) -> list[str]:
    """The names of a network's outputs: as kd wrote them into the file, or as the `label_names` of timm's weights.

    [] where nothing is recorded.
    """
    if checkpoint is not None:
        return list(weights_metadata(checkpoint).get("class_names", ()))
    cfg: Any = getattr(model, "pretrained_cfg", {})
    names = cfg.get("label_names") or ()
    return [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else list(names)


def own_names(teacher: TeacherConfig, wanted: Sequence[str]) -> list[str]:
    """The names that teacher.classes gives to the outputs of the weights that are loaded, [] without it.

    `wanted` are the data's. Raises ConfigError for a file that does not name these.
    """
    if teacher.classes is None:
        return []
    setting, loaded = f"teacher.classes={teacher.classes}", teacher.pretrained or teacher.checkpoint
    require(loaded, f"{setting}: only for weights that are loaded, by teacher.checkpoint or teacher.pretrained")
    return read_names(Path(teacher.classes), wanted, setting)


def align(
    model: nn.Module,
    names: Sequence[str],
    wanted: Sequence[str],
    shape: Sequence[int],
    where: str,
    finetune: bool = False,
    say: Say = unsaid,
) -> None:
    """Put the outputs of a network, which are called `names`, into the order of the data's classes, `wanted`.

    The rows of its head move, so that what reads the head, and training it further, sees the data's order too.

    Args:
        model: the network, on the CPU.
        names: of its outputs; where there are none, or one for each of another number of outputs, nothing is compared.
        wanted: the data's class names.
        shape: of an input.
        where: the setting or file that the weights are from, for messages.
        finetune: it will be trained further, so that a head of other classes is a start like any other.
        say: is told in one line where they are reordered.

    Raises:
        ConfigError: the names are others, or the head cannot be reordered.
    """
    others = sorted(names) != sorted(wanted)
    if list(names) == list(wanted) or len(names) != len(wanted) or (others and finetune):
        return
    meant = f"{difference(names, wanted)}; in a recipe teacher.classes=FILE names them as the data does"
    require(not others, f"{where}: its weights are for other classes: {meant}")
    say(f"{where}: {reordered(names, wanted)}")
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
            return
    instead = "its head is none that kd can reorder; data.class_order=FILE gives the data that order"
    raise ConfigError(f"{where}: has the data's classes in another order, and {instead}")


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
    return f"has the data's classes in another order, first {names[k]!r} for {wanted[k]!r}: reordered by name"
