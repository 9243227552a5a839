"""How large and how small the numbers of a loss may be; torch is not imported, for `kd.config.schema` reads it.

Within these ranges, and for finite logits up to 1e20 in absolute value, everything stays inside float32: a weight of
1e6 on a class of weight 1e6 makes 1e32 of them, T² = 1e6 likewise. Beyond, float32 fails bit by bit: KL at temperature
T is off by some 1e-7 T², which at 1,000 leaves two digits of the value (and five of the gradient, off by 1e-7 T), and
at 10,000 none. Papers go to T = 40 and to weights of 30,000.
"""

LOWEST_TEMPERATURE = 0.001
HIGHEST_TEMPERATURE = 1000
LARGEST_WEIGHT = 10**6
# A weight or smoothing mass below this counts as 0: float32 may not hold it, and make nan of its product with inf.
NOTHING = 1e-30

TEMPERATURES = f"a number from {LOWEST_TEMPERATURE} to {HIGHEST_TEMPERATURE}"
WEIGHTS = f"a number from 0 to {LARGEST_WEIGHT}"


def is_temperature(value: float) -> bool:
    """Whether it is in range; nan is not."""
    return LOWEST_TEMPERATURE <= value <= HIGHEST_TEMPERATURE


def is_weight(value: float) -> bool:
    """Whether it is in range; nan is not."""
    return 0 <= value <= LARGEST_WEIGHT


def or_nothing(value: float) -> float:
    """The weight or mass as it is computed with."""
    return value if value >= NOTHING else 0.0
