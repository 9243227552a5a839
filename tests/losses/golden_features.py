"""Feature methods: the numbers of their authors' code, and a second writing in NumPy (features_second)."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import features_second as second
import numpy as np
import torch
from golden_table import SECOND, Case, slope
from torch import nn

from kd.losses.methods.base import Seen, Setup, View
from kd.losses.methods.connectors import OverhaulFeature, ReusedClassifier, ReviewKD
from kd.losses.methods.contrastive import ContrastiveRepresentation
from kd.losses.methods.features import (
    AttentionTransfer,
    FlowOfSolution,
    Hint,
    NeuronSelectivity,
    VariationalInformation,
)
from kd.losses.methods.relations import CorrelationCongruence, ProbabilisticKnowledge, Relational, SimilarityPreserving

FILE = json.loads((Path(__file__).parent.parent / "golden" / "authors_features.json").read_text())

# The method that gives a golden case's number. Learned layers become the identity: the numbers are without them.
AUTHORS = {
    "at": lambda p: AttentionTransfer(power=p, released=True),
    "at_orig": lambda: AttentionTransfer(released=True),
    "sp": SimilarityPreserving,
    "rkd": lambda w_d, w_a: Relational(distance_weight=w_d, angle_weight=w_a, released=True),
    "rkd_d": lambda: Relational(distance_weight=1, angle_weight=0, released=True),
    "rkd_a": lambda: Relational(distance_weight=0, angle_weight=1, released=True),
    "pkt": lambda: ProbabilisticKnowledge(released=True),
    "pkt_orig": lambda: ProbabilisticKnowledge(released=True),
    "cc": lambda: CorrelationCongruence(released=True),
    "hint": lambda: Hint(layer=-1, released=True),
}


def views(s, t):
    """Seen from features alone: vectors are embeddings, and maps of one position."""
    n = len(s)
    logits = torch.zeros(n, 3, dtype=s.dtype)

    def view(x):
        return View(logits, [x if x.ndim == 4 else x[:, :, None, None]], x.flatten(1))

    return Seen(view(s), view(t), torch.zeros(n, dtype=torch.int64))


def authors_case(case):
    s, t = (torch.tensor(FILE["inputs"][case["inputs"]][key], dtype=torch.float64) for key in "st")
    method = AUTHORS[case["key"]](**case["hyper"])
    method.build(Setup(views(s, t), len(s)))
    for name, _ in list(method.named_children()):
        setattr(method, name, nn.Identity())
    numbers = (torch.tensor(case["expected"][key], dtype=torch.float64) for key in ("loss", "grad_s"))
    source = f"{case['repo']} {case['path']}"
    return Case(method.name, source, case["id"], lambda x: method(views(x, t)).mean(), s, *numbers)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


N, K, SAMPLES = 5, 4, 12


def two_pairs():
    """Two pairs of maps that differ in channels and size, and embeddings of other lengths."""
    student = View(randn(N, K), [randn(N, 3, 8, 8), randn(N, 4, 3, 4)], randn(N, 6), randn(K, 6), randn(K))
    maps = [randn(N, 4, 4, 4, seed=1), randn(N, 5, 4, 4, seed=2)]
    embedding, weight, bias = maps[-1].mean((2, 3)), randn(K, 5, seed=3), randn(K, seed=4)
    teacher = View(embedding @ weight.T + bias, maps, embedding, weight, bias)
    index = torch.tensor([3, 7, 0, 11, 5])
    return Seen(student, teacher, torch.tensor([0, 1, 2, 1, 3]), index, 3.0, 10)


def numpy(x):
    return x.detach().numpy()


def built(method, seen):
    torch.manual_seed(0)
    method.build(Setup(seen, SAMPLES))
    return method


def weights(module):
    return [numpy(m.weight) for m in module.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]


def of_hint(method, maps, seen, form=second.hint):
    convolution = method.regressor[0]
    more = {} if form is second.hint else {"stride": 2, "padding": 1}
    t = numpy(seen.teacher.maps[method.layer])
    return form(maps[:-1][method.layer], t, numpy(convolution.weight), numpy(convolution.bias), **more)


def of_maps(form, **more):
    return lambda method, maps, seen: form(maps[:-1], [numpy(m) for m in seen.teacher.maps], **more)


def of_embeddings(form, **more):
    return lambda method, maps, seen: form(maps[-1], numpy(seen.teacher.embedding), **more)


def of_vid(method, maps, seen):
    layers, scales = [weights(mean) for mean in method.means], [numpy(scale) for scale in method.scales]
    return second.vid(maps[:-1], [numpy(m) for m in seen.teacher.maps], layers, scales, method.released)


def of_crd(method, maps, seen):
    """From the memory and the draws that a call after `torch.manual_seed(1)` finds."""
    layers = (method.embed_student, maps[-1]), (method.embed_teacher, numpy(seen.teacher.embedding))
    s, t = (
        np.stack([v / np.linalg.norm(v) for v in x @ numpy(layer.weight).T + numpy(layer.bias)]) for layer, x in layers
    )
    index, memories = numpy(seen.index), (numpy(method.memory_student), numpy(method.memory_teacher))
    method.labels[seen.index] = seen.target
    torch.manual_seed(1)
    negatives = numpy(method.negatives(seen.target))
    return second.crd(s, t, *memories, index, negatives, 0.5, numpy(method.log_constants.exp()))


def of_ofd(method, maps, seen):
    layers = [weights(connector)[0] for connector in method.connectors]
    margins = [numpy(method.get_buffer(f"margin{i}")).ravel() for i in range(2)]
    return second.ofd(maps[:-1], [numpy(m) for m in seen.teacher.maps], layers, margins)


def of_reviewkd(method, maps, seen):
    fusions = []
    for fusion in method.fusions:
        weigh = (None, None) if fusion.weigh is None else (numpy(fusion.weigh[0].weight), numpy(fusion.weigh[0].bias))
        fusions.append((*weights(fusion.enter), *weights(fusion.leave), *weigh))
    t = [*(numpy(m) for m in seen.teacher.maps), numpy(seen.teacher.embedding)[:, :, None, None]]
    return second.reviewkd([*maps[:-1], maps[-1][:, :, None, None]], t, fusions)


def of_simkd(method, maps, seen):
    return second.simkd(maps[-2], numpy(seen.teacher.maps[-1]), weights(method.projector))


def equal_channels():
    seen = two_pairs()
    student = View(seen.student.logits, [randn(N, 3, 8, 8), randn(N, 4, 4, 4)], seen.student.embedding)
    teacher = View(seen.student.logits, [randn(N, 3, 6, 6), randn(N, 4, 5, 5)], seen.teacher.embedding)
    return Seen(student, teacher, seen.target)


def vid(released):
    """With variances that differ from channel to channel."""

    def prepare(method):
        for scale in method.scales:
            scale.data += torch.linspace(-1, 1, len(scale))

    return lambda: VariationalInformation(released=released), prepare


def crd(released):
    def prepare(method):  # the constants of a first batch, from which the derivative is taken, stay
        torch.manual_seed(1)
        before = {key: x.clone() for key, x in method.state_dict().items()}
        method(two_pairs())
        method.load_state_dict(before | {"log_constants": method.log_constants.clone()})

    return lambda: ContrastiveRepresentation(7, 0.5, embed_dim=8, released=released), prepare


def plain(make):
    return make, lambda method: None


WRITINGS = {
    # name: (how the method is made and prepared), its second writing, what it sees
    "hint": (plain(Hint), of_hint, two_pairs),
    "hint of a larger teacher": (plain(lambda: Hint(layer=-1)), of_hint, two_pairs),
    "hint released": (
        plain(lambda: Hint(released=True)),
        lambda *given: of_hint(*given, form=second.hint_released),
        two_pairs,
    ),
    "at": (plain(AttentionTransfer), of_maps(second.at), two_pairs),
    "at power 1": (plain(lambda: AttentionTransfer(1.0)), of_maps(second.at, power=1.0), two_pairs),
    "at power 3": (plain(lambda: AttentionTransfer(3.0)), of_maps(second.at, power=3.0), two_pairs),
    "vid": (vid(False), of_vid, two_pairs),
    "vid released": (vid(True), of_vid, two_pairs),
    "nst": (plain(NeuronSelectivity), of_maps(second.nst), two_pairs),
    "fsp": (plain(FlowOfSolution), of_maps(second.fsp, released=False), equal_channels),
    "fsp released": (plain(lambda: FlowOfSolution(released=True)), of_maps(second.fsp, released=True), equal_channels),
    "pkt": (plain(ProbabilisticKnowledge), of_embeddings(second.pkt), two_pairs),
    "rkd": (plain(Relational), of_embeddings(second.rkd), two_pairs),
    "rkd distance 3": (plain(lambda: Relational(3.0)), of_embeddings(second.rkd, distance_weight=3), two_pairs),
    "rkd angle 0": (plain(lambda: Relational(angle_weight=0.0)), of_embeddings(second.rkd, angle_weight=0), two_pairs),
    "cc": (plain(CorrelationCongruence), of_embeddings(second.cc), two_pairs),
    "cc order 4": (
        plain(lambda: CorrelationCongruence(1.5, 4)),
        of_embeddings(second.cc, gamma=1.5, order=4),
        two_pairs,
    ),
    "crd": (crd(False), of_crd, two_pairs),
    "crd released": (crd(True), of_crd, two_pairs),
    "ofd": (plain(OverhaulFeature), of_ofd, two_pairs),
    "reviewkd": (plain(ReviewKD), of_reviewkd, two_pairs),
    "simkd": (plain(ReusedClassifier), of_simkd, two_pairs),
}


def second_case(name):
    """Value at the drawn features, derivative along a drawn direction of all of the student's."""
    (make, prepare), written, see = WRITINGS[name]
    seen = see()
    method = built(make(), seen)
    prepare(method)
    start = [*seen.student.maps, seen.student.embedding]
    directions = [randn(*x.shape, seed=7) for x in start]

    def loss(way):
        *maps, embedding = (x + way * direction for x, direction in zip(start, directions, strict=True))
        student = replace(seen.student, maps=maps, embedding=embedding)
        torch.manual_seed(1)
        return copy.deepcopy(method)(replace(seen, student=student)).sum()

    def theirs(way):
        moved = [numpy(x) + way * numpy(direction) for x, direction in zip(start, directions, strict=True)]
        return np.sum(written(method, moved, seen))

    at, *numbers = (torch.tensor(float(x), dtype=torch.float64) for x in (0, theirs(0.0), slope(theirs)))
    return Case(method.name, SECOND, name, loss, at, *numbers)


GOLDEN_CASES = [*map(authors_case, FILE["cases"]), *map(second_case, WRITINGS)]
