"""Validate command-line arguments: the key=value words that every command reads."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from kd.config import yaml_reader as strict
from kd.errors import ConfigError

OPTIONS = ("--cfg", "-c", "--multirun", "-m", "--resolve")  # Hydra's others read folders or print pages of its own
LONGEST = 2000  # bytes of a word; Hydra's grammar takes a second for twenty times as many
OF_HYDRA = r"hydra/launcher|\+?hydra\.launcher\.[\w.]+"


def check_text(word: str) -> None:
    """Refuse a word that is empty, endless or cannot be printed. Raises ConfigError."""
    if not word.strip():
        raise ConfigError(f"{word!r}: is an empty word; --help says what can be typed")
    if len(word.encode(errors="replace")) > LONGEST:
        raise ConfigError(f"{word[:60]}...: must be ≤ {LONGEST} bytes; longer values belong in a recipe")
    if not word.isprintable():
        raise ConfigError(f"{word}: must be printable text in UTF-8")


def check_word(word: str) -> None:
    """Refuse a word that is no setting with a value, or whose value could be more than one. Raises ConfigError."""
    key, equals, value = word.partition("=")
    check_text(word)
    if key.startswith("-"):
        if word not in OPTIONS:
            raise ConfigError(f"{word}: no such option; --help lists what there is")
        return
    if key.startswith("~"):
        raise ConfigError(f"{word}: settings cannot be removed; type {key[1:]}=VALUE")
    if key.startswith("++"):
        raise ConfigError(f"{word}: type {key[2:]}=VALUE without ++ before it")
    if key == "hydra/launcher" and not re.fullmatch(r"(?i)(?!(true|false|null|nan|inf)$)[^\W\d]\w*", value):
        raise ConfigError(f"{word}: must be the name of a launcher such as basic or joblib")
    if re.search(r"\d{100}", value):  # no float holds 310 digits
        raise ConfigError(f"{word[:60]}...: too many digits; numbers have fewer than 100")
    if "_target_" in word:
        raise ConfigError(f"{word}: _target_ names code to run, which no setting can")
    if key.startswith(("hydra", "+hydra")) and not re.fullmatch(OF_HYDRA, key):
        raise ConfigError(
            f"{word}: Hydra's own settings are fixed, but hydra/launcher=NAME and hydra.launcher.KEY=VALUE"
        )
    if equals and not re.fullmatch(r"\+?[^\W\d][\w.]*|hydra/launcher", key.rstrip()):
        raise ConfigError(f"{word}: cannot be read; settings are typed key=value, such as seed=1 or loss.temperature=2")
    if wrong := strict.strange_reference(value):
        raise ConfigError(f"{word}: {wrong} is not read; only references to settings such as ${{seed}}")
    if (
        sum(value.count(bracket) for bracket in "[{(") > 100
        or max(map(len, re.findall(r"[\[{(]+", value)), default=0) > 20
    ):
        raise ConfigError(f"{word[:60]}...: nested too deeply; values are plain, or lists such as [1,2]")


def check_words(words: list[str]) -> None:
    """Refuse what Hydra would take in silence, or answer with a page of its own."""
    asked = ""
    for word in words:
        if asked or word.partition("=")[0] in ("--cfg", "-c"):
            asked = asked if asked else word
            if "=" in asked or asked != word:
                if word.rpartition("=")[2] != "job":
                    raise ConfigError(f"{asked} {word}: type --cfg job to print the resolved recipe")
                asked = ""
            continue
        check_word(word)
    if "--resolve" in words and not any(word.partition("=")[0] in ("--cfg", "-c") for word in words):
        raise ConfigError("--resolve: goes with --cfg job; type both")
    if asked:
        raise ConfigError("--cfg: type --cfg job to print the resolved recipe")
    if {"-m", "--multirun"} & set(words) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "-m: starts one run after the other, which torchrun's processes cannot; type one run at a time"
        )
    for group in ("recipe", "data", "loss"):
        if len(given := [word for word in words if word.startswith(f"{group}=")]) > 1:
            raise ConfigError(f"{' '.join(given)}: type one {group}={'[A,B]' if group == 'loss' else ''}")


def read(words: list[str], allowed: Mapping[str, str]) -> dict[str, str]:
    """The values that `key=value` words give, by key; the grammar of every command.

    `allowed` has what may be typed and what stands for its value in a message, as in {"run": "DIR", "html": "FILE"}.
    A key that ends in a dot allows all keys that begin so: {"data.": "VALUE"} allows data.root=PATH.

    Raises ConfigError for a word that is not key=value, an unknown key, a key given twice and an empty value.
    """
    usage = ", ".join(f"{key}KEY={value}" if key.endswith(".") else f"{key}={value}" for key, value in allowed.items())
    prefixes = tuple(key for key in allowed if key.endswith("."))
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not (key in allowed or key.startswith(prefixes)):
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean {near[0]}={allowed[near[0]]}?" if near else f"type {usage}"
            raise ConfigError(f"{word}: no such argument; {hint}")
        if key in values:
            raise ConfigError(f"{word}: {key} is given twice; keep one")
        if not value:
            raise ConfigError(f"{word}: must not be empty")
        values[key] = value
    return values


def check_target(key: str, path: Path, suffix: str = "") -> None:
    """Raise ConfigError where key=PATH names a file that cannot be written: before the work, not after it."""
    if path.suffix != suffix and suffix:
        raise ConfigError(f"{key}={path}: must end in {suffix}")
    if not path.parent.is_dir():
        raise ConfigError(f"{key}={path}: no such directory as {path.parent}")
    if path.is_dir():
        raise ConfigError(f"{key}={path}: is a directory; name a file")
