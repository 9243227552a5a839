"""Methods that compare a student's feature map with a teacher's, image by image: hint, at, vid, nst, fsp.

N examples, C channels, H, W: height and width, c, h, w their indices; s student, t teacher. Maps pair up by position
and their values add up. Where two maps differ in height or width, the larger one is averaged down by adaptive pooling,
as the published code does.

``released=True`` gives the numbers of the code that the papers are compared by; ``weight`` in the presets is for those.
The sums of hint, vid and fsp are the papers', and thousands of times a cross entropy: with weight 1 they diverged
within 20 updates of SGD at a learning rate of 0.05. Start from the preset.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from kd.losses.fields import Allowed
from kd.losses.methods.base import Method, Seen
from kd.losses.methods.shared import pick, same_size, unit


class Hint(Method, name="hint"):
    """FitNets hint: ``½ sum_chw (r(s) - t)²``, r a learned convolution to the teacher's channels.

    In squared teacher activations; grows with C·H·W. Zero and stationary where r(s) = t.

    Shapes: one map of each at position ``layer``, student (N, C_s, H_s, W_s), teacher (N, C_t, H_t, W_t); gives (N,).
    The kernel of r is H_s - H_t + 1 by W_s - W_t + 1 without padding, 1x1 for equal sizes. A larger teacher map, which
    the paper does not have, is averaged down. The paper puts the hint layer's own non-linearity behind r; a method
    cannot know it, so r is linear here.

    Source: Romero et al. 2015 (FitNets), §2.2 Eq. 3, trained there as a stage of its own before distillation.

    Args:
        layer: position of the hint among the maps; negative from the deepest. The default is the middle one of three.
        released: compute RepDistiller's HintLoss and ConvReg. The value is the mean over c, h, w of the squares, which
            is 2 / (C·H·W) times the paper's. r is a 3x3 convolution of stride 2 if the student's map is twice as large,
            a transposed convolution if it is half as large, and the paper's convolution otherwise. Batch normalisation
            and ReLU follow it, so that in training an example's value depends on its batch.

    Example:
        >>> Hint(layer=0)(torch.randn(8, 16, 4, 4), torch.randn(8, 32, 4, 4)).shape
        torch.Size([])
    """

    layer: int = -2
    released: bool = False

    needs = frozenset({"teacher", "maps"})
    presets = {"cifar100": {"weight": 100.0, "ce_weight": 1.0, "released": True}}

    def make(self, seen: Seen) -> None:
        """The regressor r."""
        s, t = pick(self, seen, self.layer)
        (c_s, h_s, w_s), (c_t, h_t, w_t) = s.shape[1:], t.shape[1:]
        if self.released and (h_s, w_s) == (2 * h_t, 2 * w_t):
            convolution = nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
        elif self.released and (2 * h_s, 2 * w_s) == (h_t, w_t):
            convolution = nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
        else:
            convolution = nn.Conv2d(c_s, c_t, (max(1, h_s - h_t + 1), max(1, w_s - w_t + 1)))
        after = (nn.BatchNorm2d(c_t), nn.ReLU()) if self.released else ()
        self.regressor = nn.Sequential(convolution, *after)

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        s, t = pick(self, seen, self.layer)
        s, t = same_size(self.regressor(s), t)
        squares = (s - t).square()
        if self.released:
            return reduce(squares, "n c h w -> n", "mean")
        return reduce(squares, "n c h w -> n", "sum") / 2


class AT(Method, name="at"):
    """Attention transfer: ``sum_j ‖Q_s/‖Q_s‖ - Q_t/‖Q_t‖‖``, ``Q_hw = sum_c |x_chw|^power`` of the maps of pair j.

    No unit; between 0 and √2 for each pair, and unchanged where a map is scaled. Zero where the normalised attention
    maps are equal, so also for permuted channels; the norm has a kink there, whose gradient is 0 here. An all-zero map
    has the attention 0.

    Shapes: any number of maps (N, C, H, W), C of student and teacher free; gives (N,).

    Source: Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", §3.1 Eq. 2. The paper's weight is β/2.

    Args:
        power: exponent of the attention, at least 1: lower powers have no gradient at 0.
        released: compute the authors' attention-transfer and RepDistiller's AT: the mean over h, w of the squared
            difference, which is d²/(H·W) with the paper's distance d. Its weight is 1000: the paper's β is 1000 divided
            by H·W and by the batch size, and both divisions are in the means.

    Example:
        >>> AT()(torch.randn(8, 16, 4, 4), torch.randn(8, 32, 4, 4)).shape
        torch.Size([])
    """

    power: Annotated[float, Allowed("a finite number ≥ 1", lambda value: value >= 1)] = 2.0
    released: bool = False

    needs = frozenset({"teacher", "maps"})
    presets = dict.fromkeys(("cifar100", "imagenet"), {"weight": 1000.0, "ce_weight": 1.0, "released": True})

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        return _sum_over_pairs(seen, self._distance)

    def _distance(self, s: Tensor, t: Tensor) -> Tensor:
        gap = self._attention(s) - self._attention(t)
        return gap.square().mean(-1) if self.released else torch.linalg.vector_norm(gap, dim=-1)

    def _attention(self, x: Tensor) -> Tensor:
        # Attention does not depend on the scale of its map, so neither value nor gradient change; powers stay in range.
        peak = x.detach().abs().amax((1, 2, 3), keepdim=True)
        x = x / peak.masked_fill(peak == 0, 1)
        return unit(reduce(x.abs().pow(self.power), "n c h w -> n (h w)", "mean"))


VARIANCE_FLOOR = 1e-5  # of vid; it is added to every variance


class VID(Method, name="vid"):
    """Variational information distillation: ``sum_chw ½ (log σ²_c + (t - μ(s))² / σ²_c)``, summed over map pairs.

    It is the Gaussian negative log likelihood of the teacher's map, without the constant ½ log 2π, in nats; it grows
    with C·H·W. μ is three learned 1x1 convolutions with ReLU between them; σ² is softplus of a learned number for each
    channel, plus 1e-5. For given σ the minimum is at μ(s) = t, stationary in s. That minimum falls with σ² and may be
    negative, down to -5.76 for each element.

    Shapes: any number of maps (N, C, H, W); gives (N,).

    Source: Ahn et al. 2019, "Variational Information Distillation for Knowledge Transfer". The width of the hidden
    layers, the teacher's channels, is the code's.

    Args:
        initial_variance: σ² at the start.
        released: compute RepDistiller's VIDLoss, from the authors' code: the mean over c, h, w instead of the sum.

    Example:
        >>> VID()(torch.randn(8, 16, 4, 4), torch.randn(8, 32, 4, 4)).shape
        torch.Size([])
    """

    initial_variance: Annotated[float, Allowed("a finite number ≥ 2e-05", lambda v: v >= 2 * VARIANCE_FLOOR)] = 5.0
    released: bool = False

    needs = frozenset({"teacher", "maps"})
    presets = {"cifar100": {"weight": 1.0, "ce_weight": 1.0, "released": True}}

    def make(self, seen: Seen) -> None:
        """μ and the channels' variances for every pair of maps."""
        start = math.log(math.expm1(self.initial_variance - VARIANCE_FLOOR))  # softplus gives the variance back
        self.means, self.scales = nn.ModuleList(), nn.ParameterList()
        for s, t in seen.map_pairs:
            c_s, c_t = s.shape[1], t.shape[1]
            widths = (c_s, c_t), (c_t, c_t), (c_t, c_t)
            first, second, third = (nn.Conv2d(a, b, 1, bias=False) for a, b in widths)
            self.means.append(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third))
            self.scales.append(nn.Parameter(torch.full((c_t,), start)))

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        total = seen.student.maps[0].new_zeros(())
        for (s, t), mean, scale in zip(seen.map_pairs, self.means, self.scales, strict=True):
            s, t = same_size(s, t)
            variance = rearrange(F.softplus(scale) + VARIANCE_FLOOR, "c -> c 1 1")
            nll = (variance.log() + (t - mean(s)).square() / variance) / 2
            total = total + reduce(nll, "n c h w -> n", "mean" if self.released else "sum")
        return total


