"""The logit methods against their authors' numbers, a second writing in numpy, and identities."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_table import SECOND, TOLERANCE, Case, errors

import kd.losses.methods.temperature as several
from kd import distill_loss
from kd.losses.methods.base import METHODS, Seen, Setup, View, batch_mean
from kd.losses.methods.batch_logits import DIST, MLKD
from kd.losses.methods.decoupled import DKD, NKD, RLD
from kd.losses.methods.logits import ATS, KD, TTM, WSL, WTTM, GeneralisedJSD, HardDistillation, LogitMSE, ReverseKL
from kd.losses.methods.registry import library
from kd.losses.methods.temperature import CTKD, LogitStandardization

# ---- the authors' numbers

FILE = json.loads((Path(__file__).parent.parent / "golden" / "authors_logits.json").read_text())


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float64)


def mean(method, s, t, y):
    """What a training step takes of a method."""
    return batch_mean(method(Seen(View(s), View(t), y)), y)


def released(case, t, y):
    """The loss of the authors' code, as a function of the student's logits, written with ours."""
    key, hyper = case["key"], case["hyper"]
    of = {
        "kd": lambda h: (KD(h["T"]), 1.0, 0.0),
        "mlkd_kd": lambda h: (KD(h["T"]), 1.0, 0.0),
        "timm_kd": lambda h: (
            (KD(h["T"]), h["distill_loss_weight"], 1.0)
            if "distill_loss_weight" in h
            else (KD(h["T"]), 1 - h["task_loss_weight"], h["task_loss_weight"])
        ),
        "torchdistill_kd": lambda h: (
            (KD(h["T"]), 1 - h["alpha"], h["alpha"]) if h["alpha"] else (KD(h["T"]), h["T"] ** -2, 0.0)
        ),
        "dkd": lambda h: (DKD(h["alpha"], h["beta"], h["T"]), 1.0, 0.0),
        "nkd": lambda h: (NKD(h["gamma"], h["temp"]), 1.0, 0.0),
        "dist": lambda h: (DIST(h["beta"], h["gamma"], h["tau"], epsilon=1e-8), 1.0, 0.0),
        "lskd": lambda h: (LogitStandardization("kd", {"temperature": h["T"]}, 1, 1e-7), 1.0, 0.0),
        "lskd_dkd": lambda h: (
            LogitStandardization(
                "dkd",
                {"tckd_weight": h["alpha"], "nckd_weight": h["beta"], "temperature": h["T"]},
                correction=1,
                epsilon=1e-7,
            ),
            1.0,
            0.0,
        ),
        "ttm": lambda h: (TTM(1 / h["l"]), 1.0, 0.0),
        "wttm": lambda h: (WTTM(1 / h["l"]), 1.0, 0.0),
        "wsl": lambda h: (WSL(h["T"], epsilon=1e-7), h["alpha"], 1.0),
        "ats": lambda h: (ATS(h["tp_tau"], h["t_tau"], h["s_tau"]), h["lamb"], 1 - h["lamb"]),
        "mlkd_cc": lambda h: (MLKD((h["T"],), 0, 0, 1, "none"), 1.0, 0.0),
        "mlkd_bc": lambda h: (MLKD((h["T"],), 0, 1, 0, "none"), 1.0, 0.0),
        "rld": lambda h: (RLD(h["alpha"], h["beta"], h["alpha_temperature"], h["temperature"]), 1.0, 0.0),
        "gjsd": lambda h: (
            {0: KD(h["temperature"]), 1: ReverseKL(h["temperature"])}.get(h["beta"])
            or GeneralisedJSD(h["beta"], h["temperature"]),
            h["temperature"] ** -2,
            0.0,
        ),
    }
    method, weight, ce_weight = of[key](hyper)

    def loss(s):
        return weight * mean(method, s, t, y) + (ce_weight * F.cross_entropy(s, y) if ce_weight else 0.0)

    return loss


def sequence_case(case, s, t, y):
    """TRL's (B, S, V): without labels it divides by B, not by B S; with them by the number not ignored."""
    flat = y.flatten() if case["hyper"]["labels"] else torch.zeros_like(y).flatten()
    per_row = 1.0 if case["hyper"]["labels"] else float(s.shape[1])
    loss = released(case, t.flatten(0, 1), flat)
    return lambda z: per_row * loss(z.flatten(0, 1))


