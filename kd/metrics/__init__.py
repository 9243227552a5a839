"""Metrics of predictions and features: pure functions in float64, usable without the rest of kd."""

from __future__ import annotations

from torch import Tensor

from kd.metrics.calibration import brier, classwise_ece, ece, equal_mass_ece, mce, nll, top_k_accuracy
from kd.metrics.dark_knowledge import (
    class_similarity_correlation,
    cmi,
    gamma,
    mutual_information,
    nt_cosine,
    nt_kl,
    shen_instability,
    transfer_efficiency,
)
from kd.metrics.fidelity import agreement, predictive_kl
from kd.metrics.geometry import class_separation, muller_projection, within_total_variance
from kd.metrics.omitted import best_bias, bias_corrected_recall, omitted_auroc, recall_with_bias
from kd.metrics.selective import (
    aurc,
    aurc_max_probability,
    aurc_normalised_logits,
    max_probability,
    normalised_max_logit,
)
from kd.metrics.smoothing import SmoothingEstimate, estimate_smoothing
from kd.metrics.temperature import post_hoc_temperature

__all__ = [
    "MISLEADING",
    "SmoothingEstimate",
    "agreement",
    "aurc",
    "aurc_max_probability",
    "aurc_normalised_logits",
    "best_bias",
    "bias_corrected_recall",
    "brier",
    "class_separation",
    "class_similarity_correlation",
    "classification",
    "classwise_ece",
    "cmi",
    "ece",
    "equal_mass_ece",
    "estimate_smoothing",
    "gamma",
    "max_probability",
    "mce",
    "muller_projection",
    "mutual_information",
    "nll",
    "normalised_max_logit",
    "nt_cosine",
    "nt_kl",
    "omitted_auroc",
    "post_hoc_temperature",
    "predictive_kl",
    "recall_with_bias",
    "shen_instability",
    "top_k_accuracy",
    "transfer_efficiency",
    "within_total_variance",
]

# Metrics that invite a wrong conclusion, and why: to be printed beside their values.
MISLEADING = {
    "predictive_kl": "falls with a smoothed teacher while the agreement falls too",
    "gamma": "smoothing and temperature raise it without any dark knowledge",
    "shen_instability": "on fitted data it rises with smoothing because hard labels saturate",
    "cmi": "on fitted data it rises with smoothing because hard labels saturate",
    "mce": "the worst bin is mostly the emptiest one",
    "estimate_smoothing": "a network trained too briefly, or with mixup, looks smoothed",
    "bias_corrected_recall": "the bias is fitted to the samples that it is shown on",
}


def classification(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Everything that a split's logits (N, K) and labels (N,) say about a classifier; accuracies and ece from 0 to 1.

    top5 counts the best min(5, K), so that it is 1 where there are at most five classes.
    """
    return {
        "top1": top_k_accuracy(logits, targets, 1).item(),
        "top5": top_k_accuracy(logits, targets, min(5, logits.shape[-1])).item(),
        "nll": nll(logits, targets).item(),
        "ece": ece(logits, targets).item(),
        "brier": brier(logits, targets).item(),
    }
