"""Methods that compare a student's map with a teacher's, image by image: hint, at, vid, nst, fsp.

N examples, C channels, H, W: height and width, c, h, w their indices; s student, t teacher. Where two maps differ in
height or width, the larger one is averaged down by adaptive pooling, as the published code does. Maps pair up by
position and their values add up.

`released=True` gives the numbers of the code that the papers are compared by; `weight` in the presets is for those.
The sums of hint, vid and fsp are the papers', and thousands of times a cross entropy: with weight 1 they diverged
within 20 updates of SGD at a learning rate of 0.05. Start from the preset.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from kd.losses.methods.base import Method, Seen
from kd.losses.methods.shared import check_at_least, pairs, pick, placed, resized, same_size, unit


@dataclass(eq=False)
class Hint(Method, name="hint"):
    """``½ sum_chw (r(s) - t)²``, r a learned convolution to the teacher's channels.

    Units: squared teacher activations; grows with C·H·W. ``released``: the mean over c, h, w of the square, so
    2 / (C·H·W) of the paper's, and a regressor of a 3x3 convolution of stride 2 (student twice as large), a transposed
    one (half as large) or the paper's, then batch normalisation and ReLU. With it, in training, an example's value
    depends on its batch.
    Shapes: one map of each at position `layer`, student (N, C_s, H_s, W_s), teacher (N, C_t, H_t, W_t); gives (N,).
    The regressor's kernel is H_s - H_t + 1 by W_s - W_t + 1 without padding, 1x1 for equal sizes; a larger teacher
    map, which the paper does not have, is averaged down. The paper puts the hint layer's own non-linearity behind the
    regressor; as no method can know it, r is linear here.
    Zero, and stationary: where r(s) = t.
    Paper: Romero et al. 2015 (FitNets), §2.2, Eq. 3, trained as a stage of its own before distillation. `layer` is the
    middle one of three.

    Args:
        layer: position of the hint among the maps; negative from the deepest.
        released: RepDistiller's HintLoss and ConvReg.
    """

    needs = frozenset({"teacher", "maps"})
    presets: ClassVar = {"cifar100": {"weight": 100.0, "ce_weight": 1.0, "kd_weight": 0.0, "released": True}}

    layer: int = -2
    released: bool = False

    def build(self, seen: Seen, num_samples: int) -> None:
        """Make the regressor."""
        s, t = pick(self.name, seen, self.layer)
        (c_s, h_s, w_s), (c_t, h_t, w_t) = s.shape[1:], t.shape[1:]
        if self.released and (h_s, w_s) == (2 * h_t, 2 * w_t):
            convolution = nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
        elif self.released and (2 * h_s, 2 * w_s) == (h_t, w_t):
            convolution = nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
        else:
            convolution = nn.Conv2d(c_s, c_t, (max(1, h_s - h_t + 1), max(1, w_s - w_t + 1)))
        after = (nn.BatchNorm2d(c_t), nn.ReLU()) if self.released else ()
        self.regressor = placed(nn.Sequential(convolution, *after), seen)

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        s, t = pick(self.name, seen, self.layer)
        s, t = same_size(self.regressor(s), t)
        squares = (s - t).square()
        if self.released:
            return reduce(squares, "n c h w -> n", "mean")
        return reduce(squares, "n c h w -> n", "sum") / 2


@dataclass(eq=False)
class AttentionTransfer(Method, name="at"):
    """``sum_j ‖Q_s/‖Q_s‖ - Q_t/‖Q_t‖‖``, ``Q_hw = sum_c |x_chw|^power`` of the map pair j, flattened.

    Units: none, between 0 and √2 a pair; the same for maps that are scaled. The paper's weight is β/2. ``released``:
    the mean over h, w of the square of that distance d, so d/(H·W) of the paper's value, weight 1000. (The paper's β,
    1000 over the number of positions and the batch size, says the same.)
    Shapes: any number of maps (N, C, H, W), C of student and teacher free; gives (N,).
    Zero: where the normalised attention maps are equal, so for channels permuted and maps scaled; the paper's norm has
    a kink there, whose gradient is 0 here. An all-zero map has the attention 0.
    Paper: Zagoruyko & Komodakis 2017, §3.1, Eq. 2.

    Args:
        power: p of the attention, at least 1.
        released: the authors' attention-transfer and RepDistiller's AT.
    """

    needs = frozenset({"teacher", "maps"})
    presets: ClassVar = {
        "cifar100": {"weight": 1000.0, "ce_weight": 1.0, "kd_weight": 0.0, "released": True},
        "imagenet": {"weight": 1000.0, "ce_weight": 1.0, "kd_weight": 0.0, "released": True},
    }

    power: float = 2.0
    released: bool = False

    def check(self) -> None:
        """Powers below 1 have no gradient at 0."""
        check_at_least(self.name, power=(self.power, 1))

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        total = seen.student.maps[0].new_zeros(())
        for s, t in pairs(self.name, seen):
            s, t = same_size(s, t)
            gap = self._attention(s) - self._attention(t)
            total = total + (gap.square().mean(-1) if self.released else torch.linalg.vector_norm(gap, dim=-1))
        return total

    def _attention(self, x: Tensor) -> Tensor:
        # Attention does not depend on the scale of its map, so neither value nor gradient change; powers stay in range.
        peak = x.detach().abs().amax((1, 2, 3), keepdim=True)
        x = x / peak.masked_fill(peak == 0, 1)
        return unit(reduce(x.abs().pow(self.power), "n c h w -> n (h w)", "mean"))


@dataclass(eq=False)
class VariationalInformation(Method, name="vid"):
    """``sum_chw ½ (log σ²_c + (t - μ(s))² / σ²_c)``, the Gaussian negative log likelihood of the teacher's map.

    μ are three learned 1x1 convolutions with ReLU between them, σ² = softplus of a learned number a channel + 1e-5.
    Units: nats, without the constant ½ log 2π; grows with C·H·W. ``released``: the mean over c, h, w instead of the
    sum, so 1 / (C·H·W) of the paper's.
    Shapes: any number of maps (N, C, H, W); gives (N,).
    Never zero where it matters: its least value for given σ is at μ(s) = t, where it is stationary in s; it falls with
    σ² and may be negative. -5.76 per element is the floor.
    Paper: Ahn et al. 2019, "Variational Information Distillation for Knowledge Transfer". The width of the hidden
    layers, the teacher's channels, is the code's.

    Args:
        initial_variance: σ² at the start, above 1e-5.
        released: RepDistiller's VIDLoss, from the authors' code.
    """

    needs = frozenset({"teacher", "maps"})
    presets: ClassVar = {"cifar100": {"weight": 1.0, "ce_weight": 1.0, "kd_weight": 0.0, "released": True}}

    initial_variance: float = 5.0
    released: bool = False

    floor = 1e-5  # added to every variance

    def check(self) -> None:
        """The variance must be above its floor."""
        check_at_least(self.name, initial_variance=(self.initial_variance, 2 * self.floor))

    def build(self, seen: Seen, num_samples: int) -> None:
        """Make a mean and the channels' variances for every pair of maps."""
        start = math.log(math.expm1(self.initial_variance - self.floor))  # softplus gives the variance back
        means, scales = nn.ModuleList(), nn.ParameterList()
        for s, t in pairs(self.name, seen):
            c_s, c_t = s.shape[1], t.shape[1]
            widths = (c_s, c_t), (c_t, c_t), (c_t, c_t)
            first, second, third = (nn.Conv2d(a, b, 1, bias=False) for a, b in widths)
            means.append(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third))
            scales.append(nn.Parameter(torch.full((c_t,), start)))
        self.means, self.scales = placed(means, seen), placed(scales, seen)

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        total = seen.student.maps[0].new_zeros(())
        for (s, t), mean, scale in zip(pairs(self.name, seen), self.means, self.scales, strict=True):
            s, t = same_size(s, t)
            variance = rearrange(F.softplus(scale) + self.floor, "c -> c 1 1")
            nll = (variance.log() + (t - mean(s)).square() / variance) / 2
            total = total + reduce(nll, "n c h w -> n", "mean" if self.released else "sum")
        return total


