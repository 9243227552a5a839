"""A study's files with one entry taken away or made something else: a report, or one line that names file and entry."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd.cli.errors import one_line_errors
from kd.errors import ConfigError
from kd.report import __main__ as report
from kd.study import load
from tests.report.report_folder import EPS, Maker, T
from tests.torture.harness import Part

DEEP = json.loads("[" * 400 + "]" * 400)
WRONG = (None, True, -1, 0.5, 10**30, float("nan"), float("inf"), "", "x", "=1+1\n<b>", "y" * 100_000, [], [None], {})
WRONG = (*WRONG, {"a": {}}, [[1, 2], [3]], DEEP)


def make(folder: Path) -> Path:
    """A small study with every kind of entry."""
    study = Maker(folder, axes={EPS: [0.0, 0.4], T: [1.0, 4.0], "method": ["kd", "dist"]}, seeds=2)
    study.contrast("a", {"eps": 0.4}, {"eps": 0.0}, ({"temperature": 4.0}, {"temperature": 1.0}))
    study.fail(max(study.points), "out of memory")
    return study.write()


def places(values: Any, at: tuple = ()) -> Iterator[tuple]:
    """The way to every entry; of a list to its first and its last."""
    yield at
    if isinstance(values, dict):
        for key, value in values.items():
            yield from places(value, (*at, key))
    elif isinstance(values, list):
        for i in sorted({0, len(values) - 1} & set(range(len(values)))):
            yield from places(values[i], (*at, i))


def mutated(values: Any, at: tuple, wrong: Any, delete: bool = False) -> Any:
    """A copy with one entry replaced or taken away."""
    if not at:
        return wrong
    made = copy.deepcopy(values)
    inner = made
    for key in at[:-1]:
        inner = inner[key]
    if delete:
        del inner[at[-1]]
    else:
        inner[at[-1]] = wrong
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def tried(folder: Path, file: Path, text: str) -> int:
    """The exit code of the report with this text in a file, which is put back; what is promised of it is asserted."""
    good = file.read_text()
    file.write_text(text)
    before, said = contents(folder), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                with one_line_errors("kd.report"):
                    code = report.main([str(folder)])
            except SystemExit as stop:
                code = stop.code
        if code:
            assert code == 2, f"exit code {code}"
            assert said.getvalue().startswith("error: "), said.getvalue()[:300]
            assert str(file) in said.getvalue(), said.getvalue()[:300]
            assert said.getvalue().count("\n") == 1, said.getvalue()[:300]
            assert contents(folder) == before, "something was written"
            with contextlib.suppress(ConfigError):
                load(folder)
        return code
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}"[:300]) from error
    finally:
        file.write_text(good)
        for written in ("report.html", "report.md"):
            (folder / written).unlink(missing_ok=True)


def prepare(folder: Path) -> None:
    if not (folder / "study").exists():
        make(folder / "study")


def trial(i: int, rng: random.Random, folder: Path) -> dict[str, int]:
    study = folder / "study"
    file = rng.choice([study / "study.json", *sorted((study / "points").iterdir())])
    good = json.loads(file.read_text())
    at = rng.choice(list(places(good)))
    delete = bool(at) and rng.random() < 0.2
    code = tried(study, file, json.dumps(mutated(good, at, rng.choice(WRONG), delete)))
    return {"one line": int(code == 2), "a report": int(code == 0)}


PARTS = (
    Part("cards", "a malformed study gives a report or one line", trials=400, small=4, trial=trial, prepare=prepare),
)
