"""Identities that any right implementation satisfies, on drawn inputs: none of them shares code with one.

Each on the fused CPU backend and on the reference, 50 examples; 1,000 with ``pytest --hypothesis-profile=nightly``.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kd import DistillLoss
from kd.smoothing import SMOOTHINGS, smooth_targets, to_uniform

EPS = st.floats(0, 0.95)
TEMPERATURE = st.floats(0.5, 20)
STUDENT_TEMPERATURE = st.none() | st.floats(0.5, 20)
backend = ""  # of the loss below


@pytest.fixture(scope="module", autouse=True, params=["cpu", "reference"])
def _backend(request):
    global backend
    backend = request.param


def distill_loss(s, t, y, *temperature, **settings):
    loss = DistillLoss(*temperature, backend=backend, **settings)
    value = loss(s, t, y)
    assert loss.backend_used == backend
    return value


@st.composite
def batches(draw, least_classes=1):
    """Student, teacher (float64 logits from flat to confident) and labels of some ignored positions."""
    # Now and then the compiled rows end at, before or after a block of 1024 classes.
    n, k = draw(st.integers(1, 5)), draw(st.integers(least_classes, 9) | st.sampled_from([1023, 1024, 1025, 2049]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.1, 2.0, 20.0]))
    s, t = (scale * torch.randn(n, k, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(k, (n,), generator=generator)
    return s.requires_grad_(), t, labels


def ce(s, y, eps=0.0, smoothing="uniform", **settings):
    settings = {"reduction": "none", **settings}
    return distill_loss(s, None, y, kd_weight=0, ce_weight=1, label_smoothing=eps, smoothing=smoothing, **settings)


def kd(s, t, temperature=1.0, student_temperature=None, reduction="none"):
    y = torch.zeros(s.shape[:-1], dtype=torch.int64)
    settings = {"kd_weight": 1, "ce_weight": 0, "reduction": reduction, "student_temperature": student_temperature}
    return distill_loss(s, t, y, temperature, **settings)


def gradient(value, s):
    return torch.autograd.grad(value.sum(), s)[0]


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def entropy(p):
    return -torch.special.xlogy(p, p).sum(-1)


# ---- label smoothing


@given(batches(), EPS, st.sampled_from(SMOOTHINGS))
def test_smoothing_is_ce_plus_kl_from_uniform(batch, given_eps, smoothing):
    """LS = (1-eps) CE + eps (KL(u||p) + log K): distillation from a uniform teacher, at T = 1."""
    s, _, y = batch
    k = s.shape[-1]
    eps = to_uniform(given_eps, k, smoothing)
    from_uniform_teacher = kd(s, torch.zeros_like(s))
    close(ce(s, y, given_eps, smoothing), (1 - eps) * ce(s, y) + eps * (from_uniform_teacher + math.log(k)))


@pytest.mark.parametrize(("eps", "gap"), [(0.05, 5.25), (0.1, 4.51), (0.2, 3.71), (0.4, 2.77)])
def test_smoothed_optimum_has_a_finite_gap(eps, gap):
    """Stationary where z_y - z_k = log(1 + (1-eps) K / eps); K = 10."""
    exact = math.log(1 + (1 - eps) * 10 / eps)
    assert exact == pytest.approx(gap, abs=5e-3)
    s = (exact * F.one_hot(torch.tensor([3]), 10).double()).requires_grad_()
    assert gradient(ce(s, torch.tensor([3]), eps), s).abs().max() < 1e-15


@given(batches(), EPS)
def test_smoothing_in_the_loss_is_smoothing_of_the_target(batch, eps):
    s, t, y = batch
    q = smooth_targets(y, s.shape[-1], eps, dtype=torch.float64)
    close(distill_loss(s, t, q), distill_loss(s, t, y, label_smoothing=eps))


@given(batches(), EPS)
def test_a_smoothed_teacher_at_temperature_one_is_student_smoothing(batch, eps):
    """H(q,s) = (1-eps) H(p,s) + eps H(u,s) with q = (1-eps) p + eps u: at T = 1 nothing is erased."""
    s, t, _ = batch
    k = s.shape[-1]
    p = t.softmax(-1)
    q = smooth_targets(p, k, eps, dtype=torch.float64)
    uniform = torch.full_like(p, 1 / k)
    cross = kd(s, q.log()) + entropy(q)
    close(cross, (1 - eps) * (kd(s, t) + entropy(p)) + eps * (kd(s, torch.zeros_like(s)) + math.log(k)))
    close(cross, (1 - eps) * ce(s, p) + eps * ce(s, uniform))


# ---- distillation


@given(batches(least_classes=2), TEMPERATURE)
def test_kl_splits_into_target_and_other_classes(batch, temperature):
    """KL = TCKD + (1 - p_y) NCKD at any T (Zhao et al. 2022)."""
    s, t, y = batch
    s, t = s.detach() / temperature, t / temperature
    others = ~F.one_hot(y, s.shape[-1]).bool()

    def split(z):
        z = z.log_softmax(-1)
        of_target = z.gather(-1, y[:, None])
        of_others = z[others].view(len(z), -1)
        return torch.cat([of_target, of_others.logsumexp(-1, keepdim=True)], -1), of_others.log_softmax(-1)

    (b_s, o_s), (b_t, o_t) = split(s), split(t)
    tckd = (b_t.exp() * (b_t - b_s)).sum(-1)
    nckd = (o_t.exp() * (o_t - o_s)).sum(-1)
    close(kd(s * temperature, t * temperature, temperature) / temperature**2, tckd + b_t[:, 1].exp() * nckd)


@given(batches(), st.floats(1.1, 20))
def test_student_at_temperature_one_is_temperature_t_and_renyi_entropy(batch, temperature):
    """D(p_T||q) = T D(p_T||q_T) - (T-1) H_{1/T}(q) + (T-1) H(p_T), H Rényi's (Zheng & Yang 2024)."""
    s, t, _ = batch
    order = 1 / temperature
    renyi = (order * s.log_softmax(-1)).logsumexp(-1) / (1 - order)
    softened = (t / temperature).softmax(-1)
    expected = kd(s, t, temperature) / temperature + (temperature - 1) * (entropy(softened) - renyi)
    close(kd(s, t, temperature, student_temperature=1.0), expected)


