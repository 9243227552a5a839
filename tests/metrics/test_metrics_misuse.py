"""Every metric of the library says what is wrong with its input, and its first lines say where it misleads."""

import math

import pytest
import torch

from kd import metrics

LOGITS = 3 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(12) % 4

# How each is called with logits (N, K); the test goes red for a metric that is not listed.
LOGIT_METRICS = {
    "agreement": lambda z, y: metrics.agreement(z, z),
    "aurc_max_probability": metrics.aurc_max_probability,
    "aurc_normalised_logits": metrics.aurc_normalised_logits,
    "best_bias": lambda z, y: metrics.best_bias(z, y, 1),
    "bias_corrected_recall": lambda z, y: metrics.bias_corrected_recall(z, y, 1),
    "brier": metrics.brier,
    "class_similarity_correlation": lambda z, y: metrics.class_similarity_correlation(z, z, y),
    "classification": metrics.classification,
    "classwise_ece": metrics.classwise_ece,
    "cmi": metrics.cmi,
    "ece": metrics.ece,
    "equal_mass_ece": metrics.equal_mass_ece,
    "estimate_smoothing": lambda z, y: metrics.estimate_smoothing(z, y).label_smoothing,
    "gamma": metrics.gamma,
    "max_probability": lambda z, y: metrics.max_probability(z),
    "mce": metrics.mce,
    "nll": metrics.nll,
    "normalised_max_logit": lambda z, y: metrics.normalised_max_logit(z),
    "nt_cosine": lambda z, y: metrics.nt_cosine(z, z, y),
    "nt_kl": lambda z, y: metrics.nt_kl(z, z, y),
    "omitted_auroc": lambda z, y: metrics.omitted_auroc(z, y, 1),
    "post_hoc_temperature": metrics.post_hoc_temperature,
    "predictive_kl": lambda z, y: metrics.predictive_kl(z, z),
    "recall_with_bias": lambda z, y: metrics.recall_with_bias(z, y, 1),
    "shen_instability": metrics.shen_instability,
    "top5_accuracy": metrics.top5_accuracy,
    "top5_agreement": lambda z, y: metrics.top5_agreement(z, z),
    "top_k_accuracy": metrics.top_k_accuracy,
}
FEATURE_METRICS = {
    "class_separation": metrics.class_separation,
    "mutual_information": lambda f, y: metrics.mutual_information(f),
    "muller_projection": lambda f, y: metrics.muller_projection(f, torch.eye(4), torch.zeros(4), (0, 1, 2)),
    "within_total_variance": metrics.within_total_variance,
}
NO_METRICS = {"MISLEADING", "METRICS", "Metric", "metric", "compute", "SmoothingEstimate", "Projection"}
OTHERS = {
    "aurc",
    "reliability_bins",
    "nll_scaled",
    "ece_scaled",
    "transfer_efficiency",
    *NO_METRICS,
}  # of scores and of numbers; tested with what they do
WITHOUT_TARGETS = {"agreement", "top5_agreement", "max_probability", "normalised_max_logit", "predictive_kl"}


def test_every_metric_is_here():
    assert {*LOGIT_METRICS, *FEATURE_METRICS, *OTHERS} == set(metrics.__all__)


def test_what_misleads_says_so_in_its_first_line():
    for each in metrics.METRICS.values():
        if each.function.__name__ in metrics.__all__:
            first = each.function.__doc__.split("\n\n")[0]
            assert ("Misleads" in first) == bool(each.misleading), each.name
    assert all(why and "\n" not in why for why in metrics.MISLEADING.values())


def results(found):
    """The numbers of a result."""
    if isinstance(found, dict):
        return torch.tensor(list(found.values()), dtype=torch.float64)
    return torch.as_tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", LOGIT_METRICS)
def test_logits_in_half_precision_are_computed_in_float64(name):
    half = LOGITS.to(torch.bfloat16)
    found = LOGIT_METRICS[name](half, TARGETS)
    assert torch.equal(results(found), results(LOGIT_METRICS[name](half.double(), TARGETS)))
    if isinstance(found, torch.Tensor):
        assert found.dtype == torch.float64


@pytest.mark.parametrize("name", LOGIT_METRICS)
@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (LOGITS.softmax(1), TARGETS, r"^\w+ are probabilities, rows ≥ 0 that sum to 1: must be logits"),
        (LOGITS.softmax(1).bfloat16(), TARGETS, r"^\w+ are probabilities"),
        (LOGITS[:, :1], TARGETS * 0, r"^\w+ has shape \(12, 1\): must be \(N, K\) with at least one row, two classes$"),
        (LOGITS[:0], TARGETS[:0], r"^\w+ has shape \(0, 4\): must be"),
        (LOGITS.where(LOGITS < 3, math.nan), TARGETS, r"^\w+ has \d+ rows with nan or inf"),
        (LOGITS.where(LOGITS < 3, math.inf), TARGETS, r"^\w+ has \d+ rows with nan or inf"),
        (LOGITS.long(), TARGETS, r"^\w+ is torch.int64: must be floating point"),
    ],
)
def test_logits_that_are_none(name, logits, targets, message):
    with pytest.raises(ValueError, match=message):
        LOGIT_METRICS[name](logits, targets)


@pytest.mark.parametrize("name", sorted(LOGIT_METRICS.keys() - WITHOUT_TARGETS))
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (TARGETS[:11], r"^targets are torch.int64 of shape \(11,\): must be int64 of shape \(12,\)$"),
        (TARGETS.float(), r"^targets are torch.float32 of shape \(12,\)"),
        (TARGETS + 1, r"^targets go from 1 to 4: must be from 0 to 3, logits have 4 classes$"),
    ],
)
def test_targets_that_do_not_fit(name, targets, message):
    with pytest.raises(ValueError, match=message):
        LOGIT_METRICS[name](LOGITS, targets)


@pytest.mark.parametrize("name", FEATURE_METRICS)
@pytest.mark.parametrize(
    ("features", "message"),
    [
        (LOGITS[:0], r"^\w+ has shape \(0, 4\): must be \(N, D\) with at least one row and column$"),
        (LOGITS[0], r"^\w+ has shape \(4,\): must be \(N, D\)"),
        (LOGITS.where(LOGITS < 3, math.nan), r"^\w+ has \d+ rows with nan or inf"),
        (LOGITS.long(), r"^\w+ is torch.int64: must be floating point$"),
    ],
)
def test_features_that_are_none(name, features, message):
    with pytest.raises(ValueError, match=message):
        FEATURE_METRICS[name](features, TARGETS[: len(features)])


@pytest.mark.parametrize("name", ["cmi", "shen_instability", "class_separation", "within_total_variance"])
def test_one_class_has_nothing_to_compare_with(name):
    with pytest.raises(ValueError, match=r"^targets hold one class, 2: must hold at least two$"):
        getattr(metrics, name)(LOGITS, torch.full((12,), 2))


def test_logits_that_only_resemble_probabilities_pass():
    metrics.nll(torch.zeros(3, 4), TARGETS[:3])
    metrics.nll(LOGITS.log_softmax(1), TARGETS)
    near = LOGITS.softmax(1)
    near[0, 0] += 0.01
    metrics.nll(near, TARGETS)
