"""Random numbers that belong to a sample: functions of (seed, epoch, index), the same wherever they are computed.

SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") as a counter-based hash:
element j of the stream of a key is mix(key + j * GOLDEN). No state and no table, a batch is hashed at once on the
device it is on: noise for CIFAR would need a table of 600 MB per epoch, a generator per sample 10 µs each.
Integers wrap at 64 bits, so the bits are the same on every device; the logarithm and the cosine of a normal may
differ in the last place between devices.
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & (2 ** (64 - bits) - 1)  # >> copies the sign bit of an int64, the mask takes it away


def mix(x: Tensor) -> Tensor:
    """SplitMix64's bijection of 64-bit integers."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def sample_keys(seed: int, epoch: int, index: Tensor) -> Tensor:
    """One int64 key per sample of an epoch; no two samples of an epoch share one, as mix is a bijection."""
    key = torch.zeros((), dtype=torch.int64, device=index.device)
    for part in (seed, epoch, index):
        key = mix(key + (torch.as_tensor(part, device=index.device) + 1) * GOLDEN)
    return key


def bits(keys: Tensor, count: int) -> Tensor:
    """The first `count` 64-bit numbers of each key's stream: (B,) -> (B, count)."""
    return mix(keys[:, None] + torch.arange(1, count + 1, device=keys.device) * GOLDEN)


def uniforms(keys: Tensor, count: int) -> Tensor:
    """Uniform in [0, 1), float32: (B,) -> (B, count)."""
    return _unit(_shift(bits(keys, count), 40))


def normals(keys: Tensor, count: int) -> Tensor:
    """Standard normal by Box and Muller, float32, within ±5.8: (B,) -> (B, count)."""
    pairs = bits(keys, math.ceil(count / 2))  # 64 bits are enough for both numbers of a pair, and hashing is the cost
    radius, angle = (-2 * torch.log1p(-_unit(_shift(pairs, 40)))).sqrt(), 2 * math.pi * _unit(pairs & (2**24 - 1))
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def _unit(x: Tensor) -> Tensor:
    return x.float() / 2**24  # as many bits as a float32 has: 1 is never reached


@contextmanager
def global_rng(seed: int) -> Iterator[None]:
    """Seed random, numpy and torch's CPU generator inside; outside nothing has happened to them.

    For other people's code that draws from them. torch.manual_seed would reseed the accelerators too.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
