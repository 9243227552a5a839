"""Losses between a student's logits, a teacher's logits and labels.

- ``DistillLoss``, ``distill_loss``: label-smoothed cross entropy plus distillation (Hinton et al. 2015)
- ``LinearDistillLoss``: the same on the logits of a linear head, without holding them
- ``DistillTerms``: a loss with its unweighted terms
- ``kd.losses.methods``: the published methods, by name

``reference`` defines the loss in plain PyTorch; ``kernels`` has the same loss fused, for CPUs and GPUs. ``settings``,
``ranges`` and ``inputs`` check settings and tensors. Names load on first use, so that importing this package is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd.losses.distill import DistillLoss, DistillTerms, distill_loss
    from kd.losses.linear import LinearDistillLoss

_HOME = {
    "DistillLoss": "kd.losses.distill",
    "DistillTerms": "kd.losses.distill",
    "LinearDistillLoss": "kd.losses.linear",
    "distill_loss": "kd.losses.distill",
}

__all__ = ["DistillLoss", "DistillTerms", "LinearDistillLoss", "distill_loss"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
