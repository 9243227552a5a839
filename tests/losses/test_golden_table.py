"""The table of all methods against numbers that are not their own: printed by the run, and kept beside the methods."""

import re
from functools import cache

import golden_table

from kd.config.schema import PACKAGE
from kd.losses.methods import registry as methods

KEPT = PACKAGE / "losses" / "README.md"


@cache
def rows():
    return golden_table.rows(golden_table.every_case())


def test_every_method_is_within_the_stored_digits(capsys):
    assert rows()
    for (method, source), (_, value, gradient) in rows().items():
        assert max(value, gradient) <= golden_table.TOLERANCE, (method, source)
    with capsys.disabled():
        print("\n" + golden_table.table(golden_table.every_case()))


def test_every_method_has_numbers_that_are_not_its_own():
    assert {method for method, _ in rows()} == set(methods.names())


def test_the_kept_table_has_the_rows_of_the_printed_one():
    kept = re.findall(r"^\| (\w+) \| (\S+ \S+) \| (\d+) \| (\S+) \| (\S+) \|$", KEPT.read_text(), re.MULTILINE)
    assert [(method, source, int(cases)) for method, source, cases, *_ in kept] == [
        (method, source, cases) for (method, source), (cases, *_) in rows().items()
    ]
    assert all(max(float(value), float(gradient)) <= golden_table.TOLERANCE for *_, value, gradient in kept)
