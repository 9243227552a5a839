"""Ranges of a loss's temperatures and weights. ``kd.config.schema`` reads them too, so torch is not imported.

Within these ranges, and for finite logits up to 1e20 in absolute value, everything stays inside float32: a weight of
1e6 on a class of weight 1e6 makes 1e32 of them, as does T² = 1e6. Beyond, float32 loses digits: the KL at temperature T
is off by some 1e-7 T², which at T = 1,000 leaves two digits of the value (and five of the gradient, off by 1e-7 T), and
at T = 10,000 none. Papers go to T = 40 and to weights of 30,000.
"""

LOWEST_TEMPERATURE = 0.001
HIGHEST_TEMPERATURE = 1000
LARGEST_WEIGHT = 10**6
# A smaller weight or smoothing mass counts as 0: float32 may not hold it, and its product with inf would be nan.
NOTHING = 1e-30


def or_nothing(value: float) -> float:
    """The weight or mass that the loss computes with: 0 for values below 1e-30."""
    return value if value >= NOTHING else 0.0
