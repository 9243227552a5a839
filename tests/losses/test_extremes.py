"""The loss at the ends of its settings and of the dtype, on every backend (loss_extremes.py)."""

from dataclasses import fields

import loss_extremes
import pytest
from loss_extremes import BF16, F16, F32, F64, INF, LARGEST, NAN, SETTINGS, TEMPERATURES

from kd.errors import ConfigError
from kd.losses.methods import registry as methods

both = pytest.mark.parametrize("backend", ["cpu", "reference"])
every_dtype = pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)


@both
@pytest.mark.parametrize("dtype", [F64, F32, F16], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_at_the_ends_of_their_ranges(name, dtype, backend):
    loss_extremes.settings_at_their_ends(backend, dtype, name)


@both
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    ("dtype", "m"), [(F16, 65504), *((d, m) for d in (BF16, F32, F64) for m in (1e20, 1e38, 3e38)), (F32, LARGEST)]
)
def test_the_largest_logits(dtype, m, temperature, backend):
    loss_extremes.largest_logits(backend, dtype, m, temperature)


@both
def test_float64_beyond_float32(backend):
    for m in (1e39, 1e300):
        loss_extremes.largest_logits(backend, F64, m, 4.0)


@both
@every_dtype
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_infinities(temperature, dtype, backend):
    loss_extremes.infinities(backend, dtype, temperature)


# The temperature of crd is that of a contrast between examples; ctkd's range has its end at lowest_temperature's.
OF_METHODS = [
    (name, f.name)
    for name, method in methods.library().items()
    for f in fields(method)
    if "temperature" in f.name and name != "crd" and f.name != "temperature_range"
]


def test_methods_have_the_same_range():
    """Their temperatures and their weights, of which those fields have the name."""
    assert len(OF_METHODS) == 19
    for name, field in OF_METHODS:
        method = methods.library()[name]
        for value in (1e-40, 0.0, -1.0, 1000.5, 1e30, INF, NAN):
            given = (value,) if field == "temperatures" else value
            with pytest.raises(ValueError, match=rf"^{name}\.{field}=.*: must be a number from 0.001 to 1000$"):
                method(**{field: given})
        for value in (0.001, 1000):
            rest = {"temperature_range": 0.0} if name == "ctkd" else {}
            method(**{field: (value,) if field == "temperatures" else value}, **rest)
    for value in (-1.0, 1e300, INF, NAN):
        for field in ("weight", "nckd_weight"):
            with pytest.raises(
                ConfigError, match=rf"^loss\.methods\.dkd\.{field}=.*: must be a number from 0 to 1000000$"
            ):
                methods.build({"dkd": {field: value}})
