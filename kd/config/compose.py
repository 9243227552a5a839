"""Recipe files and the command line, composed by Hydra into one checked Recipe."""

from __future__ import annotations

import difflib
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from kd.config import yaml_reader
from kd.config.arguments import check_word
from kd.config.schema import PACKAGE, Recipe
from kd.config.types import check_kind, check_kinds, given, no_such_setting, settings, wrong_type
from kd.errors import ConfigError
from kd.losses.methods import registry as methods

STUDIES = "studies"  # the folder of the recipes that are studies
# The extra that brings a launcher of Hydra's.
LAUNCHERS = {"joblib": "study", "submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray"}


def recipe_folders() -> list[Path]:
    """Where recipes are looked for: kd's own, in a wheel or a checkout, then ./recipes of whoever calls."""
    own = [PACKAGE / "recipes", PACKAGE.parent / "recipes"]
    folders = [next(folder for folder in own if folder.is_dir()), Path.cwd() / "recipes"]
    return list(dict.fromkeys(folder.resolve() for folder in folders if folder.is_dir()))


def recipe_files(group: str = "") -> dict[str, Path]:
    """Recipes by name, or the options of a group such as `data`; a later folder's wins."""
    return {path.stem: path for folder in recipe_folders() for path in sorted((folder / group).glob("*.yaml"))}


def read_recipe(path: Path, schema: type = Recipe) -> dict[str, Any]:
    """The values of a recipe's file, with sections that exist and no word to Hydra but the data set's name.

    Raises ConfigError. Hydra would run code that a `hydra` section names, and take any file that `defaults` name.
    """
    values = yaml_reader.load(path)
    defaults = values.get("defaults", [])
    for default in defaults if isinstance(defaults, list) else [defaults]:
        fine = isinstance(default, dict) and [*default] == ["override /data"]
        if not fine or not re.fullmatch(r"\w+", str(default["override /data"])):
            raise ConfigError(f"{path}: defaults: {default}: must be - override /data: NAME")
    known = {f.name: is_dataclass(f.default_factory) for f in fields(schema)}
    for key, value in values.items():
        if key != "defaults" and key not in known:
            raise ConfigError(f"{path}: {no_such_setting(str(key), schema)}")
        if known.get(key) and not isinstance(value, dict):
            raise ConfigError(f"{path}: {wrong_type(key, value, '', schema)}")
    for key, value in given(values, schema):
        check_kind(key, value, schema, f"{path}: ")
    return values


def losses(word: str) -> list[str]:
    """The values of `loss=A,[B,C]` as Hydra is to know them, `A` and `B+C`: in its grammar a list is a sweep's."""
    if not word.startswith("loss="):
        return []
    if word.count("[") != word.count("]"):
        raise ConfigError(f"{word}: cannot be read; type loss=A, or loss=[A,B] for both together")
    values = re.findall(r"\[[^\]]*\]|[^,\[\]]+", word.removeprefix("loss=")) or [""]
    return [re.sub(r"\s*,\s*", "+", value.strip("[] ")) for value in values]


def own_methods(words: list[str]) -> list[str]:
    """Import what `--import` names, and return the other words. Only here: no recipe can name code to run."""
    rest, given = [], iter(words)
    for word in given:
        option, equals, value = word.partition("=")
        if option != "--import":
            rest.append(word)
        elif not (value := value if equals else next(given, "")) or value.startswith("-"):
            raise ConfigError("--import: type --import my_method.py, or the name of a module")
        else:
            methods.import_own(value)
    return rest


def typed(config: Any, schema: type = Recipe) -> Any:
    """The checked recipe of a composed config; a key that the schema does not have is an error, never ignored."""
    from omegaconf import DictConfig, OmegaConf

    def unknown(node: DictConfig, schema: type, prefix: str) -> Iterator[str]:
        known = {f.name: f for f in fields(schema)}
        for key in node:
            if key not in known:
                yield f"{prefix}{key}"
            elif is_dataclass(section := known[key].default_factory):
                yield from unknown(node[key], section, f"{prefix}{key}.")  # type: ignore[arg-type]

    for key in unknown(config, schema, ""):
        raise ConfigError(no_such_setting(key, schema))
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except RecursionError as error:
        raise ConfigError("settings refer to each other in a circle: ${...} must end at a value") from error
    assert isinstance(values, dict)
    for section in ("teacher", "student", "loss"):  # which have free mappings
        yaml_reader.check_text_keys(values[section], section)
    for name, value in yaml_reader.leaves(values):
        # In a free mapping such as teacher.model_kwargs nothing else looks at it, and JSON could not keep it.
        if isinstance(value, float) and not math.isfinite(value) and name not in settings(schema):
            raise ConfigError(f"{name}={value}: must be finite")
    return OmegaConf.to_object(config)


