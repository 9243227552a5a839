"""What was not finite: looked for by computing an update once more, and only after its gradient has said so."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kd.losses.methods.base import Seen
from kd.training.objective import Objective

SHOWN = 8  # positions that a message lists
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
        """Look at one piece of a batch."""
        assert seen.index is not None
        index = seen.index.cpu()
        for name, bad in _bad_rows(seen, objective).items():
            self.rows.setdefault(name, []).extend(index[bad.cpu()].tolist())


@torch.no_grad()
def _bad_rows(seen: Seen, objective: Objective) -> dict[str, Tensor]:
    """Which examples (N,) bool are not finite, in what comes in and then in every term, unweighted."""
    assert seen.images is not None
    found = {IMAGES: _bad(seen.images)}
    if seen.teacher is not None:
        found[TEACHER] = _bad(seen.teacher.logits, masked=True)
    found[STUDENT] = _bad(seen.student.logits, masked=True)
    rowwise = copy(objective.loss)
    rowwise.reduction = "none"
    teacher = None if seen.teacher is None else seen.teacher.logits
    terms = rowwise.terms(seen.student.logits, teacher, seen.target)
    found |= {name: _bad(term) for name, term in (("ce", terms.ce), ("kd", terms.kd)) if term is not None}
    for name, method in objective.methods.items():
        values = method(seen)
        found[name] = _bad(values) if values.ndim else _bad(values).expand(len(seen.target))
    return found


def _bad(values: Tensor, masked: bool = False) -> Tensor:
    """Examples with a value that is not finite; -inf is how a class is `masked`, and is none then."""
    bad = values.isnan() | (values == torch.inf) if masked else ~values.isfinite()
    return bad.flatten(1).any(1) if values.ndim > 1 else bad


def first_bad_gradient(*modules: nn.Module) -> str | None:
    """The name of the first parameter with a gradient that is not finite."""
    named = (pair for module in modules for pair in module.named_parameters())
    return next((name for name, p in named if p.grad is not None and not bool(p.grad.isfinite().all())), None)


def describe(found: list[Suspects]) -> str:
    """What is not finite and for which examples, of the suspects of all processes; and what to try."""
    bad: dict[str, set[int]] = {}
    for each in found:
        for name, rows in each.rows.items():
            bad.setdefault(name, set()).update(rows)
    bad = {name: rows for name, rows in bad.items() if rows}
    if not bad:
        parameter = next((each.parameter for each in found if each.parameter), None)
        what = f"the gradient of {parameter} is not finite" if parameter else "the gradients overflow together"
        return f"{what}, all terms of the loss are. {SMALLER}"
    inputs = [name for name in (IMAGES, TEACHER, STUDENT) if name in bad]
    terms = [name for name in bad if name not in inputs]
    cause = (inputs or terms)[0]  # what came in explains what came out
    rows = sorted(bad[cause])
    shown = ", ".join(map(str, rows[:SHOWN])) + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")
    said = f"{', '.join(terms) or 'loss'} not finite{f', because the {cause} are not,' if inputs else ''}"
    return f"{said} for training images {shown}. {ADVICE.get(cause, SMALLER)}"
