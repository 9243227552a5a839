"""Methods whose student maps pass through a small network that learns with the student: ofd, reviewkd, simkd.

N examples, C channels, H, W: height and width, c, h, w their indices; s student, t teacher. All three normalise over
the batch inside that network, so a value is one number for the batch, (), the mean over its examples. Maps pair up by
position, from shallow to deep.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from kd.losses.fields import Count, NonNegative
from kd.losses.methods.base import Method, Seen, View
from kd.losses.methods.shared import pick, same_size


class OFD(Method, name="ofd"):
    """Overhaul of feature distillation: ``sum_j layer_decay^(L-1-j) mean_n sum_chw g (r(s) - t')²``.

    ``t' = max(t, m_c)`` is the teacher's map through a margin ReLU, cut off at the margin m_c < 0 of channel c. r is a
    learned 1x1 convolution and batch normalisation. g is 0 where t ≤ 0 and r(s) ≤ t', else 1: where the teacher is not
    positive, the student's value need only be as low as t'. j counts the L pairs of maps from 0, the shallowest. The
    margin is the mean of the teacher's negative values in a channel over the first batch, or -3 standard deviations of
    a channel without negative values. (The released code computes that mean from the batch normalisation in front of
    the map.)

    In squared teacher activations, summed over a map: the published weights, 1e-3 and 1e-4, are small for that. Zero
    and stationary where r(s) = t' at every positive t and r(s) ≤ t' elsewhere. Name layers in front of their ReLU:
    behind it no value is negative, and the margin has no effect.

    Shapes: any number of maps (N, C, H, W); gives (). Sizes are equal in the paper; here the larger is averaged down.

    Source: Heo et al. 2019, "A Comprehensive Overhaul of Feature Distillation". The factors ½ from layer to layer are
    the released code's.

    Args:
        layer_decay: weight of a layer relative to the next deeper one.

    Example:
        >>> OFD()(torch.randn(8, 16, 4, 4), torch.randn(8, 32, 4, 4)).shape
        torch.Size([])
    """

    layer_decay: NonNegative = 0.5

    needs = frozenset({"teacher", "maps", "batch"})
    presets = {
        "cifar100": {"weight": 1e-3, "ce_weight": 1.0},
        "imagenet": {"weight": 1e-4, "ce_weight": 1.0},
    }

    def make(self, seen: Seen) -> None:
        """The connectors, and the margins estimated from this batch."""
        self.connectors = nn.ModuleList()
        for i, (s, t) in enumerate(seen.map_pairs):
            convolution = nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False)
            nn.init.normal_(convolution.weight, std=math.sqrt(2 / t.shape[1]))
            self.connectors.append(nn.Sequential(convolution, nn.BatchNorm2d(t.shape[1])))
            self.register_buffer(f"margin{i}", _mean_of_negatives(t.detach().float()))

    def values(self, seen: Seen) -> Tensor:
        """()."""
        pairs = seen.map_pairs
        total = pairs[0][0].new_zeros(())
        for i, ((s, t), connector) in enumerate(zip(pairs, self.connectors, strict=True)):
            s, t = same_size(connector(s), t)
            aim = torch.maximum(t, self.get_buffer(f"margin{i}"))
            squares = (s - aim).square() * ((s > aim) | (t > 0))
            total = total + self.layer_decay ** (len(pairs) - 1 - i) * squares.sum() / s.shape[0]
        return total


def _mean_of_negatives(x: Tensor) -> Tensor:
    """The mean of the values below 0 of every channel, (C, 1, 1); where there are none, -3 standard deviations."""
    negative = x.clamp(max=0)
    count = reduce((x < 0).to(x.dtype), "n c h w -> c 1 1", "sum")
    deviation = rearrange(x, "n c h w -> c (n h w)").std(-1, correction=0)
    mean = reduce(negative, "n c h w -> c 1 1", "sum") / count.clamp(min=1)
    return torch.where(count > 0, mean, -3 * rearrange(deviation, "c -> c 1 1"))


class _Fusion(nn.Module):
    """Attention-based fusion (ABF): a level of the student with what came from deeper levels, weighed by position."""

    def __init__(self, width: int, inner: int, out: int, deepest: bool):
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner))
        self.leave = nn.Sequential(nn.Conv2d(inner, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        self.weigh = None if deepest else nn.Sequential(nn.Conv2d(2 * inner, 2, 1), nn.Sigmoid())
        for convolution in (self.enter, self.leave):
            nn.init.kaiming_uniform_(convolution.get_parameter("0.weight"), a=1)

    def forward(self, x: Tensor, deeper: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(n, width, h, w) and, except for the deepest, (n, inner, ., .) to (n, out, *size) and (n, inner, *size)."""
        x = self.enter(x)
        if self.weigh is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[-2:], mode="nearest")
            share = self.weigh(torch.cat([x, deeper], 1))
            x = x * share[:, :1] + deeper * share[:, 1:]
        x = F.interpolate(x, size, mode="nearest")
        return self.leave(x), x


