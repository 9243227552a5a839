"""Re-run a non-finite update to name the term, the parameter and the images."""

from copy import copy

import torch
from torch import Tensor, nn

from kd.losses.methods.base import Seen
from kd.training.objective import Objective

SHOWN = 8  # images that a message lists
ADVICE = "try a smaller optimizer.lr, train.clip_grad=1 or train.precision=fp32"


@torch.no_grad()
def bad_rows(seen: Seen, objective: Objective) -> dict[str, list[int]]:
    """Positions in the training set of the examples that are not finite, [] where all are: by input and by term,
    unweighted. A cause stands before what follows from it.
    """
    assert seen.index is not None
    teacher = None if seen.teacher is None else seen.teacher.logits
    per_example = copy(objective.loss)
    per_example.reduction = "none"
    terms = per_example.terms(seen.student.logits, teacher, seen.target)
    values = {"images": seen.images, "teacher's logits": _unmasked(teacher)}
    values |= {"student's logits": _unmasked(seen.student.logits), "ce": terms.ce, "kd": terms.kd}
    values |= objective.evaluate(seen)
    rows = {}
    for name, value in values.items():
        if value is not None:
            each = value if value.ndim else value.expand(len(seen.target))  # one value for the batch: all of it
            finite = each.isfinite().reshape(len(each), -1).all(1)
            rows[name] = seen.index[~finite].tolist()
    return rows


def _unmasked(logits: Tensor | None) -> Tensor | None:
    """Logits in which -inf, which stands for a class that is left out, counts as finite."""
    return None if logits is None else logits.masked_fill(logits == -torch.inf, 0)


def first_bad_gradient(*modules: nn.Module) -> str | None:
    """The name of the first parameter with a gradient that is not finite."""
    named = (pair for module in modules for pair in module.named_parameters())
    return next((name for name, p in named if p.grad is not None and not bool(p.grad.isfinite().all())), None)


def describe(rows: list[dict[str, list[int]]], parameters: list[str | None]) -> str:
    """One sentence for the rows and the first bad gradients of all processes: what is not finite, and what to try."""
    bad = {name: sorted({i for each in rows for i in each[name]}) for name in rows[0]}
    bad = {name: images for name, images in bad.items() if images}
    if not bad:
        parameter = next(filter(None, parameters), None)
        what = f"the gradient of {parameter} is not finite" if parameter else "the gradients overflow together"
        return f"{what}, all terms of the loss are; {ADVICE}"
    images = next(iter(bad.values()))  # of the cause
    shown = ", ".join(map(str, images[:SHOWN])) + (f" and {len(images) - SHOWN} more" if len(images) > SHOWN else "")
    return f"{', '.join(bad)} not finite for training images {shown}; look at these images, or {ADVICE}"
