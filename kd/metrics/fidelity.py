"""How close a student's predictions are to its teacher's.

From Stanton et al. 2021, "Does Knowledge Distillation Really Work?", section 3.
Never show one without the other: the predictive KL falls with label smoothing while the agreement falls too.
"""

from __future__ import annotations

from torch import Tensor

from kd.metrics.inputs import checked


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """Share of samples on which two networks predict the same class.

    mean over i of 1{argmax a[i] = argmax b[i]}; Stanton et al. 2021.

    Parameters
    ----------
    a, b : (N, K) floating point
        Logits of the two networks for the same samples.

    Returns
    -------
    Tensor
        () float64, between 0 and 1.
    """
    a, b = _pair("a", a, "b", b)
    return (a.argmax(dim=1) == b.argmax(dim=1)).double().mean()


def predictive_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Divergence of the student's predictions from the teacher's.

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
    teacher, student = _pair("teacher", teacher, "student", student)
    p, q = teacher.log_softmax(dim=1), student.log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1).mean()


def _pair(name_a: str, a: Tensor, name_b: str, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape:
        raise ValueError(f"{name_a} has shape {tuple(a.shape)}, {name_b} has {tuple(b.shape)}: must be the same")
    return checked(name_a, a), checked(name_b, b)