class ReviewKD(Method, name="reviewkd"):
    """Knowledge review: ``sum_j hcl(f_j, t_j)``, f_j the student's maps from the deepest to j, fused to t_j's shape.

    ``hcl(f, t) = sum_l w_l mean (pool_l f - pool_l t)² / sum_l w_l``: the maps at full size (w = 1), then averaged
    to 4x4, 2x2 and 1x1 where smaller than the maps; w halves from each level used to the next. The fusion (ABF)
    is learned. The embedding is the deepest level, a 1x1 map. In squared teacher activations, averaged; about 1 for
    each level. Zero and stationary where every fused map equals the teacher's.

    Shapes: any number of maps (N, C, H, W) and embeddings (N, D), all sizes free; gives (). N must be at least 2, for
    the batch normalisation of the 1x1 map.

    Source: Chen et al. 2021, "Distilling Knowledge via Knowledge Review". The released code is the same; it takes the
    teacher's maps, and some students', in front of their ReLU. Its weight differs from pair to pair of networks. The
    presets' ``warmup_epochs`` raise the weight linearly at the start.

    Args:
        max_width: upper limit of the channels inside the fusion, which are as many as the student's embedding has.

    Example:
        >>> teacher = student = View(maps=[torch.randn(8, 16, 4, 4)], embedding=torch.randn(8, 64))
        >>> ReviewKD()(student, teacher).shape
        torch.Size([])
    """

    max_width: Count = 512

    needs = frozenset({"teacher", "maps", "embedding", "batch"})
    presets = {
        "cifar100": {"weight": 5.0, "ce_weight": 1.0, "warmup_epochs": 20},
        "imagenet": {"weight": 1.0, "ce_weight": 1.0, "warmup_epochs": 1},
    }

    def make(self, seen: Seen) -> None:
        """A fusion for every level, the embedding's last."""
        levels = self._levels(seen)
        inner = min(self.max_width, levels[-1][0].shape[1])
        deepest = len(levels) - 1
        fusions = [_Fusion(s.shape[1], inner, t.shape[1], i == deepest) for i, (s, t) in enumerate(levels)]
        self.fusions = nn.ModuleList(fusions)

    def values(self, seen: Seen) -> Tensor:
        """()."""
        total, deeper = seen.student.maps[0].new_zeros(()), None
        for (s, t), fusion in zip(reversed(self._levels(seen)), reversed(list(self.fusions)), strict=True):
            fused, deeper = fusion(s, deeper, t.shape[-2:])
            total = total + _hierarchical_context(fused, t)
        return total

    def _levels(self, seen: Seen) -> list[tuple[Tensor, Tensor]]:
        s, t = (rearrange(x, "n d -> n d 1 1") for x in seen.embeddings)
        return [*seen.map_pairs, (s, t)]


def _hierarchical_context(a: Tensor, b: Tensor) -> Tensor:
    total, weight, weights = F.mse_loss(a, b), 1.0, 1.0
    for side in (4, 2, 1):
        if side < min(a.shape[-2:]):
            weight /= 2
            total = total + weight * F.mse_loss(F.adaptive_avg_pool2d(a, side), F.adaptive_avg_pool2d(b, side))
            weights += weight
    return total / weights


