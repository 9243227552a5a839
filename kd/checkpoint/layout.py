"""Whether the plain values of a file are laid out as kd writes them: the first entry that is not is named.

A layout is a type, a set of allowed values, [layout of each element], (layout of each of n elements), a dict of
layouts by key, where a key that ends in "?" may be missing, Each(layout) for an object with any keys, Maybe(layout)
for null besides, or ANY.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.errors import ConfigError

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
        raise ConfigError(f"{path}: {short(where.lstrip('.')) or 'all of it'}: {wrong}{hint}")


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
                yield where, f"must be {' or '.join(sorted(map(json.dumps, layout)))}, is {short(value)}"
        case type():
            kinds = (int, float) if layout is float else layout
            if not isinstance(value, kinds) or (isinstance(value, bool) and layout in (int, float)):
                yield where, f"must be {NAMES[layout]}, is {short(value)}"
        case Each() | dict() if not isinstance(value, dict):
            yield where, f"must be an object, is {short(value)}"
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
            yield where, f"must be a list, is {short(value)}"
        case tuple() if len(value) != len(layout):
            yield where, f"must be a list of {len(layout)}, is of {len(value)}"
        case list() | tuple():
            for i, each in enumerate(value):
                yield from _wrong(each, layout[i if isinstance(layout, tuple) else 0], f"{where}[{i}]")


def short(value: Any) -> str:
    """Foreign text or values on one line."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = value[:200] if isinstance(value, str) else str(value)
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= 80 else f"{text[:79]}…"
