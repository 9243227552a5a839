"""kd: knowledge distillation with smoothing-aware losses.

Names load on first use, so that ``import kd`` is instant and ``from kd import DistillLoss`` needs only torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd import smoothing
    from kd.losses.distill import DistillLoss, DistillTerms, distill_loss
    from kd.losses.linear import LinearDistillLoss
    from kd.models.wrappers import Student, Teacher

__version__ = "0.1.0"

_HOME = {
    "DistillLoss": "kd.losses.distill",
    "DistillTerms": "kd.losses.distill",
    "distill_loss": "kd.losses.distill",
    "LinearDistillLoss": "kd.losses.linear",
    "Student": "kd.models.wrappers",
    "Teacher": "kd.models.wrappers",
}

__all__ = ["DistillLoss", "DistillTerms", "LinearDistillLoss", "Student", "Teacher", "distill_loss", "smoothing"]


def __getattr__(name: str):
    if name == "smoothing":
        return import_module("kd.smoothing")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kd' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
