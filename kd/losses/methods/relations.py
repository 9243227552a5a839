"""Methods that compare how the examples of a batch relate to each other: sp, pkt, rkd, cc.

N examples of the batch, i, j, k their indices; D dimensions, free in student and teacher; s student, t teacher. Every
value is one number for the batch, (): a mean over examples, pairs or triples, so that it does not grow with the batch.
A batch is what one process sees at once: pairs across processes or accumulated pieces are not compared.

``released=True`` gives the numbers of the code that the papers are compared by; ``weight`` in the presets is for those.
"""

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from kd.losses.fields import Count, NonNegative
from kd.losses.methods.base import Method, Seen
from kd.losses.methods.shared import TINY, pick, unit


class SP(Method, name="sp"):
    """Similarity-preserving distillation: ``(1/N²) ‖G_s - G_t‖²_F``, ``G = F·Fᵀ`` with L2-normalised rows.

    F is the flattened maps (N, C·H·W). No unit; between 0 and 4/N, and unchanged where maps are scaled. Zero and
    stationary where the rows of G agree, as for features that are equal up to an orthogonal map and a scale.

    Shapes: one map of each (N, C, H, W), all sizes free; gives ().

    Source: Tung & Mori 2019, "Similarity-Preserving Knowledge Distillation". The paper may sum over several layers; its
    CIFAR experiments and RepDistiller take the last one. The released code is the same.

    Args:
        layer: position among the maps; negative from the deepest.

    Example:
        >>> SP()(torch.randn(8, 16, 4, 4), torch.randn(8, 32, 4, 4)).shape
        torch.Size([])
    """

    layer: int = -1

    needs = frozenset({"teacher", "maps", "batch"})
    presets = {"cifar100": {"weight": 3000.0, "ce_weight": 1.0}}

    def values(self, seen: Seen) -> Tensor:
        """()."""
        flat = (rearrange(x, "n c h w -> n (c h w)") for x in pick(self, seen, self.layer))
        s, t = (unit(x @ x.T) for x in flat)
        return (s - t).square().mean()


PKT_FLOOR = 1e-7


class PKT(Method, name="pkt"):
    """Probabilistic knowledge transfer: ``mean_i sum_(j≠i) q_ij log(q_ij / p_ij)``.

    q_i (teacher) and p_i (student) are ``(cos(x_i, x_j) + 1) / 2`` over j ≠ i, divided by their sum. In nats for each
    example (the paper sums over i). Probabilities below 1e-7 count as 1e-7, so that opposite vectors stay finite. Zero
    and stationary where q = p (up to 1e-7 for ``released``), as for embeddings that are equal up to an orthogonal map
    and the lengths of their rows.

    Shapes: embeddings (N, D); gives ().

    Source: Passalis & Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer", cosine kernel.

    Args:
        released: compute the authors' probabilistic_kt and RepDistiller's PKT. q and p include j = i, and the mean is
            over all N² pairs. The value is about 1/N of the paper's, and smaller still because the large diagonal takes
            a share of each row. 1e-7 is added to lengths and probabilities.

    Example:
        >>> PKT()(torch.randn(8, 64), torch.randn(8, 128)).shape
        torch.Size([])
    """

    released: bool = False

    needs = frozenset({"teacher", "embedding", "batch"})
    presets = {"cifar100": {"weight": 30000.0, "ce_weight": 1.0, "released": True}}

    def values(self, seen: Seen) -> Tensor:
        """()."""
        p, q = (self._probabilities(x) for x in seen.embeddings)
        if self.released:
            return (q * ((q + PKT_FLOOR) / (p + PKT_FLOOR)).log()).mean()
        return (q * (q.clamp(min=PKT_FLOOR) / p.clamp(min=PKT_FLOOR)).log()).sum() / q.shape[0]

    def _probabilities(self, x: Tensor) -> Tensor:
        x = x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + PKT_FLOOR) if self.released else unit(x)
        similar = (x @ x.T + 1) / 2
        if not self.released:
            similar = similar * ~torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
        total = similar.sum(-1, keepdim=True)
        return similar / total.masked_fill(total <= TINY, 1)


