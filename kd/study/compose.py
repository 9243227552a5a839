"""Command line of a study: the recipe with its grid, and the words for Hydra's launcher."""

import re
from typing import Any

from omegaconf import OmegaConf

from kd.config import arguments, types
from kd.config import compose as recipes
from kd.errors import ConfigError, require
from kd.runtime.own_code import import_file
from kd.study.axes import check_overlap
from kd.study.schema import LOSS, StudyRecipe

STUDIES = recipes.STUDIES  # the directory of the recipes


def compose(words: list[str]) -> tuple[StudyRecipe, list[str]] | None:
    """The study that a command line names, and the words for Hydra's launcher.

    None where --cfg job only prints the recipe. Raises ConfigError.
    """
    settings, options = arguments.options(words)
    require(not options.sweep, "-m: a study is many runs by itself; leave it out")
    for path in options.imports:
        import_file(path)
    composed, axes, launcher = _split(settings)
    default = [] if any(word.startswith("hydra/launcher=") for word in launcher) else ["hydra/launcher=joblib"]
    config = recipes.compose(composed, StudyRecipe, STUDIES)
    recipes.check_launcher([*default, *launcher])
    fixed = {word.partition("=")[0].lstrip("+") for word in composed}
    _set_grid(config, axes, fixed)
    study = recipes.typed(config)
    check_overlap(study.study.grid, axes.keys(), fixed)
    if options.show:
        print(recipes.to_yaml(config))
        return None
    return study, [*default, *launcher]


def _split(words: list[str]) -> tuple[list[str], dict[str, list[Any]], list[str]]:
    """The words that Hydra composes, the axes, and the words for Hydra's launcher.

    An axis is a setting with several values, or a name that no setting has. Raises ConfigError.
    """
    composed, axes, launcher = [], {}, []
    known = types.settings(StudyRecipe)
    for word in words:
        key, _, text = word.partition("=")
        # It would be merged with the recipe's grid, and not replace it.
        axis = "type an axis as SETTING=A,B, or NAME=LABEL,LABEL of the recipe's own"
        require(key.lstrip("+") != "study.grid", f"{word}: {axis}")
        if key.lstrip("+").startswith("hydra"):
            launcher.append(word)
        elif key == LOSS:
            axes[key] = recipes.losses(text)
        elif key in recipes.GROUPS or key.startswith("+"):
            composed.append(word)
        else:
            values = [types.read(key, each, StudyRecipe) for each in types.several(text)]
            if key in known and len(values) < 2:
                composed.append(word)
            else:
                axes[key] = [_per_point(value) for value in values]
    return composed, axes, launcher


def _per_point(value: Any) -> Any:
    """A value whose references are resolved in each point, not once in the base recipe."""
    return re.sub(r"(?<!\\)\$\{", r"\\${", value) if isinstance(value, str) else value


@recipes.one_line()
def _set_grid(config: Any, axes: dict[str, list[Any]], fixed: set[str]) -> None:
    """Put what the command line says of the grid into the config."""
    grid: Any = OmegaConf.to_container(config.study.grid)
    for key, values in axes.items():
        labels = grid.get(key)
        if isinstance(labels, dict):
            wrong = [value for value in values if value not in list(labels)]
            require(not wrong, f"{key}={', '.join(map(str, wrong))}: must be some of {', '.join(map(str, labels))}")
            grid[key] = {value: labels[value] for value in values}
        elif types.is_setting(key) or key == LOSS:
            grid[key] = values
        else:
            require(key in types.settings(StudyRecipe), types.no_such_setting(key, StudyRecipe))
            raise ConfigError(f"{key}: is no axis of a study; type one value, or a list as [A,B]")
    for key in fixed & grid.keys() - axes.keys():  # one value of an axis of the recipe's
        grid[key] = [OmegaConf.select(config, key)]
    for key, value in types.leaves(OmegaConf.to_container(config)):
        if isinstance(value, str) and "${" in value and "." in key and key in types.settings() and key not in grid:
            grid[key] = [_per_point(value)]  # such as loss.teacher_smoothing=${teacher.label_smoothing}
    config.study.grid = grid
