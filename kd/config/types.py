"""Which settings there are and of what type, and one line for a value that is of another. No torch here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from kd.config import yaml_reader as strict
from kd.config.schema import Recipe, allowed
from kd.errors import ConfigError
from kd.losses.methods import registry as methods

KINDS = {"int": int, "float": (int, float), "bool": bool, "str": str, "list": list, "dict": dict}
UNBOUNDED = ("nan", "inf", "-inf", "+inf")  # their range refuses them
NUMBER_LIKE = re.compile(r"[-+]?[\d.][\w.+-]*|(?i:true|false|[-+]?inf|nan)")  # what Hydra may take for no text


@cache
def settings(schema: type = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every setting's dotted name with its dataclass field."""
    found: dict[str, Any] = {}
    for f in fields(schema):
        nested = f.default_factory if is_dataclass(f.default_factory) else None
        found |= settings(nested, f"{prefix}{f.name}.") if nested else {f"{prefix}{f.name}": f}  # type: ignore[arg-type]
    return found


def given(values: dict[str, Any], schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings in nested values, by dotted name."""
    for key, value in values.items():
        if f"{prefix}{key}" in settings(schema):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from given(value, schema, f"{prefix}{key}.")


def check_kind(key: str, value: Any, schema: type = Recipe, at: str = "") -> None:
    """Refuse a value that is not of its setting's type, such as what OmegaConf would make a number or a truth value of:
    `no`, `on`, 1 for true, `1_0`, "010". Raises ConfigError, which begins with `at`.
    """
    if key not in settings(schema) or (isinstance(value, str) and ("${" in value or value.lower() in UNBOUNDED)):
        return
    kind, *rest = re.findall(r"\w+", str(settings(schema)[key].type))
    fits = _is(value, kind)
    if fits and kind == "list" and rest[0] in KINDS:
        fits = all(_is(each, rest[0]) for each in value)
    if not (fits or (value is None and "None" in rest)):
        raise ConfigError(f"{at}{wrong_type(key, value, '', schema)}")


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, KINDS[kind]) and (kind == "bool" or not isinstance(value, bool))


def check_kinds(words: list[str], schema: type = Recipe) -> list[str]:
    """`check_kind` for every value in the words of a command line, of which -m and studies may have several.

    Gives the words with what is text inside quotes: Hydra would make 1234e567 infinite and 1_0 ten.
    """
    found = []
    for word in words:
        key, equals, text = word.partition("=")
        field = settings(schema).get(key)
        if field and str(field.type).startswith("str") and re.fullmatch(r"[\w.+,-]+", text):
            several = [repr(each) if NUMBER_LIKE.fullmatch(each) else each for each in text.split(",")]
            word = f"{key}={','.join(several)}"
        elif field is None and "." in key and re.search(r"(?:^|[\[{,:])[-+]?\d+_[\d_]+(?=$|[\]},])", text):
            raise ConfigError(f"{word}: is no number with _; type {text.replace('_', '')}, or text inside quotes")
        else:
            for value in strict.values(text) or () if equals and "(" not in text else ():  # Hydra answers to the others
                check_kind(key, value, schema)
        found.append(word)
    return found


def wrong_type(key: str, value: Any, cause: str, schema: type = Recipe) -> str:
    """What to say of a value that is not of its setting's type."""
    field = settings(schema).get(key)
    if field is None:
        section = [name for name in settings(schema) if name.startswith(f"{key}.")]
        return (
            f"{key}={value}: is a group of settings; type for example {section[0]}=..."
            if section
            else f"{key}: {cause.partition(chr(10))[0]}"
        )
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    kinds |= {"list[int]": "a list of whole numbers such as [30,60]", "list[str]": "a list of names such as [A,B]"}
    kinds |= {"list": "a list", "dict": "settings by name; on a command line +NAME.KEY=VALUE for each"}
    kind = next((words for name, words in kinds.items() if str(field.type).startswith(name)), str(field.type))
    limits = allowed(field.metadata)
    quotes = ", numbers inside quotes" if "str" in str(field.type) and cause == "" else ""
    value = str(value).lower().replace("none", "null") if isinstance(value, bool | None) else value
    return f"{key}={value}: must be {kind}{quotes}{f' {limits}' if limits else ''} ({field.metadata['doc']})"


def no_such_setting(key: str, schema: type = Recipe) -> str:
    """What to say of a setting that a schema does not have."""
    names = list(settings(schema))
    if found := re.match(r"loss\.methods\.(\w+)(?:\.(\w+))?", key):
        return _no_such_method_setting(key, found[1], found[2])
    if section := re.match(r"(teacher|student)\.model_kwargs", key):
        return f"{key}: type +{section[0]}.NAME=VALUE for each argument of timm.create_model"
    if key == "loss.methods":
        return f"{key}: type loss=NAME, or loss=[A,B] for both together"
    if key in names and str(settings(schema)[key].type).startswith("dict"):
        return f"{key}: is settings by name; type +{key}.NAME=VALUE for each"
    if key in names:
        return f"{key}: is a setting; type {key}=VALUE without + before it"
    same_leaf = [name for name in names if name.split(".")[-1] == key.split(".")[-1]]
    near = same_leaf or difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    near = near or [n for n in names if difflib.get_close_matches(key.split(".")[-1], [n.split(".")[-1]], cutoff=0.7)]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else "--help lists all"
    return f"{key}: no such setting; {hint}"


def _no_such_method_setting(key: str, method: str, setting: str | None) -> str:
    """The method is not chosen, or has no such setting, or its recipe leaves the setting at its default."""
    known = [*methods.names(), *methods.library()]
    if method not in known:
        near = difflib.get_close_matches(method, known, n=1)
        return f"{key}: no such method; " + (f"did you mean loss.methods.{near[0]}?" if near else "--help lists them")
    if setting and methods.has(method, setting):
        return f"{key}: is not in this recipe; type loss={method} before it, or +{key}=VALUE"
    return f"{key}: no such setting; {methods.did_you_mean(method, setting or '')}"
