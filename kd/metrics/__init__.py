"""Metrics of predictions and features: pure functions in float64, usable without the rest of kd.

One legend for all files of this folder. N is the number of samples, K of classes, D of features.

- logits, reference, teacher (N, K): floating point, any precision. -inf masks a class, whose probability is 0: the
  metric is then that of the other classes, unless its docstring says otherwise. A nan, an inf and a row of only -inf
  are errors; logits that look like probabilities draw one warning
- targets (N,): int64, from 0 to K - 1
- bins: number of bins, an integer ≥ 1; default 15
- features (N, D), weight (K, D), views (N, L): floating point, finite
- a metric is a tensor () in float64 without gradient unless its docstring says otherwise; softmax is at T = 1

All raise ValueError with one line for other inputs, and its subclass `kd.metrics.inputs.Undefined` where the metric is
undefined. `METRICS` is the registry, a dict by name; `compute` evaluates it.
"""

from kd.metrics.calibration import *
from kd.metrics.dark_knowledge import *
from kd.metrics.fidelity import *
from kd.metrics.geometry import *
from kd.metrics.omitted import *
from kd.metrics.registry import *
from kd.metrics.selective import *
from kd.metrics.smoothing import *
from kd.metrics.temperature import *
