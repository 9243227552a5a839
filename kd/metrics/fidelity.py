"""How close a student's predictions are to its teacher's.

From Stanton et al. 2021, "Does Knowledge Distillation Really Work?", section 3.
Never show the predictive KL without the agreement: it falls with label smoothing while the agreement falls too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd.metrics.inputs import checked_pair
from kd.metrics.registry import metric

__all__ = ["agreement", "predictive_kl", "top5_agreement"]

OF_STUDENTS = {"networks": ("student",), "needs": ("logits", "teacher")}


@metric("agreement", label="agreement", better="up", percent=True, **OF_STUDENTS)
def agreement(a: Tensor, b: Tensor, k: int = 1) -> Tensor:
    """Share of the k most likely classes that two networks have in common.

    mean over i of |top k of a[i] ∩ top k of b[i]| / k. For k = 1 the share of samples with the same prediction, Stanton
    et al. 2021; the overlap for k > 1 is ours. Of equal logits the one with the lower index ranks first, as in argmax.

    Parameters
    ----------
    a, b : (N, K) floating point
        Logits of the two networks for the same samples.
    k : from 1 to K

    Returns
    -------
    Tensor
        () float64, between 0 and 1; k/K is chance.
    """
    a, b = checked_pair("a", a, "b", b)
    if not 1 <= k <= a.shape[1]:
        raise ValueError(f"k={k}: must be from 1 to {a.shape[1]}, the number of classes")
    in_a, in_b = (
        torch.zeros_like(z).scatter(1, z.sort(dim=1, descending=True, stable=True).indices[:, :k], 1) for z in (a, b)
    )
    return (in_a * in_b).sum(dim=1).mean() / k


@metric("agreement5", label="top-5 agreement", better="up", percent=True, **OF_STUDENTS)
def top5_agreement(a: Tensor, b: Tensor) -> Tensor:
    """`agreement` of the min(5, K) most likely classes."""
    return agreement(a, b, min(5, a.shape[1]))


@metric(
    "predictive_kl",
    label="predictive KL",
    better="down",
    networks=("student",),
    needs=("teacher", "logits"),
    misleading="falls with a smoothed teacher while the agreement falls too",
)
def predictive_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Divergence of the student's predictions from the teacher's. Misleads alone: show it beside `agreement`.

    mean over i of Σ_k p_t[k] (log p_t[k] - log p_s[k]), p = softmax at T = 1; Stanton et al. 2021.

    Parameters
    ----------
    teacher, student : (N, K) floating point
        Their logits for the same samples.

    Returns
    -------
    Tensor
        () float64 in nats, at least 0; 0 where the logits differ by a constant per sample.
    """
    teacher, student = checked_pair("teacher", teacher, "student", student)
    p, q = teacher.log_softmax(dim=1), student.log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1).mean()