def mlkd_whole(case, inputs):
    """The whole forward pass of its code on a weak and a strong view."""
    h = case["hyper"]
    t, t_strong, y = tensor(inputs["t"]), tensor(inputs["t_strong"]), torch.tensor(inputs["y"])
    weak = MLKD((h["T"], 3.0, 5.0, 2.0, 6.0), confidence_mask="share")

    def loss(s, s_strong):
        kd = mean(weak, s, t, y)
        kd = kd + sum(mean(KD(T), s_strong, t_strong, y) for T in (h["T"], 3.0, 5.0))
        kd = kd + sum(mean(KD(T), s, t, y) for T in (2.0, 6.0))
        ce = F.cross_entropy(s, y) + F.cross_entropy(s_strong, y)
        return h["kd_weight"] * kd + h["ce_weight"] * ce

    return loss


def golden_cases():
    for case in FILE["cases"]:
        inputs, expected = FILE["inputs"][case["inputs"]], case["expected"]
        s, t, y = tensor(inputs["s"]), tensor(inputs["t"]), torch.tensor(inputs["y"])
        if case["key"] == "mlkd":
            whole, strong, value = mlkd_whole(case, inputs), tensor(inputs["s_strong"]), expected["total"]
            of_strong, of_weak = partial(whole, s), lambda z, whole=whole, strong=strong: whole(z, strong)
            yield golden_case(case, of_weak, s, value, expected["grad_s"])
            yield golden_case(case, of_strong, strong, value, expected["grad_s_strong"])
            continue
        if s.ndim == 3:
            loss, value = sequence_case(case, s, t, y), expected["loss"]
        else:
            loss, value = released(case, t, y), expected["loss"]
        yield golden_case(case, loss, s, value, expected["grad_s"])


# Which of kd's methods a golden file's key is, where the names differ.
IS = dict.fromkeys(("mlkd_kd", "timm_kd", "torchdistill_kd"), "kd") | {"lskd_dkd": "lskd"}
IS |= dict.fromkeys(("mlkd_cc", "mlkd_bc"), "mlkd")


def golden_case(case, loss, student, value, slopes):
    method, source = IS.get(case["key"], case["key"]), f"{case['repo']} {case['path']}"
    return Case(method, source, case["id"], loss, student, tensor(value), tensor(slopes))


AUTHORS_CASES = list(golden_cases())


@pytest.mark.parametrize("case", AUTHORS_CASES, ids=lambda case: case.name)
def test_authors_numbers(case):
    assert max(errors(case)) <= TOLERANCE


def test_every_stored_case_is_compared():
    assert {case.name for case in AUTHORS_CASES} == {case["id"] for case in FILE["cases"]}
    assert all({"repo", "path", "commit"} <= set(case) for case in FILE["cases"])


@pytest.mark.parametrize(
    "case", [case for case in FILE["cases"] if "paper_loss" in case["expected"]], ids=lambda case: case["id"]
)
def test_the_default_is_the_papers_formula(case):
    inputs, h = FILE["inputs"][case["inputs"]], case["hyper"]
    temperature = h.get("T", h.get("tau"))
    method = {
        "dist": lambda: DIST(temperature=temperature),
        # Its number keeps the code's 1e-7 beside the paper's divisor K.
        "lskd": lambda: LogitStandardization(settings={"temperature": temperature}, epsilon=1e-7),
    }[case["key"]]()
    value = mean(method, tensor(inputs["s"]), tensor(inputs["t"]), torch.tensor(inputs["y"]))
    assert value.item() == pytest.approx(case["expected"]["paper_loss"], rel=TOLERANCE)


# ---- a second writing: numpy, probabilities formed as the formula has them, gradients by the complex step


