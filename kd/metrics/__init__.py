"""Metrics of predictions and features: pure functions in float64, usable without the rest of kd.

One legend for all files of this folder. N is the number of samples, K of classes, D of features.

- logits, reference, teacher (N, K): floating point, any precision, finite; probabilities are refused
- targets (N,): int64, from 0 to K - 1
- features (N, D), weight (K, D), views (N, L): floating point, finite
- a metric is a tensor () in float64 without gradient unless its docstring says otherwise; softmax is at T = 1

All raise ValueError with one line for other inputs, and its subclass `kd.metrics.inputs.Undefined` for inputs that have
no value. `METRICS` has every metric that is measured, by name; `compute` measures.
"""

from kd.metrics import (
    calibration,
    dark_knowledge,
    fidelity,
    geometry,
    omitted,
    registry,
    selective,
    smoothing,
    temperature,
)
from kd.metrics.calibration import *
from kd.metrics.dark_knowledge import *
from kd.metrics.fidelity import *
from kd.metrics.geometry import *
from kd.metrics.omitted import *
from kd.metrics.registry import *
from kd.metrics.selective import *
from kd.metrics.smoothing import *
from kd.metrics.temperature import *

__all__ = calibration.__all__ + dark_knowledge.__all__ + fidelity.__all__ + geometry.__all__ + omitted.__all__
__all__ += registry.__all__ + selective.__all__ + smoothing.__all__ + temperature.__all__
