"""Settings by dotted name: reading a value from text, checking its type, and suggesting the nearest spelling."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from kd.config import yaml_reader
from kd.config.schema import Recipe, allowed
from kd.errors import ConfigError
from kd.text import did_you_mean

# What YAML must have read for each kind of setting, and what to type.
KINDS = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "text, numbers inside quotes"),
    "list": (list, "a list such as [A,B]"),
    "list[int]": (list, "a list of whole numbers such as [30,60]"),
    "list[str]": (list, "a list of names such as [A,B], numbers inside quotes"),
    "dict": (dict, "settings by name; on a command line +NAME.KEY=VALUE for each"),
}


@cache
def settings(schema: type = Recipe, prefix: str = "") -> dict[str, Any]:
    """The dataclass field of every setting, by dotted name."""
    by_name: dict[str, Any] = {}
    for f in fields(schema):
        section = f.default_factory if is_dataclass(f.default_factory) else None
        name = f"{prefix}{f.name}"
        by_name |= settings(section, f"{name}.") if section else {name: f}  # type: ignore[arg-type]
    return by_name


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings and lists, with its dotted name."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if pairs is None:
        yield prefix, values
        return
    for key, value in pairs:
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))


def read(key: str, text: str, schema: type = Recipe) -> Any:
    """The value of ``key=text`` on a command line. Raises ConfigError where it is not of the setting's type."""
    kind = str(getattr(settings(schema).get(key), "type", ""))
    if kind.startswith("str") and not text.startswith(("'", '"')):
        return None if text == "null" and "None" in kind else text  # as it was typed: 1e5, no, a#b
    value = yaml_reader.value(text, f"{key}={text}")
    if value == text and len(several(text)) > 1:
        raise ConfigError(f"{key}={text}: is several values; add -m for a run of each, or type one")
    check_kind(key, value, schema)
    return value


def several(text: str) -> list[str]:
    """The parts of ``A,B`` between the commas that are outside brackets and quotes."""
    return re.findall(r"""(?:\[[^\]]*\]|\{[^}]*\}|'[^']*'|"[^"]*"|[^,])+""", text) or [""]


def check(values: Mapping[str, Any], schema: type = Recipe, prefix: str = "") -> None:
    """Raise ConfigError for a nested value whose setting does not exist or is of another type."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in settings(schema):
            check_kind(name, value, schema)
        elif isinstance(value, Mapping) and any(other.startswith(f"{name}.") for other in settings(schema)):
            check(value, schema, f"{name}.")
        else:
            raise ConfigError(no_such_setting(name, schema))


def check_kind(key: str, value: Any, schema: type = Recipe) -> None:
    """Raise ConfigError for a value that is not of its setting's type.

    OmegaConf would convert `no`, 1 or "010". References such as ${seed} have a type only once they are resolved.
    """
    field = settings(schema).get(key)
    if field is None or (isinstance(value, str) and "${" in value):
        return
    kind, _, optional = str(field.type).partition(" | ")
    outer, inner = re.match(r"(\w+)(?:\[(\w+))?", kind).groups()  # type: ignore[union-attr]
    fits = _is(value, outer) and (outer != "list" or all(_is(each, inner) for each in value))
    if not fits and not (value is None and optional):
        typed = json.dumps(value) if isinstance(value, bool | None) else value  # true and null, not True and None
        words = KINDS.get(kind, KINDS[outer])[1]
        limits = f" {limits}" if (limits := allowed(field.metadata)) else ""
        raise ConfigError(f"{key}={typed}: must be {words}{limits} ({field.metadata['doc']})")


def _is(value: Any, kind: str) -> bool:
    """Whether a value is of a kind, true and false of `bool` only; kinds that are not here are OmegaConf's matter."""
    return kind not in KINDS or (isinstance(value, KINDS[kind][0]) and (kind == "bool") == isinstance(value, bool))


def no_such_setting(key: str, schema: type = Recipe) -> str:
    """What to say of a name that is no setting: the nearest spelling, or how it is typed."""
    names = list(settings(schema))
    if inside := [name for name in names if name.startswith(f"{key}.")]:
        return f"{key}: is a group of settings; type for example {inside[0]}=VALUE"
    if elsewhere := [name for name in names if name.endswith(f".{key.rpartition('.')[2]}")]:
        return f"{key}: no such setting; did you mean {' or '.join(elsewhere[:3])}?"
    return f"{key}: no such setting{did_you_mean(key, names) or '; --help all lists the settings'}"