def softmax(z, axis=-1):
    e = np.exp(z - z.real.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def np_kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def np_pearson(a, b, axis):
    a, b = a - a.mean(axis, keepdims=True), b - b.mean(axis, keepdims=True)
    return (a * b).sum(axis) / np.sqrt((a * a).sum(axis) * (b * b).sum(axis))


def np_dist(s, t, y, T=4.0, inter=1.0, intra=1.0):
    p, q = softmax(s / T), softmax(t / T)
    return T**2 * (inter * (1 - np_pearson(p, q, 1).mean()) + intra * (1 - np_pearson(p, q, 0).mean()))


def np_lskd(s, t, y, T=2.0):
    def z_score(z):
        return (z - z.mean(1, keepdims=True)) / np.sqrt(((z - z.mean(1, keepdims=True)) ** 2).mean(1, keepdims=True))

    return T**2 * np_kl(softmax(z_score(t) / T), softmax(z_score(s) / T))


def np_rld(s, t, y, confidence=1.0, correlation=8.0, Tc=1.0, T=4.0):
    values = []
    for z_s, z_t, label in zip(s, t, y, strict=True):
        b_t, b_s = softmax(z_t / Tc).max(), softmax(z_s / Tc)[label]
        sc = b_t * np.log(b_t / b_s) + (1 - b_t) * np.log((1 - b_t) / (1 - b_s))
        below = z_t < z_t[label]
        mc = np_kl(softmax(z_t[below] / T), softmax(z_s[below] / T)) if below.any() else 0.0
        values.append(confidence * Tc**2 * sc + correlation * T**2 * mc)
    return np.array(values)


def np_mlkd(s, t, y, temperatures=(2.0, 3.0, 4.0, 5.0, 6.0)):
    n, k = t.shape
    confidence, mass = softmax(t).max(1), softmax(t).sum(0)
    keep, keep_class = confidence <= np.percentile(confidence, 50), mass <= np.percentile(mass, 50)
    total = 0
    for T in temperatures:
        p, q = softmax(s / T), softmax(t / T)
        total = total + T**2 * np_kl(q, p)[keep].sum() / n
        total = total + (((q @ q.T - p @ p.T) ** 2)[keep]).sum() / n
        total = total + (((q.T @ q - p.T @ p) ** 2)[keep_class]).sum() / k
    return total


def np_ctkd(s, t, y):
    T = 1 + 20 / (1 + np.exp(-1.0))
    return T**2 * np_kl(softmax(t / T), softmax(s / T))


def np_reverse_kl(s, t, y, T=1.0):
    return T**2 * np_kl(softmax(s / T), softmax(t / T))


def np_gjsd(s, t, y, share=0.5, T=1.0):
    p, q = softmax(s / T), softmax(t / T)
    m = share * q + (1 - share) * p
    return T**2 * (share * np_kl(q, m) + (1 - share) * np_kl(p, m))


def np_logit_mse(s, t, y):
    return ((s - t) ** 2).sum(-1)


def np_smoothed_teacher(s, t, y, mass=0.1, T=4.0):
    q = ((1 - mass) * softmax(t) + mass / t.shape[-1]) ** (1 / T)
    return T**2 * np_kl(q / q.sum(-1, keepdims=True), softmax(s / T))


def np_hard(s, t, y):
    return -np.log(softmax(s)[np.arange(len(s)), t.argmax(-1)])


SECOND_WRITINGS = [
    ("dist", {}, np_dist, {}),
    (
        "dist",
        {"inter_weight": 2.0, "intra_weight": 0.5, "temperature": 1.5},
        np_dist,
        {"T": 1.5, "inter": 2.0, "intra": 0.5},
    ),
    ("lskd", {}, np_lskd, {}),
    ("lskd", {"settings": {"temperature": 3.0}}, np_lskd, {"T": 3.0}),
    ("rld", {}, np_rld, {}),
    (
        "rld",
        {"confidence_weight": 0.5, "correlation_weight": 2.0, "confidence_temperature": 3.0, "temperature": 2.0},
        np_rld,
        {"confidence": 0.5, "correlation": 2.0, "Tc": 3.0, "T": 2.0},
    ),
    ("mlkd", {}, np_mlkd, {}),
    ("mlkd", {"temperatures": [1.0, 8.0]}, np_mlkd, {"temperatures": (1.0, 8.0)}),
    ("ctkd", {}, np_ctkd, {}),
    ("reverse_kl", {}, np_reverse_kl, {}),
    ("reverse_kl", {"temperature": 3.0}, np_reverse_kl, {"T": 3.0}),
    ("gjsd", {"teacher_share": 0.2, "temperature": 2.0}, np_gjsd, {"share": 0.2, "T": 2.0}),
    ("logit_mse", {}, np_logit_mse, {}),
    ("hard", {}, np_hard, {}),
    ("smoothed_teacher", {}, np_smoothed_teacher, {}),
    ("smoothed_teacher", {"mass": 0.4, "temperature": 1.5}, np_smoothed_teacher, {"mass": 0.4, "T": 1.5}),
]


def complex_step(written, s, t, y):
    """Value and gradient of a second writing, (N,) or (), summed: no difference is taken, so that no digit is lost."""
    step, slopes = 1e-30, np.zeros(s.shape)
    for i, j in np.ndindex(s.shape):
        moved = s.astype(complex)
        moved[i, j] += 1j * step
        slopes[i, j] = np.sum(written(moved, t, y)).imag / step
    return np.sum(written(s.astype(complex), t, y)).real, slopes


def second_cases():
    known = library()
    for name, settings, written, arguments in SECOND_WRITINGS:
        # Two logits standardize to 1 and -1 whatever they are, with no gradient.
        for n, k in ((6, 5), (7, 4), (3, 3 if name == "lskd" else 2)):
            s, t, y = batch(n, k, seed=n)
            s = s.detach()
            t[0] = t[0].abs()
            t[0, y[0]] = -1  # the label's is the smallest logit: all of rld's classes are masked
            value, slopes = complex_step(partial(written, **arguments), s.numpy(), t.numpy(), y.numpy())

            def loss(z, method=known[name], settings=settings, t=t, y=y):
                return ready(method(**settings), z, t, y).sum()

            yield Case(name, SECOND, f"{name}{settings}-{n}x{k}", loss, s, tensor(value), tensor(slopes))


def draw(*shape, seed=0, scale=3.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(n=6, k=5, seed=0, scale=3.0):
    y = torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))
    return draw(n, k, seed=seed, scale=scale).requires_grad_(), draw(n, k, seed=seed + 1, scale=scale), y


