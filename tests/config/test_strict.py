"""Recipes from strangers: one reading of every value, one line for what is refused, whatever the bytes."""

import pytest

from kd.config import yaml_reader as strict
from kd.errors import ConfigError
from tests import bad_lines
from tests.torture import fuzz, harness


def test_scalars_have_one_reading():
    text = b"\xef\xbb\xbfa: 1e-3\nb: no\nc: 010\nd: true\ne: ~\nf: 1:30\ng: on\nh: 2020-01-01\ni: -2.5"
    assert list(strict.parse(text, "x").values()) == [0.001, "no", 10, True, None, "1:30", "on", "2020-01-01", -2.5]
    assert isinstance(strict.parse(b"a: 1", "x")["a"], int)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a: 1\nb: {c: 1, c: 2}", "line 2: c is given twice, first in line 2"),
        (b"a: [.nan]", "line 1: .nan: must be a finite number"),
        (b"a: 1e999", "1e999: must be a finite number"),
        (b"a: !!python/name:os.system", "tags such as"),
        (b"a: !!str 1", "tags such as"),
        (b"a: &a [1]\nb: [*a, *a]", "line 2: aliases"),
        (b"[" * 60_000, "nested deeper than 20"),
        (b"- " * 30_000, "nested deeper than 20"),
        (b"a: [{_target_: x}]", "line 1: _target_ names code"),
        (b"a: ${oc.env:HOME}", "only references to settings"),
        (b"a: '\\${oc.decode:1}'", "only references to settings"),
        (b"a: ${${b}}", "only references to settings"),
        (b'a: "\\ud800"', "cannot be printed"),
        (b"a: \xff", "byte 3 is not"),
        (b"a: " + b"9" * 5000, "too many digits"),
        (b"x" * 70_000, "must be ≤ 64 KiB"),
        (b"? [a]\n: 1", "a key must be a name"),
    ],
)
def test_what_could_be_read_in_two_ways_or_run_is_refused(text, said):
    with pytest.raises(ConfigError) as error:
        strict.parse(text, "FILE")
    assert str(error.value).startswith("FILE: not a readable recipe (")
    assert said in str(error.value)


def test_plain_references_are_kept():
    assert strict.parse(b"a: ${teacher.epochs}", "x") == {"a": "${teacher.epochs}"}


def test_every_bad_line_is_told_once_what_is_allowed():
    seen = 0
    for told, names in bad_lines.told():
        seen += 1
        assert told.message.startswith("error: "), told
        assert told.message.count("\n") == 1, told
        assert names in told.message, told
        assert told.code == 2, told
    assert seen >= 200


def test_fuzzed_recipes_and_lines(tmp_path):
    outcome = harness.run(fuzz.PARTS[0], fuzz.PARTS[0].small, seed=0, folder=tmp_path)
    assert not outcome.broken
    assert outcome.counts.total() - 1 == fuzz.BATCH
    assert min(outcome.counts[f"{what} that may run"] for what in ("recipes", "studies")) > 5