def override(config: Any, words: list[str]) -> None:
    """Change a config by words such as data.root=PATH, whose values are read as in a recipe. Raises ConfigError."""
    from omegaconf import OmegaConf

    for word in words:
        check_word(word)
        key, _, text = check_kinds([word])[0].partition("=")
        check_kind(key, value := yaml_reader.value(text, word))
        OmegaConf.update(config, key, value)


def register(words: list[str], schema: type = Recipe, folder: str = "", launcher: str = "basic") -> None:
    """Store the schema, every recipe of a folder and the losses that `words` name in Hydra's ConfigStore.

    Only the files that `words` name are read. `launcher` is the one that is taken where `words` name none.
    """
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=schema, replace=True)
    quiet = [{"override hydra/job_logging": "disabled"}, {"override hydra/hydra_logging": "disabled"}]
    # The data set's usual schedule comes first, then the recipe, which may say otherwise.
    defaults = ["schema", "_self_", {"data": "digits"}, {"recipe": "???"}, {"loss": None}, *quiet]
    defaults.append({"override hydra/launcher": launcher})
    sweep = str(Path(tempfile.gettempdir()) / "kd-multirun")  # Hydra insists on writing a multirun.yaml
    places = {"output_subdir": None, "run": {"dir": "."}, "sweep": {"dir": sweep, "subdir": "."}}
    store.store(name="kd", node={"defaults": defaults, "hydra": places}, replace=True)
    replaced: set[str] = set()  # methods that recipes have: `loss=` puts others in their place
    data = {"data/digits", *_chosen(words, "data")}
    for group, inside in (("recipe", folder), ("data", "data")):
        for typed in _chosen(words, group) - (options := _options(group, inside)).keys():
            raise ConfigError(_no_such_option(typed, list(options)))
    for option, path in _options("recipe", folder).items():
        node: dict[str, Any] = {}
        if option in _chosen(words, "recipe"):
            node = read_recipe(path, schema)
            data |= {f"data/{name}" for default in node.get("defaults", ()) for name in default.values()}
            given = node.get("loss", {}).get("methods")
            replaced |= set(given) if isinstance(given, dict) else set()
        _store(store, option, node)
    for option, path in _options("data", "data").items():
        _store(store, option, read_recipe(path, schema) if option in data else {})
    for word in words:
        for value in losses(word):
            section = methods.section(value)
            section["methods"] = dict.fromkeys(replaced) | section["methods"]
            store.store(group="loss", name=value, node={"loss": section}, package="_global_", replace=True)


def _store(store: Any, option: str, node: dict[str, Any]) -> None:
    group, _, name = option.rpartition("/")
    store.store(group=group, name=name, node=node, package="_global_", replace=True)


def _no_such_option(typed: str, options: list[str]) -> str:
    group, _, name = typed.partition("/")
    names = [option.partition("/")[2] for option in options]
    near = difflib.get_close_matches(name[:80], names, n=1)
    hint = f"did you mean {group}={near[0]}?" if near else "there are " + ", ".join(names)
    return f"{group}={name}: no such {'recipe' if group == 'recipe' else 'data set'}; {hint}"


def _chosen(words: list[str], group: str) -> set[str]:
    """The options that `group=A,B` names."""
    values = [word.partition("=")[2].split(",") for word in words if word.startswith(f"{group}=")]
    return {f"{group}/{value.strip()}" for several in values for value in several}


def _options(group: str, folder: str) -> dict[str, Path]:
    """What `group=` can be, as Hydra has it: `group/NAME`, or `group/FOLDER/NAME` for recipes of a folder."""
    prefix = f"{group}/" if folder in ("", group) else f"{group}/{folder}/"
    return {f"{prefix}{name}": path for name, path in recipe_files(folder).items()}


