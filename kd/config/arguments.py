"""Validate command-line arguments: the key=value words that every command takes, and the options of training."""

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import NoReturn

from kd.errors import ConfigError, require
from kd.runtime.own_code import NETWORK

MODELS = ("teacher.model", "student.model", "model")  # keys of a network
SETTING = re.compile(r"\+?[^\W\d][\w.]*|hydra/launcher")


def read(words: Sequence[str], allowed: Mapping[str, str], required: Sequence[str] = ()) -> dict[str, str]:
    """The values that `key=value` words give, by key.

    `allowed` has what may be typed and what stands for its value in a message: {"run": "DIR", "output": "FILE.html"},
    where the file must end in .html. A key that ends in a dot allows all keys that begin with it: {"data.": "VALUE"}
    allows data.root=PATH. Of a key that is typed twice the last value counts, as on the command line of kd.train.

    Raises ConfigError for a word that is not key=value, an unknown key, an empty value, another ending, and where a
    required key is missing.
    """
    usage = ", ".join(f"{key}KEY={value}" if key.endswith(".") else f"{key}={value}" for key, value in allowed.items())
    prefixes = tuple(key for key in allowed if key.endswith("."))
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        require(equals and (key in allowed or key.startswith(prefixes)), f"{word}: no such argument; type {usage}")
        require(value, f"{word}: must not be empty")  # as of a shell variable that is not set
        _, file, suffix = allowed.get(key, "").partition("FILE")
        require(not file or value.endswith(suffix), f"{word}: must end in {suffix}")
        values[key] = value
    for key in required:
        require(key in values, f"{key}: not given; type {key}={allowed[key]}")
    return values


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def options(words: Sequence[str]) -> tuple[list[str], argparse.Namespace]:
    """The key=value words of kd.train or kd.study, the last of each key, and the options beside them.

    The options are `show` (--cfg job), `sweep` (-m) and `imports` (--import FILE, and those of `own_files`). Raises
    ConfigError.
    """
    parser = _importer()
    parser.add_argument("--cfg", "-c", dest="show", choices=["job"])
    parser.add_argument("--multirun", "-m", dest="sweep", action="store_true")
    chosen, rest = parser.parse_known_args(words)
    for word in rest:
        if not SETTING.fullmatch(word.partition("=")[0]) or "=" not in word:
            raise ConfigError(f"{word}: cannot be read; type key=value without dashes, such as seed=1, or see --help")
    # As in Hydra the last word of a key counts, so that a script's settings can be changed at their end.
    words = list({word.partition("=")[0]: word for word in rest}.values())
    chosen.imports = list(dict.fromkeys([*chosen.imports, *own_files(words)]))
    return words, chosen


def imports(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words beside --import FILE, and these files. Raises ConfigError."""
    chosen, rest = _importer().parse_known_args(words)
    return rest, chosen.imports


def own_files(words: Sequence[str]) -> list[str]:
    """The files of networks of one's own that words such as teacher.model=FILE.py:NAME name."""
    models = [word.partition("=")[2] for word in words if word.partition("=")[0] in MODELS]
    networks = [NETWORK.fullmatch(name) for model in models for name in model.split(",")]
    return [network[1] for network in networks if network]


def _importer() -> _Parser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--import", dest="imports", metavar="FILE.py", action="append", default=[])
    return parser
