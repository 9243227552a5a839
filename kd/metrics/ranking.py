"""Average ranks, Spearman's rank correlation and the area under the ROC curve."""

import torch
from torch import Tensor


def average_ranks(values: Tensor) -> Tensor:
    """Ranks (N,) from 1, smallest first, of values (N,); equal values share the mean of their ranks."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation () of two (N,), between -1 and 1; 0 where one of them is constant."""
    a, b = average_ranks(a), average_ranks(b)
    a, b = a - a.mean(), b - b.mean()
    norm = (a.square().sum() * b.square().sum()).sqrt()
    return torch.where(norm > 0, (a * b).sum() / norm.where(norm > 0, 1), 0.0)


def auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """The probability () that a positive sample scores above a negative one; ties count half, both are present."""
    n = positive.sum().double()
    above = average_ranks(scores)[positive].sum() - n * (n + 1) / 2
    return above / (n * (len(scores) - n))
