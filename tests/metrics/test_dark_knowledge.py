"""Dark knowledge and fidelity against scipy, second writings, and the identities that they were made for."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.special import rel_entr
from scipy.stats import entropy, spearmanr

from kd.metrics import (
    class_similarity_correlation,
    cmi,
    gamma,
    mutual_information,
    nt_cosine,
    nt_kl,
    shen_instability,
    transfer_efficiency,
)


def draw(n=40, k=6, seed=0, scale=2.0):
    return scale * torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.arange(40) % 6


def without(z, targets):
    return np.array([np.delete(row, y) for row, y in zip(z.numpy(), targets.tolist(), strict=True)])


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# ---- wrong classes only


def test_nt_cosine_by_a_second_writing():
    z, r = draw(), draw(seed=1)
    a, b = (x - x.mean(1, keepdims=True) for x in (without(z, LABELS), without(r, LABELS)))
    expected = ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()
    assert nt_cosine(z, r, LABELS).item() == pytest.approx(expected, rel=1e-12)


def test_nt_kl_by_a_second_writing():
    z, r = draw(), draw(seed=1)
    r = r + 0.5 * z
    p, wrong = softmax(without(r, LABELS)), without(z, LABELS)

    def at(u):
        return rel_entr(p, softmax(wrong / math.exp(u))).sum(1).mean()

    best = minimize_scalar(at, bracket=(-1, 3), tol=1e-12)
    assert nt_kl(z, r, LABELS).item() == pytest.approx(best.fun, rel=1e-10)
    assert best.fun < at(0.0)  # the temperature does something


@pytest.mark.parametrize("metric", [nt_cosine, nt_kl])
def test_neither_the_label_nor_scale_nor_offset_plays_a_part(metric):
    z, r = draw(), draw(seed=1)
    r = r + 0.5 * z
    expected = metric(z, r, LABELS)
    changed = 3 * z + torch.arange(40)[:, None]
    changed[torch.arange(40), LABELS] = 17.0
    torch.testing.assert_close(metric(changed, r, LABELS), expected)
    perfect = {nt_cosine: 1.0, nt_kl: 0.0}[metric]
    assert metric(r / 5 - 2, r, LABELS).item() == pytest.approx(perfect, abs=1e-13)


def test_knowledge_that_is_none_or_upside_down():
    z, r = draw(), draw(seed=1)
    none = torch.zeros_like(z).scatter(1, LABELS[:, None], 9.0)
    assert nt_cosine(none, r, LABELS).item() == 0
    assert nt_cosine(-r, r, LABELS).item() == pytest.approx(-1)
    from_uniform = (math.log(5) - entropy(softmax(without(r, LABELS)), axis=1)).mean()
    for worthless in (none, -r):  # the best temperature of what points the wrong way is infinite
        assert nt_kl(worthless, r, LABELS).item() == pytest.approx(from_uniform, rel=1e-12)


def test_nt_kl_where_the_reference_is_certain():
    """p* on one wrong class which the student ranks first too: the best temperature is 0, the divergence 0."""
    sure = 1e4 * F.one_hot((LABELS + 1) % 6, 6).double()
    assert nt_kl(sure / 1e4 + 0.01 * draw(), sure, LABELS).item() == pytest.approx(0, abs=1e-6)
    assert nt_kl(sure, sure, LABELS).item() == pytest.approx(0, abs=1e-12)
    assert nt_kl(draw() - sure, sure, LABELS).item() == pytest.approx(math.log(5), rel=1e-3)


@pytest.mark.parametrize("classes", [6, 2])  # with 2, four classes are absent and do not count
def test_class_similarity_against_scipy(classes):
    z, r, targets = draw(), draw(seed=1), LABELS % classes
    correlations = []
    for c in range(classes):
        own = targets == c
        means = [np.delete(logits.softmax(1)[own].mean(0).numpy(), c) for logits in (z, r)]
        correlations.append(spearmanr(*means).statistic)
    assert class_similarity_correlation(z, r, targets).item() == pytest.approx(np.mean(correlations), rel=1e-12)


def test_transfer_efficiency():
    assert transfer_efficiency(student=0.3, hard=0.5, bayes=0.1) == pytest.approx(0.5)
    assert transfer_efficiency(0.1, 0.5, 0.1) == 1
    assert transfer_efficiency(0.5, 0.5, 0.1) == 0
    assert transfer_efficiency(0.7, 0.5, 0.1) == pytest.approx(-0.5)
    assert math.isnan(transfer_efficiency(0.3, 0.1, 0.1))


# ---- mass, spread, information


@pytest.mark.parametrize("eps", [0.05, 0.4])
def test_gamma_of_smoothed_labels_is_eps(eps):
    smooth = ((1 - eps) * F.one_hot(LABELS, 6).double() + eps / 6).log()
    assert gamma(smooth, LABELS).item() == pytest.approx(eps, rel=1e-12)
    # at T: softmax over log q / T is q^(1/T) renormalised
    q = np.array([1 - eps + eps / 6, *[eps / 6] * 5]) ** (1 / 3)
    assert gamma(smooth, LABELS, 3.0).item() == pytest.approx((1 - q[0] / q.sum()) * 6 / 5, rel=1e-12)


def test_spread_and_information_by_a_second_writing():
    z = draw()
    targets = torch.tensor([0] * 10 + [2] * 3 + [3] * 27)  # unequal, three classes absent
    p, y = softmax(z.numpy()), targets.numpy()
    classes = [p[y == c] for c in np.unique(y)]
    spread = np.mean([((c - c.mean(0)) ** 2).sum(1).mean() for c in classes])
    assert shen_instability(z, targets).item() == pytest.approx(spread, rel=1e-12)
    information = sum(len(c) / 40 * (entropy(c.mean(0)) - entropy(c, axis=1).mean()) for c in classes)
    assert cmi(z, targets).item() == pytest.approx(information, rel=1e-11)


@pytest.mark.parametrize("metric", [shen_instability, cmi])
def test_saturation_and_collapse_have_no_spread(metric):
    """The trap: hard labels, fitted, give 0, so that any network which is less sure looks richer."""
    z = draw()
    fitted = 1e3 * F.one_hot(LABELS, 6).double()
    assert metric(fitted, LABELS).item() == 0
    assert metric(z[LABELS], LABELS).item() == pytest.approx(0, abs=1e-15)
    assert metric(fitted / 1e3 * 2.8 + 0.3 * z, LABELS).item() > 1e-3
    two_points = 1e3 * F.one_hot(torch.arange(40) // 2 % 2, 6).double()
    top = {shen_instability: 0.5, cmi: math.log(2)}[metric]
    assert metric(two_points, torch.arange(40) % 2).item() == pytest.approx(top)


def test_mutual_information_by_a_second_writing():
    v = draw(30, 4).numpy()
    mean = v.mean(1)
    variance = ((v - mean[:, None]) ** 2).mean()
    total = 0.0
    for x in range(30):
        for j in range(4):
            kernel = np.exp(-((v[x, j] - mean) ** 2) / (2 * variance))
            total += math.log(kernel[x]) - math.log(kernel.mean())
    found = mutual_information(torch.tensor(v)).item()
    assert found == pytest.approx(total / 120, rel=1e-11)
    assert mutual_information(torch.tensor(5 * v - 3)).item() == pytest.approx(found, rel=1e-11)


def test_mutual_information_at_its_ends():
    noise = draw(50, 5, scale=0.01)
    noise = noise - noise.mean(1, keepdim=True)
    far = torch.arange(50.0)[:, None].double()
    assert mutual_information(far + noise).item() == pytest.approx(math.log(50), rel=1e-9)
    assert mutual_information(far // 25 + noise).item() == pytest.approx(math.log(2), rel=1e-9)  # two points
    assert mutual_information(noise).item() == pytest.approx(0, abs=1e-12)
    for still in (far.expand(50, 3), draw(1, 5), draw(5, 1)):  # no noise, one input, one augmentation
        with pytest.raises(ValueError, match="do not vary over inputs and augmentations"):
            mutual_information(still)
