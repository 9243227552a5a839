"""Functions that methods of several families share.

N examples, K classes, C channels, H, W: height and width of a map.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kd.losses.methods.base import Method, Seen

TINY = 1e-12  # a length below this counts as 0; float32 squares cannot carry much less

# ---- logits


def against_others(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """One class against all others: its margin (N,), and the others' log softmax (N, K), -inf at the class itself.

    The class's probability is sigmoid(margin), so that log p and log(1 - p) keep their digits however near to 1 it is.
    """
    index = index.unsqueeze(-1)
    others = logits.scatter(-1, index, -math.inf)
    total = others.logsumexp(-1, keepdim=True)
    return (logits.gather(-1, index) - total).squeeze(-1), others - total


def centred(values: Tensor, dim: int, largest: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Values minus their mean along `dim`, their length, and whether that is only the rounding error of `largest`."""
    deviation = values - values.mean(dim, keepdim=True)
    length = torch.linalg.vector_norm(deviation, dim=dim, keepdim=True)
    rounding = 8 * torch.finfo(values.dtype).eps * values.shape[dim] ** 0.5 * largest
    return deviation, length, length.detach() <= rounding


# ---- features


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """`x` divided by its length along `dim`; a zero vector stays 0, with a gradient as if its length were 1.

    F.normalize divides by 1e-12 there, which makes gradients of 1e12.
    """
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / length.masked_fill(length <= TINY, 1)


def pick(method: Method, seen: Seen, layer: int) -> tuple[Tensor, Tensor]:
    """The pair of maps at position `layer`; negative positions count from the deepest. Raises ValueError."""
    pairs = seen.map_pairs
    count = len(pairs)
    method.require(-count <= layer < count, f"layer={layer}: must be from {-count} to {count - 1} ({count} maps)")
    return pairs[layer]


def same_size(a: Tensor, b: Tensor, shrink: Callable = F.adaptive_avg_pool2d) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and the smaller width, the larger one averaged down (adaptive pooling)."""
    size = min(a.shape[-2], b.shape[-2]), min(a.shape[-1], b.shape[-1])
    a, b = (x if x.shape[-2:] == size else shrink(x, size) for x in (a, b))
    return a, b


# ---- processes


def everywhere(x: Tensor) -> Tensor:
    """The rows of `x` of all processes, in the order of their ranks; processes may have different numbers of rows."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x.cpu())  # all_gather wants equal shapes; a pickled tensor stays on its device
    return torch.cat(parts).to(x.device)