def ready(method, s, t, y, **seen):
    """The method's values, after it has made its learned parts."""
    seen = Seen(View(s), View(t), y, **seen)
    method.build(Setup(seen, len(s)))
    return method.double()(seen)


SECOND_CASES = list(second_cases())
GOLDEN_CASES = AUTHORS_CASES + SECOND_CASES


@pytest.mark.parametrize("case", SECOND_CASES, ids=lambda case: case.name)
def test_a_second_writing(case):
    assert max(errors(case)) <= TOLERANCE


# ---- identities


def gradient(values, s):
    return torch.autograd.grad(values.sum(), s)[0]


def close(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 3.0, 12.0])
def test_kd_is_distill_loss(temperature):
    s, t, y = batch()
    ours = ready(KD(temperature), s, t, y)
    theirs = distill_loss(s, t, y, temperature, kd_weight=1, ce_weight=0, reduction="none")
    close(ours, theirs)
    close(gradient(ours, s), gradient(theirs, s))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_with_the_teachers_own_weight_is_kd(temperature):
    """KL = TCKD + (1 - p_y) NCKD, one example at a time because the weight is the example's."""
    s, t, y = batch(8, 6)
    rest = 1 - (t / temperature).softmax(-1).gather(-1, y[:, None])[:, 0]
    for i in range(len(s)):
        row = slice(i, i + 1)
        ours = ready(DKD(1.0, rest[i].item(), temperature), s[row], t[row], y[row])
        plain = ready(KD(temperature), s[row], t[row], y[row])
        close(ours, plain)
        close(gradient(ours, s), gradient(plain, s))


@pytest.mark.parametrize("temperature", [1.5, 4.0, 10.0])
def test_ttm_is_kd_and_a_renyi_entropy(temperature):
    """D(p_T||q) = T D(p_T||q_T) - (T-1) H_{1/T}(q) + (T-1) H(p_T)."""
    s, t, y = batch()
    order = 1 / temperature
    renyi = (order * s.log_softmax(-1)).logsumexp(-1) / (1 - order)
    p = (t / temperature).softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    kd = ready(KD(temperature), s, t, y) / temperature**2
    expected = temperature * kd - (temperature - 1) * (renyi - entropy)
    close(ready(TTM(temperature), s, t, y), expected)


