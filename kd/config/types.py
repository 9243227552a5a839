"""Settings by dotted name: reading a value from text, and suggesting the nearest spelling."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from kd.config import yaml_reader
from kd.config.schema import Recipe
from kd.errors import ConfigError
from kd.text import did_you_mean


@cache
def settings(schema: type = Recipe, prefix: str = "") -> dict[str, Any]:
    """The dataclass field of every setting, by dotted name."""
    by_name: dict[str, Any] = {}
    for f in fields(schema):
        section = f.default_factory if is_dataclass(f.default_factory) else None
        name = f"{prefix}{f.name}"
        by_name |= settings(section, f"{name}.") if section else {name: f}  # type: ignore[arg-type]
    return by_name


def flat(values: Mapping[str, Any], schema: type = Recipe, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; the methods of a loss, which are one setting, stay one value."""
    by_name: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, Mapping) and name not in settings(schema)
        by_name |= flat(value, schema, f"{name}.") if nested else {name: value}
    return by_name


def is_setting(key: str, schema: type = Recipe) -> bool:
    """Whether a schema has this setting, or one that holds values by name, as loss.methods has a method's."""
    by_name = (f"{name}." for name, field in settings(schema).items() if str(field.type).startswith("dict"))
    return key in settings(schema) or key.startswith(tuple(by_name))


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings and lists, with its dotted name."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if pairs is None:
        yield prefix, values
        return
    for key, value in pairs:
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))


def read(key: str, text: str, schema: type = Recipe) -> Any:
    """The value of ``key=text`` on a command line; OmegaConf checks its type where it is assigned.

    Raises ConfigError where it cannot be read, or is several values.
    """
    kind = str(getattr(settings(schema).get(key), "type", ""))
    if kind.startswith("str") and not text.startswith(("'", '"')):
        return None if text == "null" and "None" in kind else text  # as it was typed: 1e5, no, a#b
    value = yaml_reader.value(text, f"{key}={text}")
    if value == text and len(several(text)) > 1:
        raise ConfigError(f"{key}={text}: is several values; add -m for a run of each, or type one")
    return value


def several(text: str) -> list[str]:
    """The parts of ``A,B`` between the commas that are outside brackets and quotes."""
    return re.findall(r"""(?:\[[^\]]*\]|\{[^}]*\}|'[^']*'|"[^"]*"|[^,])+""", text) or [""]


def no_such_setting(key: str, schema: type = Recipe) -> str:
    """What to say of a name that is no setting: the nearest spelling, or how it is typed."""
    names = list(settings(schema))
    if inside := [name for name in names if name.startswith(f"{key}.")]:
        return f"{key}: is a group of settings; type for example {inside[0]}=VALUE"
    if elsewhere := [name for name in names if name.endswith(f".{key.rpartition('.')[2]}")]:
        return f"{key}: no such setting; did you mean {' or '.join(elsewhere[:3])}?"
    return f"{key}: no such setting{did_you_mean(key, names) or '; --help all lists the settings'}"