@dataclass(eq=False)
class NeuronSelectivity(Method, name="nst"):
    """``mean_ij k(t_i, t_j) + mean_ij k(s_i, s_j) - 2 mean_ij k(s_i, t_j)``, ``k(x, y) = (x·y)²``, i, j channels.

    The squared maximum mean discrepancy between the channels of two maps, each channel flattened and of length 1.
    Units: none, between 0 and 2 a pair; the same for channels that are scaled. The paper's weight is λ/2.
    Shapes: any number of maps (N, C, H, W), C of student and teacher free; gives (N,).
    Zero, and stationary: where both have the same mean of c·cᵀ over their channels c, so for the same channels in any
    order, sign and number of copies.
    Paper: Huang & Wang 2017, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", polynomial kernel
    of degree 2 and offset 0. The released code is the same.
    """

    needs = frozenset({"teacher", "maps"})
    presets: ClassVar = {"cifar100": {"weight": 50.0, "ce_weight": 1.0, "kd_weight": 0.0}}

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        total = seen.student.maps[0].new_zeros(())
        for s, t in pairs(self.name, seen):
            s, t = same_size(s, t)
            s, t = (unit(rearrange(x, "n c h w -> n c (h w)")) for x in (s, t))
            total = total + _kernel(t, t) + _kernel(s, s) - 2 * _kernel(s, t)
        return total


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """The mean over channels of both (n, c, p), (n, d, p) of the squared products, (n,)."""
    return einsum(a, b, "n c p, n d p -> n c d").square().mean((1, 2))


