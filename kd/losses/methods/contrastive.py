"""Contrastive distillation against a memory of the whole training set: crd.

N examples of the batch, M of the training set, n negatives for each example, D dimensions of the common space; s
student, t teacher.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kd.losses.fields import Allowed, Count, Mass
from kd.losses.methods.base import Method, Seen
from kd.losses.methods.shared import everywhere, unit


class CRD(Method, name="crd"):
    """Contrastive representation distillation: ``mean_i [-log h(s_i, t*_i) - sum_j log(1 - h(s_i, t*_j))]``.

    The same term with student and teacher exchanged is added. ``h(u, v) = e^(u·v/temperature) / (e^(u·v/temperature) +
    n/M)``; s and t are the L2-normalised outputs of a learned linear layer on each network's embedding; t*_j and s*_j
    are what a memory holds for training example j of M; j runs over n draws, with replacement, from the examples of
    other labels than i's. The label of an example is known once it was in a batch: before, in the first epoch, it may
    be drawn for an example of the same label.

    In nats for each example; the sum over n negatives starts in the ten thousands. Never zero: each direction is an
    upper bound of log n minus the mutual information. Stationary where h is the posterior of a true pair.

    Shapes: embeddings (N, D_s), (N, D_t), index (N,) positions in the training set, target (N,) labels; gives ().

    State: ``memory_student``, ``memory_teacher`` (M, D), ``labels`` (M,) and ``log_constants`` (2,), the logarithms of
    the constants of ``released``; all are saved. The memory starts uniform, of expected length 1. In training, after
    the value is computed, the rows of the batch become ``momentum · old + (1 - momentum) · new``, L2-normalised. Draws
    come from torch's generator, so a seeded step is repeatable. All processes hold the same memory: each writes the
    rows of all.

    Source: Tian et al. 2020, "Contrastive Representation Distillation", §3.1. n, momentum, temperature and negatives of
    other labels are the defaults of its released code.

    Args:
        num_negatives: n.
        temperature: divisor of the exponent.
        momentum: share of the old row.
        embed_dim: D.
        released: compute RepDistiller's CRDLoss. In each of the two directions e^(u·v/temperature) is divided by a
            constant, as in Wu et al. 2018: M times its mean over the first batch of all processes. The quotient is then
            typically 1/M, so its ratio to n/M is 1/n (about M/n by default), and the first value is about
            2·(1 + log n). That code also adds 1e-7 to denominators, 3e-7 of n/M on CIFAR-100; kd does not.

    Example:
        >>> s, t, y = torch.randn(8, 64), torch.randn(8, 128), torch.randint(10, (8,))
        >>> CRD(num_negatives=16)(s, t, y, index=torch.arange(8), num_samples=50).shape
        torch.Size([])
    """

    num_negatives: Count = 16384
    temperature: Annotated[float, Allowed("a finite number ≥ 0.0001", lambda value: value >= 1e-4)] = 0.07
    momentum: Mass = 0.5
    embed_dim: Count = 128
    released: bool = False

    needs = frozenset({"teacher", "embedding", "index", "labels", "batch"})
    presets = dict.fromkeys(("cifar100", "imagenet"), {"weight": 0.8, "ce_weight": 1.0, "released": True})

    def make(self, seen: Seen) -> None:
        """The layers into the common space, and the memory."""
        size = seen.num_samples
        self.require(size > 1, f"needs a training set of 2 or more examples, got {size}: pass num_samples")
        s, t = seen.embeddings
        self.embed_student = nn.Linear(s.shape[1], self.embed_dim)
        self.embed_teacher = nn.Linear(t.shape[1], self.embed_dim)
        bound = math.sqrt(3 / self.embed_dim)  # of a uniform distribution of variance 1 / D
        for name in ("memory_student", "memory_teacher"):
            self.register_buffer(name, torch.empty(size, self.embed_dim).uniform_(-bound, bound))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("log_constants", torch.full((2,), torch.nan if self.released else 0.0))

    def values(self, seen: Seen) -> Tensor:
        """()."""
        assert seen.index is not None
        s, t = seen.embeddings
        s, t = unit(self.embed_student(s)), unit(self.embed_teacher(t))
        if self.training:
            self.get_buffer("labels")[everywhere(seen.index)] = everywhere(seen.target)
        chosen = torch.cat([rearrange(seen.index, "n -> n 1"), self.negatives(seen.target)], 1)
        directions = (s, self.get_buffer("memory_teacher")), (t, self.get_buffer("memory_student"))
        # All products and then a choice: the rows chosen for a batch are more than the memory has. The memory is copied
        # because it changes before the backward pass needs it.
        exponents = [(x @ memory.clone().T).gather(1, chosen) / self.temperature for x, memory in directions]
        value = sum((self._contrast(x, i) for i, x in enumerate(exponents)), start=s.new_zeros(()))
        if self.training:
            self._remember(seen.index, s.detach(), t.detach())
        return value

    @torch.no_grad()
    def negatives(self, target: Tensor) -> Tensor:
        """Positions of examples with other labels than each target's, (N, n), drawn evenly and with replacement."""
        by_label, order = self.get_buffer("labels").sort()
        first, last = (torch.searchsorted(by_label, target, right=right) for right in (False, True))
        first, same = rearrange(first, "n -> n 1"), rearrange(last - first, "n -> n 1")
        size = len(order)
        share = torch.rand(len(target), self.num_negatives, device=target.device, dtype=torch.float64)
        place = (share * (size - same)).long()  # among the sorted examples, without those of the label
        return order[(place + same * (place >= first)).clamp(max=size - 1)]

    def _contrast(self, exponent: Tensor, direction: int) -> Tensor:
        """The mean over the batch, from exponents (N, 1 + n) of which the first is the true pair's."""
        size = len(self.get_buffer("labels"))
        constants = self.get_buffer("log_constants")
        constant = constants[direction].clone()
        if self.released:
            estimate = exponent.detach().logsumexp((0, 1)) - math.log(exponent.numel()) + math.log(size)
            if self.training:
                estimates = everywhere(rearrange(estimate, "-> 1"))
                estimate = estimates.logsumexp(0) - math.log(len(estimates))
            constant = torch.where(constant.isnan(), estimate, constant)  # without waiting for the device
            if self.training:
                constants[direction] = constant
        gap = exponent - constant - math.log(self.num_negatives / size)  # the log odds of h
        return -(F.logsigmoid(gap[:, 0]) + F.logsigmoid(-gap[:, 1:]).sum(1)).mean()

    @torch.no_grad()
    def _remember(self, index: Tensor, s: Tensor, t: Tensor) -> None:
        index = everywhere(index)
        for memory, new in ((self.get_buffer("memory_student"), s), (self.get_buffer("memory_teacher"), t)):
            new = everywhere(new)
            memory[index] = unit(self.momentum * memory[index] + (1 - self.momentum) * new)