class SimKD(Method, name="simkd"):
    """Reused teacher classifier: ``mean_nchw (r(s) - t)²`` of the last maps, r a learned bottleneck.

    r is a 1x1, a 3x3 and a 1x1 convolution. There is no cross entropy (its presets say so), so the student's own
    classifier is not trained. The network to evaluate, and to ship, is student, r and the teacher's classifier:
    ``classify(view)`` gives its logits in eval mode. kd.train scores and saves that network (kd.models.ensemble). In a
    loop of your own call ``classify`` instead of reading ``view.logits``, and save this method's state_dict, which
    holds the teacher's classifier, with the student.

    In squared teacher activations; the paper writes the squared norm, C·H·W times this, and its code the mean. Zero and
    stationary in r(s) where r(s) = t; then the student's logits are the teacher's.

    Shapes: one map of each (N, C, H, W); gives (). A larger student map is averaged down to the teacher's size in front
    of r, a larger teacher map to the student's.

    Source: Chen et al. 2022, "Knowledge Distillation with the Reused Teacher Classifier"; r with batch normalisation
    and ReLU behind every convolution.

    Args:
        layer: position of the map whose average the teacher's classifier reads; negative from the deepest.
        factor: r has the teacher's number of channels divided by this inside.

    Example:
        >>> m, w = torch.randn(8, 16, 4, 4), torch.randn(10, 16)
        >>> SimKD()(v := View(m.mean((2, 3)) @ w.T, [m], weight=w), v).shape
        torch.Size([])
    """

    layer: int = -1
    factor: Count = 2

    needs = frozenset({"teacher", "maps", "weight", "batch"})
    classifies = True
    renamed = {"reduction": "factor"}
    presets = dict.fromkeys(("cifar100", "imagenet"), {"weight": 1.0, "ce_weight": 0.0})

    def make(self, seen: Seen) -> None:
        """The projector r, and a copy of the teacher's classifier, checked to give its logits from its map."""
        s, t = pick(self, seen, self.layer)
        _, teacher = seen.views
        assert teacher.weight is not None
        has_logits = teacher.logits.shape[-1] == len(teacher.weight)
        self.require(has_logits, "needs the logits of the teacher, to check that its classifier gives them")
        bias = teacher.logits.new_zeros(len(teacher.weight)) if teacher.bias is None else teacher.bias
        self._check_classifier(t, teacher.logits, teacher.weight, bias)
        inner = max(1, t.shape[1] // self.factor)
        layers: list[nn.Module] = []
        for a, b, kernel in ((s.shape[1], inner, 1), (inner, inner, 3), (inner, t.shape[1], 1)):
            layers += [nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.projector = nn.Sequential(*layers)
        self.size = tuple(t.shape[-2:])  # of the teacher's map
        self.register_buffer("weight", teacher.weight.detach().clone())
        self.register_buffer("bias", bias.detach().clone())

    def _check_classifier(self, t: Tensor, logits: Tensor, weight: Tensor, bias: Tensor) -> None:
        """Refuse a map from whose average the teacher's classifier does not give the teacher's logits."""
        t, logits, weight, bias = (x.float() for x in (t, logits, weight, bias))
        near = 0.02 * logits.abs().max() + 1e-3  # half precision differs by about 0.005
        fits = t.shape[1] == weight.shape[1]
        self.require(
            fits and bool((F.linear(t.mean((2, 3)), weight, bias) - logits).abs().max() <= near),
            f"the teacher's classifier reads {weight.shape[1]} channels, and not the average of map {self.layer} with "
            f"{t.shape[1]}; name the layer whose average the classifier reads",
        )

    def values(self, seen: Seen) -> Tensor:
        """()."""
        s, t = same_size(*pick(self, seen, self.layer))
        return F.mse_loss(self.projector(s), t)

    def classify(self, view: View) -> Tensor:
        """The logits (N, K) of student, projector and the teacher's classifier, from the student's view."""
        self._require_built("classifier")
        weight, bias = self.get_buffer("weight"), self.get_buffer("bias")
        s = view.maps[self.layer]
        s = F.adaptive_avg_pool2d(s, (min(s.shape[-2], self.size[0]), min(s.shape[-1], self.size[1])))
        return F.linear(reduce(self.projector(s.to(weight.dtype)), "n c h w -> n c", "mean"), weight, bias)
