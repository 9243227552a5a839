"""Logit methods: the numbers of their authors' code, and a second writing in NumPy that shares no code with kd."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from golden_table import SECOND, Case, authors_case, tensor
from method_batches import logit_batch, logit_values

from kd.losses.methods.batch_logits import DIST, MLKD
from kd.losses.methods.decoupled import DKD, NKD, RLD
from kd.losses.methods.logits import ATS, KD, TTM, WSL, WTTM, GeneralizedJSD, ReverseKL
from kd.losses.methods.registry import library
from kd.losses.methods.temperature import LogitStandardKD

# ---- the authors' numbers

FILE = json.loads((Path(__file__).parent.parent / "golden" / "authors_logits.json").read_text())


def mean(method, s, t, y):
    """What a training step takes of a method."""
    return method(s, t, y)


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
        "dist": lambda h: (DIST(h["beta"], h["gamma"], h["tau"], released=True), 1.0, 0.0),
        "lskd": lambda h: (LogitStandardKD("kd", {"temperature": h["T"]}, released=True), 1.0, 0.0),
        "lskd_dkd": lambda h: (
            LogitStandardKD(
                "dkd",
                {"tckd_weight": h["alpha"], "nckd_weight": h["beta"], "temperature": h["T"]},
                released=True,
            ),
            1.0,
            0.0,
        ),
        "ttm": lambda h: (TTM(1 / h["l"]), 1.0, 0.0),
        "wttm": lambda h: (WTTM(1 / h["l"]), 1.0, 0.0),
        "wsl": lambda h: (WSL(h["T"], released=True), h["alpha"], 1.0),
        "ats": lambda h: (ATS(h["tp_tau"], h["t_tau"], h["s_tau"]), h["lamb"], 1 - h["lamb"]),
        "mlkd_cc": lambda h: (MLKD((h["T"],), 0, 0, 1, masks=False), 1.0, 0.0),
        "mlkd_bc": lambda h: (MLKD((h["T"],), 0, 1, 0, masks=False), 1.0, 0.0),
        "rld": lambda h: (RLD(h["alpha"], h["beta"], h["alpha_temperature"], h["temperature"]), 1.0, 0.0),
        "gjsd": lambda h: (
            {0: KD(h["temperature"]), 1: ReverseKL(h["temperature"])}.get(h["beta"])
            or GeneralizedJSD(h["beta"], h["temperature"]),
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
    weak = MLKD((h["T"], 3.0, 5.0, 2.0, 6.0), released=True)

    def loss(s, s_strong):
        kd = mean(weak, s, t, y)
        kd = kd + sum(mean(KD(T), s_strong, t_strong, y) for T in (h["T"], 3.0, 5.0))
        kd = kd + sum(mean(KD(T), s, t, y) for T in (2.0, 6.0))
        ce = F.cross_entropy(s, y) + F.cross_entropy(s_strong, y)
        return h["kd_weight"] * kd + h["ce_weight"] * ce

    return loss


# Which of kd's methods a golden file's key is, where the names differ.
IS = dict.fromkeys(("mlkd_kd", "timm_kd", "torchdistill_kd"), "kd") | {"lskd_dkd": "lskd"}
IS |= dict.fromkeys(("mlkd_cc", "mlkd_bc"), "mlkd")


def golden_cases():
    for case in FILE["cases"]:
        inputs, expected = FILE["inputs"][case["inputs"]], case["expected"]
        s, t, y = tensor(inputs["s"]), tensor(inputs["t"]), torch.tensor(inputs["y"])
        method = IS.get(case["key"], case["key"])
        if case["key"] == "mlkd":
            whole, strong, value = mlkd_whole(case, inputs), tensor(inputs["s_strong"]), expected["total"]
            of_strong, of_weak = partial(whole, s), lambda z, whole=whole, strong=strong: whole(z, strong)
            yield authors_case(case, method, of_weak, s, value, expected["grad_s"])
            yield authors_case(case, method, of_strong, strong, value, expected["grad_s_strong"])
            continue
        loss = sequence_case(case, s, t, y) if s.ndim == 3 else released(case, t, y)
        yield authors_case(case, method, loss, s, expected["loss"], expected["grad_s"])


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
            s, t, y = logit_batch(n, k, seed=n)
            s = s.detach()
            t[0] = t[0].abs()
            t[0, y[0]] = -1  # the label's is the smallest logit: all of rld's classes are masked
            value, slopes = complex_step(partial(written, **arguments), s.numpy(), t.numpy(), y.numpy())

            def loss(z, method=known[name], settings=settings, t=t, y=y):
                return logit_values(method(**settings), z, t, y).sum()

            yield Case(name, SECOND, f"{name}{settings}-{n}x{k}", loss, s, tensor(value), tensor(slopes))


GOLDEN_CASES = [*golden_cases(), *second_cases()]
