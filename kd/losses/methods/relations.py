"""Methods that compare how the examples of a batch lie to each other: sp, pkt, rkd, cc.

N examples of the batch, i, j, k their indices; D dimensions, free in student and teacher; s student, t teacher. Every
value is one number for the batch, (): a mean over examples, pairs or triples, so that it does not grow with the batch.
A batch is what one process sees at once: on several processes, or with accumulated gradients, pairs across are not
compared.

`released=True` gives the numbers of the code that the papers are compared by; `weight` in the presets is for those.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from kd.losses.methods.base import Method, Seen
from kd.losses.methods.shared import TINY, check_at_least, embeddings, needs_several, pick, placed, unit


@dataclass(eq=False)
class SimilarityPreserving(Method, name="sp"):
    """``(1/N²) ‖G_s - G_t‖²_F``, ``G = F·Fᵀ`` with rows of length 1, F the flattened maps (N, C·H·W).

    Units: none, between 0 and 4/N; the same for maps that are scaled.
    Shapes: one map of each (N, C, H, W), all sizes free; gives ().
    Zero, and stationary: where the rows of G agree, so for features that differ by an orthogonal map and a factor.
    Paper: Tung & Mori 2019, "Similarity-Preserving Knowledge Distillation"; the paper may sum over several layers, its
    CIFAR experiments and RepDistiller take the last one. The released code is the same.

    Args:
        layer: position among the maps; negative from the deepest.
    """

    needs = frozenset({"teacher", "maps"})
    per_example = False
    presets: ClassVar = {"cifar100": {"weight": 3000.0, "ce_weight": 1.0, "kd_weight": 0.0}}

    layer: int = -1

    def values(self, seen: Seen) -> Tensor:
        """()."""
        needs_several(self.name, len(seen.student.logits))
        s, t = (_similarities(x) for x in pick(self.name, seen, self.layer))
        return (s - t).square().mean()


def _similarities(x: Tensor) -> Tensor:
    flat = rearrange(x, "n c h w -> n (c h w)")
    return unit(flat @ flat.T)


@dataclass(eq=False)
class ProbabilisticKnowledge(Method, name="pkt"):
    """``mean_i sum_(j≠i) q_ij log(q_ij / p_ij)``, q_i and p_i over j ≠ i.

    They are the teacher's and the student's ``(cos(x_i, x_j) + 1) / 2``, made to sum to 1.

    Units: nats an example (the paper sums over i). ``released``: q and p include j = i, the mean is over all N² pairs,
    so about 1/N of the paper's and less still by the share of the large diagonal, and 1e-7 is added to lengths and
    probabilities: relative 1e-7·N.
    Shapes: embeddings (N, D); gives (). Probabilities below 1e-7 count as that, so that opposite vectors stay finite.
    Zero, and stationary (`released` but for 1e-7): where q = p, so for embeddings that differ by an orthogonal map and
    factors of their rows.
    Paper: Passalis & Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer", cosine kernel.

    Args:
        released: the authors' probabilistic_kt and RepDistiller's PKT.
    """

    needs = frozenset({"teacher", "embedding"})
    per_example = False
    presets: ClassVar = {"cifar100": {"weight": 30000.0, "ce_weight": 1.0, "kd_weight": 0.0, "released": True}}

    released: bool = False

    floor = 1e-7

    def values(self, seen: Seen) -> Tensor:
        """()."""
        s, t = embeddings(seen)
        n = len(s)
        needs_several(self.name, n)
        if self.released:
            p, q = self._probabilities_released(s), self._probabilities_released(t)
            return (q * ((q + self.floor) / (p + self.floor)).log()).mean()
        p, q = self._probabilities(s), self._probabilities(t)
        return (q * (q.clamp(min=self.floor) / p.clamp(min=self.floor)).log()).sum() / n

    def _probabilities(self, x: Tensor) -> Tensor:
        x = unit(x)
        others = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
        similar = (x @ x.T + 1) / 2 * others
        total = similar.sum(-1, keepdim=True)
        return similar / total.masked_fill(total <= TINY, 1)

    def _probabilities_released(self, x: Tensor) -> Tensor:
        x = x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + self.floor)
        similar = (x @ x.T + 1) / 2
        return similar / similar.sum(-1, keepdim=True)


@dataclass(eq=False)
class Relational(Method, name="rkd"):
    """``distance_weight · mean_ij h(d_ij/μ_s, d'_ij/μ_t) + angle_weight · mean_ijk h(cos_ijk, cos'_ijk)``.

    d_ij = ‖x_i - x_j‖, μ its mean over i ≠ j; cos_ijk the cosine of the angle at x_i between x_j and x_k; primes the
    teacher's; h the Huber loss of threshold 1. The means are over i ≠ j, and over i, j, k all different.
    Units: none. The paper writes sums; its weights are for means. ``released``: the zeros of equal indices are counted
    in the means, so (N-1)/N of the distance term and (N-1)(N-2)/N² of the angle term: 0.98 and 0.95 at N = 64. Rows
    that are equal have distance 0 here, 1e-6 in the released code.
    Shapes: embeddings (N, D); gives (). With N = 2 there is no angle, and its term is 0.
    Zero, and stationary: where all distance ratios and angles agree, so for embeddings that differ by a shift, an
    orthogonal map and a factor. Equal rows have no direction: their cosines are 0.
    Paper: Park et al. 2019, "Relational Knowledge Distillation", §3.2; weights of its CIFAR-100 experiments.

    Args:
        distance_weight: weight of the distances, at least 0.
        angle_weight: weight of the angles, at least 0.
        released: the authors' RKD and RepDistiller's RKDLoss.
    """

    needs = frozenset({"teacher", "embedding"})
    per_example = False
    presets: ClassVar = {"cifar100": {"weight": 1.0, "ce_weight": 1.0, "kd_weight": 0.0, "released": True}}

    distance_weight: float = 25.0
    angle_weight: float = 50.0
    released: bool = False

    def check(self) -> None:
        """Weights are not negative."""
        check_at_least(self.name, distance_weight=(self.distance_weight, 0), angle_weight=(self.angle_weight, 0))

    def values(self, seen: Seen) -> Tensor:
        """()."""
        n = len(seen.student.logits)
        needs_several(self.name, n)
        s, t = (_edges(x) for x in embeddings(seen))
        total = s[:0].sum()
        if self.distance_weight > 0:
            apart = F.smooth_l1_loss(_distances(s), _distances(t), reduction="sum")
            total = total + self.distance_weight * apart / (n * n if self.released else n * (n - 1))
        if self.angle_weight > 0:
            turned = F.smooth_l1_loss(_cosines(s), _cosines(t), reduction="sum")
            total = total + self.angle_weight * turned / (n**3 if self.released else max(1, n * (n - 1) * (n - 2)))
        return total


def _edges(x: Tensor) -> Tensor:
    """From each row to each other, (N, N, D): differences, not products, so that close rows keep their digits."""
    return rearrange(x, "j d -> 1 j d") - rearrange(x, "i d -> i 1 d")


def _distances(edges: Tensor) -> Tensor:
    distance = torch.linalg.vector_norm(edges, dim=-1)
    n = len(distance)
    mean = distance.sum() / (n * (n - 1))
    return distance / mean.masked_fill(mean <= TINY, 1)


def _cosines(edges: Tensor) -> Tensor:
    direction = unit(edges)
    return einsum(direction, direction, "i j d, i k d -> i j k")


@dataclass(eq=False)
class CorrelationCongruence(Method, name="cc"):
    """``(1/N²) sum_ij (K(s_i, s_j) - K(t_i, t_j))²``, ``K(x, y) = sum_(p≤order) e^(-2γ) (2γ)^p / p! · (x·y)^p``.

    K is the Taylor series of the Gaussian kernel e^(-γ‖x-y‖²) of vectors of length 1; embeddings are brought to it.
    Units: none, between 0 and 1. ``released`` is another loss, ``mean_(i<N) sum_d |s_i - t_i| |s_(i+1) - t_(i+1)|``
    over neighbours in the batch, of embeddings through a learned linear layer of each network. It depends on the order
    of the batch; RepDistiller has it from the paper's authors.
    Shapes: embeddings (N, D); gives ().
    Zero, and stationary: where all kernel values agree, so for embeddings that differ by an orthogonal map and factors
    of their rows; released: where of any two neighbours one agrees with its teacher, with a kink.
    Paper: Peng et al. 2019, "Correlation Congruence for Knowledge Distillation", γ 0.4 and order 2.

    Args:
        gamma: γ of the Gaussian kernel, at least 0.
        order: the last power of the series, at least 1.
        released: RepDistiller's Correlation.
        embed_dim: dimensions of the learned layers, which only `released` has.
    """

    needs = frozenset({"teacher", "embedding"})
    per_example = False
    presets: ClassVar = {"cifar100": {"weight": 0.02, "ce_weight": 1.0, "kd_weight": 0.0, "released": True}}

    gamma: float = 0.4
    order: int = 2
    released: bool = False
    embed_dim: int = 128

    def check(self) -> None:
        """A series has a first power."""
        check_at_least(self.name, gamma=(self.gamma, 0), order=(self.order, 1), embed_dim=(self.embed_dim, 1))

    def build(self, seen: Seen, num_samples: int) -> None:
        """Make the linear layers that `released` has."""
        if self.released:
            s, t = embeddings(seen)
            self.embed_student = placed(nn.Linear(s.shape[1], self.embed_dim), seen)
            self.embed_teacher = placed(nn.Linear(t.shape[1], self.embed_dim), seen)

    def values(self, seen: Seen) -> Tensor:
        """()."""
        s, t = embeddings(seen)
        needs_several(self.name, len(s))
        if self.released:
            gap = (self.embed_student(s) - self.embed_teacher(t)).abs()
            return (gap[:-1] * gap[1:]).sum(-1).mean()
        return (self._kernel(s) - self._kernel(t)).square().mean()

    def _kernel(self, x: Tensor) -> Tensor:
        x = unit(x)
        cosine, g = x @ x.T, 2 * self.gamma
        terms = [math.exp(-g) * g**p / math.factorial(p) * cosine**p for p in range(self.order + 1)]
        return torch.stack(terms).sum(0)
