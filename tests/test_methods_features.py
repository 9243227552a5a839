"""The feature methods against their authors' numbers, against a second writing, and against what must hold for them."""

import json
import math
from pathlib import Path

import features_second as second
import numpy as np
import pytest
import torch
from torch import nn

from kd.losses.contrast import ContrastiveRepresentation
from kd.losses.features import AttentionTransfer, FlowOfSolution, Hint, NeuronSelectivity, VariationalInformation
from kd.losses.method import Seen, View
from kd.losses.relations import CorrelationCongruence, ProbabilisticKnowledge, Relational, SimilarityPreserving
from kd.losses.transforms import OverhaulFeature, ReusedClassifier, ReviewKD, normal_mean_of_negatives

GOLDEN = json.loads((Path(__file__).parent / "golden" / "authors_features.json").read_text())

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


def errors(case):
    """Relative errors of value and gradient, the gradient's in units of its largest element."""
    s, t = (torch.tensor(GOLDEN["inputs"][case["inputs"]][key], dtype=torch.float64) for key in "st")
    s.requires_grad_()
    method = AUTHORS[case["key"]](**case["hyper"])
    method.build(views(s, t), len(s))
    for name, _ in list(method.named_children()):
        setattr(method, name, nn.Identity())
    value = method(views(s, t)).mean()
    (gradient,) = torch.autograd.grad(value, s)
    want, want_gradient = case["expected"]["loss"], torch.tensor(case["expected"]["grad_s"], dtype=torch.float64)
    return abs(value.item() / want - 1), ((gradient - want_gradient).abs().max() / want_gradient.abs().max()).item()


def rows():
    """A row a golden key: method, number of cases, worst relative error of value and of gradient."""
    found = []
    for key in AUTHORS:
        cases = [case for case in GOLDEN["cases"] if case["key"] == key]
        values, gradients = zip(*(errors(case) for case in cases), strict=True)
        found.append((cases[0]["method"], len(cases), max(values), max(gradients)))
    return found


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["id"])
def test_released_forms_equal_the_authors_numbers(case):
    value, gradient = errors(case)
    assert value <= 1e-9
    assert gradient <= 1e-9


def test_every_golden_case_is_in_the_table():
    assert sum(row[1] for row in rows()) == len(GOLDEN["cases"]) == 13


# ---- a second writing


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


N, K, SAMPLES = 5, 4, 12


@pytest.fixture
def seen():
    """Two pairs of maps that differ in channels and size, and embeddings of other lengths."""
    student = View(randn(N, K), [randn(N, 3, 8, 8), randn(N, 4, 3, 4)], randn(N, 6), randn(K, 6), randn(K))
    maps = [randn(N, 4, 4, 4, seed=1), randn(N, 5, 4, 4, seed=2)]
    embedding, weight, bias = maps[-1].mean((2, 3)), randn(K, 5, seed=3), randn(K, seed=4)
    teacher = View(embedding @ weight.T + bias, maps, embedding, weight, bias)
    index = torch.tensor([3, 7, 0, 11, 5])
    return Seen(student, teacher, torch.tensor([0, 1, 2, 1, 3]), index, 3.0, 10)


def numpy(x):
    return x.detach().numpy()


def maps(seen):
    return [numpy(m) for m in seen.student.maps], [numpy(m) for m in seen.teacher.maps]


def built(method, seen):
    torch.manual_seed(0)
    method.build(seen, SAMPLES)
    return method


def weights(module):
    return [numpy(m.weight) for m in module.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]


def same(method, seen, want):
    torch.testing.assert_close(method(seen), torch.as_tensor(want), rtol=1e-10, atol=1e-12)


def test_hint(seen):
    method = built(Hint(), seen)
    (s, _), (t, _) = maps(seen)
    convolution = method.regressor[0]
    assert convolution.kernel_size == (5, 5)  # 8 - 4 + 1
    same(method, seen, second.hint(s, t, numpy(convolution.weight), numpy(convolution.bias)))


def test_hint_of_a_larger_teacher_averages_it_down(seen):
    method = built(Hint(layer=-1), seen)
    (_, s), (_, t) = maps(seen)
    convolution = method.regressor[0]
    same(method, seen, second.hint(s, t, numpy(convolution.weight), numpy(convolution.bias)))