class NST(Method, name="nst"):
    """Neuron selectivity transfer: ``mean_ij k(t_i, t_j) + mean_ij k(s_i, s_j) - 2 mean_ij k(s_i, t_j)``.

    i, j are channels and ``k(x, y) = (x·y)²``: the squared maximum mean discrepancy between the channels of two maps,
    each channel flattened and of length 1. No unit; between 0 and 2 for each pair, and unchanged where a channel is
    scaled. Zero and stationary where both maps have the same mean of c·cᵀ over their channels c, so for the same
    channels in any order, sign and number of copies.

    Shapes: any number of maps (N, C, H, W), C of student and teacher free; gives (N,).

    Source: Huang & Wang 2017, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", polynomial
    kernel of degree 2 and offset 0. The paper's weight is λ/2. The released code is the same.

    Example:
        >>> NST()(torch.randn(8, 16, 4, 4), torch.randn(8, 32, 4, 4)).shape
        torch.Size([])
    """

    needs = frozenset({"teacher", "maps"})
    presets = {"cifar100": {"weight": 50.0, "ce_weight": 1.0}}

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        return _sum_over_pairs(seen, self._discrepancy)

    def _discrepancy(self, s: Tensor, t: Tensor) -> Tensor:
        s, t = (unit(rearrange(x, "n c h w -> n c (h w)")) for x in (s, t))
        return _mean_kernel(t, t) + _mean_kernel(s, s) - 2 * _mean_kernel(s, t)


