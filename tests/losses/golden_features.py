"""Feature methods: the numbers of their authors' code, and a second writing in NumPy (features_second)."""

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import features_second as second
import numpy as np
import torch
from golden_table import SECOND, Case, slope, tensor
from golden_table import authors_case as stored_case
from torch import nn

from kd.losses.methods.base import Seen, View
from kd.losses.methods.registry import library

FILE = json.loads((Path(__file__).parent.parent / "golden" / "authors_features.json").read_text())

# The method and the fields that give a golden case's number. Learned layers become the identity, as in the numbers.
AUTHORS = {
    "at": lambda p: ("at", {"power": p, "released": True}),
    "at_orig": lambda: ("at", {"released": True}),
    "sp": lambda: ("sp", {}),
    "rkd": lambda w_d, w_a: ("rkd", {"distance_weight": w_d, "angle_weight": w_a, "released": True}),
    "rkd_d": lambda: ("rkd", {"distance_weight": 1, "angle_weight": 0, "released": True}),
    "rkd_a": lambda: ("rkd", {"distance_weight": 0, "angle_weight": 1, "released": True}),
    "pkt": lambda: ("pkt", {"released": True}),
    "pkt_orig": lambda: ("pkt", {"released": True}),
    "cc": lambda: ("cc", {"released": True}),
    "hint": lambda: ("hint", {"layer": -1, "released": True}),
}


def authors_case(case):
    s, t = (tensor(FILE["inputs"][case["inputs"]][key]) for key in "st")
    name, settings = AUTHORS[case["key"]](**case["hyper"])
    method = library()[name](**settings)
    if "maps" in method.needs:
        s, t = (x if x.ndim == 4 else x[:, :, None, None] for x in (s, t))  # vectors are maps of one position
    else:
        s, t = s.flatten(1), t.flatten(1)
    method(s, t)
    for learned, _ in list(method.named_children()):
        setattr(method, learned, nn.Identity())
    value, slopes = (case["expected"][key] for key in ("loss", "grad_s"))
    return stored_case(case, method.name, lambda x: method(x, t), s, tensor(value), tensor(slopes).reshape(s.shape))


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
    return Seen(student, teacher, torch.tensor([0, 1, 2, 1, 3]), index, 3.0, 10, num_samples=SAMPLES)


def numpy(x):
    return x.detach().numpy()


def built(method, seen):
    torch.manual_seed(0)
    method.build(seen)
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


def called(method, seen, student):
    """The sum over examples of what a user calls, of what the method needs of the batch."""
    method.reduction = "mean" if "batch" in method.needs else "sum"
    more = {"index": seen.index, "num_samples": seen.num_samples} if "index" in method.needs else {}
    views = student, seen.teacher
    if method.needs & {"maps", "embedding", "weight"} == {"maps"}:
        views = [view.maps for view in views]
    elif method.needs & {"maps", "embedding", "weight"} == {"embedding"}:
        views = [view.embedding for view in views]
    return method(*views, seen.target if "labels" in method.needs else None, **more)


def prepare(method):
    """Give vid's channels different variances; keep crd's constants of a first batch, at which the derivative is."""
    if method.name == "vid":
        for scale in method.scales:
            scale.data += torch.linspace(-1, 1, len(scale))
    if method.name == "crd":
        torch.manual_seed(1)
        before = {key: x.clone() for key, x in method.state_dict().items()}
        called(method, two_pairs(), two_pairs().student)
        method.load_state_dict(before | {"log_constants": method.log_constants.clone()})


CRD = {"num_negatives": 7, "temperature": 0.5, "embed_dim": 8}
WRITINGS = {
    # name, which begins with the method's: its fields and its second writing
    "hint": ({}, of_hint),
    "hint of a larger teacher": ({"layer": -1}, of_hint),
    "hint released": ({"released": True}, partial(of_hint, form=second.hint_released)),
    "at": ({}, of_maps(second.at)),
    "at power 1": ({"power": 1.0}, of_maps(second.at, power=1.0)),
    "at power 3": ({"power": 3.0}, of_maps(second.at, power=3.0)),
    "vid": ({}, of_vid),
    "vid released": ({"released": True}, of_vid),
    "nst": ({}, of_maps(second.nst)),
    "fsp": ({}, of_maps(second.fsp, released=False)),
    "fsp released": ({"released": True}, of_maps(second.fsp, released=True)),
    "pkt": ({}, of_embeddings(second.pkt)),
    "rkd": ({}, of_embeddings(second.rkd)),
    "rkd distance 3": ({"distance_weight": 3.0}, of_embeddings(second.rkd, distance_weight=3)),
    "rkd angle 0": ({"angle_weight": 0.0}, of_embeddings(second.rkd, angle_weight=0)),
    "cc": ({}, of_embeddings(second.cc)),
    "cc order 4": ({"gamma": 1.5, "order": 4}, of_embeddings(second.cc, gamma=1.5, order=4)),
    "crd": (CRD, of_crd),
    "crd released": (CRD | {"released": True}, of_crd),
    "ofd": ({}, of_ofd),
    "reviewkd": ({}, of_reviewkd),
    "simkd": ({}, of_simkd),
}


def second_case(name):
    """Value at the drawn features, derivative along a drawn direction of all of the student's."""
    settings, written = WRITINGS[name]
    method = library()[name.split()[0]](**settings)
    seen = equal_channels() if method.name == "fsp" else two_pairs()
    built(method, seen)
    prepare(method)
    start = [*seen.student.maps, seen.student.embedding]
    directions = [randn(*x.shape, seed=7) for x in start]

    def loss(way):
        *maps, embedding = (x + way * direction for x, direction in zip(start, directions, strict=True))
        student = replace(seen.student, maps=maps, embedding=embedding)
        torch.manual_seed(1)
        return called(copy.deepcopy(method), seen, student)

    def theirs(way):
        moved = [numpy(x) + way * numpy(direction) for x, direction in zip(start, directions, strict=True)]
        return np.sum(written(method, moved, seen))

    at, *numbers = (tensor(float(x)) for x in (0, theirs(0.0), slope(theirs)))
    return Case(method.name, SECOND, name, loss, at, *numbers)


GOLDEN_CASES = [*map(authors_case, FILE["cases"]), *map(second_case, WRITINGS)]