def test_hint_released(seen):
    method = built(Hint(released=True), seen)
    (s, _), (t, _) = maps(seen)
    convolution = method.regressor[0]
    same(method, seen, second.hint_released(s, t, numpy(convolution.weight), numpy(convolution.bias), 2, 1))


def test_hint_released_doubles_a_student_of_half_the_size(seen):
    half = Seen(
        View(seen.student.logits, [randn(N, 3, 2, 2)]), View(seen.student.logits, [randn(N, 2, 4, 4)]), seen.target
    )
    method = built(Hint(layer=-1, released=True), half)
    assert isinstance(method.regressor[0], nn.ConvTranspose2d)
    assert method.regressor(half.student.maps[0]).shape == (N, 2, 4, 4)
    assert method(half).shape == (N,)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_at(seen, power):
    same(AttentionTransfer(power), seen, second.at(*maps(seen), power))


@pytest.mark.parametrize("released", [False, True])
def test_vid(seen, released):
    method = built(VariationalInformation(released=released), seen)
    for scale in method.scales:
        scale.data += torch.linspace(-1, 1, len(scale))
    layers = [weights(mean) for mean in method.means]
    same(method, seen, second.vid(*maps(seen), layers, [numpy(scale) for scale in method.scales], released))


def test_vid_starts_at_its_variance(seen):
    method = built(VariationalInformation(initial_variance=3.0), seen)
    for scale in method.scales:
        torch.testing.assert_close(nn.functional.softplus(scale) + 1e-5, torch.full_like(scale, 3))


def test_nst(seen):
    same(NeuronSelectivity(), seen, second.nst(*maps(seen)))


@pytest.mark.parametrize("released", [False, True])
def test_fsp(seen, released):
    student = View(seen.student.logits, [randn(N, 3, 8, 8), randn(N, 4, 4, 4)])
    teacher = View(seen.student.logits, [randn(N, 3, 6, 6), randn(N, 4, 5, 5)])
    pair = Seen(student, teacher, seen.target)
    same(FlowOfSolution(released=released), pair, second.fsp(*maps(pair), released))


def test_pkt(seen):
    same(ProbabilisticKnowledge(), seen, second.pkt(numpy(seen.student.embedding), numpy(seen.teacher.embedding)))


@pytest.mark.parametrize("ours", [{}, {"distance_weight": 3}, {"angle_weight": 0}])
def test_rkd(seen, ours):
    want = second.rkd(numpy(seen.student.embedding), numpy(seen.teacher.embedding), **ours)
    same(Relational(**ours), seen, want)


@pytest.mark.parametrize("ours", [{}, {"gamma": 1.5, "order": 4}])
def test_cc(seen, ours):
    want = second.cc(numpy(seen.student.embedding), numpy(seen.teacher.embedding), **ours)
    same(CorrelationCongruence(**ours), seen, want)


@pytest.mark.parametrize("released", [False, True])
def test_crd(seen, released):
    method = built(ContrastiveRepresentation(num_negatives=7, embed_dim=8, temperature=0.5, released=released), seen)
    memory_s, memory_t = numpy(method.memory_student).copy(), numpy(method.memory_teacher).copy()
    s, t = (
        np.stack([x / np.linalg.norm(x) for x in numpy(layer(x))])
        for layer, x in (
            (method.embed_student, seen.student.embedding),
            (method.embed_teacher, seen.teacher.embedding),
        )
    )
    index, constants = numpy(seen.index), (1.0, 1.0)
    method.labels[seen.index] = seen.target
    torch.manual_seed(1)
    negatives = numpy(method.negatives(seen.target))
    if released:  # M times the mean exponential of the first batch
        chosen = np.concatenate([index[:, None], negatives], 1)
        constants = tuple(
            SAMPLES * np.mean([[np.exp(x[i] @ m[j] / 0.5) for j in chosen[i]] for i in range(N)])
            for x, m in ((s, memory_t), (t, memory_s))
        )
    torch.manual_seed(1)
    same(method, seen, second.crd(s, t, memory_s, memory_t, index, negatives, 0.5, constants))

    # The memory afterwards: the batch's rows half old, half new, of length 1; the others as they were.
    for memory, old, new in ((method.memory_student, memory_s, s), (method.memory_teacher, memory_t, t)):
        want = old.copy()
        for i, x in zip(index, new, strict=True):
            want[i] = (old[i] + x) / 2
            want[i] /= np.linalg.norm(want[i])
        np.testing.assert_allclose(numpy(memory), want, rtol=1e-10)


