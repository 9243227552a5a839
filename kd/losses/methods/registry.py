"""Methods by name: which there are, what a recipe may set of each, and what `loss=NAME` stands for.

torch is imported when a method is asked for, not before, so that `--help` answers at once.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from kd.errors import ConfigError
from kd.losses.ranges import WEIGHTS, is_weight

if TYPE_CHECKING:
    from kd.losses.methods.base import Method

PLAIN = "kd"  # the method that the `loss` section has by itself: kd_weight and temperature
USUAL = "cifar100"  # the preset that is taken where none is named
SHARED = {"weight": 1.0, "warmup_epochs": 0.0}  # what a recipe sets of every method beside its fields
# Other figures in metrics.jsonl, where each method has one by its name.
TAKEN = {"stage", "update", "epoch", "loss", "ce", "kd", "lr", "agreement", "student_entropy", "teacher_entropy"}
TAKEN |= {"grad_kd", "grad_ce", "grad_ratio", "grad_norm", "images_per_second"}


class Weighted(NamedTuple):
    """A method with what the recipe says of it beside its fields."""

    method: Method
    weight: float
    warmup_epochs: float  # over which the weight rises linearly from 0; 0 for none


def names() -> dict[str, str]:
    """The module of every method in kd, by the method's name: read, not imported."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for name in re.findall(r'^class \w+\(Method, name="(\w+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            found[name] = f"kd.losses.methods.{path.stem}"
    return found


def library() -> dict[str, type[Method]]:
    """Every method by name: kd's, and those of files that were imported."""
    from kd.losses.methods.base import METHODS

    for module in set(names().values()):
        importlib.import_module(module)
    return METHODS


def import_own(given: str) -> None:
    """Import a file of one's own (`my_method.py`) or a module by name; its methods enter themselves.

    Raises ConfigError with the line that went wrong.
    """
    path = Path(given)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise ConfigError(f"--import {given}: no such file")
    try:
        if not is_file:
            importlib.import_module(given)
            return
        name = f"kd_import_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # a dataclass looks its module up there
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's code raises
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = f" (line {where.lineno} of {where.filename})" if is_file else ""
        raise ConfigError(f"--import {given}: {type(error).__name__}: {error}{line}") from error


# ---- `loss=NAME`, spelled out


def section(value: str) -> dict[str, Any]:
    """The `loss` section that `loss=VALUE` stands for: NAME, NAME:PRESET, or several of them as [A,B].

    Every field of a method is written out, so that `loss.methods.NAME.FIELD=...` changes one. The cross entropy gets
    the smallest weight that one of the methods asks for: a method that takes its place stays alone. Raises ConfigError.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for word in re.split(r"[+,]", value.strip("[]")):
        name, _, preset = (part.strip() for part in word.partition(":"))
        if name in chosen:
            raise ConfigError(f"loss={value}: names {name} twice")
        chosen[name] = _settings(f"loss={value}", name, preset)
    plain = chosen.pop(PLAIN, None)
    ce_weights = [s.pop("ce_weight") for s in (*chosen.values(), plain or {}) if "ce_weight" in s]
    kd_weights = [s.pop("kd_weight", 0.0) for s in chosen.values()]
    found: dict[str, Any] = {"methods": chosen, "kd_weight": max(kd_weights, default=0.0)}
    if ce_weights:
        found["ce_weight"] = min(ce_weights)
    if plain:
        found |= {"kd_weight": plain["weight"], "temperature": plain["temperature"]}
    return found


def _settings(typed: str, name: str, preset: str) -> dict[str, Any]:
    """A method's weights and fields under a preset, as plain values."""
    method = _find(name, f"{typed}: no such method as {name!r}", "loss=")
    presets = method.presets
    if preset and preset not in presets:
        raise ConfigError(f"{typed}: {name} has no preset {preset!r}; there is {', '.join(presets) or 'none'}")
    usual = USUAL if USUAL in presets else next(iter(presets), "")
    values = {**SHARED, **{key: _default(typed, f) for key, f in _fields(method).items()}}
    values |= {key: _plain(value) for key, value in presets.get(preset or usual, {}).items()}
    return values


def _find(name: str, wrong: str, before: str) -> type[Method]:
    known = library()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise ConfigError(f"{wrong}; " + (f"did you mean {before}{near[0]}?" if near else "--help lists them"))
    return known[name]


def _fields(method: type[Method]) -> dict[str, Field]:
    return {f.name: f for f in fields(method) if f.init}  # type: ignore[arg-type]


def _default(typed: str, f: Field) -> Any:
    if f.default is MISSING and f.default_factory is MISSING:
        raise ConfigError(f"{typed}: its field {f.name} has no default; give it one in its class")
    return _plain(f.default if f.default_factory is MISSING else f.default_factory())


def _plain(value: Any) -> Any:
    """What YAML can hold."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


# ---- from a recipe's values to methods


def build(values: Mapping[str, Any], section: str = "loss") -> dict[str, Weighted]:
    """The methods that `loss.methods` names, each with its weight. Raises ConfigError for what cannot work.

    `section` is `teacher` for those that the teacher itself is trained with, which have nobody to learn from.
    """
    made = {name: _build(f"{section}.methods.{name}", name, settings) for name, settings in values.items()}
    for name, each in made.items() if section == "teacher" else ():
        if each.method.needs:
            alone = [known for known, method in library().items() if not method.needs]
            raise ConfigError(f"teacher.methods.{name}: needs a teacher of its own; must be of {', '.join(alone)}")
    return made


def _build(at: str, name: str, settings: Any) -> Weighted:
    if name == PLAIN:
        raise ConfigError(f"{at}: is there already; type loss.kd_weight=... and loss.temperature=...")
    method = _find(name, f"{at}: no such method", at.removesuffix(name))
    if name in TAKEN:
        raise ConfigError(f"{at}: {name} is another figure of metrics.jsonl; give the method another name")
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{at}={settings}: must be settings such as {{weight: 1.0}}; type loss={name}")
    hints = {key: hint for key, hint in get_type_hints(method).items() if key in _fields(method)}
    for key, value in settings.items():
        if key not in (known := hints | dict.fromkeys(SHARED, float)):
            raise ConfigError(f"{at}.{key}: no such setting; {did_you_mean(name, key, at.partition('.')[0])}")
        if not _fits(value, known[key]):
            raise ConfigError(f"{at}.{key}={value}: must be {_words(known[key])}")
    shared = {key: settings.get(key, default) for key, default in SHARED.items()}
    for key, value in shared.items():
        if not is_weight(value):  # the epochs are bounded like the weight
            raise ConfigError(f"{at}.{key}={value}: must be {WEIGHTS}")
    try:
        made = method(**{key: value for key, value in settings.items() if key in hints})
    except (ValueError, TypeError) as error:  # its `check`, which may start with the method's name or not
        raise ConfigError(f"{at}.{re.sub(rf'^{name}(: |[.])', '', str(error))}") from error
    return Weighted(made, **shared)


def classifies(values: Mapping[str, Any]) -> bool:
    """Whether one of the methods that `loss.methods` names brings the classifier to evaluate."""
    return any(name in library() and library()[name].classifies for name in values)


def has(name: str, key: str) -> bool:
    """Whether a method that exists has such a setting."""
    return key in _fields(library()[name]) or key in SHARED


def did_you_mean(name: str, key: str, section: str = "loss") -> str:
    """What to type instead of a setting that the method does not have."""
    known = [*_fields(library()[name]), *SHARED] if name in library() else []
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {section}.methods.{name}.{near[0]}?" if near else f"{name} has {', '.join(known)}"


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a field's type; types that YAML does not know are left to the method."""
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if origin in (int, str, bool, types.NoneType):
        return type(value) is origin
    if origin is Any or not isinstance(origin, type):
        return True
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if issubclass(origin, Sequence):
        return isinstance(value, list | tuple) and all(_fits(item, inner[0]) for item in value if inner)
    return True


def _words(hint: Any) -> str:
    """A field's type for a person."""
    known = {float: "a number", int: "a whole number", bool: "true or false", str: "text", types.NoneType: "null"}
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(option) for option in inner)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "settings such as {temperature: 2}"
    return known.get(origin, "a list such as [1,2]")
