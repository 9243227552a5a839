"""Methods by name: which there are, what a recipe may set of each, and what ``loss=NAME`` stands for.

torch is imported when a method is asked for, not before, so that ``--help`` answers at once.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.errors import ConfigError, require
from kd.text import did_you_mean

if TYPE_CHECKING:
    from kd.losses.methods.base import Method, Weighted

PLAIN = "kd"  # the method that the `loss` section has by itself: kd_weight and temperature
SHARED = {"weight": 1.0, "warmup_epochs": 0.0}  # what a recipe sets of every method beside its fields


# ---- which methods there are


def _written() -> Iterator[tuple[str, str, str]]:
    """Class, name and module of every method in kd: read from the files, so that torch is not imported."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for found in re.findall(r'^class (\w+)\(Method, name="(\w+)"', text, re.MULTILINE):
            yield *found, f"kd.losses.methods.{path.stem}"


def classes() -> dict[str, str]:
    """The module of every method in kd, by the name of its class."""
    return {cls: module for cls, _, module in _written()}


def names() -> list[str]:
    """The name of every method in kd."""
    return [name for _, name, _ in _written()]


def library() -> dict[str, type[Method]]:
    """Every method by name: kd's, and those of files that were imported."""
    from kd.losses.methods.base import METHODS

    for module in set(classes().values()):
        importlib.import_module(module)
    return METHODS


def _find(name: str, typed: str) -> type[Method]:
    known = library()
    hint = did_you_mean(name, known) or "; --help lists them"
    require(name in known, f"{typed}: no such method as {name!r}{hint}")
    return known[name]


# ---- `loss=NAME`, spelled out


def section(value: str) -> dict[str, Any]:
    """The `loss` section that `loss=VALUE` stands for: NAME, NAME:PRESET, or several of them as [A,B].

    Every field of a method is written out, so that `loss.methods.NAME.FIELD=...` changes one. The cross entropy gets
    the smallest weight that one of the methods asks for, so that a method in its place stays alone. Raises ConfigError.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for word in re.split(r"[+,]", value.strip("[]")):
        name, _, preset = (part.strip() for part in word.partition(":"))
        require(name not in chosen, f"loss={value}: names {name} twice")
        chosen[name] = _settings(f"loss={value}", name, preset)
    ce_weights = [settings.pop("ce_weight") for settings in chosen.values() if "ce_weight" in settings]
    loss: dict[str, Any] = {"kd_weight": 0.0}
    if ce_weights:
        loss["ce_weight"] = min(ce_weights)
    if plain := chosen.pop(PLAIN, None):
        loss |= {"kd_weight": plain["weight"], "temperature": plain["temperature"]}
    return loss | {"methods": chosen}


def _settings(typed: str, name: str, preset: str) -> dict[str, Any]:
    """A method's weights and fields under a preset, as plain values."""
    method = _find(name, typed)
    presets = method.presets
    known = ", ".join(presets) or "none"
    require(not preset or preset in presets, f"{typed}: {name} has no preset {preset!r}; its presets: {known}")
    usual = next(iter(presets), "")  # the first
    settings = {**SHARED, **method.defaults(), **presets.get(preset or usual, {})}
    return json.loads(json.dumps(settings))  # as YAML can hold them: tuples become lists


# ---- from a recipe's values to methods


def build(values: Mapping[str, Any], section: str = "loss") -> dict[str, Weighted]:
    """The methods that `loss.methods` names, each with its weight. Raises ConfigError for what cannot work.

    `section` is `teacher` for those that the teacher itself is trained with, which have no teacher to learn from.
    """
    made = {name: _build(f"{section}.methods.", name, settings) for name, settings in values.items()}
    if section == "teacher":
        alone = [name for name, method in library().items() if method.needs.isdisjoint({"teacher", "peer"})]
        for name in made:
            require(name in alone, f"teacher.methods.{name}: needs its own teacher; must be one of {', '.join(alone)}")
    return made


def _build(before: str, name: str, settings: Any) -> Weighted:
    from kd.losses.fields import checked, ranges
    from kd.losses.methods.base import Weighted

    at = f"{before}{name}"
    require(name != PLAIN, f"{at}: is in every loss; type loss.kd_weight=... and loss.temperature=...")
    method = _find(name, at)
    is_section = isinstance(settings, Mapping)
    require(is_section, f"{at}={settings}: must be settings such as {{weight: 1.0}}; type loss={name}")
    known = [*method.defaults(), *SHARED]
    for key in settings:
        require(key not in method.renamed, f"{at}.{key}: has a new name; type {method.renamed.get(key)}")
        hint = did_you_mean(key, known) or f"; {name} has {', '.join(known)}"
        require(key in known, f"{at}.{key}: no such setting{hint}")
    allowed = ranges(Weighted)
    try:
        made = method(**{key: value for key, value in settings.items() if key not in SHARED})
        shared = {k: checked(f"{name}.{k}", settings.get(k, usual), allowed[k]) for k, usual in SHARED.items()}
        return Weighted(made, **shared)
    except ValueError as error:  # of a field; it begins with the method's name
        raise ConfigError(f"{before}{error}") from error