def test_at_temperature_one_ttm_and_wttm_are_kd():
    s, t, y = batch()
    kd = ready(KD(1.0), s, t, y)
    close(ready(TTM(1.0), s, t, y), kd)
    close(ready(WTTM(1.0), s, t, y), kd)


def test_wttm_weighs_between_one_and_the_uniform_teachers():
    s, _, y = batch()
    certain = 1e4 * F.one_hot(y, 5).double()
    for teacher, weight in ((certain, 1.0), (torch.zeros_like(s), 5**0.75)):
        close(ready(WTTM(4.0), s, teacher, y), weight * ready(TTM(4.0), s, teacher, y))


@pytest.mark.parametrize("method", ["kd", "dkd", "rld", "ttm", "mlkd", "dist", "gjsd", "ctkd"])
@pytest.mark.parametrize(("correction", "epsilon", "tolerance"), [(0, 0.0, 1e-10), (1, 1e-7, 1e-5)])
def test_standardized_logits_have_no_scale_and_no_offset(method, correction, epsilon, tolerance):
    s, t, y = batch()
    a, b = draw(6, 1, seed=5).exp(), draw(6, 1, seed=6)
    lskd = LogitStandardization(method, correction=correction, epsilon=epsilon)
    close(ready(lskd, s, t, y), ready(lskd, a * s + b, t / a - b, y), tolerance)


def test_standardized_rows_are_z_scores_of_bounded_size():
    z = draw(4, 7)
    standard = LogitStandardization().standardize(z)
    close(standard.mean(-1), torch.zeros(4).double())
    close(standard.square().mean(-1), torch.ones(4).double())
    close(LogitStandardization(correction=1).standardize(z), (z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True))
    spike = LogitStandardization(correction=1).standardize(F.one_hot(torch.tensor([2]), 9).double())
    assert spike.max().item() == pytest.approx(8 / 3)  # (K - 1) / sqrt(K)


def test_a_row_without_variation_standardizes_to_zeros():
    for dtype in (torch.float32, torch.float64):
        flat = torch.full((3, 7), 0.1, dtype=dtype) * torch.tensor([[1.0], [1e4], [0.0]], dtype=dtype)
        s = flat.requires_grad_()
        values = ready(LogitStandardization(), s, draw(3, 7).to(dtype), torch.tensor([0, 1, 2]))
        assert values.isfinite().all()
        assert gradient(values, s).abs().max() == 0


def test_logit_standardization_sets_temperature_two_and_hands_settings_on():
    inner = LogitStandardization("dkd", {"nckd_weight": 3.0}).inner
    assert (inner.temperature, inner.nckd_weight, inner.tckd_weight) == (2.0, 3.0, 1.0)
    assert LogitStandardization("dkd", {"temperature": 5.0}).inner.temperature == 5.0
    assert not LogitStandardization("dist").per_example
    assert not LogitStandardization("rld").soft_targets
    for wrong in ({"method": "kdd"}, {"settings": {"nckd_weight": 1.0}}):
        with pytest.raises(ValueError, match=r"^lskd"):
            LogitStandardization(**wrong)


def test_logit_standardization_of_a_method_that_learns():
    s, t, y = batch()
    lskd = LogitStandardization("ctkd")
    values = ready(lskd, s, t, y)
    assert list(lskd.state_dict()) == ["inner.temperature_logit"]
    values.sum().backward()
    assert lskd.inner.temperature_logit.grad.abs() > 0


def test_logit_standardization_of_a_batch_method_cannot_ignore():
    s, t, y = batch()
    y[0] = -100
    with pytest.raises(ValueError, match="lskd: compares examples with each other"):
        ready(LogitStandardization("dist"), s, t, y)


