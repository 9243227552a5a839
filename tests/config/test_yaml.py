"""The one reader of YAML: each scalar has one reading, and no file runs code."""

import pytest

from kd.config import types, yaml_reader
from kd.errors import ConfigError


def load(folder, text):
    path = folder / "recipe.yaml"
    path.write_bytes(text)
    return yaml_reader.load(path)


def test_scalars_have_one_reading(tmp_path):
    text = b"\xef\xbb\xbfa: 1e-3\nb: no\nc: 010\nd: true\ne: ~\nf: 1:30\ng: on\nh: 2020-01-01\ni: -2.5\nj: ${seed}"
    read = [0.001, "no", 10, True, None, "1:30", "on", "2020-01-01", -2.5, "${seed}"]
    assert list(load(tmp_path, text).values()) == read
    assert isinstance(load(tmp_path, b"a: 1")["a"], int)
    assert types.several("1,[2,3],'a,b',{c: d, e: f}") == ["1", "[2,3]", "'a,b'", "{c: d, e: f}"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"a: 1\nb: {c: 1, c: 2}", "line 2: c is given twice"),
        (b"a: !!python/name:os.system", "could not determine a constructor"),
        (b"a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        (b"a: [{_target_: x}]", "line 1: _target_ names code"),
        (b"a: ${oc.env:HOME}", "only references to settings"),
        (b"a: '\\${oc.decode:1}'", "only references to settings"),
        (b"a: ${${b}}", "only references to settings"),
        (b"a: \xff", "'utf-8' codec can't decode byte 0xff in position 3"),
        (b"a: [", "line 1: "),
        (b"name: a\x00", "special characters"),
        (b"[" * 500, "maximum recursion depth"),
        (b"x" * 70_000, "must be ≤ 64 KiB"),
        (b"- 1", "must be settings such as seed: 1"),
    ],
)
def test_what_would_run_or_could_be_read_in_two_ways_is_refused(text, said, tmp_path):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path}/recipe.yaml: not a readable recipe (")
    assert said in str(error.value)
