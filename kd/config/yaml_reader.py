"""The one reader of YAML, for recipe files and for values on the command line.

YAML 1.1 reads `no` as false, `010` as eight and `1e-3` as text, and keeps the last of two equal keys in silence. Here
`no` is text, numbers are decimal, and a key that is given twice is an error. No code runs from
a file: PyYAML's safe loader refuses tags that name Python objects, and `_target_` and OmegaConf's resolvers are refused
here. Nothing here imports torch.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from kd.errors import ConfigError, require

MAX_BYTES = 64 * 1024  # twelve times the longest recipe here
# OmegaConf calls a resolver for what has a colon, such as ${oc.env:HOME}. A recipe may refer to settings only.
_REFERENCE = re.compile(r"\$\{[A-Za-z_][\w.]*\}")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers and truth values of YAML 1.2, and each key once."""

    yaml_implicit_resolvers: dict = {}  # without those of YAML 1.1; the ones below take their place  # noqa: RUF012

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for key, (key_node, value_node) in zip(keys, node.value, strict=True):
            if keys.count(key) > 1:
                raise self._refused(f"{key} is given twice; keep one", key_node)
            if key == "_target_":
                raise self._refused("_target_ names code to run, which a recipe cannot do", key_node)
            if ":" in key and not value_node.value:  # {a:1} is the name "a:1" with no value
                raise self._refused(f"{key} needs a space after the colon", key_node)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        rest = _REFERENCE.sub("", str(value))
        if "${" in rest:
            at = rest.index("${")
            raise self._refused(f"{rest[at : at + 40]} is not read, only references to settings like ${{seed}}", node)
        return value

    @staticmethod
    def _refused(problem: str, node: Any) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]{1,18}", "-+0123456789"),  # 010 is ten; what has more digits is out of every range
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+0123456789."),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(loader.construct_scalar(node)))


def load(path: Path) -> dict[str, Any]:
    """The plain values of a recipe file in UTF-8. Raises ConfigError that names the file, the line and the problem."""
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    try:
        require(len(content) <= MAX_BYTES, f"must be ≤ {MAX_BYTES // 1024} KiB", ValueError)
        values = _load(content.decode("utf-8-sig"))
        require(isinstance(values, dict | None), "must be settings such as seed: 1", ValueError)
    except ValueError as error:  # of the decoder, too
        raise ConfigError(f"{path}: not a readable recipe ({error})") from error
    return values or {}


def value(text: str, at: str) -> Any:
    """One value, read as in a recipe file. Raises ConfigError, which begins with `at`."""
    try:
        return _load(f"x: {text}")["x"] if text else text
    except ValueError as error:
        raise ConfigError(f"{at}: cannot be read ({error}); type a plain value, or one inside quotes") from error


def _load(text: str) -> Any:
    """What YAML holds. Raises ValueError with the line and the problem."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:  # a character that YAML does not allow, or nested too deeply
        raise ValueError(" ".join(str(error).split())) from error