def _mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    """The mean over channels of both (n, c, p), (n, d, p) of the squared products, (n,)."""
    return einsum(a, b, "n c p, n d p -> n c d").square().mean((1, 2))


def _sum_over_pairs(seen: Seen, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(N,) the distances of all pairs of maps, brought to one size, added up."""
    return torch.stack([distance(*same_size(s, t)) for s, t in seen.map_pairs]).sum(0)


class FSP(Method, name="fsp"):
    """Flow of solution procedure: ``sum_j ‖G_s,j - G_t,j‖²``, ``G_j = mean_hw x_j[c, h, w] x_(j+1)[d, h, w]``.

    j and j + 1 are neighbouring maps. In activations to the fourth power, so that its gradient overflows float16 at
    activations of about 100; grows with C_j·C_(j+1). Zero and stationary where all G are equal, as for equal maps and
    for maps whose positions are permuted alike.

    Shapes: two or more maps (N, C, H, W), as many channels in the student's as in the teacher's; gives (N,).

    Source: Yim et al. 2017, "A Gift from Knowledge Distillation" (FSP matrices), all weights λ equal. The paper first
    trains the student with it alone and then with the labels alone. RepDistiller does so too, with weight 1; the weight
    50 of its script multiplies a term that is 0 in its code. The preset has 50, for one stage with both terms.

    Args:
        released: compute RepDistiller's FSP: the mean over c, d instead of the sum. The larger of two neighbouring maps
            is averaged down; the paper max-pools it.

    Example:
        >>> FSP()([torch.randn(8, 16, 4, 4)] * 2, [torch.randn(8, 16, 4, 4)] * 2).shape
        torch.Size([])
    """

    released: bool = False

    needs = frozenset({"teacher", "maps"})
    presets = {"cifar100": {"weight": 50.0, "ce_weight": 1.0, "released": True}}

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        pairs = seen.map_pairs
        self.require(len(pairs) > 1, f"compares neighbouring maps: there is {len(pairs)} map, name 2 or more layers")
        for i, (s, t) in enumerate(pairs):
            ours, theirs = s.shape[1], t.shape[1]
            self.require(ours == theirs, f"map {i}: student has {ours} channels and teacher {theirs}; must be equal")
        gaps = [self._flow(s, deeper_s) - self._flow(t, deeper_t) for (s, t), (deeper_s, deeper_t) in pairwise(pairs)]
        squares = [gap.square().mean((1, 2)) if self.released else gap.square().sum((1, 2)) for gap in gaps]
        return torch.stack(squares).sum(0)

    def _flow(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = same_size(a, b, F.adaptive_avg_pool2d if self.released else F.adaptive_max_pool2d)
        return einsum(a, b, "n c h w, n d h w -> n c d") / a.shape[-2:].numel()