def test_rld_is_zero_at_a_right_teacher_and_trusts_a_wrong_one_only_below_the_label():
    _, t, _ = batch()
    same = t.clone().requires_grad_()
    right = ready(RLD(), same, t, t.argmax(-1))
    close(right, torch.zeros(6).double())
    close(gradient(right, same), torch.zeros(6, 5).double())
    y = t.argsort(-1)[:, 2]  # two classes above the label, two below
    wrong = ready(RLD(confidence_weight=0), s := draw(6, 5, seed=7).requires_grad_(), t, y)
    slope = gradient(wrong, s)
    masked = t >= t.gather(-1, y[:, None])
    assert (slope[masked] == 0).all()
    assert (slope[~masked] != 0).all()


def test_wsls_gradient_takes_its_weight_as_given():
    s, t, y = batch()
    weight = 1 - (-F.cross_entropy(s, y, reduction="none") / F.cross_entropy(t, y, reduction="none")).exp().detach()
    expected = weight[:, None] * 4 * ((s / 4).softmax(-1) - (t / 4).softmax(-1))
    close(gradient(ready(WSL(), s, t, y), s), expected.detach())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_generalised_jsd_tends_to_both_kls(temperature):
    s, t, y = batch(scale=1.0)
    few = 1e-7
    close(ready(GeneralisedJSD(few, temperature), s, t, y) / few, ready(KD(temperature), s, t, y), 1e-5)
    reverse = ready(ReverseKL(temperature), s, t, y)
    close(ready(GeneralisedJSD(1 - few, temperature), s, t, y) / few, reverse, 1e-5)


def test_generalised_jsd_is_symmetric_and_at_most_log_two():
    s, t, y = batch(scale=30.0)
    value = ready(GeneralisedJSD(), s, t, y)
    close(value, ready(GeneralisedJSD(), t.clone().requires_grad_(), s.detach(), y))
    close(ready(GeneralisedJSD(0.3), s, t, y), ready(GeneralisedJSD(0.7), t.clone(), s.detach(), y))
    assert (value <= math.log(2)).all()
    assert value.max() > 0.99 * math.log(2)


def test_reverse_kl_is_kd_with_the_roles_exchanged():
    s, t, y = batch()
    close(ready(ReverseKL(3.0), s, t, y), ready(KD(3.0), t, s.detach(), y))


def test_a_high_temperature_turns_kd_into_centred_logit_mse():
    """T² KL tends to ½ of the mean over classes of the squared difference of centred logits."""
    s, t, y = batch()
    centred = [z - z.mean(-1, keepdim=True) for z in (s, t)]
    limit = 2 * ready(KD(1000.0), s, t, y) - ready(KD(500.0), s, t, y)  # what is missing at T falls as 1/T
    close(2 * s.shape[-1] * limit, ready(LogitMSE(), *centred, y), 1e-3)


def test_nkd_differs_from_its_kl_form_by_a_constant_of_the_teacher():
    s, t, y = batch()
    others = torch.stack([row[torch.arange(5) != label] for row, label in zip(t / 3, y, strict=True)])
    entropy = -(others.softmax(-1) * others.log_softmax(-1)).sum(-1)
    with_kl = 3.5 * ready(DKD(0.0, 1.0, 3.0), s, t, y)
    of_label = t.softmax(-1).gather(-1, y[:, None])[:, 0] * F.cross_entropy(s, y, reduction="none")
    close(ready(NKD(), s, t, y), of_label + with_kl + 3.5 * 9 * entropy)
    close(gradient(ready(NKD(), s, t, y), s), gradient(of_label + with_kl, s))


def test_hard_distillation_looks_at_the_teachers_first_choice_only():
    s, t, y = batch()
    close(ready(HardDistillation(), s, t, y), F.cross_entropy(s, t.argmax(-1), reduction="none"))
    assert torch.equal(ready(HardDistillation(), s, t, y), ready(HardDistillation(), s, 7 * t + 3, y))


def test_dist_sees_no_increasing_linear_change_of_the_probabilities():
    """p -> a p + b with the same a > 0 and b for all: rows and columns stay correlated as they were."""
    s, t, y = batch()
    p = s.detach().softmax(-1)
    milder = (0.3 * p + 0.7 / 5).log()
    close(ready(DIST(temperature=1.0), milder, t, y), ready(DIST(temperature=1.0), s, t, y))
    close(ready(DIST(temperature=1.0), milder, p.log(), y), torch.zeros(()).double())


