"""Whether a teacher's outputs are in another order than the data's classes, told by what it predicts on validation.

K: classes; an order is the class of each of the teacher's outputs, (K,) int64.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kd.data.class_order import natural

# The rule, which networks in the right order must not meet, however weak. Of 735 networks better than chance (digits of
# 2 to 10 classes, often unbalanced, 1 to 30 updates or wrong pixel values) none met it, with 30 random orders in place
# of a known one and with the best. Of 754 no better than chance, which stop anyway, 0.7 % of the orders and 2 % of the
# best did.
KNOWN, BEST = 2.5, 4.0  # standard errors of the gain in accuracy: of one order, and of the best of all on other images
TIMES_MORE = 3  # images right in the other order only, to those right now only: few are right by chance in a wrong one
SHARE = 0.7  # of the classes that change places must gain: a network that never says "3" leaves an output for others
# The matrices take memory by K²: 4,096 classes 0.5 GB, and 5 s.
MOST_CLASSES = 4096


def other_order(predicted: Tensor, targets: Tensor, names: Sequence[str]) -> str:
    """A clause that says in which order the predictions (N,) fit the labels (N,) better, and what to type; '' for none.

    `names` are those of the K classes, in the data's order.
    """
    better = None if len(names) > MOST_CLASSES else _better_order(predicted, targets, names)
    if better is None:
        return ""
    known, order = better
    top1 = (torch.from_numpy(order).to(targets)[predicted] == targets).double().mean()
    moved = [k for k in range(len(names)) if order[k] != k]
    fits = ", ".join(f"{k} is {names[order[k]]!r} and not {names[k]!r}" for k in moved[:3])
    outputs = f"output {fits}{', ...' if len(moved) > 3 else ''}"
    whose = {"natural": "timm's natural order", "sorted": "torchvision's, sorted as text"}
    if known:
        return f"{top1:.2%} in {whose[known]}, where {outputs}; type data.class_order={known}"
    return f"{top1:.2%} if {outputs}; give the teacher's order as data.class_order=FILE, with a class name on each line"


def _better_order(predicted: Tensor, targets: Tensor, names: Sequence[str]) -> tuple[str, np.ndarray] | None:
    """The order in which the predictions fit so much better that it must be the teacher's; None for the data's own.

    Known orders come first and are called as in data.class_order; any other is "". That one is the best assignment of
    outputs to classes, found on one half of the images and judged on the other, so that a choice among K! orders gains
    nothing by chance. Each class counts alike: always guessing a frequent class is no order.
    """
    halves = [_confusion(predicted[i::2], targets[i::2], len(names)) for i in (0, 1)]
    known = {"natural": natural(names), "sorted": sorted(range(len(names)), key=names.__getitem__)}
    for name, order in known.items():
        if _convincing([(halves[0] + halves[1], np.array(order))], KNOWN):
            return name, np.array(order)
    first, second = map(_best, halves)
    fits = _convincing([(halves[1], first), (halves[0], second)], BEST)
    return ("", _best(halves[0] + halves[1])) if fits else None


def _confusion(predicted: Tensor, targets: Tensor, classes: int) -> np.ndarray:
    """How many images of each class (rows) have each output (columns), (K, K) float64."""
    counts = (targets * classes + predicted).bincount(minlength=classes**2)
    return counts.view(classes, classes).double().numpy()


def _best(confusion: np.ndarray) -> np.ndarray:
    """The order with the highest mean accuracy of the classes; an output that decides nothing keeps its place."""
    from scipy.optimize import linear_sum_assignment

    shares = confusion / confusion.sum(1, keepdims=True).clip(1)
    return linear_sum_assignment((shares + 1e-9 * np.eye(len(shares))).T, maximize=True)[1]


def _convincing(judged: Sequence[tuple[np.ndarray, np.ndarray]], standard_errors: float) -> bool:
    """Whether orders beat the present one by the rule above, each on its own images (a confusion matrix)."""
    parts = []
    for confusion, order in judged:
        outputs = np.flatnonzero(order != np.arange(len(order)))
        moved = order[outputs]
        parts.append(np.stack([confusion[moved, outputs], confusion[moved, moved], confusion[moved].sum(1).clip(1)]))
    then, now, images = np.concatenate(parts, axis=1)  # per class: right in the other order, right now, all
    gain, error = ((then - now) / images).sum(), np.sqrt(((then + now) / images**2).sum())
    return bool(
        gain > standard_errors * error
        and (then / images).sum() > TIMES_MORE * (now / images).sum()
        and (then > now).mean() >= SHARE
    )