@dataclass(eq=False)
class FlowOfSolution(Method, name="fsp"):
    """``sum_j ‖G_s,j - G_t,j‖²``, ``G_j = mean_hw x_j[c, h, w] x_(j+1)[d, h, w]`` of neighbouring maps j and j + 1.

    Units: activations to the fourth power, so that its gradient leaves float16 at activations of about 100; grows with
    C_j·C_(j+1). ``released``: the mean over c, d instead of the sum. The paper max-pools the larger of the two maps,
    the released code averages it; `released` chooses that too.
    Shapes: two or more maps (N, C, H, W), as many channels in the student's as in the teacher's; gives (N,).
    Zero, and stationary: where all G are equal, so at equal maps, and at maps whose positions are permuted alike.
    Paper: Yim et al. 2017, "A Gift from Knowledge Distillation" (FSP matrices), all weights λ equal. The paper trains
    the student with it alone first, and with the labels alone afterwards. RepDistiller does so too, with weight 1: the
    weight 50 of its script, kept in the preset for one stage with both terms, meets a term that is 0 in its code.

    Args:
        released: RepDistiller's FSP.
    """

    needs = frozenset({"teacher", "maps"})
    presets: ClassVar = {"cifar100": {"weight": 50.0, "ce_weight": 1.0, "kd_weight": 0.0, "released": True}}

    released: bool = False

    def values(self, seen: Seen) -> Tensor:
        """(N,)."""
        found = pairs(self.name, seen)
        if len(found) < 2:
            raise ValueError(
                f"{self.name}: compares neighbouring maps: there is {len(found)} map, name 2 or more layers"
            )
        for i, (s, t) in enumerate(found):
            if s.shape[1] != t.shape[1]:
                raise ValueError(
                    f"{self.name}: map {i} has {s.shape[1]} channels in the student and {t.shape[1]} in the teacher; "
                    f"name layers with equal numbers"
                )
        gaps = [self._flow(s, deeper_s) - self._flow(t, deeper_t) for (s, t), (deeper_s, deeper_t) in pairwise(found)]
        squares = [gap.square().mean((1, 2)) if self.released else gap.square().sum((1, 2)) for gap in gaps]
        return torch.stack(squares).sum(0)

    def _flow(self, a: Tensor, b: Tensor) -> Tensor:
        size = min(a.shape[-2], b.shape[-2]), min(a.shape[-1], b.shape[-1])
        shrink = resized if self.released else F.adaptive_max_pool2d
        a, b = shrink(a, size), shrink(b, size)
        return einsum(a, b, "n c h w, n d h w -> n c d") / (size[0] * size[1])
