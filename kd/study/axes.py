"""Axes of a study: the values of each, and the settings that a value stands for."""

from collections.abc import Mapping, Set
from dataclasses import fields
from typing import Any

from kd.config import types
from kd.config.compose import check_types
from kd.errors import ConfigError, require
from kd.losses.methods import registry as methods
from kd.study.schema import COLUMNS, LOSS, StudyRecipe

# Names that a command line, a contrast or the table uses for something else.
TAKEN = {*COLUMNS, "recipe", *(f.name for f in fields(StudyRecipe))}
Settings = dict[str, Any]  # values by dotted name, as on the command line


class NotInGrid(ConfigError):
    """A contrast asks for points that the grid does not have."""


def labelled(grid: Mapping[str, Any]) -> dict[str, dict[Any, Settings]]:
    """Each axis of `study.grid` with its values, and the settings that each value stands for. Raises ConfigError."""
    axes: dict[str, dict[Any, Settings]] = {}
    for axis, values in sorted(grid.items(), key=lambda item: item[0] != LOSS):  # first: other axes change what it sets
        at = f"study.grid.{axis}"
        if isinstance(values, Mapping):
            free = axis.isidentifier() and axis not in TAKEN and not types.is_setting(axis)
            require(free, f"{at}: must be a name of letters, digits and _, and none of {', '.join(sorted(TAKEN))}")
            distinct = len({str(label) for label in values}) == len(values) > 0  # JSON has labels as text
            nested = all(isinstance(each, Mapping) for each in values.values())
            require(distinct and nested, f"{at}={values}: must be {{label: {{setting: value}}}} with different labels")
            axes[axis] = {label: _spelled(at, settings) for label, settings in values.items()}
        else:
            values = values if isinstance(values, list) else [values]
            plain = not any(isinstance(value, list | Mapping) for value in values)
            different = plain and len(set(values)) == len(values) > 0
            labels = "a value that is a list or a section needs a label"
            require(different, f"{at}={values}: must be different plain values; {labels}")
            axes[axis] = {value: _spelled(at, {axis: value}) for value in values}
    return axes


def _spelled(at: str, settings: Mapping[Any, Any]) -> Settings:
    """Settings, checked, where `loss: NAME` is replaced by what it stands for, so that the others can change it.

    Raises ConfigError for a setting that does not exist, is no property of a network, or has a value of
    another type.
    """
    named = methods.section(str(settings[LOSS])) if LOSS in settings else {}
    spelled = {f"loss.{key}": value for key, value in named.items()}
    for name, value in settings.items():
        if (key := str(name)) == LOSS:
            continue
        if not types.is_setting(key):  # looking for the nearest one takes milliseconds
            raise ConfigError(f"{at}: {types.no_such_setting(key)}")
        require("." in key, f"{at}: {key} is no axis; leave it out, and type study.seeds=N for seeds")
        spelled[key] = value
    check_types(spelled)
    return spelled


def expand(settings: Settings, axes: Mapping[str, Mapping[Any, Settings]]) -> Settings:
    """A contrast's settings, where an axis with its label is replaced by what the label stands for."""
    expanded: Settings = {}
    for key, value in settings.items():
        if key in axes and not types.is_setting(key):
            if value not in list(axes[key]):  # a list cannot be looked up in a dict
                raise NotInGrid(f"{key}={value}: must be one of {', '.join(map(str, axes[key]))}")
            expanded |= axes[key][value]
        else:
            expanded |= _spelled("study.contrasts", {key: value})
    return expanded


def check_overlap(grid: Mapping[str, Any], axes: Set[str], fixed: Set[str]) -> None:
    """Raise ConfigError where the command line sets what a label of the grid sets too.

    `axes` were given several values, `fixed` one. The label would win over a fixed value without a word; an axis would
    give cells whose label is not what it says. An axis may change one field of a method that a label chooses.
    """
    for axis, values in labelled(grid).items():
        if not isinstance(grid[axis], Mapping):
            continue
        for label, settings in values.items():
            own = settings.keys() | grid[axis][label].keys()  # `loss: NAME` itself, and what it stands for
            inside = {key for key in fixed if any(key.startswith(f"{each}.") for each in settings)}
            for key in sorted((axes | fixed) & own | inside):
                raise ConfigError(f"{key}: {axis}={label} sets it too; leave {key} out, or type other labels")
