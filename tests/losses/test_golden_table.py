"""Every method against numbers that are not its own, and the table of them that is kept beside the methods."""

import json
import re
from functools import cache
from pathlib import Path

import golden_table
import pytest

from kd.config.schema import PACKAGE
from kd.losses.methods import registry as methods

KEPT = PACKAGE / "losses" / "README.md"
CASES = golden_table.every_case()


@cache
def rows():
    return golden_table.rows(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method} {case.name}")
def test_value_and_gradient_are_within_the_stored_digits(case):
    assert max(golden_table.errors(case)) <= golden_table.TOLERANCE


def test_every_method_has_numbers_that_are_not_its_own():
    assert {case.method for case in CASES} == set(methods.names())


@pytest.mark.parametrize("family", ["logits", "hard", "features"])
def test_every_stored_case_is_compared(family):
    stored = json.loads((Path(__file__).parent.parent / "golden" / f"authors_{family}.json").read_text())["cases"]
    compared = tuple(case.name for case in CASES)
    for case in stored:
        assert {"repo", "path", "commit"} <= set(case)
        assert any(name.startswith(case["id"]) for name in compared), case["id"]


def test_the_kept_table_has_the_rows_of_the_printed_one():
    kept = re.findall(r"^\| (\w+) \| (\S+ \S+) \| (\d+) \| (\S+) \| (\S+) \|$", KEPT.read_text(), re.MULTILINE)
    assert [(method, source, int(cases)) for method, source, cases, *_ in kept] == [
        (method, source, cases) for (method, source), (cases, *_) in rows().items()
    ]
    assert all(max(float(value), float(gradient)) <= golden_table.TOLERANCE for *_, value, gradient in kept)
