"""Re-run a non-finite update to name the term, the parameter and the images."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kd.losses.methods.base import Seen
from kd.training.objective import Objective

SHOWN = 8  # images that a message lists
IMAGES, TEACHER, STUDENT = "images", "teacher's logits", "student's logits"
ADVICE = {
    IMAGES: "Look at these images",
    TEACHER: "Look at the teacher, or try train.precision=fp32",
}
SMALLER = "Try a smaller optimizer.lr, or train.clip_grad=1"


@dataclass
class Suspects:
    """Where one process's part of an update is not finite."""

    rows: dict[str, list[int]] = field(default_factory=dict)  # by input and by term: positions in the training set
    parameter: str | None = None  # the first whose gradient is not finite

    def add(self, seen: Seen, objective: Objective) -> None:
        """Add what one piece of a batch shows."""
        assert seen.index is not None
        index = seen.index.cpu()
        for name, bad in _bad_rows(seen, objective).items():
            self.rows.setdefault(name, []).extend(index[bad.cpu()].tolist())


@torch.no_grad()
def _bad_rows(seen: Seen, objective: Objective) -> dict[str, Tensor]:
    """Which examples (N,) bool are not finite, in the inputs and in every term, unweighted."""
    assert seen.images is not None
    teacher = None if seen.teacher is None else seen.teacher.logits
    bad = {IMAGES: _bad(seen.images), STUDENT: _bad(seen.student.logits, masked=True)}
    if teacher is not None:
        bad[TEACHER] = _bad(teacher, masked=True)
    per_example = copy(objective.loss)
    per_example.reduction = "none"
    terms = per_example.terms(seen.student.logits, teacher, seen.target)
    bad |= {name: _bad(term) for name, term in (("ce", terms.ce), ("kd", terms.kd)) if term is not None}
    for name, method in objective.methods.items():
        values = _bad(method(seen))
        bad[name] = values if values.ndim else values.expand(len(seen.target))  # one value for the batch: all of it
    return bad


def _bad(values: Tensor, masked: bool = False) -> Tensor:
    """Examples with a value that is not finite; in `masked` logits -inf stands for a class that is left out."""
    bad = values.isnan() | (values == torch.inf) if masked else ~values.isfinite()
    return bad.flatten(1).any(1) if values.ndim > 1 else bad


def first_bad_gradient(*modules: nn.Module) -> str | None:
    """The name of the first parameter with a gradient that is not finite."""
    named = (pair for module in modules for pair in module.named_parameters())
    return next((name for name, p in named if p.grad is not None and not bool(p.grad.isfinite().all())), None)


def describe(suspects: list[Suspects]) -> str:
    """One sentence for the suspects of all processes: what is not finite, for which images, and what to try."""
    bad: dict[str, set[int]] = {}
    for name, rows in (item for each in suspects for item in each.rows.items() if item[1]):
        bad.setdefault(name, set()).update(rows)
    if not bad:
        parameter = next((each.parameter for each in suspects if each.parameter), None)
        what = f"the gradient of {parameter} is not finite" if parameter else "the gradients overflow together"
        return f"{what}, all terms of the loss are. {SMALLER}"
    inputs = [name for name in (IMAGES, TEACHER, STUDENT) if name in bad]
    terms = [name for name in bad if name not in inputs]
    cause = (inputs or terms)[0]  # a bad input explains bad terms
    rows = sorted(bad[cause])
    shown = ", ".join(map(str, rows[:SHOWN])) + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")
    because = f", because the {cause} are not," if inputs else ""
    return f"{', '.join(terms) or 'loss'} not finite{because} for training images {shown}. {ADVICE.get(cause, SMALLER)}"
