"""What every published method is here: one class, a pure function of what student and teacher gave for a batch.

A method is a dataclass whose fields are its hyper-parameters. Its ``values`` gives one number per example (or one for
the batch, where the method compares examples with each other), unweighted: the weight and the mean belong to the
caller. The loop gives every method the same ``Seen`` and knows none by name.

N examples, K classes, C channels, D dimensions; logits (N, K), maps (N, C, H, W), embeddings (N, D).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kd.losses.reference import wide_dtype
from kd.smoothing import check_target

IGNORE = -100
METHODS: dict[str, type[Method]] = {}  # by name; a subclass enters itself


@dataclass(frozen=True)
class View:
    """What one network gave for a batch."""

    logits: Tensor  # (N, K)
    maps: Sequence[Tensor] = ()  # each (N, C, H, W), from shallow to deep; student's and teacher's pair up by position
    embedding: Tensor | None = None  # (N, D), what the classifier reads
    weight: Tensor | None = None  # (K, D), the classifier's rows, the class templates
    bias: Tensor | None = None  # (K,)


@dataclass(frozen=True)
class Seen:
    """All that a method may look at."""

    student: View
    teacher: View | None
    target: Tensor  # (N,) int64 labels, or (N, K) probabilities
    index: Tensor | None = None  # (N,) int64, positions of the examples in the training set
    epoch: float = 0.0  # epochs done, with the fraction of the running one
    epochs: int = 1  # epochs in all
    images: Tensor | None = None  # (N, ...), what the networks saw
    ignored: Tensor | None = None  # (N,) bool, set by Method.forward: rows that it has blanked and labelled 0


class Method(nn.Module):
    """The base of all methods. A subclass is ``@dataclass(eq=False) class DKD(Method, name="dkd")``.

    It states what it needs, sets its hyper-parameters as fields with the defaults of its paper (CIFAR-100 where there
    are several), and defines ``values``. Modules that are learned with the student, and buffers that last from batch to
    batch, are made in ``build``; they are trained, saved and resumed.
    """

    # Of: teacher, maps, embedding, weight, index, images, peer (a network to be set as `.peer` before `build`).
    needs: ClassVar[frozenset[str]] = frozenset({"teacher"})
    per_example: ClassVar[bool] = True  # values are (N,), row i a function of row i alone; else () over the batch
    soft_targets: ClassVar[bool] = True  # whether the target may be probabilities, as with mixup
    classifies: ClassVar[bool] = False  # `classify` gives the logits to evaluate, not the student's own classifier
    # Settings of the paper beside its fields: this method's "weight" and the "warmup_epochs" over which it rises
    # linearly from 0, "ce_weight", "kd_weight" (a plain KD term beside it; 0 where not named), fields that differ.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        cls.name = name
        METHODS[name] = cls

    def __post_init__(self):
        super().__init__()  # after the dataclass has set the fields: a module takes plain attributes before it
        self.check()

    def check(self) -> None:
        """Raise ValueError for hyper-parameters that cannot work."""

    def build(self, seen: Seen, num_samples: int) -> None:
        """Make the learned modules and lasting buffers, once, from a first batch and the size of the training set.

        Every process sees the same first batch. Gradients are averaged over processes; what `values` gathers in
        training is each process's own unless it is exchanged there, as `kd.losses.methods.shared.everywhere` does.
        """

    def end_epoch(self) -> None:
        """Turn what was gathered over an epoch into what the next one uses."""

    def classify(self, view: View) -> Tensor:
        """Logits (N, K) from the student's view, for a method that `classifies`; it is saved with the student."""
        raise NotImplementedError(f"{self.name}: classifies without a classifier")

    @abstractmethod
    def values(self, seen: Seen) -> Tensor:
        """The method's value: (N,) where `per_example`, else (). Logits and maps come in float32 or float64."""

    def forward(self, seen: Seen) -> Tensor:
        """`values` with its inputs checked and widened; exactly 0, with zero gradient, where the label is ignored.

        Raises ValueError where something that the method needs is missing or of a form that it cannot use.
        """
        self._check_inputs(seen)
        soft, wide = seen.target.is_floating_point(), wide_dtype(seen.student.logits)
        teacher = None if seen.teacher is None else _changed(seen.teacher, lambda x: x.detach().to(wide))
        seen = replace(seen, student=_changed(seen.student, lambda x: x.to(wide)), teacher=teacher)
        # Autocast would run matrix products in half precision again, where those of large features are infinite.
        with torch.autocast(seen.student.logits.device.type, enabled=False):
            if soft or not self.per_example:
                return self.values(seen)
            ignored = seen.target == IGNORE
            return self.values(_blank(seen, ignored)).masked_fill(ignored, 0)

    def _check_inputs(self, seen: Seen) -> None:
        if "teacher" in self.needs and seen.teacher is None:
            raise ValueError(f"{self.name}: needs a teacher")
        if seen.teacher is not None and seen.teacher.logits.shape[:1] != seen.student.logits.shape[:1]:
            raise ValueError(f"{self.name}: teacher and student must have seen the same examples")
        for who, view in (("student", seen.student), ("teacher", seen.teacher)):
            if view is not None:
                self._check_view(who, view, len(seen.student.logits))
        self._check_target(seen.target, *seen.student.logits.shape)
        # Without features there are only logits to compare, and a teacher of one class would broadcast.
        if seen.teacher is not None and "teacher" in self.needs and not self.needs & {"maps", "embedding", "weight"}:
            classes = [view.logits.shape[-1] for view in (seen.student, seen.teacher)]
            if classes[0] != classes[1]:
                raise ValueError(
                    f"{self.name}: student has {classes[0]} classes and teacher {classes[1]}: must be equal"
                )
        for need in sorted(self.needs & {"maps", "embedding", "weight"}):
            for who, view in (("student", seen.student), ("teacher", seen.teacher)):
                found = None if view is None else getattr(view, need)
                if view is not None and (found is None or len(found) == 0):
                    raise ValueError(f"{self.name}: needs {need} of the {who}")
        for need in sorted(self.needs & {"index", "images"}):
            if getattr(seen, need) is None:
                raise ValueError(f"{self.name}: needs {need}")

    def _check_view(self, who: str, view: View, examples: int) -> None:
        """Raise for what would be broadcast in silence, or be an error somewhere inside PyTorch."""
        tensors = {"logits": ("(N, K)", view.logits)}
        if "maps" in self.needs:
            tensors |= {f"map {i}": ("(N, C, H, W)", m) for i, m in enumerate(view.maps)}
        if "embedding" in self.needs and view.embedding is not None:
            tensors["embedding"] = "(N, D)", view.embedding
        for what, (form, tensor) in tensors.items():
            if tensor.ndim != form.count(",") + 1 or len(tensor) != examples or not tensor.is_floating_point():
                raise ValueError(
                    f"{self.name}: {who}'s {what} of shape {tuple(tensor.shape)} and {tensor.dtype}: must be floating, "
                    f"{form} with N = {examples}"
                )

    def _check_target(self, target: Tensor, examples: int, classes: int) -> None:
        soft = target.is_floating_point()
        if soft and not self.soft_targets:
            raise ValueError(f"{self.name}: needs class labels, not probabilities; turn mixup and cutmix off")
        if target.shape != ((examples, classes) if soft else (examples,)):
            raise ValueError(
                f"{self.name}: target of shape {tuple(target.shape)} and {target.dtype}: must be ({examples},) int64 "
                f"labels" + (f" or ({examples}, {classes}) probabilities" if self.soft_targets else "")
            )
        try:  # on a GPU the values are not read, because the host would wait for them
            check_target(target, classes, IGNORE, read_values=target.device.type == "cpu")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name}: {error}") from error
        if self.per_example:
            return
        if examples == 0:
            raise ValueError(f"{self.name}: compares the examples of a batch, and this one is empty")
        if not soft and bool((target == IGNORE).any()):
            raise ValueError(f"{self.name}: compares examples with each other and cannot ignore some of them")


