"""What the feature methods share: which maps meet, at which size, and vectors of length one.

N examples, C channels, H, W: height and width; s, t: student and teacher.
"""

from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kd.losses.methods.base import Seen
from kd.losses.reference import wide_dtype

M = TypeVar("M", bound=nn.Module)

TINY = 1e-12  # a length below this is none; float32 squares cannot carry much less


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """`x` over its length along `dim`; what has none stays 0, with a gradient as if its length were 1.

    F.normalize divides by 1e-12 there, which makes gradients of 1e12.
    """
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / length.masked_fill(length <= TINY, 1)


def pairs(name: str, seen: Seen) -> list[tuple[Tensor, Tensor]]:
    """The maps of student and teacher that belong together. Raises ValueError where their numbers differ."""
    assert seen.teacher is not None
    ours, theirs = seen.student.maps, seen.teacher.maps
    if len(ours) != len(theirs):
        raise ValueError(
            f"{name}: the student gives {len(ours)} maps and the teacher {len(theirs)}; name as many layers of each"
        )
    return list(zip(ours, theirs, strict=True))


def pick(name: str, seen: Seen, layer: int) -> tuple[Tensor, Tensor]:
    """The pair of maps at position `layer`; negative positions count from the deepest."""
    found = pairs(name, seen)
    if not -len(found) <= layer < len(found):
        raise ValueError(f"{name}: layer={layer}: there are {len(found)} maps, give {-len(found)} to {len(found) - 1}")
    return found[layer]


def embeddings(seen: Seen) -> tuple[Tensor, Tensor]:
    """The embeddings of student and teacher, (N, D) each, for a method that needs them."""
    assert seen.student.embedding is not None
    assert seen.teacher is not None
    assert seen.teacher.embedding is not None
    return seen.student.embedding, seen.teacher.embedding


def same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and the smaller width, the larger one averaged down (adaptive pooling)."""
    size = min(a.shape[-2], b.shape[-2]), min(a.shape[-1], b.shape[-1])
    return resized(a, size), resized(b, size)


def resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The map averaged down to a size; as it is where it has that size."""
    return x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size)


def needs_several(name: str, examples: int) -> None:
    """Raise ValueError for a batch of one, in which there is nothing to compare."""
    if examples < 2:
        raise ValueError(
            f"{name}: compares examples with each other: a batch of {examples} is too small, give 2 or more"
        )


def placed(module: M, seen: Seen) -> M:
    """The learned module on the device of the student's outputs, in the dtype in which methods compute."""
    logits = seen.student.logits
    return module.to(logits.device, wide_dtype(logits))


def everywhere(x: Tensor) -> Tensor:
    """The rows of `x` of all processes, which may have different numbers of them, in the order of their ranks."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    count = torch.tensor([len(x)], device=x.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    padded = x.new_zeros(int(torch.cat(counts).max()), *x.shape[1:])  # a gathering wants equal shapes
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(number)] for part, number in zip(parts, counts, strict=True)])


def check_at_least(name: str, **fields: tuple[float, float]) -> None:
    """Raise ValueError for the first field, given as (value, least), that is below its least, or not finite."""
    for field, (value, least) in fields.items():
        if not least <= value < float("inf"):
            raise ValueError(f"{name}: {field}={value}: must be a finite number of at least {least:g}")
