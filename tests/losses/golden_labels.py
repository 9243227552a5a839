"""Label methods: the numbers of their authors' code, and second writings by their published objectives."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from golden_logits import softmax
from golden_table import SECOND, Case, authors_case, tensor
from method_batches import draw, labels
from torch import nn

from kd.losses.methods.base import Seen, View
from kd.losses.methods.labels import (
    FLSD53,
    ConfidencePenalty,
    Focal,
    GeneralizedSmoothing,
    LabelSmoothing,
    MaxSup,
    OnlineLabelSmoothing,
)
from kd.losses.methods.teacher_free import DML, TfReg, TfSelf

FILE = json.loads((Path(__file__).parent.parent / "golden" / "authors_hard.json").read_text())


def logits(n=6, k=5, seed=0):
    return draw(n, k, seed=seed, scale=3.0)


def ce(student, target):
    return F.cross_entropy(student, target, reduction="none")


# By key of the golden file: our method with the authors' settings, its weight, and that of the cross entropy.
AUTHORS = {
    "tf_ls": lambda h: (LabelSmoothing(0.1, "others"), 1.0, 0.0),
    "ls_uniform": lambda h: (LabelSmoothing(h["alpha"]), 1.0, 0.0),
    "maxsup_ls": lambda h: (LabelSmoothing(h["smoothing_rate"]), 1.0, -1.0),  # the regulariser alone
    "tf_kd": lambda h: (TfSelf(h["T"], released=True), h["alpha"], 1 - h["alpha"]),
    "tf_self": lambda h: (TfSelf(h["T"], released=True), h["alpha"] * h["multiplier"], 1 - h["alpha"]),
    "tf_reg": lambda h: (
        TfReg(0.99, h["reg_temperature"], released=True),
        h["reg_alpha"] * h["multiplier"],
        1 - h["reg_alpha"],
    ),
    "maxsup": lambda h: (MaxSup(h["begin_lambda"], h["end_lambda"]), 1.0, 1.0),
    "maxsup_lt": lambda h: (MaxSup(released=True), 1.0, 1.0),
    "focal": lambda h: (Focal(h["gamma"]), 1.0, 0.0),
    "flsd53": lambda h: (FLSD53(h["gamma"]), 1.0, 0.0),
    "confpen": lambda h: (ConfidencePenalty(), h["weight"], 0.0),  # the penalty alone
}


def authors_cases():
    for case in FILE["cases"]:
        if case["key"] == "ols":
            yield from ols_cases(case)
            continue
        data, hyper = FILE["inputs"][case["inputs"]], case["hyper"]
        student, teacher = (tensor(data[name]) if name in data else None for name in "st")
        target = torch.tensor(data["y"])
        method, weight, ce_weight = AUTHORS[case["key"]](hyper)
        when = {"epoch": hyper.get("epoch", 0), "epochs": hyper.get("epochs", 1)}
        size = len(target) if hyper.get("reduction") == "sum" else 1

        def loss(z, t=teacher, y=target, size=size, method=method, weights=(weight, ce_weight), when=when):
            ours = method(z, t, y, **when)
            return size * (weights[0] * ours + weights[1] * ce(z, y).mean())

        expected = case["expected"]
        yield authors_case(case, method.name, loss, student, expected["loss"], expected["grad_s"])


def ols_cases(case):
    """Every batch after all before it, and the table after every epoch."""
    epochs = [[(tensor(b["s"]), torch.tensor(b["y"])) for b in epoch] for epoch in FILE["inputs"]["ols"]["epochs"]]

    def after(batches):
        """The method that has seen so many batches, and the ends of the epochs that they complete."""
        method = OnlineLabelSmoothing(released=True)
        method.build(Seen(View(epochs[0][0][0]), None, epochs[0][0][1]))  # the first batch may be one to come
        for epoch in epochs:
            for batch in epoch[:batches]:
                method(*batch)
            if batches < len(epoch):
                break
            method.end_epoch()
            batches -= len(epoch)
        return method

    done = 0
    for e, (epoch, expected) in enumerate(zip(epochs, case["expected"]["epochs"], strict=True)):
        for n, (student, target) in enumerate(epoch):

            def loss(z, target=target, done=done):
                return 0.5 * ce(z, target).mean() + 0.5 * after(done)(z, target)

            numbers = expected["batch_loss"][n], expected["batch_grad_s"][n]
            yield authors_case(case, "online_label_smoothing", loss, student, *numbers, more=f":{e}:{n}")
            done += 1

        def of_table(_, done=done):
            return after(done).table

        table = expected["matrix_after"]
        yield authors_case(case, "online_label_smoothing", of_table, student, table, more=f":{e}")


class Peer(nn.Module):
    """Logits as its parameters, row by row of the batch."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits[: len(images)]


def second_cases():
    """Deep mutual learning by each network's own published objective, and negative smoothing by its line."""
    s, t, y = logits(), logits(seed=1), labels()
    p1, p2, onehot = softmax(s.numpy()), softmax(t.numpy()), np.eye(5)[y]
    nll = -np.log(p2[np.arange(6), y])
    images = torch.zeros(6, 1)
    value = (p2 * np.log(p2 / p1)).sum(1) + nll + (p1 * np.log(p1 / p2)).sum(1)

    def of_student(z):
        return DML(reduction="sum")(z, y, images=images, peer=Peer(t))

    def of_peer(z):
        peer = Peer(t)
        object.__setattr__(peer, "forward", lambda images: z)
        return DML(reduction="sum")(s, y, images=images, peer=peer)

    gradients = {"student": (of_student, s, p1 - p2), "peer": (of_peer, t, (p2 - onehot) + (p2 - p1))}
    for who, (loss, at, slopes) in gradients.items():
        yield Case("dml", SECOND, f"dml-{who}", loss, at, tensor(value.sum()), tensor(slopes))
    for eps in (-1.5, 0.3):
        value = (1 - eps) * -np.log(p1[np.arange(6), y]).sum() - eps * np.log(p1).mean(1).sum()

        def line(z, eps=eps):
            return GeneralizedSmoothing(eps, reduction="sum")(z, y)

        slopes = p1 - (1 - eps) * onehot - eps / 5
        yield Case("generalized_smoothing", SECOND, f"negative{eps}", line, s, tensor(value), tensor(slopes))
    for temperature in (1.0, 20.0):  # of Tf-KD as in the paper
        p = softmax(t.numpy() / temperature)
        virtual = np.where(onehot == 1, 0.99, 0.01 / 4) ** (1 / temperature)
        virtual /= virtual.sum(1, keepdims=True)
        q = softmax(s.numpy() / temperature)
        for method, of_teacher in ((TfSelf, p), (TfReg, virtual)):
            value = (of_teacher * np.log(of_teacher / q)).sum()

            def tf(z, method=method, temperature=temperature):
                return method(temperature=temperature, reduction="sum")(z, t, y)

            slopes = (q - of_teacher) / temperature
            yield Case(method.name, SECOND, f"{method.name}{temperature}", tf, s, tensor(value), tensor(slopes))


GOLDEN_CASES = [*authors_cases(), *second_cases()]
