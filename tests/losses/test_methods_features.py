"""The feature methods against their authors' numbers, against a second writing, and against what must hold for them."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import features_second as second
import numpy as np
import pytest
import torch
from golden_table import SECOND, TOLERANCE, Case, errors, slope
from torch import nn

from kd.losses.methods.base import Seen, Setup, View
from kd.losses.methods.connectors import OverhaulFeature, ReusedClassifier, ReviewKD, normal_mean_of_negatives
from kd.losses.methods.contrastive import ContrastiveRepresentation
from kd.losses.methods.features import (
    AttentionTransfer,
    FlowOfSolution,
    Hint,
    NeuronSelectivity,
    VariationalInformation,
)
from kd.losses.methods.relations import CorrelationCongruence, ProbabilisticKnowledge, Relational, SimilarityPreserving

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "authors_features.json").read_text())

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
    s, t = (torch.tensor(GOLDEN["inputs"][case["inputs"]][key], dtype=torch.float64) for key in "st")
    method = AUTHORS[case["key"]](**case["hyper"])
    method.build(Setup(views(s, t), len(s)))
    for name, _ in list(method.named_children()):
        setattr(method, name, nn.Identity())
    numbers = (torch.tensor(case["expected"][key], dtype=torch.float64) for key in ("loss", "grad_s"))
    source = f"{case['repo']} {case['path']}"
    return Case(method.name, source, case["id"], lambda x: method(views(x, t)).mean(), s, *numbers)


AUTHORS_CASES = [authors_case(case) for case in GOLDEN["cases"]]


@pytest.mark.parametrize("case", AUTHORS_CASES, ids=lambda case: case.name)
def test_released_forms_equal_the_authors_numbers(case):
    assert max(errors(case)) <= TOLERANCE


def test_every_golden_case_is_compared():
    assert {case["key"] for case in GOLDEN["cases"]} == set(AUTHORS)
    assert len(AUTHORS_CASES) == len(GOLDEN["cases"]) == 13


# ---- a second writing


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


@pytest.fixture
def seen():
    return two_pairs()


def numpy(x):
    return x.detach().numpy()


def built(method, seen):
    torch.manual_seed(0)
    method.build(Setup(seen, SAMPLES))
    return method


def weights(module):
    return [numpy(m.weight) for m in module.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]


# A method's value by the second writing, from the student's arrays (its maps, then its embedding) and what was seen.


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


SECOND_CASES = [second_case(name) for name in WRITINGS]
GOLDEN_CASES = AUTHORS_CASES + SECOND_CASES


@pytest.mark.parametrize("case", SECOND_CASES, ids=lambda case: case.name)
def test_a_second_writing(case):
    assert max(errors(case)) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in WRITINGS if WRITINGS[name][0][0]().per_example])
def test_a_second_writing_row_by_row(name, seen):
    (make, prepare), written, see = WRITINGS[name]
    seen = see()
    method = built(make(), seen)
    prepare(method)
    maps = [numpy(x) for x in (*seen.student.maps, seen.student.embedding)]
    torch.testing.assert_close(method(seen), torch.as_tensor(written(method, maps, seen)), rtol=1e-10, atol=1e-12)


def test_hint_has_the_papers_kernel_and_the_released_codes_strides(seen):
    assert built(Hint(), seen).regressor[0].kernel_size == (5, 5)  # 8 - 4 + 1
    half = Seen(
        View(seen.student.logits, [randn(N, 3, 2, 2)]), View(seen.student.logits, [randn(N, 2, 4, 4)]), seen.target
    )
    method = built(Hint(layer=-1, released=True), half)
    assert isinstance(method.regressor[0], nn.ConvTranspose2d)
    assert method.regressor(half.student.maps[0]).shape == (N, 2, 4, 4)
    assert method(half).shape == (N,)


def test_vid_starts_at_its_variance(seen):
    method = built(VariationalInformation(initial_variance=3.0), seen)
    for scale in method.scales:
        torch.testing.assert_close(nn.functional.softplus(scale) + 1e-5, torch.full_like(scale, 3))


def in_common_space(method, seen):
    """s and t of crd as arrays."""
    pairs = (method.embed_student, seen.student.embedding), (method.embed_teacher, seen.teacher.embedding)
    return (np.stack([x / np.linalg.norm(x) for x in numpy(layer(x))]) for layer, x in pairs)


def test_crd_sets_its_constants_from_the_first_batch(seen):
    method = built(ContrastiveRepresentation(7, 0.5, embed_dim=8, released=True), seen)
    s, t = in_common_space(method, seen)
    index, memories = numpy(seen.index), (numpy(method.memory_teacher).copy(), numpy(method.memory_student).copy())
    method.labels[seen.index] = seen.target
    torch.manual_seed(1)
    chosen = np.concatenate([index[:, None], numpy(method.negatives(seen.target))], 1)
    torch.manual_seed(1)
    method(seen)
    for x, memory, constant in zip((s, t), memories, method.log_constants, strict=True):
        exponentials = [[np.exp(x[i] @ memory[j] / 0.5) for j in chosen[i]] for i in range(N)]
        assert constant.item() == pytest.approx(math.log(SAMPLES * np.mean(exponentials)), rel=1e-12)


@pytest.mark.parametrize("released", [False, True])
def test_crd_remembers_the_batch(seen, released):
    """Its rows half old, half new, of length 1; the others as they were."""
    method = built(ContrastiveRepresentation(7, 0.5, embed_dim=8, released=released), seen)
    before = numpy(method.memory_student).copy(), numpy(method.memory_teacher).copy()
    new = in_common_space(method, seen)
    method(seen)
    for memory, old, rows in zip((method.memory_student, method.memory_teacher), before, new, strict=True):
        want = old.copy()
        for i, x in zip(numpy(seen.index), rows, strict=True):
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


def test_ofd_margins_are_means_of_negative_values(seen):
    method = built(OverhaulFeature(), seen)
    for i, t in enumerate(seen.teacher.maps):
        want = [channel[channel < 0].mean() for channel in numpy(t).transpose(1, 0, 2, 3)]
        np.testing.assert_allclose(numpy(method.get_buffer(f"margin{i}")).ravel(), want, rtol=1e-6)


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


def test_simkd_classifies_as_the_teacher_where_the_maps_agree(seen):
    method = built(ReusedClassifier(), seen)
    method.projector = nn.Identity()
    torch.testing.assert_close(method.classify(seen.teacher), seen.teacher.logits)
    assert {"weight", "bias"} <= method.state_dict().keys()


def test_simkd_refuses_a_map_that_the_classifier_does_not_read(seen):
    with pytest.raises(ValueError, match="reads 5 channels, and not the average of map -2 with 4"):
        built(ReusedClassifier(layer=-2), seen)
    other = View(seen.teacher.logits + 1, seen.teacher.maps, None, seen.teacher.weight, seen.teacher.bias)
    with pytest.raises(ValueError, match="not the average of map -1"):
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
