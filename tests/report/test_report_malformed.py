"""A study's files with something wrong in them: a report, or one line that names the file, and nothing is written."""

import json

import pytest

from kd.errors import ConfigError
from kd.report import figures
from kd.report.reading import read
from kd.study import load
from tests.torture import cards, harness


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cards.make(tmp_path_factory.mktemp("cards") / "it")


@pytest.fixture
def undrawn(monkeypatch):
    """Drawings take most of the time; the small trials below draw."""
    for name in ("lines", "dots", "heat", "forest", "reliability", "curves", "projections"):
        monkeypatch.setattr(figures, name, lambda *given, **more: "<svg/>")


def files(folder):
    points = sorted((folder / "points").iterdir())
    by_role = {json.loads(path.read_text())["role"]: path for path in points}
    return {"card": folder / "study.json", **by_role, "failed": points[-1]}


@pytest.mark.parametrize("which", ["card", "teacher", "control", "student", "failed"])
def test_every_entry_in_turn_taken_away_or_made_something_else(folder, undrawn, which):
    file = files(folder)[which]
    good = json.loads(file.read_text())
    codes = []
    for i, at in enumerate(cards.places(good)):
        if at:
            codes.append(cards.tried(folder, file, json.dumps(cards.mutated(good, at, None, delete=True))))
        wrong = cards.WRONG[i % len(cards.WRONG)]  # all of them in turn
        codes.append(cards.tried(folder, file, json.dumps(cards.mutated(good, at, wrong))))
    assert set(codes) == {0, 2}
    assert codes.count(2) > len(codes) / 4


def test_some_trials_with_drawings(tmp_path):
    (part,) = cards.PARTS
    outcome = harness.run(part, part.small, seed=0, folder=tmp_path)
    assert not outcome.broken
    assert outcome.counts["trials"] == part.small
    assert outcome.counts["one line"] + outcome.counts["a report"] == part.small


BAD = [
    (("cells", 0, "point"), "f" * 12, "study.json: cells[0].point: 'ffffffffffff' is not among the points"),
    (("cells", 0, "axes"), {"other": 1}, "study.json: cells[0].axes: "),
    (("seeds",), "0", "study.json: seeds: must be a list, is 0"),
    (("seeds", 0), True, "study.json: seeds[0]: must be a whole number, is True"),
    (("contrasts", 0, "a", "points", 1), 7, "study.json: contrasts[0].a.points[1]: must be text, is 7"),
    (("axes", "method"), {"a\nb\x1b": 1}, "study.json: axes.method: must be a list, is an object"),
    (("axes", "teacher.label_smoothing"), ["x"], "study.json: axes.teacher.label_smoothing: must be numbers"),
    (("schema",), "1\n2", "study.json: schema 1\N{REPLACEMENT CHARACTER}2, this kd reads 1"),
    (("recipe", "train"), cards.DEEP, "study.json: cannot be read (nested more than 100 deep)"),
    (("provenance", "threads"), float("nan"), "study.json: cannot be read (NaN is no JSON)"),
]


@pytest.mark.parametrize(("at", "wrong", "said"), BAD, ids=[said for *_, said in BAD])
def test_the_line_names_the_entry(folder, at, wrong, said):
    file = folder / "study.json"
    good = file.read_text()
    try:
        file.write_text(json.dumps(cards.mutated(json.loads(good), at, wrong)))
        with pytest.raises(ConfigError) as error:
            read(folder)
        assert said in str(error.value)
        assert "\n" not in str(error.value)
    finally:
        file.write_text(good)


def test_a_points_line_says_how_to_make_it_again(folder):
    file = files(folder)["student"]
    good = json.loads(file.read_text())
    hint = "; remove the file and the same kd.study command makes it again"
    wrong = {
        ("metrics", "test", "top1"): ("high", f"metrics.test.top1: must be a number, is high{hint}"),
        ("id",): ("0" * 12, f"id: must be {good['id']}, is {'0' * 12}{hint}"),
        ("detail", "reliability", "count"): ([1], f"detail: lists that belong together differ in length{hint}"),
    }
    try:
        for at, (value, said) in wrong.items():
            file.write_text(json.dumps(cards.mutated(good, at, value)))
            with pytest.raises(ConfigError) as error:
                load(folder)
            assert str(error.value) == f"{file}: {said}"
    finally:
        file.write_text(json.dumps(good))


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000, '{"schema": 1', "\x00", '"' + "x" * 10**6])
def test_text_that_json_cannot_read_is_one_line(folder, undrawn, text):
    assert cards.tried(folder, folder / "study.json", text) == 2
    assert cards.tried(folder, files(folder)["teacher"], text) == 2
