"""Base class of every distillation method, and what a method receives for a batch.

A method is one class whose fields are its hyperparameters. Its ``values`` is a pure function of what student and
teacher gave for a batch: one number per example, or one for the batch where the method compares examples with each
other. Values are unweighted; the weight and the mean belong to the caller. The training loop gives every method the
same ``Seen`` and knows no method by name.

N examples, K classes, C channels, D dimensions; logits (N, K), maps (N, C, H, W), embeddings (N, D).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, dataclass_transform

import torch
from torch import Tensor, nn

from kd.losses.fields import Weight, check_fields
from kd.losses.reference import wide_dtype
from kd.smoothing import check_target

IGNORE = -100
METHODS: dict[str, type[Method]] = {}  # by name; a subclass registers itself


@dataclass(frozen=True)
class View:
    """What one network gave for a batch."""

    logits: Tensor  # (N, K)
    maps: Sequence[Tensor] = ()  # each (N, C, H, W), from shallow to deep; student's and teacher's pair up by position
    embedding: Tensor | None = None  # (N, D), what the classifier reads
    weight: Tensor | None = None  # (K, D), the classifier's rows, the class templates
    bias: Tensor | None = None  # (K,)

    def map(self, change: Callable[[Tensor], Tensor]) -> View:
        """The view with every tensor changed that has a row per example; the classifier's stay."""
        embedding = None if self.embedding is None else change(self.embedding)
        return replace(self, logits=change(self.logits), maps=[change(m) for m in self.maps], embedding=embedding)


@dataclass(frozen=True)
class Seen:
    """All that a method may look at: both networks' outputs for a batch, its labels, and where training stands."""

    student: View
    teacher: View | None
    target: Tensor  # (N,) int64 labels, or (N, K) probabilities
    index: Tensor | None = None  # (N,) int64, positions of the examples in the training set
    epoch: float = 0.0  # epochs done, with the fraction of the running one
    epochs: int = 1  # epochs in all
    images: Tensor | None = None  # (N, ...), what the networks saw
    num_samples: int = 0  # examples in the training set
    peer: nn.Module | None = None  # a second student with other weights; for `build` of a method that needs "peer"
    ignored: Tensor | None = None  # (N,) bool, set by Method.forward: rows that it has blanked and labelled 0

    # What a method that needs a teacher reads. `Method.forward` has checked that it is there.

    @property
    def views(self) -> tuple[View, View]:
        """Student's and teacher's."""
        assert self.teacher is not None
        return self.student, self.teacher

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        """Student's and teacher's, (N, K) each."""
        student, teacher = self.views
        return student.logits, teacher.logits

    @property
    def map_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Student's and teacher's map at every position. Raises ValueError where one has more."""
        student, teacher = self.views
        return list(zip(student.maps, teacher.maps, strict=True))

    @property
    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Student's (N, D_s) and teacher's (N, D_t)."""
        student, teacher = self.views
        assert student.embedding is not None
        assert teacher.embedding is not None
        return student.embedding, teacher.embedding