def explain(error: Exception, schema: type = Recipe, folder: str = "") -> str:
    """One line for an error of Hydra's: the setting, what was typed, what to type."""
    text, cause = str(error), str(error.__cause__ or "")
    if found := re.search(r"Could not (?:override|append|delete).*?'([\w./@-]+)'", text):
        if "object_type=Contrast" in cause:
            return _explain_value(cause, found[1], schema) or cause
        return no_such_setting(found[1], schema)
    if found := re.search(r"Could not find 'hydra/launcher/(\w+)'", text):
        if found[1] in LAUNCHERS:
            return f"hydra/launcher={found[1]}: needs pip install 'kd-torch[{LAUNCHERS[found[1]]}]'"
        return f"hydra/launcher={found[1]}: must be one of basic, {', '.join(LAUNCHERS)}"
    if "must specify 'recipe'" in text:
        options = ", ".join(option.partition("/")[2] for option in _options("recipe", folder))
        return f"recipe: not given; type recipe=NAME with one of {options}"
    if found := re.search(r"Error merging override ([^\s=]+)=?(.*)", text):
        key = found[1].lstrip("+")
        return _explain_value(f"{text}\n{cause}", key, schema) or wrong_type(key, found[2], cause, schema)
    if found := re.search(r"Error parsing override '(.*)'|Error when parsing index: \d+, string: (.*) out of", text):
        word = found[1] or found[2]
        if "=" not in word:
            value = "true" if getattr(settings(schema).get(word), "type", "") == "bool" else "VALUE"
            return f"{word}: cannot be read; settings are typed key=value, such as {word.strip()}={value}"
        if re.match(r"\S+\s+=|\S+=\s", word):
            return f"{word}: cannot be read; no space before or after ="
        return (
            f"{word}: cannot be read; settings are typed key=value, and a value with brackets, "
            f"commas or other than plain letters inside two pairs of quotes: 'key=\"VALUE\"'"
        )
    if found := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        return f"{found[1]}={found[2]}: is several values; add -m for a run of each, or type one"
    lines = [line.strip() for line in f"{text}\n{cause}".splitlines()]
    full_key = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")
    if known := _explain_value(f"{text}\n{cause}", full_key, schema):
        file = re.match(r"In '(recipe/[^']+)'", text)
        return f"{file[1]}: {known}" if file else known
    said = [line for line in lines if line and not re.match(r"(full_key|object_type|reference_type|See https)", line)]
    return f"{full_key}{': ' if full_key else ''}{' '.join(dict.fromkeys(said[:3]))}"


def _explain_value(text: str, key: str, schema: type) -> str | None:
    """What is wrong with a reference, a name or the kind of a value, of an error of OmegaConf's."""
    at = f"study.contrasts: {key}" if "object_type=Contrast" in text and key != "study.contrasts" else key
    if found := re.search(r"Interpolation key '([^']*)' not found", text):
        return f"{at}=${{{found[1]}}}: {no_such_setting(found[1], schema)}"
    if "Recursive interpolation" in text:
        return f"{at}: refers to itself in a circle; ${{...}} must end at a value"
    if found := re.search(r"Key '.*' not in '(\w+)'", text):
        own = found[1] == "Contrast"
        return f"{at}: no such entry; there are name, metric, a, b and minus" if own else no_such_setting(key, schema)
    if re.search(r"Key .* is incompatible with", text):
        return f"{at}: a name must be text; put it inside quotes"
    if "not a subclass of Contrast" in text:
        return f"{at}: must be {{metric: NAME, a: {{SETTING: VALUE}}, b: {{SETTING: VALUE}}}}"
    return f"{at}: must be settings by name, such as {{loss.temperature: 4}}" if " to Dict" in text else None


@contextmanager
def explained(schema: type = Recipe, folder: str = "") -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into a ConfigError of one line."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("hydra", "omegaconf", "antlr4"):
            raise
        raise ConfigError(explain(error, schema, folder)) from error


def saved_recipe(path: Path, words: Sequence[str] = ()) -> Recipe:
    """The checked recipe of a file, such as the one that a run saved, changed by `words` such as data.root=PATH.

    Raises ConfigError.
    """
    return build(read_recipe(path), words=words)


def build(*layers: dict[str, Any], words: Sequence[str] = (), schema: type = Recipe) -> Any:
    """The checked recipe of nested settings, the later over the earlier, changed by `words`. Raises ConfigError."""
    from omegaconf import OmegaConf

    with explained(schema):
        config = OmegaConf.merge(OmegaConf.structured(schema), *layers)
        override(config, list(words))
        return typed(config, schema)
