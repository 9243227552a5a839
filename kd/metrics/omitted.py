"""What a student knows about a class that its training set did not have. Logits (N, K), targets (N,), all K classes.

Such a student hardly ever predicts the class, because its bias is far too low. Hinton et al. 2015, "Distilling the
Knowledge in a Neural Network", section 3, raise the bias and find that the student knew the class all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd.metrics.inputs import checked, checked_class, checked_targets
from kd.metrics.ranking import auroc
from kd.metrics.registry import metric

__all__ = ["best_bias", "bias_corrected_recall", "omitted_auroc", "recall_with_bias"]

NEEDS = ("logits", "targets", "omitted")


@metric(
    "bias_corrected_recall",
    label="recall after its own bias",
    better="up",
    percent=True,
    splits=(),
    needs=NEEDS,
    misleading="the bias is fitted to the samples that it is shown on",
)
def bias_corrected_recall(logits: Tensor, targets: Tensor, omitted: int) -> Tensor:
    """Recall of the omitted class after the best bias for it. Misleads: the bias is fitted to the same samples.

    `recall_with_bias` at `best_bias`, both on these logits, as Hinton et al. 2015 do. Call the two on different samples
    where there are enough.

    Parameters
    ----------
    logits : (N, K) floating point
    targets : (N,) int64, of the omitted class and of others
    omitted : class

    Returns
    -------
    Tensor
        () float64, between 0 and 1.
    """
    return recall_with_bias(logits, targets, omitted, best_bias(logits, targets, omitted))


def best_bias(logits: Tensor, targets: Tensor, omitted: int) -> float:
    """What to add to the omitted class's logit for the highest accuracy over all classes; exact search.

    The accuracy changes only where the bias passes a sample's max over the other classes less the omitted one's logit.
    Of the best stretches between two such values it is the middle of the one nearest to 0, or 0 itself where that is in
    one; outside all of them, 1 beyond the last.

    Parameters
    ----------
    logits : (N, K) floating point
    targets : (N,) int64, of the omitted class and of others
    omitted : class

    Returns
    -------
    float
        In the logits' unit.
    """
    margin, positive, other_right = _margins(logits, targets, omitted)
    order = margin.argsort()
    # Biases above a sample's margin predict the omitted class for it.
    change = (positive.long() - (~positive & other_right).long())[order]
    ends = margin[order]
    right = torch.cat([change.new_zeros(1), change.cumsum(0)])  # gained in the stretch after n margins
    low, high = torch.cat([ends[:1] - torch.inf, ends]), torch.cat([ends, ends[-1:] + torch.inf])
    middle = torch.cat([ends[:1] - 1, (ends[:-1] + ends[1:]) / 2, ends[-1:] + 1])
    middle = torch.where((low < 0) & (high > 0), 0.0, middle)
    middle = middle[(low < high) & (right == right[low < high].max())]
    return middle[middle.abs().argmin()].item()


@metric("omitted_recall", label="recall of the omitted class", better="up", percent=True, needs=NEEDS)
@metric(
    "omitted_recall_corrected",
    label="bias-corrected recall of the omitted class",
    better="up",
    percent=True,
    needs=(*NEEDS, "bias"),
)
def recall_with_bias(logits: Tensor, targets: Tensor, omitted: int, bias: float = 0.0) -> Tensor:
    """Share of the omitted class's samples that are predicted as such once `bias` is added to its logit.

    Parameters
    ----------
    logits : (N, K) floating point
    targets : (N,) int64, of the omitted class and of others
    omitted : class
    bias : in the logits' unit

    Returns
    -------
    Tensor
        () float64, between 0 and 1.
    """
    margin, positive, _ = _margins(logits, targets, omitted)
    return (margin[positive] < bias).double().mean()


@metric("omitted_auroc", label="AUROC of the omitted class", better="up", needs=NEEDS)
def omitted_auroc(logits: Tensor, targets: Tensor, omitted: int) -> Tensor:
    """How well the omitted class's log odds tell its samples from the others; no bias changes it.

    The chance that a sample of the class has higher log p/(1-p), p = softmax(logits)[omitted], than one of another
    class, ties counting half.

    Parameters
    ----------
    logits : (N, K) floating point
    targets : (N,) int64, of the omitted class and of others
    omitted : class

    Returns
    -------
    Tensor
        () float64, between 0 and 1; 1/2 is chance.
    """
    _, positive, _ = _margins(logits, targets, omitted)
    logits = checked("logits", logits)
    rest = logits.clone()
    rest[:, omitted] = -torch.inf
    return auroc(logits[:, omitted] - rest.logsumexp(dim=1), positive)


def _margins(logits: Tensor, targets: Tensor, omitted: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) bias from which a sample goes to the omitted class, whether it belongs there, whether it is right before."""
    logits = checked("logits", logits)
    targets, omitted = checked_targets(targets, logits), checked_class("omitted", omitted, logits)
    positive = targets == omitted
    if positive.all() or not positive.any():
        raise ValueError(
            f"targets have {positive.sum()} of {len(targets)} samples of class {omitted}: must have some, not all"
        )
    rest = logits.clone()
    rest[:, omitted] = -torch.inf
    best, which = rest.max(dim=1)
    return best - logits[:, omitted], positive, which == targets
