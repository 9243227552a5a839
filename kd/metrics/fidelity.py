"""Fidelity: agreement and divergence between a student's predictions and its teacher's.

From Stanton et al. 2021, "Does Knowledge Distillation Really Work?", section 3. Show the predictive KL only beside the
agreement: label smoothing lowers both, and a lower agreement is worse.
"""

import functools

import torch
from torch import Tensor

from kd.metrics.registry import metric

__all__ = ["agreement", "predictive_kl"]

STUDENT = ("student",)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL (N,) of log-probabilities (N, K). A class of probability 0 adds 0; one that only q masks gives inf."""
    p = log_p.exp()
    return (p * (log_p - log_q)).where(p != 0, 0).sum(dim=1)


@metric("agreement", "agreement", "up", percent=True, networks=STUDENT)
def agreement(logits: Tensor, teacher: Tensor, k: int = 1) -> Tensor:
    """Share of the k most likely classes that two networks have in common, from 0 to 1; k/K is chance.

    mean over i of |top k of logits[i] ∩ top k of teacher[i]| / k, k at most K. For k = 1 the share of samples with the
    same prediction, Stanton et al. 2021; the overlap for k > 1 is ours. Among equal logits the one with the lower
    index ranks first, as in argmax.
    """
    k = min(k, logits.shape[1])
    orders = (z.sort(dim=1, descending=True, stable=True).indices[:, :k] for z in (logits, teacher))
    in_student, in_teacher = (torch.zeros_like(logits).scatter(1, order, 1) for order in orders)
    return (in_student * in_teacher).sum(dim=1).mean() / k


metric("agreement5", "top-5 agreement", "up", percent=True, networks=STUDENT)(functools.partial(agreement, k=5))
APART = "falls with a smoothed teacher while the agreement falls too"


@metric("predictive_kl", "predictive KL", "down", needs=("teacher", "logits"), networks=STUDENT, misleading=APART)
def predictive_kl(teacher: Tensor, logits: Tensor) -> Tensor:
    """Divergence of the student's predictions from the teacher's, in nats. Misleading without `agreement`.

    mean over i of Σ_k p_t[k] (log p_t[k] - log p_s[k]), p = softmax at T = 1; Stanton et al. 2021. 0 where the logits
    differ by a constant per sample, inf where the student masks by -inf what the teacher does not.
    """
    return divergence(teacher.log_softmax(dim=1), logits.log_softmax(dim=1)).mean()