def test_crd_keeps_its_first_constants_and_its_memory_in_eval_mode(seen):
    method = built(ContrastiveRepresentation(num_negatives=7, embed_dim=8, released=True), seen)
    method(seen)
    first = method.log_constants.clone()
    method(seen)
    assert torch.equal(method.log_constants, first)
    memory = method.memory_student.clone()
    assert method.eval()(seen).isfinite()
    assert torch.equal(method.memory_student, memory)


def test_crd_draws_evenly_from_other_labels(seen):
    method = built(ContrastiveRepresentation(num_negatives=3000), seen)
    method.labels[:] = torch.tensor([2, 0, 1, 0, 1, 1, 3, 0, 2, 1, 3, 0])
    drawn = method.negatives(torch.tensor([0, 1, 2, 3]))
    for label, row in enumerate(drawn):
        others = (method.labels != label).nonzero().flatten()
        counts = torch.bincount(row, minlength=SAMPLES)
        assert not counts[method.labels == label].any()
        expected = 3000 / len(others)
        assert ((counts[others] - expected).abs() < 5 * expected**0.5).all()


def test_ofd(seen):
    method = built(OverhaulFeature(), seen)
    layers = [weights(connector)[0] for connector in method.connectors]
    for i, t in enumerate(maps(seen)[1]):
        want = [channel[channel < 0].mean() for channel in t.transpose(1, 0, 2, 3)]
        np.testing.assert_allclose(numpy(method.get_buffer(f"margin{i}")).ravel(), want, rtol=1e-6)
    margins = [numpy(method.get_buffer(f"margin{i}")).ravel() for i in range(2)]
    same(method, seen, second.ofd(*maps(seen), layers, margins))


def test_ofd_margin_of_a_normal_is_the_mean_of_its_negative_half():
    mean, deviation = torch.tensor([0.0, 1.0, -2.0, 0.5]), torch.tensor([1.0, -2.0, 0.5, 1.0])
    x = torch.linspace(-30, 0, 300_001, dtype=torch.float64)[:, None]
    density = torch.exp(-(((x - mean) / deviation) ** 2) / 2)
    want = (x * density).sum(0) / density.sum(0)
    torch.testing.assert_close(normal_mean_of_negatives(mean, deviation), want, rtol=1e-3, atol=1e-3)
    assert normal_mean_of_negatives(torch.tensor([4.0]), torch.tensor([1.0])) == -3  # P(x < 0) = 3e-5


def test_ofd_takes_margins_from_batch_normalisations(seen):
    method = built(OverhaulFeature(), seen)
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(5)]
    method.set_margins(norms)
    torch.testing.assert_close(method.margin1, torch.full((5, 1, 1), -((2 / math.pi) ** 0.5), dtype=torch.float64))


def test_reviewkd(seen):
    method = built(ReviewKD(), seen)
    fusions = []
    for fusion in method.fusions:
        weigh = (None, None) if fusion.weigh is None else (numpy(fusion.weigh[0].weight), numpy(fusion.weigh[0].bias))
        fusions.append((*weights(fusion.enter), *weights(fusion.leave), *weigh))
    s, t = maps(seen)
    s, t = [*s, numpy(seen.student.embedding)[:, :, None, None]], [*t, numpy(seen.teacher.embedding)[:, :, None, None]]
    same(method, seen, second.reviewkd(s, t, fusions))


def test_simkd(seen):
    method = built(ReusedClassifier(), seen)
    (_, s), (_, t) = maps(seen)
    same(method, seen, second.simkd(s, t, weights(method.projector)))


def test_simkd_classifies_as_the_teacher_where_the_maps_agree(seen):
    method = built(ReusedClassifier(), seen)
    method.projector = nn.Identity()
    torch.testing.assert_close(method.classify(seen.teacher), seen.teacher.logits)
    assert {"weight", "bias"} <= method.state_dict().keys()


