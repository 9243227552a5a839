"""Geometry of classes, and a class that was left out, against scikit-learn and second writings."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score

from kd.metrics import (
    best_bias,
    class_separation,
    muller_projection,
    omitted_auroc,
    recall_with_bias,
    within_total_variance,
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TARGETS = torch.tensor([0] * 20 + [3] * 5 + [1] * 7)  # unequal, class 2 absent
FEATURES = draw(32, 4) + 2 * draw(4, 4, seed=1)[TARGETS]


def test_within_total_variance_is_the_decomposition():
    f, y = FEATURES.numpy(), TARGETS.numpy()
    between = sum((y == c).sum() * ((f[y == c].mean(0) - f.mean(0)) ** 2).sum() for c in (0, 1, 3))
    assert within_total_variance(FEATURES, TARGETS).item() == pytest.approx(
        1 - between / ((f - f.mean(0)) ** 2).sum(), rel=1e-12
    )
    assert within_total_variance(5 * FEATURES + 3, TARGETS) == pytest.approx(within_total_variance(FEATURES, TARGETS))
    points = draw(4, 4)
    assert within_total_variance(points[TARGETS], TARGETS).item() == pytest.approx(0, abs=1e-14)
    same = torch.cat([FEATURES, FEATURES])
    assert within_total_variance(same, torch.arange(64) // 32).item() == pytest.approx(1)


def test_class_separation_over_all_pairs():
    f, y = FEATURES.numpy(), TARGETS.numpy()
    distance = cdist(f, f, "cosine")
    classes = [y == c for c in (0, 1, 3)]
    within = np.mean([distance[np.ix_(c, c)].mean() for c in classes])
    total = np.mean([[distance[np.ix_(a, b)].mean() for b in classes] for a in classes])
    found = class_separation(FEATURES, TARGETS)
    assert found.item() == pytest.approx(1 - within / total, rel=1e-12)
    scaled = FEATURES * (1 + torch.arange(32)[:, None])
    assert class_separation(scaled, TARGETS).item() == pytest.approx(found.item(), rel=1e-12)  # directions only


# ---- Müller's plane


@pytest.mark.parametrize("classes", [[4, 0, 2], [0, 4, 2], [2, 0, 4], [4, 2, 0]])  # a QR's signs differ between them
def test_the_projection_keeps_distances_in_the_plane(classes):
    weight, bias = draw(5, 4, seed=2), draw(5, seed=3)
    points, templates = muller_projection(FEATURES, weight, bias, classes)
    full = torch.cat([weight, bias[:, None]], 1)[classes]
    torch.testing.assert_close(torch.cdist(templates, templates), torch.cdist(full, full))
    assert templates[0].tolist() == [0, 0]
    assert templates[1, 1].abs() < 1e-12
    assert templates[1, 0] > 0
    assert templates[2, 1] > 0
    # least squares, without a QR: the foot of each point in the plane, from the first template
    x = torch.cat([FEATURES, torch.ones(32, 1)], 1) - full[0]
    edges = (full[1:] - full[0]).T
    foot = edges @ torch.linalg.lstsq(edges, x.T).solution  # (5, 32)
    torch.testing.assert_close(points.norm(dim=1), foot.norm(dim=0))
    torch.testing.assert_close(torch.cdist(points, points), torch.cdist(foot.T, foot.T), atol=1e-7, rtol=1e-7)


# ---- a class that was left out


def omitted_case(bias=-6.0, n=200):
    """Logits that know class 2 but for its bias."""
    targets = torch.arange(n) % 4
    logits = draw(n, 4, seed=4)
    logits[torch.arange(n), targets] += 2
    logits[:, 2] += bias
    return logits, targets


def test_the_best_bias_by_hand():
    # margins (others' best - class 0): 5 and 3 for class 0, 4 for a right other, 1 for an other that is wrong anyway
    logits = torch.tensor([[0.0, 5, 0], [0, 3, 0], [0, 0, 4], [0, 1, 0]])
    targets = torch.tensor([0, 0, 2, 2])
    # right: below 3 one; between 3 and 4 two; between 4 and 5 one; above 5 two. Nearest to 0 is 3.5
    assert best_bias(logits, targets, 0) == 3.5
    assert recall_with_bias(logits, targets, 0, 3.5).item() == 0.5
    assert recall_with_bias(logits, targets, 0, 6.0).item() == 1
    assert best_bias(logits - torch.tensor([0.0, 3.2, 3.2]), targets, 0) == 0.0  # already within the best stretch
    assert best_bias(logits + torch.tensor([5.8, 0, 0]), targets, 0) == 0.0  # of -2.3 and 0 that is nearer
    assert best_bias(logits[[0, 3]], targets[[0, 3]], 0) == 6.0  # beyond the last
    assert best_bias(torch.tensor([[5.0, 0, 0], [0, 9, 0]]), torch.tensor([1, 0]), 0) == -6.0  # below the first, or 10


def test_auroc_against_scikit_learn():
    logits, targets = omitted_case()
    p = logits.softmax(1)[:, 2].numpy()
    assert omitted_auroc(logits, targets, 2).item() == pytest.approx(roc_auc_score(targets == 2, p), rel=1e-12)
    ties = logits.round()
    odds = (ties.softmax(1)[:, 2] / (1 - ties.softmax(1)[:, 2])).numpy().round(9)
    assert omitted_auroc(ties, targets, 2).item() == pytest.approx(roc_auc_score(targets == 2, odds), abs=1e-3)
    far = omitted_auroc(omitted_case(-600.0)[0], targets, 2)  # where p itself is 0 for all
    assert far.item() == pytest.approx(omitted_auroc(logits, targets, 2).item(), abs=1e-3)
    assert omitted_auroc(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), 0).item() == 0.5
