"""Python files of one's own: imported where the command line names them, and the networks in them.

A recipe, a run directory or a file of weights may name such a network too, but never has its file imported.
"""

import importlib.util
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from kd.errors import ConfigError, require

NETWORK = re.compile(r"(.+\.py):(\w+)")  # FILE.py:NAME
_IMPORTED: dict[Path, ModuleType] = {}


def import_file(given: str) -> None:
    """Run a Python file of one's own, such as `my_method.py`; its methods register themselves.

    Raises ConfigError with the line that went wrong.
    """
    path = Path(given)
    require(path.suffix == ".py" and path.is_file(), f"--import {given}: no such Python file")
    name = f"kd_import_{path.stem}"  # so that a file called random.py does not hide another module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # a dataclass looks its module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's code raises
        where = traceback.extract_tb(error.__traceback__)[-1]
        line = f"line {where.lineno} of {where.filename}"
        raise ConfigError(f"--import {given}: {type(error).__name__}: {error} ({line})") from error
    _IMPORTED[path.resolve()] = module


def imported_files() -> list[Path]:
    """The files that were imported."""
    return list(_IMPORTED)


def own_network(name: str, setting: str) -> Callable[..., Any] | None:
    """The function or class that FILE.py:NAME names, None for a name of another form.

    Raises ConfigError where the command line did not name the file, or the file has no such function or class.
    """
    match = NETWORK.fullmatch(name)
    if match is None:
        return None
    path = own_file(name)
    if path is None:
        raise ConfigError(f"{setting}: only the command line imports code; type --import {match[1]} if you trust it")
    made = getattr(_IMPORTED[path], match[2], None)
    require(callable(made), f"{setting}: {path} has no function or class {match[2]}")
    return made


def own_file(name: str) -> Path | None:
    """The imported file that FILE.py:NAME names: that path or, as a run may be scored elsewhere, a file so called."""
    match = NETWORK.fullmatch(name)
    if match is None:
        return None
    path = Path(match[1]).resolve()
    return path if path in _IMPORTED else next((each for each in _IMPORTED if each.name == path.name), None)
