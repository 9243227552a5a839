"""Whether a study's files hold what `kd.study` says they hold: the first entry that does not is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd.checkpoint.layout import ANY, NUMBER, Each, Maybe, check, short
from kd.errors import ConfigError

SCHEMA = 1
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


def check_card(path: Path, card: Any) -> None:
    """Raise ConfigError unless this is the card of a study whose entries are about its own points and axes."""
    if isinstance(card, dict) and card.get("schema") != SCHEMA:
        raise ConfigError(f"{path}: schema {short(card.get('schema'))}, this kd reads {SCHEMA}")
    check(path, card, CARD)
    for i in card["points"]:
        if len(i) != 12 or not set(i) <= set("0123456789abcdef"):
            raise ConfigError(f"{path}: points: {short(i)!r} is no id of 12 hex digits")
    known = set(card["points"])
    for name in ("cells", "controls"):
        for at, cell in enumerate(card[name]):
            if cell["point"] not in known:
                raise ConfigError(f"{path}: {name}[{at}].point: {short(cell['point'])!r} is not among the points")
            for axis in cell["axes"].keys() ^ card["axes"].keys() if name == "cells" else ():
                raise ConfigError(f"{path}: {name}[{at}].axes: {short(axis)!r} must be an axis of study and cell")


def check_point(path: Path, identifier: str, point: Any) -> None:
    """Raise ConfigError unless this is the file of this point."""
    hint = "; remove the file and the same kd.study command makes it again"
    if isinstance(point, dict) and point.get("schema") != SCHEMA:
        raise ConfigError(f"{path}: schema {short(point.get('schema'))}, this kd reads {SCHEMA}")
    check(path, point, POINT, hint)
    if point["id"] != identifier:
        raise ConfigError(f"{path}: id: must be {identifier}, is {short(point['id'])}{hint}")
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
