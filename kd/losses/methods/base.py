"""Base class of every distillation method: a loss to call on tensors, and to evaluate in the training loop.

A method is one class whose fields are its hyperparameters. Its ``values`` is a pure function of what student and
teacher gave for a batch: one number per example, or one for the batch where the method compares examples with each
other. Called on tensors, ``DKD()(student_logits, teacher_logits, target)``, it is a loss like those of torch.nn. The
training loop gives ``evaluate`` of every method the same ``Seen``, weighs and sums the values, and knows no method by
name.

N examples, K classes, C channels, D dimensions; logits (N, K), maps (N, C, H, W), embeddings (N, D).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, fields, replace
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from kd.losses.fields import Checked, Weight, one_of
from kd.losses.methods import call
from kd.losses.methods.seen import FEATURES, IGNORE, Seen, View
from kd.losses.reference import wide_dtype
from kd.smoothing import check_target, values_readable


class NotBuiltError(RuntimeError, AttributeError):
    """What a method learns was asked for before it was made. An AttributeError too, so that hasattr says False."""


METHODS: dict[str, type[Method]] = {}  # by name; a subclass registers itself


class Method(Checked):
    """Base of all methods. A subclass is ``class DKD(Method, name="dkd")``.

    It states what it needs, declares its hyperparameters as fields with the defaults of its paper (CIFAR-100 where
    there are several) and their ranges (`kd.losses.fields`), and defines ``values``. Modules that learn with
    the student, and buffers that last from batch to batch, are made in ``make``; they are trained, saved and resumed.

    ``forward`` says how to call it. What it learns is made at the first call, on the device of its inputs, as
    nn.LazyLinear makes its weight: call the method once, or call ``build``, before you give its ``parameters()``, or
    those of a module that holds it, to the optimizer, and before you load a state_dict. In eval mode its buffers do not
    change.

    Args:
        reduction: "mean" (default) over the examples or positions whose label is not -100 (0 where there are none),
            "sum", or "none" for a value each. For a method that compares examples, which has one value for the batch,
            "mean" is that value, "sum" is N times it, and "none" is an error. `evaluate` does not use it.

    Raises:
        ValueError: a field is out of its range.
        TypeError: the constructor was given tensors, which belong to the call.
    """

    _: KW_ONLY
    reduction: Annotated[str, one_of("mean", "sum", "none")] = "mean"

    # What the method reads: some of teacher, target, maps, embedding, weight, index, images, peer. "labels" in place of
    # "target" refuses probabilities such as mixup's. "batch" marks a method that compares 2 or more examples and has
    # one value, (); without it the values are (N,), and row i depends on example i alone.
    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})
    classifies: ClassVar[bool] = False  # `classify` gives the logits to evaluate, not the student's own classifier
    # Published settings: this method's "weight", the "warmup_epochs" over which it rises linearly from 0, "ce_weight",
    # and the fields that differ from their defaults.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    renamed: ClassVar[Mapping[str, str]] = {}  # by a field's former name: what to type now

    name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.name, cls._before = name, f"{name}."
        METHODS[name] = cls

    def __new__(cls, *args: Any, **kwargs: Any):
        """Refuse tensors: ``DKD(s, t, y)`` would else fail with a message about fields."""
        if any(isinstance(value, Tensor | View) for value in (*args, *kwargs.values())):
            text = f"type {cls.__name__}(...)({call.arguments(cls.needs)})"
            raise TypeError(f"{cls.name}: settings go to the constructor and tensors to the call: {text}")
        return super().__new__(cls)

    def __post_init__(self):
        super().__init__()  # after the dataclass has set the fields: a module takes plain attributes before it
        self._built = type(self).make is Method.make

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The fields that a recipe may set, and their defaults."""
        default = cls()
        return {f.name: getattr(default, f.name) for f in fields(cls) if f.name != "reduction"}

    def require(self, holds: bool, message: str) -> None:
        """Raise ValueError, ``NAME: MESSAGE``, unless the condition holds."""
        if not holds:
            raise ValueError(f"{self.name}: {message}")

    def build(self, seen: Seen) -> None:
        """Make the learned modules and lasting buffers, on the device of the student's logits, in float32 or float64.

        `seen` is a first batch, the same on every process.

        Gradients are averaged over processes. Statistics that `values` collects are each process's own unless the
        method exchanges them, as by `kd.losses.methods.shared.everywhere`.

        Raises:
            ValueError: the batch lacks what the method needs, or has a form that it cannot use.
        """
        self._check_inputs(seen)
        self._built = True  # now, because PyTorch asks whether there is such a buffer before it registers one
        try:
            # What is made in inference mode could never be trained.
            with torch.inference_mode(False), torch.no_grad():
                with torch.device("cpu"):  # the same draws on every device, whatever the default device is
                    self.make(seen)
                self.to(seen.student.logits.device, wide_dtype(seen.student.logits))
        except BaseException:
            self._built = False
            raise

    def _unbuilt(self, name: str) -> str:
        """What to say where something is asked for that `build`, or the first call, makes."""
        typed = f"loss({call.arguments(self.needs)})"
        return f"{self.name}: is not built yet and has no {name}; call {typed} once, or loss.build(seen), before this"

    def _require_built(self, name: str) -> None:
        """Raise NotBuiltError unless `build` or a call has made what the method learns and keeps."""
        if not self._built:
            raise NotBuiltError(self._unbuilt(name))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:  # type: ignore[bad-override]
        """As of every module. An error where what the state is of is still to be made, also under strict=False."""
        if self._built or not any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *others)
        else:
            others[-1].append(self._unbuilt("parameters or buffers to load into"))

    def __getattr__(self, name: str) -> Any:
        """What a module holds. Raises RuntimeError, which says what to call, for what is still to be made."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not name.startswith("_"):  # PyTorch and Python ask for names of their own that need not be there
                self._require_built(name)
            raise

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As of every module, also for `parameters`. Raises RuntimeError while a method is not built."""
        self._require_built("parameters")
        return super().named_parameters(*args, **kwargs)

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

    def forward(
        self,
        student: Any,
        teacher: Any = None,
        target: Tensor | None = None,
        *,
        index: Tensor | None = None,
        num_samples: int = 0,
        epoch: float = 0.0,
        epochs: int = 1,
        images: Tensor | None = None,
        peer: nn.Module | None = None,
    ) -> Tensor:
        """The loss of tensors: a scalar, or a value for every position under reduction "none".

        - ``loss(student_logits, teacher_logits, target)``, logits ``(..., K)``, classes last: give those of
          segmentation, ``(N, K, H, W)``, as ``logits.movedim(1, -1)``
        - ``loss(student_logits, target)`` for a method without a teacher; it ignores a teacher given as above
        - ``loss(student_features, teacher_features)`` for a method that needs maps, one ``(N, C, H, W)`` or a list of
          them from shallow to deep, or that needs embeddings ``(N, D)``
        - ``loss(View(maps=..., embedding=...), View(...))`` for a method that needs several of them

        Computed and returned in float32, or in float64 for a float64 student. The teacher gets no gradient.

        Args:
            student: logits, features or a View.
            teacher: the same of the teacher.
            target: int64 labels ``(...)``, -100 at positions that do not count, or probabilities ``(..., K)``. It may
                be None where the formula has none; then every position counts.
            index: (N,) int64, positions of the examples in the training set.
            num_samples: number of examples in the training set; read at the first call.
            epoch: epochs done, with the fraction of the running one, such as 2.5.
            epochs: number of epochs of the training.
            images: (N, ...), what the networks saw.
            peer: a second student with other weights; read at the first call.

        Raises:
            ValueError: something that the method needs is missing or has a form that it cannot use, or a tensor of the
                teacher requires a gradient.
            TypeError: an argument has the wrong type, or a tensor the wrong dtype.
        """
        if "teacher" not in self.needs:
            teacher, target = None, teacher if target is None else target
        views = call.views(self.name, self.needs, student, teacher)
        missing = target is None and bool(self.needs & {"target", "labels"})
        self.require(not missing, f"needs the target; type loss({call.arguments(self.needs)})")
        one_value = "batch" in self.needs and self.reduction == "none"
        self.require(
            not one_value, "compares examples with each other and has one value: reduction must be mean or sum"
        )
        views, target, shape = call.rows(*views, target, of_logits=not self.needs & FEATURES)
        values = self.evaluate(Seen(*views, target, index, epoch, epochs, images, num_samples, peer))
        if self.reduction == "none":
            return values.reshape(shape)
        if "batch" in self.needs:
            return values if self.reduction == "mean" else values * target.shape[0]
        soft = target.is_floating_point()
        count = max(target.shape[0], 1) if soft else (target != IGNORE).sum().clamp(min=1)
        return values.sum() if self.reduction == "sum" else values.sum() / count

    def evaluate(self, seen: Seen) -> Tensor:
        """`values` of checked inputs in float32 or float64; exactly 0, with zero gradient, where a label is ignored.

        Labels are not read on a GPU, under torch.compile or torch.func; there one outside 0..K-1 gives nan.

        Raises:
            ValueError: the batch lacks what the method needs, or has a form that it cannot use.
        """
        if not self._built:
            self.build(seen)
        self._check_inputs(seen)
        wide, soft = wide_dtype(seen.student.logits), seen.target.is_floating_point()
        ignored = None if soft or "batch" in self.needs else seen.target == IGNORE

        def clean(x: Tensor) -> Tensor:
            # Rows to ignore become zeros of label 0: neither what is in them nor its gradient passes.
            x = x.to(wide)
            return x if ignored is None else x.masked_fill(ignored.view(-1, *[1] * (x.ndim - 1)), 0)

        def constant(x: Tensor) -> Tensor:
            # What was made in inference mode is copied, because autograd refuses to keep it. A compiler cannot ask.
            inferred = not torch.compiler.is_compiling() and x.is_inference()
            return clean(x.clone() if inferred else x.detach())

        teacher = None if seen.teacher is None else seen.teacher.map(constant)
        target, classes = seen.target, seen.student.logits.shape[-1]
        unknown = None  # which labels stand for no class, (N,), where `_check_target` has not read them
        if not (soft or classes == 0 or _reads(target)):
            unknown = (target < 0) | (target >= classes)
            unknown = unknown if ignored is None else unknown & ~ignored
        for blank in (ignored, unknown):
            target = target if blank is None else target.masked_fill(blank, 0)
        seen = replace(seen, student=seen.student.map(clean), teacher=teacher, target=target, ignored=ignored)
        # Autocast would run matrix products in half precision again, where those of large features are infinite.
        with torch.autocast(seen.student.logits.device.type, enabled=False):
            values = self.values(seen)
        if unknown is not None:
            values = values * torch.where(unknown if values.ndim else unknown.any(), math.nan, 1).to(values.dtype)
        return values if ignored is None else values.masked_fill(ignored, 0)

    def _check_inputs(self, seen: Seen) -> None:
        """Refuse what is missing, what PyTorch would broadcast in silence, and a target that the method cannot use."""
        for need in sorted(self.needs & {"teacher", "index", "images"}):
            given = getattr(seen, need) is not None
            self.require(given, f"needs the {need}; type loss({call.arguments(self.needs)})")
        for who, view in (("student", seen.student), ("teacher", seen.teacher)):
            if view is not None:
                given = {"maps": view.maps or None, "embedding": view.embedding, "weight": view.weight}
                if who == "student" and self.classifies:
                    del given["weight"]  # the student's own classifier is not used
                for need in sorted(self.needs & set(given)):
                    self.require(given[need] is not None, f"needs the {need} of the {who}")
                shape, n = tuple(view.logits.shape), seen.target.shape[0]
                self.require(len(shape) == 2 and shape[0] == n, f"{who}'s logits of shape {shape}: must be ({n}, K)")
        if "teacher" in self.needs and not self.needs & FEATURES:  # logits are all there is to compare
            ours, theirs = (logits.shape[-1] for logits in seen.logits)
            self.require(ours == theirs, f"student has {ours} classes and teacher {theirs}: must be equal")
        self._check_target(seen.target, seen.student.logits.shape[-1])

    def _check_target(self, target: Tensor, classes: int) -> None:
        soft = target.is_floating_point()
        usable = not soft or "labels" not in self.needs
        self.require(usable, "needs class labels, not probabilities; turn mixup and cutmix off")
        shape = tuple(target.shape)
        self.require(len(shape) == 1 + soft, f"target of shape {shape}: must be (N,) labels or (N, K) probabilities")
        if classes > 0:  # features alone have none
            check_target(target, classes, IGNORE, read_values=_reads(target))
        if "batch" in self.needs:
            compares = "compares examples with each other"
            self.require(target.shape[0] > 1, f"{compares}: a batch of {target.shape[0]} is too small, give 2 or more")
            ignores = not soft and values_readable(target) and bool((target == IGNORE).any())
            self.require(not ignores, f"{compares} and cannot ignore some of them")


def _reads(target: Tensor) -> bool:
    """Whether labels are read to check them; not on a GPU, where the host would wait for them."""
    return target.device.type == "cpu" and values_readable(target)


class Weighted(NamedTuple):
    """A method with what a recipe says of it beside its fields."""

    method: Method
    weight: Weight
    warmup_epochs: Weight  # over which the weight rises linearly from 0; 0 for none
