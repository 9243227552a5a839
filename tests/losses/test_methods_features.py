"""The learned parts, memories and margins of the feature methods."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from golden_features import SAMPLES, N, built, numpy, randn, two_pairs
from torch import nn

from kd.losses.methods.base import Seen, View
from kd.losses.methods.connectors import OFD, SimKD
from kd.losses.methods.contrastive import CRD
from kd.losses.methods.features import Hint
from kd.losses.methods.relations import RKD


@pytest.fixture
def seen():
    return two_pairs()


def test_hint_has_the_papers_kernel_and_the_released_codes_strides(seen):
    assert built(Hint(), seen).regressor[0].kernel_size == (5, 5)  # 8 - 4 + 1
    half = Seen(
        View(seen.student.logits, [randn(N, 3, 2, 2)]), View(seen.student.logits, [randn(N, 2, 4, 4)]), seen.target
    )
    method = built(Hint(layer=-1, released=True), half)
    assert isinstance(method.regressor[0], nn.ConvTranspose2d)
    assert method.regressor(half.student.maps[0]).shape == (N, 2, 4, 4)
    assert method.evaluate(half).shape == (N,)


def in_common_space(method, seen):
    """s and t of crd as arrays."""
    pairs = (method.embed_student, seen.student.embedding), (method.embed_teacher, seen.teacher.embedding)
    return (np.stack([x / np.linalg.norm(x) for x in numpy(layer(x))]) for layer, x in pairs)


def test_crd_sets_its_constants_from_the_first_batch(seen):
    method = built(CRD(7, 0.5, embed_dim=8, released=True), seen)
    s, t = in_common_space(method, seen)
    index, memories = numpy(seen.index), (numpy(method.memory_teacher).copy(), numpy(method.memory_student).copy())
    method.labels[seen.index] = seen.target
    torch.manual_seed(1)
    chosen = np.concatenate([index[:, None], numpy(method.negatives(seen.target))], 1)
    torch.manual_seed(1)
    method.evaluate(seen)
    for x, memory, constant in zip((s, t), memories, method.log_constants, strict=True):
        exponentials = [[np.exp(x[i] @ memory[j] / 0.5) for j in chosen[i]] for i in range(N)]
        assert constant.item() == pytest.approx(math.log(SAMPLES * np.mean(exponentials)), rel=1e-12)


@pytest.mark.parametrize("released", [False, True])
def test_crd_remembers_the_batch(seen, released):
    """Its rows half old, half new, of length 1; the others as they were."""
    method = built(CRD(7, 0.5, embed_dim=8, released=released), seen)
    before = numpy(method.memory_student).copy(), numpy(method.memory_teacher).copy()
    new = in_common_space(method, seen)
    method.evaluate(seen)
    for memory, old, rows in zip((method.memory_student, method.memory_teacher), before, new, strict=True):
        want = old.copy()
        for i, x in zip(numpy(seen.index), rows, strict=True):
            want[i] = (old[i] + x) / 2
            want[i] /= np.linalg.norm(want[i])
        np.testing.assert_allclose(numpy(memory), want, rtol=1e-10)


def test_crd_draws_evenly_from_other_labels(seen):
    method = built(CRD(num_negatives=3000), seen)
    method.labels[:] = torch.tensor([2, 0, 1, 0, 1, 1, 3, 0, 2, 1, 3, 0])
    drawn = method.negatives(torch.tensor([0, 1, 2, 3]))
    for label, row in enumerate(drawn):
        others = (method.labels != label).nonzero().flatten()
        counts = torch.bincount(row, minlength=SAMPLES)
        assert not counts[method.labels == label].any()
        expected = 3000 / len(others)
        assert ((counts[others] - expected).abs() < 5 * expected**0.5).all()


def test_ofd_margins_are_means_of_negative_values(seen):
    method = built(OFD(), seen)
    for i, t in enumerate(seen.teacher.maps):
        want = [channel[channel < 0].mean() for channel in numpy(t).transpose(1, 0, 2, 3)]
        np.testing.assert_allclose(numpy(method.get_buffer(f"margin{i}")).ravel(), want, rtol=1e-6)


def test_simkd_refuses_a_map_that_the_classifier_does_not_read(seen):
    with pytest.raises(ValueError, match="reads 5 channels, and not the average of map -2 with 4"):
        built(SimKD(layer=-2), seen)
    other = View(seen.teacher.logits + 1, seen.teacher.maps, None, seen.teacher.weight, seen.teacher.bias)
    with pytest.raises(ValueError, match="not the average of map -1"):
        built(SimKD(), Seen(seen.student, other, seen.target))


def test_rkd_of_a_collapsed_student_counts_every_pair_and_triple_once():
    """All its distances and cosines are 0, so that the means are those of the teacher's: the zeros of i = j and j = k
    are not among them."""
    n, t = 5, randn(5, 3, seed=4)
    lengths = np.array([np.linalg.norm(numpy(t[i] - t[j])) for i, j in permutations(range(n), 2)])

    def cosine(i, j, k):
        a, b = numpy(t[j] - t[i]), numpy(t[k] - t[i])
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    def huber(x):
        return np.where(abs(x) < 1, x**2 / 2, abs(x) - 0.5)

    cosines = np.array([cosine(*each) for each in permutations(range(n), 3)])
    expected = 25 * huber(lengths / lengths.mean()).mean() + 50 * huber(cosines).mean()
    assert RKD()(torch.ones(n, 4, dtype=torch.float64), t).item() == pytest.approx(expected, rel=1e-12)
