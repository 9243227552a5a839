"""Losses between a student's logits, a teacher's logits and labels.

- ``DistillLoss``: label-smoothed cross entropy plus distillation (Hinton et al. 2015)
- ``LinearDistillLoss``: the same on the logits of a linear head, without holding them
- ``LabelSmoothing``: label-smoothed cross entropy as a method of a recipe
- ``methods``: all published methods, by name

``reference`` defines the loss in plain PyTorch; ``kernels`` has the same loss fused, for CPUs and GPUs. ``settings``,
``ranges`` and ``inputs`` check settings and tensors. Names load on first use: ``ranges`` and the names of the methods
are read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd.losses.distill import DistillLoss, DistillTerms, distill_loss
    from kd.losses.linear import LinearDistillLoss
    from kd.losses.methods.labels import LabelSmoothing

__all__ = ["DistillLoss", "DistillTerms", "LabelSmoothing", "LinearDistillLoss", "distill_loss"]
_HOME = {"LabelSmoothing": "methods.labels", "LinearDistillLoss": "linear"}


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module 'kd.losses' has no attribute {name!r}")
    return getattr(import_module(f"kd.losses.{_HOME.get(name, 'distill')}"), name)
