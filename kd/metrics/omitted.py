"""Metrics of a class that the student's training set left out. Logits have all K classes.

Such a student hardly ever predicts the class, because its bias is far too low. Hinton et al. 2015, "Distilling the
Knowledge in a Neural Network", section 3, raise the bias and find that the student learned the class from its teacher.
All raise Undefined unless `targets` hold samples of the class `omitted` and of others.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import require
from kd.metrics.inputs import Undefined, checked
from kd.metrics.ranking import auroc
from kd.metrics.registry import metric

__all__ = ["best_bias", "omitted_auroc", "recall_with_bias"]


@checked
def best_bias(logits: Tensor, targets: Tensor, omitted: int) -> float:
    """The addition to the omitted class's logit that gives the highest accuracy over all classes; exact search.

    The accuracy changes only where the bias passes a sample's margin: the largest logit of the other classes less the
    omitted one's. Of the intervals between margins, those of highest accuracy count. The bias is 0 if one of them
    contains 0, else the midpoint nearest to 0; an unbounded interval counts with the point 1 away from its margin.
    """
    rest, positive = _rest(logits, targets, omitted)
    best, which = rest.max(dim=1)
    margin = best - logits[:, omitted]
    order = margin.argsort()
    # Biases above a sample's margin predict the omitted class for it.
    change = (positive.long() - (which == targets).long())[order]
    ends = margin[order]
    right = F.pad(change.cumsum(0), (1, 0))  # gained in the interval after n margins
    low, high = F.pad(ends, (1, 0), value=-torch.inf), F.pad(ends, (0, 1), value=torch.inf)
    middle = torch.where(low.isinf(), high - 1, torch.where(high.isinf(), low + 1, (low + high) / 2))
    middle = torch.where((low < 0) & (high > 0), 0.0, middle)
    middle = middle[(low < high) & (right == right[low < high].max())]
    return middle[middle.abs().argmin()].item()


@metric("omitted_recall", "recall of the omitted class", "up", percent=True)
def recall_with_bias(logits: Tensor, targets: Tensor, omitted: int, bias: float = 0.0) -> Tensor:
    """Recall of the omitted class once `bias` is added to its logit.

    Hinton et al. 2015 fit `best_bias` to the same samples, which flatters the recall; fit it on a split of its own.
    """
    rest, positive = _rest(logits, targets, omitted)
    margin = rest.amax(dim=1) - logits[:, omitted]
    return (margin[positive] < bias).double().mean()


WITH_BIAS = ("logits", "targets", "omitted", "bias")
metric("omitted_recall_corrected", "recall of the omitted class after a bias", "up", WITH_BIAS, percent=True)(
    recall_with_bias
)


@metric("omitted_auroc", "AUROC of the omitted class", "up")
def omitted_auroc(logits: Tensor, targets: Tensor, omitted: int) -> Tensor:
    """Area under the ROC curve of the omitted class's log odds; no bias changes it. 1/2 is chance.

    The probability that a sample of the class has a higher log p/(1-p), p = softmax(logits)[omitted], than a sample of
    another class; ties count half.
    """
    rest, positive = _rest(logits, targets, omitted)
    return auroc(logits[:, omitted] - rest.logsumexp(dim=1), positive)


def _rest(logits: Tensor, targets: Tensor, omitted: int) -> tuple[Tensor, Tensor]:
    """(N, K) logits with -inf for the omitted class, and (N,) whether a sample belongs to it."""
    positive = targets == omitted
    samples = f"{positive.sum()} of {len(targets)} samples of class {omitted}"
    require(positive.any() and not positive.all(), f"targets have {samples}: must have some, not all", Undefined)
    rest = logits.clone()
    rest[:, omitted] = -torch.inf
    return rest, positive
