"""What a method may look at for a batch: what both networks gave, the labels, and where training stands.

N examples, K classes, C channels, D dimensions; logits (N, K), maps (N, C, H, W), embeddings (N, D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

IGNORE = -100  # the label of an example or position that counts nothing
FEATURES = frozenset({"maps", "embedding", "weight"})  # what a method may need beside logits of each network


@dataclass(frozen=True)
class View:
    """Outputs of one network for a batch, and its classifier; leave out what the method does not need.

    Args:
        logits: (N, K). If left out they become (N, 0), on the device and in the dtype of the maps or the embedding.
        maps: each (N, C, H, W), from shallow to deep; student's and teacher's pair up by position.
        embedding: (N, D), what the classifier reads.
        weight: (K, D), the classifier's weight; its rows are the class templates.
        bias: (K,), the classifier's bias.

    Raises:
        ValueError: logits, maps and embedding are all left out.
        TypeError: maps is one tensor and not a list.
    """

    logits: Tensor = None  # type: ignore[assignment]
    maps: Sequence[Tensor] = ()
    embedding: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self):
        if isinstance(self.maps, Tensor):
            raise TypeError("View(maps=tensor): must be a list of maps; type View(maps=[tensor])")
        if self.logits is None:
            rows = next(iter(self.rows().values()), None)
            if rows is None:
                raise ValueError("View(): must have logits, maps or an embedding")
            object.__setattr__(self, "logits", rows.detach().new_zeros((rows.shape[0], 0)))

    def rows(self) -> dict[str, Tensor]:
        """The tensors that have a row per example, by name."""
        named = {"embedding": self.embedding, "logits": self.logits}
        given = {name: tensor for name, tensor in named.items() if tensor is not None}
        return {f"maps[{i}]": tensor for i, tensor in enumerate(self.maps)} | given

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
    ignored: Tensor | None = None  # (N,) bool, set by Method.evaluate: rows that it has blanked and labelled 0

    # What a method that needs a teacher reads. `Method.evaluate` has checked that it is there.

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
        ours, theirs = len(student.maps), len(teacher.maps)
        if ours != theirs:
            raise ValueError(f"student has {ours} maps and teacher {theirs}: must be equal, because maps pair up")
        return list(zip(student.maps, teacher.maps, strict=True))

    @property
    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Student's (N, D_s) and teacher's (N, D_t)."""
        student, teacher = self.views
        assert student.embedding is not None
        assert teacher.embedding is not None
        return student.embedding, teacher.embedding
