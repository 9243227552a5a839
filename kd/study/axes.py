"""The axes of a study: what each value stands for, and one line for what is none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import fields
from typing import Any

from kd.config import types as kinds
from kd.config import yaml_reader as strict
from kd.errors import ConfigError
from kd.losses.methods import registry as methods
from kd.study.schema import FIRST, LOSS, StudyRecipe

METHODS = re.compile(r"loss\.methods\.\w+(\.\w+)?")
# No axis of the study's own: on a command line, in a contrast or in the table it would be taken for something else.
TAKEN = {*FIRST, "recipe", *(f.name for f in fields(StudyRecipe))}
Settings = dict[str, Any]


def labelled(grid: Mapping[str, Any]) -> dict[str, dict[Any, Settings]]:
    """Each axis with its values, and the settings that each value stands for. Raises ConfigError."""
    known = kinds.settings()
    found: dict[str, dict[Any, Settings]] = {}
    for axis, values in sorted(grid.items(), key=lambda item: item[0] != LOSS):  # as on a command line, it gives way
        at = f"study.grid.{axis}"
        if isinstance(values, Mapping):
            found[axis] = _labels(at, axis, values)
        elif axis == LOSS:
            found[axis] = {value: _method(value) for value in _several(at, values)}
        elif axis in known or METHODS.fullmatch(axis):
            found[axis] = {value: {axis: value} for value in _several(at, values)}
        else:
            raise ConfigError(f"study.grid: {kinds.no_such_setting(axis)}")
        if not found[axis]:
            raise ConfigError(f"{at}={values}: must have at least one value")
        for settings in found[axis].values():
            _check_keys(at, settings)
    return found


def _labels(at: str, axis: str, values: Mapping[Any, Any]) -> dict[Any, Settings]:
    """The labels of an axis of the study's own."""
    if axis in kinds.settings() or axis == LOSS:
        raise ConfigError(f"{at}: is a setting; give a list of values, or choose another name for the axis")
    if axis in TAKEN or axis.startswith("hydra") or not re.fullmatch(r"[^\W\d]\w*", axis):
        raise ConfigError(f"{at}: must be a name of letters, digits and _, and none of {', '.join(sorted(TAKEN))}")
    if not all(isinstance(each, Mapping) for each in values.values()):
        raise ConfigError(f"{at}={values}: must be {{label: {{setting: value}}}}")
    _different(at, [str(label) for label in values])  # as which the card has them
    return {label: _spelled(settings) for label, settings in values.items()}


def _several(at: str, values: Any) -> list[Any]:
    values = values if isinstance(values, list) else [values]
    if any(isinstance(value, list | Mapping) for value in values):
        raise ConfigError(f"{at}={values}: must be plain values; an axis of labels takes others")
    return _different(at, values)


def _different(at: str, values: list[Any]) -> list[Any]:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ConfigError(f"{at}: {value} is given twice; keep one")
    return values


def _spelled(settings: Mapping[Any, Any]) -> Settings:
    """A label's settings, `loss: NAME` among them spelled out first, so that the others can change it."""
    named = _method(settings[LOSS]) if LOSS in settings else {}
    return named | {key: value for key, value in settings.items() if key != LOSS}


def _method(value: Any) -> Settings:
    section = methods.section(str(value))
    return {f"loss.{key}": each for key, each in section.items()}


def _check_keys(at: str, settings: Mapping[Any, Any]) -> None:
    for key, value in settings.items():
        if not isinstance(key, str) or not (key in kinds.settings() or METHODS.fullmatch(key)):
            raise ConfigError(f"{at}: {kinds.no_such_setting(str(key))}")
        if key == "seed" or "." not in key:
            raise ConfigError(f"{at}: {key} is no axis; {'type study.seeds=N' if key == 'seed' else 'it changes none'}")
        strict.check_text_keys(value, f"{at}: {key}")
        kinds.check_kind(key, value)


def check_typed(grid: Mapping[str, Any], axes: Set[str], fixed: Set[str]) -> None:
    """Raise ConfigError where a label of the grid sets what was typed too: one of them would not be so in its cells.

    `axes` were typed with several values, and change what a label sets in part; `fixed` with one, which a label hides.
    """
    for axis, values in labelled(grid).items():
        if not isinstance(grid[axis], Mapping):
            continue
        for label, settings in values.items():
            own = settings.keys() | grid[axis][label].keys()  # `loss: NAME` itself, and what it stands for
            inside = {key for key in fixed if any(key.startswith(f"{each}.") for each in settings)}
            for key in sorted((axes | fixed) & own | inside):
                raise ConfigError(
                    f"{key}: {axis}={label} sets it too; leave {key} out, or type {axis}= with labels that do not"
                )


class NotInGrid(ConfigError):
    """A contrast asks for points that the grid does not have."""


def expand(settings: Settings, axes: Mapping[str, Mapping[Any, Settings]]) -> Settings:
    """Settings in which an axis of labels may appear by name, with what the label stands for in its place."""
    found: Settings = {}
    for key, value in settings.items():
        if key in axes and (key == LOSS or key not in kinds.settings()):
            if not any(value == label for label in axes[key]):  # a list cannot be looked up
                raise NotInGrid(f"{key}={value}: must be one of {', '.join(map(str, axes[key]))}")
            found |= axes[key][value]
        else:
            _check_keys("study.contrasts", {key: value})
            found[key] = value
    return found
