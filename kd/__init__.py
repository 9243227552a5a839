"""kd: knowledge distillation with smoothing-aware losses.

Names load on first use, so that ``import kd`` is instant and ``from kd import DistillLoss`` needs only torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd import losses, smoothing
    from kd.losses import DistillLoss, DistillTerms, LinearDistillLoss, distill_loss
    from kd.models.wrappers import Student, Teacher

__version__ = "0.1.0"

__all__ = [
    "DistillLoss",
    "DistillTerms",
    "LinearDistillLoss",
    "Student",
    "Teacher",
    "distill_loss",
    "losses",
    "smoothing",
]


def __getattr__(name: str):
    if name in ("losses", "smoothing"):
        return import_module(f"kd.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'kd' has no attribute {name!r}")
    home = "kd.models.wrappers" if name in ("Student", "Teacher") else "kd.losses"
    return getattr(import_module(home), name)


def __dir__():
    return sorted([*globals(), *__all__])
