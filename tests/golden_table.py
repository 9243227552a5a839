"""How far every method is from the numbers of its authors' code: ``python -m tests.golden_table``.

A test module that has such numbers lists them as ``GOLDEN_CASES``, a list of ``Case``. The table has a row per method:
how many cases, and the worst relative error of value and of gradient, the largest element of the expected gradient
being the scale.
"""

import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-9  # the stored numbers have 10 digits


class Case(NamedTuple):
    method: str  # as the table shows it
    name: str
    loss: Callable[[Tensor], Tensor]  # of the student's tensor
    student: Tensor
    expected: float
    gradient: Tensor | None = None  # None: only the value is known


def errors(case: Case) -> tuple[float, float]:
    """Relative error of value and of gradient."""
    student = case.student.clone().requires_grad_()
    loss = case.loss(student)
    of_value = abs(loss.item() - case.expected) / abs(case.expected)
    if case.gradient is None:
        return of_value, 0.0
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.shape == case.gradient.shape
    return of_value, ((gradient - case.gradient).abs().max() / case.gradient.abs().max()).item()


def rows(cases: Iterable[Case]) -> dict[str, tuple[int, float, float]]:
    """By method: cases, worst error of value, worst error of gradient."""
    found: dict[str, tuple[int, float, float]] = {}
    for case in cases:
        count, value, gradient = found.get(case.method, (0, 0.0, 0.0))
        here = errors(case)
        found[case.method] = (count + 1, max(value, here[0]), max(gradient, here[1]))
    return found


def table(cases: Iterable[Case]) -> str:
    """In Markdown."""
    lines = ["| method | cases | worst relative error of value | of gradient |", "|---|---|---|---|"]
    for method, (count, value, gradient) in rows(cases).items():
        lines.append(f"| {method} | {count} | {value:.1e} | {gradient:.1e} |")
    return "\n".join(lines)


def every_case() -> list[Case]:
    """What all the test modules beside this one list as GOLDEN_CASES."""
    here = Path(__file__).parent
    if str(here) not in sys.path:
        sys.path.insert(0, str(here))
    cases = []
    for path in sorted(here.glob("test_*.py")):
        if "\nGOLDEN_CASES" in path.read_text():
            cases += import_module(path.stem).GOLDEN_CASES
    return cases


if __name__ == "__main__":
    print(table(every_case()))
