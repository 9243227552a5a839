"""The difference that decides, by hand, and the words that go with it."""

import pytest
import torch
from scipy import stats

from kd.training.results import paired_difference, verdict


def test_paired_difference_has_the_standard_error_of_a_paired_test():
    torch.manual_seed(0)
    a, b, targets = torch.randn(200, 3), torch.randn(200, 3), torch.randint(3, (200,))
    found = paired_difference(a, b, targets)
    right = [(x.argmax(-1) == targets).double().numpy() for x in (a, b)]
    t = stats.ttest_rel(*right).statistic
    assert found["top1"] / found["standard_error"] == pytest.approx(t)
    p = max((targets == k).double().mean().item() for k in range(3))
    assert found["chance"] == pytest.approx(p + stats.norm.ppf(0.99) * (p * (1 - p) / 200) ** 0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("top1", "error", "images", "updates", "tone", "words"),
    [
        (0.05, 0.02, 100, 100, 1, "distillation helped"),
        (-0.05, 0.02, 100, 100, -1, "distillation hurt"),
        (0.03, 0.02, 100, 100, 0, "distillation made no difference beyond chance"),
        (0.05, 0.02, 29, 100, 0, "distillation cannot be judged from 29 test images"),
        (0.05, 0.02, 100, 5, 0, "distillation cannot be judged from 5 updates"),
    ],
)
def test_only_a_difference_of_two_standard_errors_counts(top1, error, images, updates, tone, words):
    test = {"top1": top1, "standard_error": error, "n": images}
    said = verdict({"difference": {"last": {"test": test}}, "student": {"updates": updates}})
    assert said[::2] == (tone, words)
    assert f"{100 * top1:+.2f} ± {100 * error:.2f} points" in said[1]
    assert f"{images} images, one seed" in said[1]


@pytest.mark.parametrize(
    ("student", "control", "words"),
    [
        (0.40, 0.20, "distillation helped"),
        (0.20, 0.15, "distillation cannot be judged: student and control are no better than chance (≤ 22.0% on test)"),
    ],
)
def test_two_networks_at_chance_are_not_compared(student, control, words):
    test = {"top1": student - control, "standard_error": 0.02, "n": 100, "chance": 0.22}
    names = {"student": student, "control": control}
    result = {name: {"updates": 100, "last": {"test": {"top1": top1}}} for name, top1 in names.items()}
    assert verdict(result | {"difference": {"last": {"test": test}}})[2] == words
