"""YAML that says one thing only: every recipe, from whoever it comes, is read here.

YAML 1.1 reads `no` as false, `010` as eight and `1e-3` as text, keeps the last of two equal keys in silence, lets a
tag name code, and lets an alias of an alias fill the memory. Here only true and false are truth values, numbers are
decimal and finite, and tags, aliases and equal keys are refused. Nothing here imports torch, or Hydra.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

from kd.errors import ConfigError

try:
    import yaml
except ModuleNotFoundError as error:  # `pip install kd-torch` alone brings no command
    print("error: kd's commands need yaml: pip install 'kd-torch[train]'", file=sys.stderr)
    raise SystemExit(2) from error

MAX_BYTES = 64 * 1024  # twelve times the longest recipe here; more takes seconds to read
MAX_DEPTH = 20
# OmegaConf would run what stands behind a colon, such as ${oc.env:HOME}: a recipe may refer to settings only.
_REFERENCE = re.compile(r"\$\{[A-Za-z_][\w.]*\}")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, without tags, aliases, equal keys and deep nesting."""

    yaml_implicit_resolvers: dict = {}  # none of SafeLoader's: bools, octals, sexagesimals, dates, merges  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _Refused("aliases such as *a are not read; write the value out", event.start_mark)
        if tag := getattr(event, "tag", None):
            raise _Refused(f"tags such as {tag[:60]} are not read; write a plain value", event.start_mark)
        if self.depth >= MAX_DEPTH:
            raise _Refused(f"nested deeper than {MAX_DEPTH}", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise _Refused("a key must be a name", key_node.start_mark)
            if key in seen:
                raise _Refused(f"{key} is given twice, first in line {seen[key]}; keep one", key_node.start_mark)
            if key == "_target_":
                raise _Refused("_target_ names code to run, which no recipe can", key_node.start_mark)
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and not value.replace("\n", "").replace("\t", "").isprintable():
            raise _Refused("characters that cannot be printed are not read", node.start_mark)
        if value == "???":
            raise _Refused("??? is no value", node.start_mark)
        if isinstance(value, str) and (wrong := strange_reference(value)):
            raise _Refused(f"{wrong}: only references to settings such as ${{seed}} are read", node.start_mark)
        return value


class _Refused(yaml.YAMLError):
    def __init__(self, what: str, mark: Any):
        super().__init__(f"line {mark.line + 1}: {what}")


def _decimal(loader: _Loader, node: Any) -> int:
    text = loader.construct_scalar(node)
    if len(text) > 40:  # more digits than any setting has; Python refuses thousands with words of its own
        raise _Refused(f"{text[:40]}...: too many digits", node.start_mark)
    return int(text)


def _finite(loader: _Loader, node: Any) -> float:
    text = loader.construct_scalar(node)
    value = float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text, flags=re.IGNORECASE))
    if value - value != 0:
        raise _Refused(f"{text}: must be a finite number", node.start_mark)
    return value


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),  # 010 is ten
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     "-+0123456789."),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)
_Loader.add_constructor("tag:yaml.org,2002:float", _finite)


def load(path: Path) -> dict[str, Any]:
    """The plain values of a recipe's file. Raises ConfigError that names the file, the line and what is allowed."""
    return parse(_bytes(path), str(path))


def parse(content: bytes, at: str) -> dict[str, Any]:
    """The plain values of a recipe's text, in UTF-8; `at` names it in the ConfigError that is raised."""
    try:
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{at}: not a readable recipe (must be ≤ {MAX_BYTES // 1024} KiB)")
        values = yaml.load(content.decode("utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{at}: not a readable recipe (must be text in UTF-8; byte {error.start} is not)") from error
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{at}: not a readable recipe ({_said(error)})") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{at}: not a readable recipe (must be settings such as seed: 1)")
    return values


def value(text: str, at: str) -> Any:
    """One value as a recipe has it; `at` names it in the ConfigError that is raised."""
    if not text or "\n" in text:
        return text
    if text[0] not in "'\"" and re.search(r"[\s\]}]#", text):  # the rest would be a comment
        raise ConfigError(f"{at}: cannot be read; type a plain value, or one inside quotes")
    try:
        return parse(f"x: {text}".encode(), at)["x"]
    except ConfigError as error:
        raise ConfigError(f"{at}: cannot be read; type a plain value, or one inside quotes") from error


def values(text: str) -> list[Any] | None:
    """The values in A,B as a recipe has them in [A,B]; None where they cannot be read so."""
    try:
        return value(f"[{text}]", text)
    except ConfigError:
        return None


def whole(text: str, at: str) -> int:
    """A whole number ≥ 1 in decimal digits; `at` names it in the ConfigError that is raised."""
    if not re.fullmatch(r"0*[1-9][0-9]{0,11}", text):
        raise ConfigError(f"{at}={text}: must be a whole number ≥ 1")
    return int(text)


def check_text_keys(values: Any, at: str) -> None:
    """Raise ConfigError, which begins with `at`, for a key in a mapping that is no text."""
    for key, inner in values.items() if isinstance(values, dict) else ():
        if not isinstance(key, str):
            raise ConfigError(f"{at}.{key}: a name must be text; put it inside quotes")
        check_text_keys(inner, f"{at}.{key}")
    for inner in values if isinstance(values, list) else ():
        check_text_keys(inner, at)


def strange_reference(text: str) -> str | None:
    """What is written like a reference of OmegaConf's and is none to a setting; None where there is nothing such."""
    rest = _REFERENCE.sub("", text)
    return rest[rest.index("${") :][:60] if "${" in rest else None


def leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no container, with its dotted name."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if pairs is None:
        yield prefix, values
        return
    for key, value in pairs:
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))


def _bytes(path: Path) -> bytes:
    if not path.is_file():  # a FIFO would wait for somebody to write
        raise ConfigError(f"{path}: not a readable recipe ({'is no file' if path.exists() else 'no such file'})")
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _said(error: Exception) -> str:
    """The problem and its line, of an error of PyYAML's."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())
