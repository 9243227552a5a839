"""Every metric of the registry says what is wrong with its input, and the registry measures what it says."""

import math
import subprocess
import sys
import warnings

import pytest
import torch

from kd import metrics
from kd.metrics import METRICS, compute

LOGITS = 3 * torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(12) % 4
OTHER = LOGITS.roll(1, 0)
EVIDENCE = {"logits": LOGITS, "targets": TARGETS, "teacher": OTHER, "reference": OTHER, "scaled": LOGITS / 2}
EVIDENCE |= {"features": LOGITS, "views": LOGITS, "omitted": 1, "bias": 2.0}
OF_TENSORS = [name for name, metric in METRICS.items() if name != "transfer_efficiency"]
TENSORS = ("logits", "teacher", "reference", "scaled", "features", "views")
BAD_LOGITS = [
    (LOGITS[:, :1], r"has shape \(12, 1\): must have"),
    (LOGITS[0], r"has shape \(4,\): must have"),
    (LOGITS[:0], r"has shape \(0, 4\): must have"),
    (LOGITS.where(LOGITS < 3, math.inf), r"has \d+ rows with nan, inf or nothing but -inf"),
    (LOGITS.where(LOGITS < 3, math.nan), r"has \d+ rows with nan"),
    (LOGITS.long(), "is torch.int64: must be floating point"),
]


def called(name, **changes):
    """A metric of the registry on the evidence with some of it changed."""
    return METRICS[name].function(*[(EVIDENCE | changes)[need] for need in METRICS[name].needs])


@pytest.mark.parametrize("name", OF_TENSORS)
def test_half_precision_is_computed_in_float64_and_without_a_gradient(name):
    half = {key: EVIDENCE[key].to(torch.bfloat16) for key in TENSORS}
    found = called(name, **{key: value.clone().requires_grad_() for key, value in half.items()})
    assert float(found) == float(called(name, **{key: value.double() for key, value in half.items()}))
    if isinstance(found, torch.Tensor):
        assert (found.dtype, found.shape, found.requires_grad) == (torch.float64, (), False)


@pytest.mark.parametrize(("logits", "said"), BAD_LOGITS)
def test_what_is_no_logits_and_no_target_is_one_line(logits, said):
    with pytest.raises(ValueError, match="^logits " + said) as error:
        metrics.nll(logits, TARGETS)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^targets go from 1 to 4: must be from 0 to 3"):
        metrics.nll(LOGITS, TARGETS + 1)
    with pytest.raises(ValueError, match=r"^targets are torch.int64 of shape \(11,\)"):
        metrics.nll(LOGITS, TARGETS[:11])
    with pytest.raises(ValueError, match=r"^logits and teacher have shapes .*: must agree"):
        metrics.agreement(LOGITS, LOGITS[:, :3])


def test_what_looks_like_probabilities_is_a_warning_once():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for logits in (LOGITS.softmax(1), LOGITS.softmax(1).bfloat16()) * 3:
            metrics.nll(logits, TARGETS)
    assert [str(each.message)[:32] for each in said] == ["logits look like probabilities, "]
    assert said[0].filename == __file__
    identity = torch.eye(2)  # logits that are small integers
    assert metrics.nll(identity, torch.tensor([0, 1])).item() == pytest.approx(math.log(1 + math.exp(-1)))


@pytest.mark.parametrize("bins", [0, -1, 2.0, "15", None])
def test_bins_are_a_positive_integer(bins):
    for function in (metrics.ece, metrics.mce, metrics.equal_mass_ece, metrics.classwise_ece, metrics.reliability_bins):
        with pytest.raises(ValueError, match=f"^bins={bins!r}: must be an integer ≥ 1"):
            function(LOGITS, TARGETS, bins=bins)


# ---- the registry


def test_a_study_measures_what_the_registry_says():
    student = compute(EVIDENCE, "test", "student")
    assert student["nll"] == metrics.nll(LOGITS, TARGETS).item()
    assert student["nll_scaled"] == metrics.nll(LOGITS / 2, TARGETS).item()
    assert student["top5"] == 1  # of four classes
    assert student["agreement"] == metrics.agreement(LOGITS, OTHER).item()
    assert student["predictive_kl"] == metrics.predictive_kl(OTHER, LOGITS).item()
    assert student["omitted_recall_corrected"] == metrics.recall_with_bias(LOGITS, TARGETS, 1, 2.0).item()
    assert "transfer_efficiency" not in student  # it needs three networks
    teacher = compute(EVIDENCE, "train", "teacher")
    assert teacher.keys() >= {"top1", "mutual_information", "smoothing_low"}
    assert not teacher.keys() & {"agreement", "brier", "nt_kl"}


def test_a_metric_is_left_out_without_its_evidence_and_none_where_it_has_no_value():
    known = {"logits": LOGITS, "targets": TARGETS, "scaled": None, "reference": OTHER}
    found = compute(known, "test", "student")
    assert found["nll_scaled"] is None  # no temperature could be fitted
    assert not found.keys() & {"class_separation", "agreement", "omitted_recall"}
    two = compute({"logits": LOGITS[:, :2], "targets": TARGETS % 2, "reference": OTHER[:, :2]}, "test", "student")
    assert two["nt_kl"] is None  # one wrong class has no rank
    one = compute(EVIDENCE | {"targets": TARGETS * 0, "features": LOGITS * 0, "views": LOGITS * 0}, "test", "student")
    assert one["cmi"] is one["class_separation"] is one["omitted_recall"] is None
    assert compute({"views": LOGITS * 0}, "train", "student") == {"mutual_information": None}


def test_metrics_can_be_imported_without_the_rest():
    heavy = {"timm", "torchvision", "sklearn", "kd.config.schema"}
    code = f"import sys, kd.metrics; print(sorted({heavy} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