@dataclass_transform(eq_default=False)
class Method(nn.Module):
    """Base of all methods. A subclass is ``class DKD(Method, name="dkd")`` and becomes a dataclass by that.

    It states what it needs, declares its hyperparameters as fields with the defaults of its paper (CIFAR-100 where
    there are several) and their ranges (`kd.losses.fields`), and defines ``values``. Modules that learn with
    the student, and buffers that last from batch to batch, are made in ``make``; they are trained, saved and resumed.

    Raises:
        ValueError: a field is out of its range.
    """

    # Of teacher, maps, embedding, weight, index, images, peer. Also "labels" where the target may not be probabilities,
    # as with mixup, and "batch" where the value is one of 2 or more examples, (), and not (N,), row i of row i alone.
    needs: frozenset[str] = frozenset({"teacher"})
    classifies: ClassVar[bool] = False  # `classify` gives the logits to evaluate, not the student's own classifier
    # Published settings: this method's "weight", the "warmup_epochs" over which it rises linearly from 0, "ce_weight",
    # and the fields that differ from their defaults.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        dataclass(eq=False)(cls)  # a module is equal to itself alone
        cls.name = name
        METHODS[name] = cls

    def __post_init__(self):
        super().__init__()  # after the dataclass has set the fields: a module takes plain attributes before it
        check_fields(self.name, self)

    def require(self, holds: bool, message: str) -> None:
        """Raise ValueError, ``NAME: MESSAGE``, unless the condition holds."""
        if not holds:
            raise ValueError(f"{self.name}: {message}")

    def build(self, seen: Seen) -> None:
        """Make the learned modules and lasting buffers, on the device of the student's logits, in float32 or float64.

        `seen` is a first batch, the same on every process.

        Gradients are averaged over processes. What `values` gathers in training is each process's own unless the method
        exchanges it, as `kd.losses.methods.shared.everywhere` does.

        Raises:
            ValueError: the batch lacks what the method needs, or has a form that it cannot use.
        """
        self._check_inputs(seen)
        self.make(seen)
        self.to(seen.student.logits.device, wide_dtype(seen.student.logits))

    def make(self, seen: Seen) -> None:
        """Set learned modules and lasting buffers as attributes; by default there are none."""

    def end_epoch(self) -> None:
        """Turn what was gathered over an epoch into what the next one uses."""

    def classify(self, view: View) -> Tensor:
        """Logits (N, K) from the student's view, for a method that `classifies`; it is saved with the student."""
        raise NotImplementedError

    def values(self, seen: Seen) -> Tensor:
        """The value: () where it needs a "batch", else (N,). Logits and features come in float32 or float64."""
        raise NotImplementedError

    def forward(self, seen: Seen) -> Tensor:
        """`values` of checked inputs in float32 or float64; exactly 0, with zero gradient, where a label is ignored.

        Raises:
            ValueError: the batch lacks what the method needs, or has a form that it cannot use.
        """
        self._check_inputs(seen)
        wide, soft = wide_dtype(seen.student.logits), seen.target.is_floating_point()
        ignored = None if soft or "batch" in self.needs else seen.target == IGNORE

        def clean(x: Tensor) -> Tensor:
            # Rows to ignore become zeros of label 0: neither what is in them nor its gradient passes.
            x = x.to(wide)
            return x if ignored is None else x.masked_fill(ignored.view(-1, *[1] * (x.ndim - 1)), 0)

        teacher = None if seen.teacher is None else seen.teacher.map(lambda x: clean(x.detach()))
        target = seen.target if ignored is None else seen.target.masked_fill(ignored, 0)
        seen = replace(seen, student=seen.student.map(clean), teacher=teacher, target=target, ignored=ignored)
        # Autocast would run matrix products in half precision again, where those of large features are infinite.
        with torch.autocast(seen.student.logits.device.type, enabled=False):
            values = self.values(seen)
        return values if ignored is None else values.masked_fill(ignored, 0)

    def _check_inputs(self, seen: Seen) -> None:
        """Refuse what is missing, what PyTorch would broadcast in silence, and a target that the method cannot use."""
        for need in sorted(self.needs & {"teacher", "index", "images"}):
            self.require(getattr(seen, need) is not None, f"needs the {need}")
        for who, view in (("student", seen.student), ("teacher", seen.teacher)):
            if view is not None:
                given = {"maps": view.maps or None, "embedding": view.embedding, "weight": view.weight}
                for need in sorted(self.needs & set(given)):
                    self.require(given[need] is not None, f"needs the {need} of the {who}")
                shape, n = tuple(view.logits.shape), len(seen.target)
                self.require(len(shape) == 2 and shape[0] == n, f"{who}'s logits of shape {shape}: must be ({n}, K)")
        # Features may come from networks of other classes.
        if "teacher" in self.needs and not self.needs & {"maps", "embedding", "weight"}:
            ours, theirs = (logits.shape[-1] for logits in seen.logits)
            self.require(ours == theirs, f"student has {ours} classes and teacher {theirs}: must be equal")
        self._check_target(seen.target, seen.student.logits.shape[-1])

    def _check_target(self, target: Tensor, classes: int) -> None:
        soft = target.is_floating_point()
        usable = not soft or "labels" not in self.needs
        self.require(usable, "needs class labels, not probabilities; turn mixup and cutmix off")
        shape = tuple(target.shape)
        self.require(len(shape) == 1 + soft, f"target of shape {shape}: must be (N,) labels or (N, K) probabilities")
        # On a GPU the values are not read, because the host would wait for them.
        check_target(target, classes, IGNORE, read_values=target.device.type == "cpu")
        if "batch" in self.needs:
            compares = "compares examples with each other"
            self.require(len(target) > 1, f"{compares}: a batch of {len(target)} is too small, give 2 or more")
            self.require(soft or not bool((target == IGNORE).any()), f"{compares} and cannot ignore some of them")


@dataclass(frozen=True)
class Weighted:
    """A method with what a recipe says of it beside its fields."""

    method: Method
    weight: Weight
    warmup_epochs: Weight  # over which the weight rises linearly from 0; 0 for none

    def __post_init__(self):
        check_fields(self.method.name, self)