@given(batches())
def test_a_high_temperature_matches_centred_logits(batch):
    """T -> inf: the gradient of T² KL tends to (centred s - centred t) / K (Hinton et al. 2015 §2.1)."""
    s, t = (batch[0] / 20).detach().requires_grad_(), batch[1] / 20
    centred = (s - s.mean(-1, keepdim=True) - t + t.mean(-1, keepdim=True)).detach() / s.shape[-1]
    # What is missing at T falls as 1/T: at 1,000 and 500 it is the same, once and twice.
    limit = 2 * gradient(kd(s, t, 1000.0), s) - gradient(kd(s, t, 500.0), s)
    torch.testing.assert_close(limit, centred, rtol=1e-3, atol=1e-6)


@given(batches(), TEMPERATURE)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(batch, temperature):
    s, _, _ = batch
    value = kd(s, s.detach().clone(), temperature)
    assert torch.equal(value, torch.zeros_like(value))
    close(gradient(value, s), torch.zeros_like(s), 1e-13)
    shifted = kd(s, s.detach() + 3, temperature)  # the same distribution
    close(shifted, torch.zeros_like(shifted), 1e-11)


# ---- the whole loss


def whole(s, t, y, temperature, student_temperature, eps, **settings):
    return distill_loss(
        s,
        t,
        y,
        temperature,
        kd_weight=0.7,
        ce_weight=0.4,
        student_temperature=student_temperature,
        label_smoothing=eps,
        **{"reduction": "none", **settings},
    )


SETTINGS = st.tuples(TEMPERATURE, STUDENT_TEMPERATURE, EPS)


@given(batches(), SETTINGS, st.floats(-50, 50), st.floats(-50, 50))
def test_adding_a_constant_to_a_row_changes_nothing(batch, chosen, a, b):
    s, t, y = batch
    before, after = whole(s, t, y, *chosen), whole(s + a, t + b, y, *chosen)
    close(after, before, 1e-9)
    close(gradient(after, s), gradient(before, s), 1e-9)


@given(batches(), SETTINGS, st.randoms(use_true_random=False))
def test_the_order_of_classes_changes_nothing(batch, chosen, random):
    s, t, y = batch
    order = list(range(s.shape[-1]))
    random.shuffle(order)
    place = torch.tensor(order).argsort()
    weight = torch.linspace(0.5, 2, s.shape[-1], dtype=torch.float64)
    before = whole(s, t, y, *chosen, class_weight=weight)
    after = whole(s[:, order], t[:, order], place[y], *chosen, class_weight=weight[order])
    close(after, before)
    close(gradient(after, s), gradient(before, s))


@given(batches(), TEMPERATURE, st.floats(0.25, 4))
def test_logits_and_temperature_scale_together(batch, temperature, factor):
    """c·logits at c·T are the same distributions, so T² KL grows by c²."""
    s, t, _ = batch
    close(kd(factor * s, factor * t, factor * temperature), factor**2 * kd(s, t, temperature))