def test_dists_epsilon_costs_what_the_docstring_says():
    inputs = FILE["inputs"]["confident"]
    s, t, y = tensor(inputs["s"]), tensor(inputs["t"]), torch.tensor(inputs["y"])
    with_it, without = (ready(DIST(temperature=1.0, epsilon=e), s, t, y).item() for e in (1e-8, 0.0))
    assert with_it / without - 1 == pytest.approx(0.0335, abs=5e-4)


def test_dist_knows_the_correlation_of_columns_too_small_for_float32():
    s, t, y = batch(6, 4)
    s, t = s.detach().clone(), t.clone()
    s[:, 0] += 60
    t[:, 0] += 60  # the other columns are e^-60 in both, their squares nothing in float32
    p, q = softmax(s.numpy()), softmax(t.numpy())
    columns = np_pearson(p[:, 1:], q[:, 1:], 0).sum() / 4  # column 0 is all ones and counts 0
    exact = 2 - np_pearson(p, q, 1).mean() - columns
    assert abs(columns) > 0.01
    assert ready(DIST(temperature=1.0), s, t, y).item() == pytest.approx(exact, rel=1e-10)
    assert ready(DIST(temperature=1.0), s.float(), t.float(), y).item() == pytest.approx(exact, abs=1e-4)


def test_mlkds_masks_drop_confident_examples_and_frequent_classes():
    s, t, y = batch(4, 3)
    t = torch.tensor([[9.0, 0, 0], [8.0, 0, 0], [1.0, 0, 0], [0.5, 0, 0]]).double()
    grad = gradient(ready(MLKD(batch_weight=0, class_weight=0), s, t, y), s)
    assert (grad[:2] == 0).all()
    assert (grad[2:] != 0).any(-1).all()
    every = gradient(ready(MLKD(batch_weight=0, class_weight=0, confidence_mask="none"), s, t, y), s)
    half = gradient(ready(MLKD(batch_weight=0, class_weight=0, confidence_mask="share"), s, t, y), s)
    close(half, every / 2)
    close(grad[2:], every[2:])


def test_wsl_ignores_an_easy_example_and_not_a_hard_one():
    s, t, y = batch(2, 5)
    s = torch.stack([9.0 * F.one_hot(y[0], 5), -9.0 * F.one_hot(y[1], 5)]).double().requires_grad_()
    full = WSL().temperature ** 2 * torch.distributions.Categorical(logits=t / 4).entropy() + ready(KD(), s, t, y)
    weight = ready(WSL(), s, t, y) / full
    expected = 1 - (-F.cross_entropy(s, y, reduction="none") / F.cross_entropy(t, y, reduction="none")).exp()
    close(weight, expected)
    assert weight[0] < 0.01 < 0.9 < weight[1]


def test_wsls_weight_where_a_cross_entropy_is_zero():
    """A certain teacher: weight 1; both certain: 1 - 1/e, as for any two that are equally good."""
    y = torch.tensor([0, 0])
    t = torch.tensor([[1e3, 0.0, -5.0], [1e3, 0.0, -5.0]])
    s = torch.tensor([[1.0, 0.0, 0.0], [1e3, 0.0, 0.0]], requires_grad=True)
    log_s, p_t = F.log_softmax(s / 4, -1), F.softmax(t / 4, -1)
    expected = torch.tensor([1.0, 1 - math.exp(-1)]) * 16 * -(p_t * log_s).sum(-1)
    torch.testing.assert_close(ready(WSL(), s, t, y).float(), expected)


def test_ctkd_reverses_and_scales_the_gradient_of_its_temperature():
    s, t, y = batch()
    method = CTKD(curriculum_epochs=4.0)
    seen = Seen(View(s), View(t), y)
    method.build(Setup(seen, 6))
    method.double()

    def at(theta):
        temperature = 1 + 20 / (1 + math.exp(-theta))
        return ready(KD(temperature), s, t, y).sum().item()

    slope = (at(1 + 1e-5) - at(1 - 1e-5)) / 2e-5
    # From the epochs done to the strength: the first epoch is the running one of number 1.
    for epoch, strength in (
        (0.0, 0.5 * (1 - math.cos(math.pi / 4))),
        (0.9, 0.146447),
        (1.0, 0.5),
        (3.0, 1.0),
        (50.0, 1.0),
    ):
        seen = Seen(View(s), View(t), y, epoch=epoch, epochs=60)
        method.zero_grad()
        values = method(seen)
        values.sum().backward()
        assert method.temperature_logit.grad.item() == pytest.approx(-strength * slope, rel=1e-5)
        close(values, ready(KD(method.temperature().item()), s, t, y))  # the strength is in the gradient alone
    assert gradient(method(seen), s).abs().sum() > 0


