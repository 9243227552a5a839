"""Types and ranges of a method's fields, checked once: when the method is made.

A field states its range in its type, ``temperature: Temperature = 4.0``, which may be a range of its own:
``Positive = Annotated[float, Allowed("a finite number > 0", lambda value: value > 0)]``. A plain ``float`` may be any
finite number, a plain ``int``, ``bool`` or ``str`` any value of that type. Other types are not checked.
"""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from kd.losses.ranges import TEMPERATURES, WEIGHTS, is_temperature, is_weight
from kd.smoothing import MASSES, is_mass


class Allowed(NamedTuple):
    """Which values a field may have: ``must be {words}`` is what an error says."""

    words: str
    accepts: Callable[[Any], bool]


def is_number(value: object) -> bool:
    """Whether it is a finite int or float; a bool is not a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def one_of(*names: str) -> Allowed:
    """One of these names."""
    return Allowed(f"one of {', '.join(names)}", lambda value: value in names)


Temperature = Annotated[float, Allowed(TEMPERATURES, is_temperature)]
Weight = Annotated[float, Allowed(WEIGHTS, is_weight)]
NonNegative = Annotated[float, Allowed("a finite number ≥ 0", lambda value: value >= 0)]
Count = Annotated[int, Allowed("a whole number ≥ 1", lambda value: value >= 1)]
Share = Annotated[float, Allowed("a number > 0 and < 1", lambda value: 0 < value < 1)]
Mass = Annotated[float, Allowed(MASSES, is_mass)]

# What a value must be before its range is looked at. YAML knows these types.
_OF_TYPE: dict[Any, Allowed] = {
    float: Allowed("a finite number", is_number),
    int: Allowed("a whole number", lambda value: type(value) is int),
    bool: Allowed("true or false", lambda value: type(value) is bool),
    str: Allowed("text", lambda value: isinstance(value, str)),
}


def check_fields(name: str, method: Any) -> None:
    """Raise ValueError, ``NAME.FIELD=VALUE: must be ...``, for the first field of a dataclass that is out of range."""
    hints = get_type_hints(type(method), include_extras=True)
    for field in fields(method):
        value, hint = getattr(method, field.name), hints[field.name]
        kind, *ranges = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        checks = [_OF_TYPE[kind]] if kind in _OF_TYPE else []
        checks += [allowed for allowed in ranges if isinstance(allowed, Allowed)]
        if not all(allowed.accepts(value) for allowed in checks):
            raise ValueError(f"{name}.{field.name}={value}: must be {checks[-1].words}")