class RKD(Method, name="rkd"):
    """Relational KD: ``distance_weight · mean_ij h(d_ij/μ_s, d'_ij/μ_t) + angle_weight · mean_ijk h(cos, cos')``.

    d_ij = ‖x_i - x_j‖, μ its mean over i ≠ j; cos is the cosine of the angle at x_i between x_j and x_k; primes are the
    teacher's; h is the Huber loss of threshold 1. The means are over i ≠ j, and over i, j, k all different. No unit.
    Zero and stationary where all distance ratios and angles agree, as for embeddings that are equal up to a shift, an
    orthogonal map and a scale. Equal rows have no direction: their cosines are 0. With N = 2 there is no angle, and
    its term is 0.

    Shapes: embeddings (N, D); gives ().

    Source: Park et al. 2019, "Relational Knowledge Distillation", §3.2, weights of its CIFAR-100 experiments. The paper
    writes sums, but its weights are for means.

    Args:
        distance_weight: weight of the distances.
        angle_weight: weight of the angles.
        released: compute the authors' RKD and RepDistiller's RKDLoss. The zeros of equal indices count in the means,
            which multiplies the distance term by (N-1)/N and the angle term by (N-1)(N-2)/N²: by 0.98 and 0.95 at
            N = 64. Equal rows have distance 1e-6 in that code and 0 here.

    Example:
        >>> RKD()(torch.randn(8, 64), torch.randn(8, 128)).shape
        torch.Size([])
    """

    distance_weight: NonNegative = 25.0
    angle_weight: NonNegative = 50.0
    released: bool = False

    needs = frozenset({"teacher", "embedding", "batch"})
    presets = {"cifar100": {"weight": 1.0, "ce_weight": 1.0, "released": True}}

    def values(self, seen: Seen) -> Tensor:
        """()."""
        # From each row to each other, (N, N, D): differences, not products, so that close rows keep their digits.
        s, t = (rearrange(x, "j d -> 1 j d") - rearrange(x, "i d -> i 1 d") for x in seen.embeddings)
        n = s.shape[0]
        total = s[:0].sum()
        if self.distance_weight > 0:
            apart = F.smooth_l1_loss(_distances(s), _distances(t), reduction="sum")
            total = total + self.distance_weight * apart / (n * n if self.released else n * (n - 1))
        if self.angle_weight > 0:
            ours, theirs = _cosines(s), _cosines(t)
            if not self.released:  # j = k is no angle: its cosine is 1, but 0 where x_i and x_j are equal
                same = torch.eye(n, dtype=torch.bool, device=s.device)
                ours, theirs = ours.masked_fill(same, 0), theirs.masked_fill(same, 0)
            turned = F.smooth_l1_loss(ours, theirs, reduction="sum")
            total = total + self.angle_weight * turned / (n**3 if self.released else max(1, n * (n - 1) * (n - 2)))
        return total


def _distances(edges: Tensor) -> Tensor:
    distance = torch.linalg.vector_norm(edges, dim=-1)
    n = distance.shape[0]
    mean = distance.sum() / (n * (n - 1))
    return distance / mean.masked_fill(mean <= TINY, 1)


def _cosines(edges: Tensor) -> Tensor:
    direction = unit(edges)
    return einsum(direction, direction, "i j d, i k d -> i j k")


class CC(Method, name="cc"):
    """Correlation congruence: ``(1/N²) sum_ij (K(s_i, s_j) - K(t_i, t_j))²``.

    ``K(x, y) = sum_(p≤order) e^(-2γ) (2γ)^p / p! · (x·y)^p`` of L2-normalised embeddings is the Taylor series of the
    Gaussian kernel e^(-γ‖x-y‖²). No unit; between 0 and 1. Zero and stationary where all kernel values agree, as for
    embeddings that are equal up to an orthogonal map and the lengths of their rows.

    Shapes: embeddings (N, D); gives ().

    Source: Peng et al. 2019, "Correlation Congruence for Knowledge Distillation", γ 0.4 and order 2.

    Args:
        gamma: γ of the Gaussian kernel.
        order: last power of the series.
        released: compute RepDistiller's Correlation, by the paper's authors, which is another loss:
            ``mean_(i<N) sum_d |s_i - t_i| |s_(i+1) - t_(i+1)|`` over neighbours in the batch, of embeddings through a
            learned linear layer of each network. It depends on the order of the batch. Zero, with a kink, where in
            every product one of the two factors is 0.
        embed_dim: width of the learned layers, which only ``released`` has.

    Example:
        >>> CC()(torch.randn(8, 64), torch.randn(8, 128)).shape
        torch.Size([])
    """

    gamma: NonNegative = 0.4
    order: Count = 2
    released: bool = False
    embed_dim: Count = 128

    needs = frozenset({"teacher", "embedding", "batch"})
    presets = {"cifar100": {"weight": 0.02, "ce_weight": 1.0, "released": True}}

    def __post_init__(self):
        super().__post_init__()
        self._built = not self.released

    def make(self, seen: Seen) -> None:
        """The linear layers of ``released``."""
        if self.released:
            s, t = seen.embeddings
            self.embed_student = nn.Linear(s.shape[1], self.embed_dim)
            self.embed_teacher = nn.Linear(t.shape[1], self.embed_dim)

    def values(self, seen: Seen) -> Tensor:
        """()."""
        s, t = seen.embeddings
        if self.released:
            gap = (self.embed_student(s) - self.embed_teacher(t)).abs()
            return (gap[:-1] * gap[1:]).sum(-1).mean()
        return (self._kernel(s) - self._kernel(t)).square().mean()

    def _kernel(self, x: Tensor) -> Tensor:
        x = unit(x)
        cosine, g = x @ x.T, 2 * self.gamma
        terms = [math.exp(-g) * g**p / math.factorial(p) * cosine**p for p in range(self.order + 1)]
        return torch.stack(terms).sum(0)