def test_ctkd_climbs_the_loss_and_the_student_descends_it():
    s, t, y = batch()
    method = CTKD()
    seen = Seen(View(s), View(t), y, epoch=20.0, epochs=30)
    method.build(Setup(seen, 6))
    method.double()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    before = method(seen).mean()
    before.backward()
    optimizer.step()
    assert method(seen).mean() > before


def test_several_teachers_become_one():
    s, _, y = batch()
    teachers = draw(3, 6, 5, seed=8)
    for T in (1.0, 4.0):
        p = (teachers / T).softmax(-1).mean(0)
        close((several.arithmetic_mean(teachers, T) / T).softmax(-1), p)
        q = (s / T).log_softmax(-1)
        close(ready(KD(T), s, several.arithmetic_mean(teachers, T), y), T**2 * (p * (p.log() - q)).sum(-1))
    same = draw(1, 6, 5).expand(4, 6, 5)
    close(several.arithmetic_mean(same, 2.0).log_softmax(-1), same[0].log_softmax(-1))
    far = several.arithmetic_mean(torch.tensor([[[1e4, -1e4]], [[-1e4, 1e4]]]), 1.0)
    torch.testing.assert_close(far.softmax(-1), torch.tensor([[0.5, 0.5]]))


# What moves with a row's offset: only the distance of the logits themselves.
MODULES = tuple(f"kd.losses.methods.{name}" for name in ("logits", "decoupled", "batch_logits", "temperature"))
HERE = [name for name, method in METHODS.items() if method.__module__ in MODULES]
OFFSET_FREE = [name for name in HERE if name != "logit_mse"]


@pytest.mark.parametrize("name", OFFSET_FREE)
def test_an_offset_of_a_row_changes_nothing_and_gradient_rows_sum_to_zero(name):
    s, t, y = batch()
    here = ready(METHODS[name](), s, t, y)
    of_teacher = 0 if name == "ats" else draw(6, 1, seed=4)  # two temperatures see the offset: its docstring
    there = ready(METHODS[name](), s + draw(6, 1, seed=3), t + of_teacher, y)
    close(here, there, 1e-9)
    close(gradient(here, s), gradient(there, s), 1e-9)
    close(gradient(ready(METHODS[name](), s, t, y), s).sum(-1), torch.zeros(6).double())


@pytest.mark.parametrize("name", HERE)
def test_the_order_of_classes_and_of_examples_changes_nothing(name):
    s, t, y = batch()
    classes, rows = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([5, 2, 0, 1, 4, 3])
    here = ready(METHODS[name](), s, t, y)
    there = ready(METHODS[name](), s[rows][:, classes], t[rows][:, classes], classes.argsort()[y[rows]])
    close(here[rows] if here.ndim else here, there)


@pytest.mark.parametrize("margin", [20.0, 110.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("right", [True, False])
def test_dkd_and_its_kin_are_exact_at_margins_where_probabilities_round_to_one(margin, dtype, right):
    """Logs of probabilities give NaN here: mdistiller's DKD at margin 110 in float32, at 20 in float16."""
    y = torch.tensor([0, 1])
    t = margin * F.one_hot(y if right else 1 - y, 4).to(dtype)
    s = draw(2, 4, scale=1.0).to(dtype).requires_grad_()
    for method in (DKD(temperature=1.0), NKD(), RLD()):
        values = ready(method, s, t, y)
        exact = ready(method, s.detach().double(), t.double(), y)
        torch.testing.assert_close(values.double(), exact, rtol=2e-5, atol=2e-5)
        assert gradient(values, s).isfinite().all()
