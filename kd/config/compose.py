"""Recipe files and a command line, composed by Hydra into one checked recipe."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kd.config import types
from kd.config.schema import PACKAGE, Recipe
from kd.config.yaml_reader import load
from kd.errors import ConfigError
from kd.losses.methods import registry as methods
from kd.text import did_you_mean

STUDIES = "studies"  # the directory of the recipes that are studies
GROUPS = {"recipe": "recipe", "data": "data set", "loss": "loss"}  # what a word chooses by name, in words
# Hydra's, and the extras that bring them
LAUNCHERS = "basic comes with kd-torch[train], joblib with [study], submitit with [slurm], ray with [ray]"


@contextmanager
def one_line() -> Iterator[None]:
    """Turn an error of Hydra's or OmegaConf's into a ConfigError of one line: the setting and the problem."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("hydra", "omegaconf"):
            raise
        at, problem = getattr(error, "full_key", None), str(error).splitlines()[0]
        raise ConfigError(f"{at}: {problem}" if at else problem) from error


# ---- recipe files


def recipe_folders() -> list[Path]:
    """The directories of recipes: kd's own, in a wheel or a checkout, then ./recipes of the working directory."""
    own = [PACKAGE / "recipes", PACKAGE.parent / "recipes"]
    folders = [next(folder for folder in own if folder.is_dir()), Path.cwd() / "recipes"]
    return list(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))


def recipe_files(folder: str = "") -> dict[str, Path]:
    """The recipes by name, or those of a folder such as `data`. One's own takes the place of kd's of the same name."""
    return {path.stem: path for parent in recipe_folders() for path in sorted((parent / folder).glob("*.yaml"))}


def read_recipe(path: Path, schema: type = Recipe) -> dict[str, Any]:
    """The values of a recipe file, which are settings, beside `defaults`, which names its data set.

    Raises ConfigError, which names the file. Hydra would run code that a `hydra` section names, and load any file that
    `defaults` name.
    """
    values = load(path)
    try:
        _data_set(values)
        by_name = types.flat({key: value for key, value in values.items() if key != "defaults"}, schema)
        if unknown := by_name.keys() - types.settings(schema).keys():
            raise ConfigError(types.no_such_setting(min(unknown), schema))
        check_types(by_name, schema)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return values


@one_line()
def check_types(values: Mapping[str, Any], schema: type = Recipe) -> None:
    """Raise ConfigError for a value, by its setting's dotted name, that is not of the setting's type."""
    config = OmegaConf.merge(_structured(schema))
    for key, value in values.items():
        OmegaConf.update(config, key, value)


def _data_set(recipe: Mapping[str, Any]) -> str:
    """The data set that a recipe's `defaults` name, digits where there are none. Raises ConfigError."""
    match recipe.get("defaults", [{"override /data": "digits"}]):
        case [{"override /data": str(name), **rest}] if not rest:
            return name
    raise ConfigError(f"defaults={recipe['defaults']}: must be - override /data: NAME")


def recipe_file(group: str, name: str, folder: str = "") -> Path:
    """The file that `group=NAME` chooses; for a recipe of a folder, NAME is FOLDER/NAME. Raises ConfigError."""
    files = recipe_files("data") if group == "data" else recipe_files(folder)
    files = {f"{folder}/{stem}" if folder else stem: path for stem, path in files.items()}
    if name in files:
        return files[name]
    hint = did_you_mean(name, files) or f"; must be one of {', '.join(files)}"
    raise ConfigError(f"{group}={name}: no such {GROUPS[group]}{hint}" if name else f"{group}: not given{hint}")


# ---- composing


@one_line()
def compose(words: Sequence[str], schema: type = Recipe, folder: str = "") -> Any:
    """The config of a command line such as recipe=NAME data=NAME loss=NAME key=value ...: not yet resolved.

    The data set's file comes first, with its usual schedule; then the recipe, the loss and the settings, each over
    what came before. Raises ConfigError.
    """
    chosen, changes = _split(words)
    recipe = read_recipe(recipe_file("recipe", chosen.get("recipe", ""), folder), schema)
    data = read_recipe(recipe_file("data", chosen.get("data", _data_set(recipe))), schema)
    recipe.pop("defaults", None)
    loss = _loss(chosen["loss"], recipe) if "loss" in chosen else {}
    config = OmegaConf.merge(_structured(schema), data, recipe, loss)
    override(config, changes, schema)
    return config


