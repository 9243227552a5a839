"""Calling a method on tensors: what they are, whether they fit, and what to type where they do not.

``(...)`` positions, N of them in all; K classes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kd.losses.inputs import check_fits, check_inputs
from kd.losses.kernels.autograd import as_rows
from kd.losses.methods.seen import FEATURES, IGNORE, Seen, View
from kd.smoothing import check_floating


def arguments(needs: Collection[str]) -> str:
    """What to type between the parentheses of a call: ``student_logits, teacher_logits, target``."""
    features = [need for need in ("maps", "embedding", "weight") if need in needs]
    kind = "features" if features else "logits"
    view = f"View({', '.join(f'{need}=...' for need in features)})"
    networks = ["student", "teacher"] if "teacher" in needs else ["student"]
    words = [view if len(features) > 1 else f"{network}_{kind}" for network in networks]
    words += ["target"] if {"target", "labels"} & set(needs) else []
    words += ["index=index", "num_samples=len(dataset)"] if "index" in needs else []
    return ", ".join(words + [f"{need}={need}" for need in ("images", "peer") if need in needs])


def views(name: str, needs: frozenset[str], student: Any, teacher: Any) -> tuple[View, View | None]:
    """What the method `name` was called with, as views. Raises ValueError or TypeError that says what to type."""
    typed = f"type loss({arguments(needs)})"
    if isinstance(student, Seen):
        raise TypeError(f"{name}: a call takes tensors: {typed}, or loss.evaluate(seen)")
    if isinstance(teacher, Tensor) and teacher.dtype == torch.int64:
        raise TypeError(f"{name}: the teacher's place has int64 labels: must be floating; {typed}")
    ours = _view(name, needs, "student", student, typed)
    if teacher is None:
        return ours, None
    theirs = _view(name, needs, "teacher", teacher, typed)
    if needs & FEATURES:
        _check_features(ours, theirs)
    return ours, theirs


def _view(name: str, needs: frozenset[str], who: str, given: Any, typed: str) -> View:
    features = needs & FEATURES
    if isinstance(given, View):
        return given
    if not features:
        check_floating(f"{who}_logits", given)
        return View(given)
    if len(features) > 1:
        raise TypeError(f"{name}: needs {' and '.join(sorted(features))} of each network; {typed}")
    many = "maps" in features and isinstance(given, list | tuple)
    if "maps" in features and not (many or isinstance(given, Tensor)):
        got = type(given).__name__
        raise TypeError(f"{who}_features: must be a floating tensor (N, C, H, W) or a list of them, got {got}")
    tensors = list(given) if many else [given]
    dims, shape = (4, "(N, C, H, W)") if "maps" in features else (2, "(N, D)")
    for tensor in tensors:
        check_floating(f"{who}_features", tensor)
        if tensor.ndim != dims:
            raise ValueError(f"{name}: {who}_features of shape {tuple(tensor.shape)}: must be {shape}")
    return View(maps=tensors) if "maps" in features else View(embedding=tensors[0])


def _check_features(student: View, teacher: View) -> None:
    """Refuse features of other numbers of examples, on other devices, or of a teacher and requiring a gradient."""
    first = next(iter(student.rows().values()))
    for who, view in (("student", student), ("teacher", teacher)):
        for part, tensor in view.rows().items():
            shape = (first.shape[0], *tensor.shape[1:])
            check_fits(f"{who}.{part}", tensor, shape, first, beside="the student's", constant=who == "teacher")


def rows(
    student: View, teacher: View | None, target: Tensor | None, *, of_logits: bool
) -> tuple[tuple[View, View | None], Tensor, torch.Size]:
    """Views and target with one row per position, and the shape of the positions. Without a target all labels are 0.

    Raises ValueError or TypeError, as DistillLoss does, for logits and targets that do not fit each other.
    """
    logits = student.logits
    shape = logits.shape[:-1]
    if target is None:
        target = torch.zeros(shape, dtype=torch.int64, device=logits.device)
    if not of_logits:
        return (student, teacher), target, shape
    theirs = None if teacher is None else teacher.logits
    check_inputs(logits, theirs, target, None, IGNORE, read_values=target.device.type == "cpu")
    if len(shape) != 1:
        logits, theirs, target = as_rows(len(shape), logits, theirs, target)
        student = replace(student, logits=logits)
        teacher = teacher and replace(teacher, logits=theirs)
    return (student, teacher), target, shape
