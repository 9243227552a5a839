"""Values and gradients of the CPU backend for every combination of settings (loss_matrix.py)."""

import loss_matrix
import pytest
from loss_matrix import AXES, check, combinations

CLASSES = (7, 1030)  # one block of the kernel, and two


@pytest.mark.parametrize("dtype", AXES["dtype"], ids=str)
def test_every_combination(dtype):
    done = 0
    for i, c in enumerate(combinations(dtype=dtype)):
        for k in CLASSES:
            check("cpu", 4, k, i % 7, c)
            done += 1
    assert done == 3240  # of 4 dtypes: 12,960


def test_the_axes_are_those_that_were_promised():
    assert len(combinations()) == 6480
    every = loss_matrix.pairs(combinations())
    for name, values in AXES.items():
        assert {c[name] for c in combinations()} == set(values)
        assert len(values) == len(set(values))
    assert ("soft", "True", "temperature", "20.0") in every
