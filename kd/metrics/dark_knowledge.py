"""Dark knowledge: what a network predicts about the classes that are wrong.

NT stands for non-target: the label's class is dropped and the others are renormalised, so that accuracy and confidence
play no part. `reference` (N, K) holds logits whose softmax is the best known posterior p*, such as the logarithm of the
true posterior, or of the mean prediction of an ensemble trained on hard labels. The NT metrics need K ≥ 3, not counting
classes that both mask by -inf.
"""

import math

import torch
from torch import Tensor

from kd.errors import require
from kd.metrics.fidelity import divergence
from kd.metrics.inputs import Undefined, centred, class_means, present_classes
from kd.metrics.ranking import spearman
from kd.metrics.registry import SPLITS, metric
from kd.metrics.temperature import inverse_temperature, sharpened

__all__ = ["class_similarity_correlation", "cmi", "gamma", "mutual_information", "nt_cosine", "nt_kl"]
__all__ += ["shen_instability", "transfer_efficiency"]


@metric("nt_cosine", "NT-cosine", "up")
def nt_cosine(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    """Cosine of the wrong classes' logits with the reference's, each centred; from -1 to 1.

    mean over i of cos(c(logits[i] without class targets[i]), c(log p*[i] without it)), c(z) = z - mean z. Ours. 1 for
    reference·a + b, a > 0; 0 for a sample whose wrong classes have equal logits; nan where one of the two alone masks a
    wrong class.
    """
    z, r = _non_target(logits, reference, targets)
    kept = (z > -torch.inf) | (r > -torch.inf)
    z, r = centred(z, kept), centred(r, kept)
    norm = z.norm(dim=1) * r.norm(dim=1)
    return ((z * r).sum(dim=1) / norm.where(norm > 0, 1)).mean()


@metric("nt_kl", "NT-KL", "down")
def nt_kl(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    """Divergence of the wrong classes' probabilities from the reference's, in nats, at the best temperature.

    min over T of mean over i of KL(nt(p*[i]) ‖ nt(softmax(logits[i] / T))), one T for all samples. Ours. The best T
    removes what smoothing changes in confidence alone. From 0 (at reference·a + b, a > 0) to the divergence from
    uniform (T = inf); inf where the logits alone mask a wrong class, nan where one of the two masks all of them.
    """
    z, r = _non_target(logits, reference, targets)
    log_p = r.log_softmax(dim=1)
    z = z - z.amax(dim=1, keepdim=True)
    p = log_p.exp()
    inverse = inverse_temperature(z, (p * z).where(p != 0, 0).sum(dim=1))
    return divergence(log_p, sharpened(z, inverse).log_softmax(dim=1)).mean().clamp(min=0)


# It compares three networks, so that only a study's table can compute it.
@metric("transfer_efficiency", "transfer efficiency", "up", splits=("test",), networks=("student",))
def transfer_efficiency(student: float, hard: float, bayes: float) -> float:
    """Share of the transferable dark knowledge that the student received.

    (hard - student) / (hard - bayes), each an `nt_kl` against the same reference: of the distilled student, of the same
    student trained on hard labels, and of the same student trained on the reference's probabilities. Ours.
    1: as good as training on the reference; 0: no better than labels; negative: harmful; not bounded. nan where
    hard ≤ bayes, since there was nothing to transfer.
    """
    return (hard - student) / (hard - bayes) if hard > bayes else math.nan


@metric("class_similarity_correlation", "class-similarity correlation", "up")
def class_similarity_correlation(logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    """Rank correlation of the network's class confusions with the reference's, from -1 to 1.

    mean over the classes c present of Spearman's ρ between the class means of softmax(logits) and of p* over the
    samples of class c, both without entry c. Ours. Smoothing a prediction exactly, (1-eps) p + eps/K, changes no rank.
    Equal entries share their mean rank; a row of equal entries counts 0. An entry that is 0 in both is left out.
    """
    _check_wrong_classes(logits, reference)
    present, groups = targets.unique(return_inverse=True)
    rows_a, rows_b = (class_means(z.softmax(dim=1), groups) for z in (logits, reference))
    others = (torch.arange(logits.shape[1], device=logits.device) != present[:, None]) & ((rows_a > 0) | (rows_b > 0))
    return torch.stack([spearman(a[own], b[own]) for a, b, own in zip(rows_a, rows_b, others, strict=True)]).mean()


CONFIDENCE = "smoothing and temperature raise it without any dark knowledge"
SATURATION = "on fitted data it rises with smoothing because hard labels saturate"


@metric("gamma", "γ", splits=SPLITS, misleading=CONFIDENCE)
def gamma(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Müller's γ, the mass off the label. Misleading: smoothing and temperature raise it without any dark knowledge.

    mean over i of Σ_k (1 - y_k) softmax(logits[i] / T)[k] · K/(K-1), y one-hot, T = temperature > 0; Müller et al.
    2019, "When Does Label Smoothing Help?", section 4, who set a smoothed target's eps equal to a teacher's γ(T) to
    compare the two. From 0 to K/(K-1); eps for exactly smoothed labels, 1 for constant logits. A masked class counts
    among the K.
    """
    k = logits.shape[1]
    p = (logits / temperature).softmax(dim=1)
    wrong = torch.arange(k, device=p.device) != targets[:, None]
    return (p * wrong).sum(dim=1).mean() * k / (k - 1)


@metric("shen_instability", "Shen's 1 − S", splits=SPLITS, misleading=SATURATION)
def shen_instability(logits: Tensor, targets: Tensor) -> Tensor:
    """Shen's 1 - S, the spread of predictions within a class. Misleading: on fitted data it rises with smoothing.

    (1/C) Σ_c (1/n_c) Σ_{i in c} ‖p_i - mean of p over c‖², p = softmax(logits), over the C ≥ 2 classes present; Shen et
    al. 2021, "Is Label Smoothing Truly Incompatible with Knowledge Distillation?", whose stability S is 1 minus this. A
    network that fits hard labels perfectly predicts one-hot vectors on its training data and scores 0; smoothing ends
    this saturation, and the rise is no sign of knowledge. From 0 to 1.
    """
    p, groups = logits.softmax(dim=1), present_classes(targets)
    spread = (p - class_means(p, groups)[groups]).square().sum(dim=1, keepdim=True)
    return class_means(spread, groups).mean()


@metric("cmi", "CMI", splits=SPLITS, misleading=SATURATION)
def cmi(logits: Tensor, targets: Tensor) -> Tensor:
    """Conditional mutual information of input and prediction given the label. Misleading as `shen_instability` is.

    mean over i of KL(p_i ‖ mean of p over the samples of class targets[i]), p = softmax(logits), in nats, from 0 to
    log K: Ye et al. 2024, "Bayes Conditional Distribution Estimation for Knowledge Distillation Based on Conditional
    Mutual Information". Per class it is H(mean p) - mean H(p). At least two classes have to be present.
    """
    p, groups = logits.softmax(dim=1), present_classes(targets)
    means = class_means(p, groups)[groups]
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, means)).sum(dim=1).mean().clamp(min=0)


@metric("mutual_information", "Müller's MI", splits=("train",))
def mutual_information(views: Tensor) -> Tensor:
    """Müller's estimate of the mutual information of an input and a logit, or a difference of two logits, in nats.

    (1/N) Σ_x mean over l of [ -(v[x, l] - μ_x)²/2σ² - log (1/N) Σ_x' exp(-(v[x, l] - μ_x')²/2σ²) ] with v[x, l] the
    logit of augmentation l of input x, μ_x its mean over l, σ² the mean of (v[x, l] - μ_x)² over all; Müller et al.
    2019, "When Does Label Smoothing Help?", section 4 and appendix, N = 600 of two classes, L = 5. The scale of the
    logit, which differs from network to network, plays no part. At most log N; log 2 for inputs collapsed to
    two far points; about 0 where the inputs do not differ, and as an estimate a little below it at times.

    Parameters
    ----------
    views : (N, L) floating point, finite, N ≥ 2 inputs and L ≥ 2 augmentations
    """
    n, repeats = views.shape
    noise = n > 1 and (views != views[:, :1]).any()
    require(noise, f"views {(n, repeats)} do not vary over inputs and augmentations: it needs noise", Undefined)
    means = views.mean(dim=1)
    variance = (views - means[:, None]).square().mean()
    total = views.new_zeros(())
    for column in views.T:
        exponent = -(column[:, None] - means).square() / (2 * variance)  # (N, N)
        total = total + (exponent.diagonal() - exponent.logsumexp(dim=1) + math.log(n)).mean()
    return total / repeats


def _check_wrong_classes(logits: Tensor, reference: Tensor) -> None:
    count = ((logits > -torch.inf) | (reference > -torch.inf)).any(dim=0).sum()
    message = f"logits have {count} classes that are not masked: must be 3 or more; one wrong class has no ranking"
    require(count > 2, message, Undefined)


def _non_target(logits: Tensor, reference: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K-1) logits and reference without the label's class."""
    _check_wrong_classes(logits, reference)
    n, k = logits.shape
    others = torch.arange(k, device=logits.device) != targets[:, None]
    return logits[others].view(n, k - 1), reference[others].view(n, k - 1)