def test_simkd_refuses_a_map_that_the_classifier_does_not_read(seen):
    with pytest.raises(ValueError, match=r"simkd: the teacher's map -2 has 4 channels and its classifier reads 5"):
        built(ReusedClassifier(layer=-2), seen)
    other = View(seen.teacher.logits + 1, seen.teacher.maps, None, seen.teacher.weight, seen.teacher.bias)
    with pytest.raises(ValueError, match="does not read the average of map -1"):
        built(ReusedClassifier(), Seen(seen.student, other, seen.target))


# ---- identities


def orthogonal(d, seed=0):
    return torch.linalg.qr(randn(d, d, seed=seed))[0]


def embedded(seen, s, t):
    logits, weight = seen.student.logits, torch.ones(K, 1)
    return Seen(View(logits, [], s, weight), View(logits, [], t, weight), seen.target)


@pytest.mark.parametrize("method", [Relational(), Relational(released=True)], ids=["paper", "released"])
def test_rkd_is_blind_to_shift_rotation_and_scale(seen, method):
    t = seen.teacher.embedding
    moved = 3 * t @ orthogonal(5) + randn(5)
    assert method(embedded(seen, moved, t)) < 1e-12
    torch.testing.assert_close(
        method(embedded(seen, moved, seen.student.embedding)), method(embedded(seen, t, seen.student.embedding))
    )
    assert method(embedded(seen, t * torch.linspace(1, 2, 5), t)) > 1e-3  # what it does see


@pytest.mark.parametrize("method", [ProbabilisticKnowledge(), CorrelationCongruence()], ids=["pkt", "cc"])
def test_pkt_and_cc_are_blind_to_rotation_and_the_scale_of_rows(seen, method):
    t = seen.teacher.embedding
    moved = torch.linspace(1, 4, N)[:, None] * t @ orthogonal(5)
    assert method(embedded(seen, moved, t)).abs() < 1e-12
    assert method(embedded(seen, t + randn(5), t)) > 1e-4  # a shift it sees


def test_sp_is_blind_to_rotation_and_scale(seen):
    t = seen.teacher.maps[0]
    moved = 2 * (t.flatten(1) @ orthogonal(64)).reshape(t.shape)
    assert SimilarityPreserving()(views(moved, t)) < 1e-12
    assert SimilarityPreserving()(views(t * torch.linspace(1, 2, N)[:, None, None, None], t)) > 1e-4


def test_at_is_blind_to_the_order_of_channels_and_to_positive_scale(seen):
    t = seen.teacher.maps[0]
    moved = 5 * t[:, torch.tensor([2, 0, 3, 1])] * torch.linspace(1, 3, N)[:, None, None, None]
    torch.testing.assert_close(AttentionTransfer()(views(moved, t)), torch.zeros(N, dtype=torch.float64))
    assert (AttentionTransfer()(views(t.flip(-1), t)) > 0.1).all()


def test_nst_is_blind_to_the_order_and_scale_of_channels(seen):
    t = seen.teacher.maps[0]
    moved = t[:, torch.tensor([2, 0, 3, 1])] * torch.tensor([1.0, -2, 3, 4])[:, None, None]
    doubled = torch.cat([moved, t], 1)
    for s in (moved, doubled):
        torch.testing.assert_close(NeuronSelectivity()(views(s, t)), torch.zeros(N, dtype=torch.float64))


def test_ofd_asks_nothing_of_a_student_below_negative_values(seen):
    method = built(OverhaulFeature(), seen)
    method.connectors = nn.ModuleList([nn.Identity(), nn.Identity()])
    t = seen.teacher.maps
    below = [torch.where(m > 0, m, m - 5) for m in t]
    assert method(Seen(View(seen.student.logits, below), seen.teacher, seen.target)) == 0
    above = [torch.where(m > 0, m, m + 0.1) for m in t]
    assert method(Seen(View(seen.student.logits, above), seen.teacher, seen.target)) > 0


def test_released_means_of_rkd_are_smaller_by_the_share_of_zeros(seen):
    for ours, share in (({"angle_weight": 0}, (N - 1) / N), ({"distance_weight": 0}, (N - 1) * (N - 2) / N**2)):
        paper, released = Relational(**ours)(seen), Relational(**ours, released=True)(seen)
        torch.testing.assert_close(released, paper * share)