def _changed(view: View, change: Callable[[Tensor], Tensor]) -> View:
    """The view with every tensor changed."""
    optional = {name: getattr(view, name) for name in ("embedding", "weight", "bias")}
    optional = {name: None if tensor is None else change(tensor) for name, tensor in optional.items()}
    return View(change(view.logits), [change(m) for m in view.maps], **optional)


def _blank(seen: Seen, ignored: Tensor) -> Seen:
    """Rows to ignore become zeros of label 0: neither what is in them nor its gradient passes."""

    def blank(view: View) -> View:
        def fill(tensor: Tensor) -> Tensor:
            return tensor.masked_fill(ignored.view(-1, *[1] * (tensor.ndim - 1)), 0)

        embedding = None if view.embedding is None else fill(view.embedding)
        return replace(view, logits=fill(view.logits), maps=[fill(m) for m in view.maps], embedding=embedding)

    teacher = None if seen.teacher is None else blank(seen.teacher)
    target = seen.target.masked_fill(ignored, 0)
    return replace(seen, student=blank(seen.student), teacher=teacher, target=target, ignored=ignored)


def batch_mean(values: Tensor, target: Tensor) -> Tensor:
    """The mean of a method over the examples that are not ignored; what a training step minimises."""
    if values.ndim == 0 or target.is_floating_point():
        return values.mean()
    return values.sum() / (target != IGNORE).sum().clamp(min=1)


def probabilities(target: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """The target as probabilities (N, K): one-hot where it is labels."""
    if target.is_floating_point():
        return target.to(dtype)
    return (target.unsqueeze(-1) == torch.arange(num_classes, device=target.device)).to(dtype)
