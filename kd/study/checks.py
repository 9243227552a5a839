"""Whether a study's files hold what `kd.study` says they hold: the first entry that does not is named.

A layout is a type, a set of allowed values, [layout of each element], (layout of each of n elements), a dict of
layouts by key, where a key that ends in "?" may be missing, Each(layout) for an object with any keys, Maybe(layout)
for null besides, or ANY.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.recipe import ConfigError

SCHEMA = 1
DEEPEST = 32  # nesting; kd writes 6
LARGEST = 2**63  # of a whole number


@dataclass(frozen=True)
class Each:
    """An object with any keys."""

    layout: Any


@dataclass(frozen=True)
class Maybe:
    """Null, or what the layout says."""

    layout: Any


ANY, NUMBER = object, float  # a float's place may hold a whole number
IDS, AXES = {"points": [str], "settings": Each(ANY)}, Each(ANY)
SIDES = {"a": IDS, "b": IDS}
ORIGIN = {"versions?": Maybe(Each(ANY)), "hardware?": Maybe({"gpus?": Maybe([ANY])}), "data_hash?": Maybe(str)}
CARD = {
    "schema": {SCHEMA},
    "name": str,
    "claim": str,
    "command": str,
    "seeds": [int],
    "axes": Each([ANY]),
    "labels": Each(Each(Each(ANY))),
    "cells": [{"axes": AXES, "seed": int, "point": str}],
    "controls": [{"control": str, "axes": AXES, "seed": int, "point": str}],
    "contrasts": [{"name": str, "metric": str, **SIDES, "minus?": Maybe(SIDES)}],
    "points": [str],
    "data": Each({"class_names?": Maybe([ANY])}),
    "misleading?": Each(str),
    "recipe": Each(ANY),
    "provenance": ORIGIN,
}
SPLITS = ("train", "test")  # of a projection
CLOUD = {"points": [(NUMBER, NUMBER)], "labels": [int]}
MEANS = [Maybe(NUMBER)]
POINT = {
    "schema": {SCHEMA},
    "id": str,
    "role": {"teacher", "student", "control"},
    "control": Maybe(str),
    "state": {"finished", "failed"},
    "error": Maybe(str),
    "seed": int,
    "settings": Each(ANY),
    "teacher": Maybe(str),
    "metrics": Each(Each(Maybe(NUMBER))),
    "detail": {
        "reliability?": {"count": [NUMBER], "confidence": MEANS, "accuracy": MEANS},
        "smoothing_doubts?": Maybe([str]),
        "gamma?": {"temperature": [NUMBER], "gamma": [NUMBER]},
        "projection?": Maybe({"classes": (int, int, int), **dict.fromkeys(SPLITS, CLOUD)}),
    },
    "provenance": ORIGIN,
}
NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bool: "a truth value",
}


def check(path: Path, values: Any, layout: Any, hint: str = "") -> None:
    """Raise ConfigError, naming the file and the entry, where the values are not laid out so."""
    for where, wrong in (*_beyond(values), *_wrong(values, layout, "")):
        raise ConfigError(f"{path}: {_short(where.lstrip('.')) or 'all of it'}: {wrong}{hint}")


def _beyond(values: Any) -> Iterator[tuple[str, str]]:
    """What no reader expects: nesting without end, numbers that are none or do not fit into 64 bits."""
    left = [("", values, 0)]
    while left:
        where, value, depth = left.pop()
        if depth > DEEPEST:
            yield where, f"is nested more than {DEEPEST} deep"
            return
        if isinstance(value, dict):
            left += [(f"{where}.{key}", each, depth + 1) for key, each in value.items()]
        elif isinstance(value, list):
            left += [(f"{where}[{i}]", each, depth + 1) for i, each in enumerate(value)]
        elif isinstance(value, int) and abs(value) >= LARGEST:
            yield where, "is a number of more than 64 bits"
        elif isinstance(value, float) and not math.isfinite(value):
            yield where, f"must be a finite number, is {value}"


def _wrong(value: Any, layout: Any, where: str) -> Iterator[tuple[str, str]]:
    match layout:
        case Maybe():
            if value is not None:
                yield from _wrong(value, layout.layout, where)
        case set():
            if not isinstance(value, str | int) or value not in layout:
                yield where, f"must be {' or '.join(sorted(map(json.dumps, layout)))}, is {_short(value)}"
        case type():
            kinds = (int, float) if layout is float else layout
            if not isinstance(value, kinds) or (isinstance(value, bool) and layout in (int, float)):
                yield where, f"must be {NAMES[layout]}, is {_short(value)}"
        case Each() | dict() if not isinstance(value, dict):
            yield where, f"must be an object, is {_short(value)}"
        case Each():
            for key, each in value.items():
                yield from _wrong(each, layout.layout, f"{where}.{key}")
        case dict():
            for key, inner in layout.items():
                name = key.removesuffix("?")
                if name in value:
                    yield from _wrong(value[name], inner, f"{where}.{name}")
                elif name == key:
                    yield f"{where}.{name}", "is missing"
        case list() | tuple() if not isinstance(value, list):
            yield where, f"must be a list, is {_short(value)}"
        case tuple() if len(value) != len(layout):
            yield where, f"must be a list of {len(layout)}, is of {len(value)}"
        case list() | tuple():
            for i, each in enumerate(value):
                yield from _wrong(each, layout[i if isinstance(layout, tuple) else 0], f"{where}[{i}]")


def _short(value: Any) -> str:
    """Foreign text or values on one line."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = value[:200] if isinstance(value, str) else str(value)
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= 80 else f"{text[:79]}…"