def _split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The words that choose a recipe, a data set or a loss, by group, and the words that are settings."""
    chosen: dict[str, str] = {}
    changes = []
    for word in words:
        key, _, text = word.partition("=")
        if key not in GROUPS:
            changes.append(word)
            continue
        if len(types.several(text)) > 1:
            raise ConfigError(f"{word}: type one {key}={'[A,B]' if key == 'loss' else ''}, or add -m for a run of each")
        chosen[key] = text.strip()
    return chosen, changes


def _loss(name: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The `loss` section of `loss=NAME`, which takes the place of the methods that the recipe has."""
    section = methods.section(name)
    replaced = dict.fromkeys(recipe.get("loss", {}).get("methods") or {})
    return {"loss": section | {"methods": replaced | section["methods"]}}


def losses(text: str) -> list[str]:
    """The values of `loss=A,[B,C]`, in which several methods together are `B+C`."""
    return [re.sub(r"\s*,\s*", "+", value.strip("[] ")) for value in types.several(text)]


@one_line()
def check_launcher(words: Sequence[str]) -> None:
    """Raise ConfigError for hydra/launcher=NAME or hydra.launcher.KEY=VALUE that Hydra cannot compose."""
    from hydra import compose as hydra_compose
    from hydra import initialize
    from hydra.errors import MissingConfigException

    try:
        with initialize(config_path=None):
            hydra_compose(overrides=[*words])
    except (MissingConfigException, TypeError, ValueError) as error:  # of hydra/launcher=[1,2], and of null
        raise ConfigError(f"{' '.join(words)}: {str(error).splitlines()[0]}; {LAUNCHERS}") from error


def override(config: Any, words: Sequence[str], schema: type = Recipe) -> None:
    """Change a config by words such as data.root=PATH, or student.model_kwargs.KEY=VALUE. Raises ConfigError."""
    for word in words:
        typed, _, text = word.partition("=")
        # As in Hydra, + adds what is not there yet. Only a method must be added on purpose.
        key = typed.removeprefix("+")
        if not types.is_setting(key, schema):
            raise ConfigError(types.no_such_setting(key, schema))
        method = re.match(r"loss\.methods\.(\w+)", key)
        if method and not typed.startswith("+") and OmegaConf.select(config, method[0]) is None:
            raise ConfigError(f"{word}: the recipe does not use {method[1]}; type loss={method[1]} too, or +{word}")
        OmegaConf.update(config, key, types.read(key, text, schema), force_add=True)


def sweep(words: Sequence[str]) -> list[list[str]]:
    """The command lines that -m makes of words with several values, the last word's values varying fastest."""
    pairs = [word.partition("=")[::2] for word in words]
    choices = [[f"{key}={value}" for value in types.several(text)] for key, text in pairs]
    return [[*line] for line in itertools.product(*choices)]


@one_line()
def typed(config: Any) -> Any:
    """The checked recipe of a composed config, its references resolved. Raises ConfigError."""
    return OmegaConf.to_object(config)


def to_yaml(config: Any) -> str:
    """A composed config as YAML, its references resolved."""
    return OmegaConf.to_yaml(config, resolve=True).rstrip()


@one_line()
def build(*layers: Mapping[str, Any], words: Sequence[str] = (), schema: type = Recipe) -> Any:
    """The checked recipe of nested values, the later over the earlier, changed by `words`. Raises ConfigError."""
    config = OmegaConf.merge(_structured(schema), *layers)
    override(config, words, schema)
    return typed(config)


@cache
def _structured(schema: type) -> Any:
    """A schema as OmegaConf has it, which takes longer to make than to copy: a study builds thousands of recipes."""
    return OmegaConf.structured(schema)


def saved_recipe(path: Path, words: Sequence[str] = ()) -> Recipe:
    """The checked recipe that a run saved, changed by `words`. Raises ConfigError."""
    values = read_recipe(path)
    if "train" in values:
        values["train"].setdefault("ema_warmup", False)  # an older kd averaged without
    if "teacher" in values:
        values["teacher"].setdefault("preprocess", "data")  # an older kd gave the teacher the student's images
    return build(values, words=words)
