"""How far every method is from numbers that are not its own: ``python -m tests.golden_table``.

They come from its authors' released code, or, where there is none to run, from a second writing in NumPy that shares no
code with kd. The modules ``losses/golden_*.py`` list both as ``GOLDEN_CASES``. The table has a row for each method and
source: how many cases, and the worst relative error of value and of gradient, the largest element being the scale.
"""

import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-9  # the authors' numbers are stored with 10 digits
SECOND = "second writing"


class Case(NamedTuple):
    method: str  # its name in kd
    source: str  # "owner/repository path" of the code that gave the numbers, or SECOND
    name: str
    loss: Callable[[Tensor], Tensor]  # of `student`
    student: Tensor  # what to differentiate by: logits or features, or the way along a drawn direction of them
    expected: Tensor
    gradient: Tensor | None = None  # None: only the value is known


def tensor(numbers: object) -> Tensor:
    """In float64."""
    return torch.as_tensor(numbers, dtype=torch.float64)


def authors_case(
    stored: dict,
    method: str,
    loss: Callable[[Tensor], Tensor],
    student: Tensor,
    value: object,
    gradient: object = None,
    more: str = "",
) -> Case:
    """A case of an ``authors_*.json``; `more` ends the name where there are several of it."""
    slopes = None if gradient is None else tensor(gradient)
    return Case(method, f"{stored['repo']} {stored['path']}", stored["id"] + more, loss, student, tensor(value), slopes)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the largest element."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def errors(case: Case) -> tuple[float, float]:
    """Relative error of value and of gradient."""
    student = case.student.clone().requires_grad_()
    loss = case.loss(student)
    of_value = relative(loss.detach(), case.expected)
    if case.gradient is None:
        return of_value, 0.0
    return of_value, relative(torch.autograd.grad(loss, student)[0], case.gradient)


def rows(cases: Iterable[Case]) -> dict[tuple[str, str], tuple[int, float, float]]:
    """By method and source: cases, worst error of value, worst error of gradient."""
    found: dict[tuple[str, str], tuple[int, float, float]] = {}
    for case in cases:
        count, value, gradient = found.get((case.method, case.source), (0, 0.0, 0.0))
        here = errors(case)
        found[case.method, case.source] = (count + 1, max(value, here[0]), max(gradient, here[1]))
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1] == SECOND, item[0][1])))


def table(cases: Iterable[Case]) -> str:
    """In Markdown."""
    lines = ["| method | numbers of | cases | worst relative error of value | of gradient |", "|---|---|---|---|---|"]
    for (method, source), (count, value, gradient) in rows(cases).items():
        lines.append(f"| {method} | {source} | {count} | {value:.1e} | {gradient:.1e} |")
    return "\n".join(lines)


def slope(function: Callable[[np.longdouble], np.longdouble], step: float = 1e-4) -> float:
    """The derivative at 0 by central differences of the sixth order, in numbers that have digits to lose.

    A kink, as of a ReLU, must not lie within three steps.
    """
    weights = {1: 45, 2: -9, 3: 1}
    ways = {k: np.longdouble(k * step) for k in weights}
    return float(sum(w * (function(ways[k]) - function(-ways[k])) for k, w in weights.items()) / (60 * ways[1]))


def every_case() -> list[Case]:
    """What the modules `losses/golden_*.py` list as GOLDEN_CASES."""
    tests = Path(__file__).parent
    sys.path[:0] = [str(tests), str(tests / "losses")]  # as pytest does
    return [case for path in sorted(tests.glob("losses/golden_*.py")) for case in import_module(path.stem).GOLDEN_CASES]


if __name__ == "__main__":
    print(table(every_case()))
