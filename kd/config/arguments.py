"""The words of a command line, before Hydra or anybody else reads them: what is refused, and what may be printed."""

from __future__ import annotations

import os
import re

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