def check_card(path: Path, card: Any) -> None:
    """Raise ConfigError unless this is the card of a study whose entries are about its own points and axes."""
    if isinstance(card, dict) and card.get("schema") != SCHEMA:
        raise ConfigError(f"{path}: schema {_short(card.get('schema'))}, this kd reads {SCHEMA}")
    check(path, card, CARD)
    for i in card["points"]:
        if len(i) != 12 or not set(i) <= set("0123456789abcdef"):
            raise ConfigError(f"{path}: points: {_short(i)!r} is no id of 12 hex digits")
    known = set(card["points"])
    for name in ("cells", "controls"):
        for at, cell in enumerate(card[name]):
            if cell["point"] not in known:
                raise ConfigError(f"{path}: {name}[{at}].point: {_short(cell['point'])!r} is not among the points")
            for axis in cell["axes"].keys() ^ card["axes"].keys() if name == "cells" else ():
                raise ConfigError(f"{path}: {name}[{at}].axes: {_short(axis)!r} must be an axis of study and cell")


def check_point(path: Path, identifier: str, point: Any) -> None:
    """Raise ConfigError unless this is the file of this point."""
    hint = "; remove the file and the same kd.study command makes it again"
    if isinstance(point, dict) and point.get("schema") != SCHEMA:
        raise ConfigError(f"{path}: schema {_short(point.get('schema'))}, this kd reads {SCHEMA}")
    check(path, point, POINT, hint)
    if point["id"] != identifier:
        raise ConfigError(f"{path}: id: must be {identifier}, is {_short(point['id'])}{hint}")
    detail = point["detail"]
    projection = detail.get("projection") or {}
    for group in (*(detail.get(name) or {} for name in ("reliability", "gamma")), *map(projection.get, SPLITS)):
        if len({len(each) for each in (group or {}).values() if isinstance(each, list)}) > 1:
            raise ConfigError(f"{path}: detail: lists that belong together differ in length{hint}")


def check_alike(points: Mapping[Path, Any]) -> None:
    """Raise ConfigError unless what is pooled over points is of one length in all of them."""
    seen: dict[str, int] = {}
    for path, point in points.items():
        for name, entry in (("reliability", "count"), ("gamma", "gamma")):
            if found := point["detail"].get(name):
                length = len(found[entry])
                if seen.setdefault(name, length) != length:
                    raise ConfigError(f"{path}: detail.{name}: has {length} values, {seen[name]} in other points")
