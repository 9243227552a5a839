"""The objective of a stage: the fused cross entropy and plain distillation, and any weighted methods beside them.

N examples. Everything is a sum over examples; the training loop divides by their number. With class weights it also
tells the objective the mean weight of an update's labels: `divide_ce`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd.losses.distill import DistillLoss
from kd.losses.methods.base import Method, Seen, View, Weighted


class Terms(NamedTuple):
    """The loss with its graph; and every term by name, unweighted and detached. All are sums over the examples, ()."""

    loss: Tensor
    values: dict[str, Tensor]


class Objective(nn.Module):
    """``ce_weight CE + kd_weight T² KL + sum_m weight_m min(1, epoch / warmup_epochs_m) method_m``, in sums.

    A method that gives one value for the whole batch counts once for every example of it, so that its weight means the
    same as that of a mean over examples.

    Args:
        loss: the first two terms, with reduction "sum".
        methods: the others by name; they are the objective's submodules, and what they learn its parameters.
        new_peer: makes a second student with other weights, for methods that need "peer".
    """

    class_weight: Tensor | None  # (K,), as the user gave them

    def __init__(
        self,
        loss: DistillLoss,
        methods: Mapping[str, Weighted] | None = None,
        new_peer: Callable[[], nn.Module] | None = None,
    ):
        super().__init__()
        assert loss.reduction == "sum"
        self.loss = loss
        weight = loss.class_weight  # the loss's own is divided anew for every update
        self.register_buffer("class_weight", None if weight is None else weight.clone(), persistent=False)
        self._weighted = dict(methods or {})
        self.methods = nn.ModuleDict({name: each.method for name, each in self._weighted.items()})
        self._new_peer = new_peer

    @property
    def needs(self) -> frozenset[str]:
        """What the methods need of the loop, as `Method.needs` lists it."""
        return frozenset().union(*(each.method.needs for each in self._weighted.values()))

    @property
    def classifier(self) -> Method | None:
        """The method that gives the logits to evaluate; None where those are the student's own."""
        return next((each.method for each in self._weighted.values() if each.method.classifies), None)

    @torch.no_grad()
    def logits(self, student: View) -> Tensor:
        """The logits that would be evaluated, of a batch seen in training."""
        method = self.classifier
        if method is None:
            return student.logits.detach()
        training = method.training
        logits = method.eval().classify(student)  # in eval mode nothing that it gathers moves
        method.train(training)
        return logits

    @torch.no_grad()
    def build(self, seen: Seen, rehearsal: Seen | None = None) -> None:
        """Let every method make what it learns and keeps, from a first batch; then evaluate it on a `rehearsal`, as
        training does, which moves what it keeps.

        Raises ValueError, beginning with the method's name.
        """
        for name, each in self._weighted.items():
            method = each.method
            try:
                method.build(replace(seen, peer=self._peer() if "peer" in method.needs else None))
                method.to(seen.student.logits.device)
                if rehearsal:
                    method.evaluate(rehearsal)
            except (ValueError, TypeError, RuntimeError) as error:  # a shape that PyTorch refuses too
                text = str(error).splitlines()[0].removeprefix(f"{name}: ")
                raise ValueError(f"{name}: {text}") from error

    def _peer(self) -> nn.Module | None:
        with torch.random.fork_rng():  # other methods draw the same weights with and without a peer
            return self._new_peer() if self._new_peer else None

    def end_epoch(self) -> None:
        """Tell every method that an epoch is over."""
        for each in self._weighted.values():
            each.method.end_epoch()

    @torch.no_grad()
    def divide_ce(self, mean: Tensor) -> None:
        """Divide the class weights, and so the cross entropy, by the `mean` () weight of an update's labels.

        The sum over examples, divided by their number, is then the weighted mean of nn.CrossEntropyLoss; it is 0 where
        all labels have weight 0.
        """
        assert self.class_weight is not None
        assert self.loss.class_weight is not None
        # Into the buffer: an assigned setting is checked against the range of a user's weights.
        self.loss.class_weight.copy_(torch.where(mean > 0, self.class_weight / mean, 0))

    def evaluate(self, seen: Seen) -> dict[str, Tensor]:
        """The methods' values by name, unweighted: (N,), or () of a method that compares the examples of a batch."""
        return {name: each.method.evaluate(seen) for name, each in self._weighted.items()}

    def forward(self, seen: Seen) -> Terms:
        """The terms of one batch, or of a piece of one."""
        teacher = None if seen.teacher is None else seen.teacher.logits
        total, ce, kd = self.loss.terms(seen.student.logits, teacher, seen.target)
        values = {name: term for name, term in (("ce", ce), ("kd", kd)) if term is not None}
        for name, value in self.evaluate(seen).items():
            each = self._weighted[name]
            value = value * len(seen.target) if "batch" in each.method.needs else value.sum()
            risen = min(1.0, seen.epoch / each.warmup_epochs) if each.warmup_epochs else 1.0
            total = total + each.weight * risen * value
            values[name] = value.detach()
        return Terms(total, values)
