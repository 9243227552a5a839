"""Types and ranges of a loss's settings and of a method's fields.

A field states its range in its type, ``temperature: Temperature = 4.0``, which may be a range of its own:
``Positive = Annotated[float, Allowed("a finite number > 0", lambda value: value > 0)]``. A plain ``float`` may be any
finite number, a plain ``int``, ``bool`` or ``str`` any value of that type. Other types are not checked.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, NamedTuple, dataclass_transform, get_args, get_origin, get_type_hints

from torch import nn

from kd.losses.ranges import HIGHEST_TEMPERATURE, LARGEST_WEIGHT, LOWEST_TEMPERATURE
from kd.smoothing import MASSES, SMOOTHINGS, is_mass


class Allowed(NamedTuple):
    """Which values a field may have: ``must be {words}`` is what an error says."""

    words: str
    accepts: Callable[[Any], bool]

    def __repr__(self) -> str:
        """For ``help(loss)``, which shows the type of every setting."""
        return f"Allowed({self.words!r})"


def is_number(value: object) -> bool:
    """Whether it is a finite int or float; a bool is not a number."""
    # Compared, not math.isfinite: that converts to a float, which an int such as 10**400 has none of.
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def is_temperature(value: object) -> bool:
    """Whether it is a number in the range of temperatures."""
    return is_number(value) and LOWEST_TEMPERATURE <= value <= HIGHEST_TEMPERATURE  # type: ignore[operator]


def one_of(*names: str) -> Allowed:
    """One of these names."""
    return Allowed(f"one of {', '.join(names)}", lambda value: value in names)


TEMPERATURES = f"a number from {LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE}"

Temperature = Annotated[float, Allowed(TEMPERATURES, is_temperature)]
OptionalTemperature = Annotated[
    float | None, Allowed(f"None or {TEMPERATURES}", lambda value: value is None or is_temperature(value))
]
Weight = Annotated[float, Allowed(f"a number from 0 to {LARGEST_WEIGHT}", lambda value: 0 <= value <= LARGEST_WEIGHT)]
NonNegative = Annotated[float, Allowed("a finite number ≥ 0", lambda value: value >= 0)]
Count = Annotated[int, Allowed("a whole number ≥ 1", lambda value: value >= 1)]
Share = Annotated[float, Allowed("a number > 0 and < 1", lambda value: 0 < value < 1)]
Mass = Annotated[float, Allowed(MASSES, is_mass)]
Convention = Annotated[str, one_of(*SMOOTHINGS)]

# What a value must be before its range is looked at. YAML knows these types.
_OF_TYPE: dict[Any, Allowed] = {
    float: Allowed("a finite number", is_number),
    int: Allowed("a whole number", lambda value: type(value) is int),
    bool: Allowed("true or false", lambda value: type(value) is bool),
    str: Allowed("text", lambda value: isinstance(value, str)),
}


def ranges(owner: Any) -> dict[str, list[Allowed]]:
    """What every annotated attribute of a class may be, by name; `checked` wants all of it."""
    by_name = {}
    for name, hint in get_type_hints(owner, include_extras=True).items():
        kind, *stated = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        of_type = [_OF_TYPE[kind]] if kind in _OF_TYPE else []
        by_name[name] = of_type + [allowed for allowed in stated if isinstance(allowed, Allowed)]
    return by_name


@dataclass_transform(eq_default=False)
class Checked(nn.Module):
    """Base of modules with settings, which are checked where they are assigned and never at a call.

    A subclass becomes a dataclass, whose fields are its settings.
    """

    _ranges: ClassVar[dict[str, list[Allowed]]] = {}
    _before: ClassVar[str] = ""  # stands before a setting's name in an error

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        dataclass(eq=False, repr=False)(cls)  # a module is equal to itself alone
        cls._ranges = ranges(cls)  # once, because torch.compile cannot trace how they are read

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign an attribute. Raises ValueError, ``NAME=VALUE: must be ...``, for a setting out of its range."""
        if name in self._ranges:
            value = checked(self._before + name, value, self._ranges[name])
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The settings that are not at their defaults, for ``print(loss)``."""
        default = type(self)()
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]  # a subclass is a dataclass
        changed = [name for name in names if getattr(self, name) != getattr(default, name)]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in changed)


def checked(at: str, value: Any, wanted: list[Allowed]) -> Any:
    """The value, a NumPy scalar as the Python number that it is.

    Raises ValueError, ``AT=VALUE: must be ...``, unless it is all that is wanted.
    """
    if type(value).__module__ == "numpy" and value.ndim == 0:
        value = value.item()
    for allowed in wanted:
        if not allowed.accepts(value):
            raise ValueError(f"{at}={value!r}: must be {wanted[-1].words}")
    return value
