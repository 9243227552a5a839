"""What holds for every feature method, whatever its formula: gradients, rows, safety, learned parts, clear errors."""

import pytest
import torch

from kd.losses.methods import connectors as transforms
from kd.losses.methods import contrastive as contrast
from kd.losses.methods import features, relations
from kd.losses.methods.base import METHODS, Seen, Setup, View

N, K, SAMPLES = 4, 3, 16
HERE = (features, relations, contrast, transforms)

MAKE = {
    "hint": features.Hint,
    "hint released": lambda: features.Hint(released=True),
    "at": features.AttentionTransfer,
    "at released": lambda: features.AttentionTransfer(released=True),
    "at of power 4": lambda: features.AttentionTransfer(power=4.0),
    "vid": features.VariationalInformation,
    "vid released": lambda: features.VariationalInformation(released=True),
    "nst": features.NeuronSelectivity,
    "fsp": features.FlowOfSolution,
    "fsp released": lambda: features.FlowOfSolution(released=True),
    "sp": relations.SimilarityPreserving,
    "pkt": relations.ProbabilisticKnowledge,
    "pkt released": lambda: relations.ProbabilisticKnowledge(released=True),
    "rkd": relations.Relational,
    "rkd released": lambda: relations.Relational(released=True),
    "cc": relations.CorrelationCongruence,
    "cc released": lambda: relations.CorrelationCongruence(released=True, embed_dim=8),
    "crd": lambda: contrast.ContrastiveRepresentation(num_negatives=6, embed_dim=8),
    "crd released": lambda: contrast.ContrastiveRepresentation(num_negatives=6, embed_dim=8, released=True),
    "ofd": transforms.OverhaulFeature,
    "reviewkd": transforms.ReviewKD,
    "simkd": transforms.ReusedClassifier,
}
LEARNED = {
    name
    for name in MAKE
    if name.split()[0] in ("hint", "vid", "crd", "ofd", "reviewkd", "simkd") or name == "cc released"
}
every = pytest.mark.parametrize("name", MAKE)


def test_every_method_of_the_feature_files_is_here():
    found = {name for name, cls in METHODS.items() if cls.__module__ in {module.__name__ for module in HERE}}
    assert found == {name.split()[0] for name in MAKE}


def randn(*shape, generator, scale=1.0):
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def batch(name="", n=N, seed=0, dtype=torch.float64, scale=1.0):
    """Seen with maps of different sizes, and of different channels but for fsp."""
    g = torch.Generator().manual_seed(seed)
    channels = (4, 5) if name.startswith("fsp") else (3, 4)

    def view(channels, sizes):
        maps = [randn(n, c, *size, generator=g, scale=scale) for c, size in zip(channels, sizes, strict=True)]
        embedding = maps[-1].mean((2, 3))
        weight, bias = randn(K, channels[-1], generator=g), randn(K, generator=g)
        cast = [m.to(dtype) for m in (embedding @ weight.T + bias, embedding, weight, bias)]
        return View(cast[0], [m.to(dtype).requires_grad_() for m in maps], cast[1].requires_grad_(), *cast[2:])

    student, teacher = view(channels, ((6, 6), (3, 3))), view((4, 5), ((4, 4), (2, 2)))
    target, index = torch.randint(K, (n,), generator=g), torch.randperm(SAMPLES, generator=g)[:n]
    return Seen(student, teacher, target, index, 1.0, 10)


def built(name, seen):
    torch.manual_seed(0)
    method = MAKE[name]()
    method.build(Setup(seen, SAMPLES))
    return method


def leaves(seen):
    """The student's features that a method may look at."""
    return [*seen.student.maps, seen.student.embedding]


def value(method, seen, state=None):
    """The loss, from the same draws and, where given, the same state."""
    if state is not None:
        method.load_state_dict(state)
    torch.manual_seed(1)
    return method(seen).mean()


def frozen(method):
    return {key: tensor.clone() for key, tensor in method.state_dict().items()}


def with_leaves(seen, tensors):
    *maps, embedding = tensors
    return Seen(
        View(seen.student.logits, maps, embedding, seen.student.weight), seen.teacher, seen.target, seen.index, 1.0
    )


@every
def test_gradient_is_that_of_finite_differences(name):
    """In every feature and every learned parameter, along a drawn direction."""
    seen = batch(name)
    method = built(name, seen)
    value(method, seen)  # constants of a first batch are set
    state, g = frozen(method), torch.Generator().manual_seed(5)
    directions = [randn(*x.shape, generator=g) for x in leaves(seen)]
    moves = {key: randn(*p.shape, generator=g) for key, p in method.named_parameters()}
    gradients = torch.autograd.grad(
        value(method, seen, state), [*leaves(seen), *method.parameters()], allow_unused=True
    )
    along = sum(
        (gradient * direction).sum()
        for gradient, direction in zip(gradients, [*directions, *moves.values()], strict=True)
        if gradient is not None
    )
    step = 1e-6

    def at(sign):
        moved = [(x + sign * step * d).detach() for x, d in zip(leaves(seen), directions, strict=True)]
        shifted = {key: tensor + sign * step * moves.get(key, 0) for key, tensor in state.items()}
        return value(method, with_leaves(seen, moved), shifted)

    torch.testing.assert_close(along, (at(1) - at(-1)).detach() / (2 * step), rtol=1e-5, atol=1e-8)
    assert along.abs() > 1e-9


@every
def test_rows_are_independent_unless_declared(name):
    seen = batch(name)
    method = built(name, seen).eval()  # in training, batch normalisation joins the rows of "hint released"
    got = method(seen)
    if not method.per_example:
        assert got.shape == ()
        return
    assert got.shape == (N,)
    for i in range(N):
        maps = [m[i : i + 1] for m in seen.student.maps], [m[i : i + 1] for m in seen.teacher.maps]
        one = slice(i, i + 1)
        alone = Seen(View(seen.student.logits[one], maps[0]), View(seen.teacher.logits[one], maps[1]), seen.target[one])
        torch.testing.assert_close(method(alone), got[one])


@every
def test_the_order_of_the_batch_does_not_matter(name):
    seen = batch(name)
    order = torch.tensor([2, 0, 3, 1])

    def turned(view):
        return View(view.logits[order], [m[order] for m in view.maps], view.embedding[order], view.weight)

    method = built(name, seen)
    state = frozen(method)
    given = Seen(turned(seen.student), turned(seen.teacher), seen.target[order], seen.index[order], 1.0)
    if name.startswith("crd"):  # every example keeps its negatives, which are drawn row by row of the batch
        method.labels[seen.index] = seen.target
        drawn = method.negatives(seen.target)
        method.negatives = lambda target: drawn if torch.equal(target, seen.target) else drawn[order]
        assert not torch.equal(drawn, drawn[order])
    straight = value(method, seen, state)
    kept = frozen(method)
    other = value(method, given, state)
    if name.startswith("crd"):
        for key, tensor in frozen(method).items():
            torch.testing.assert_close(tensor, kept[key])
        assert not torch.equal(kept["memory_student"], state["memory_student"])
    if name == "cc released":
        assert (other / straight - 1).abs() > 1e-3  # as its docstring says
    else:
        torch.testing.assert_close(other, straight)


@every
def test_no_gradient_reaches_the_teacher(name):
    seen = batch(name)
    value(built(name, seen), seen).backward()
    assert all(m.grad is None for m in [*seen.teacher.maps, seen.teacher.embedding])
    assert any(m.grad is not None and m.grad.any() for m in leaves(seen))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e4])
@every
def test_finite_at_zero_equal_and_huge_features(name, scale, dtype):
    seen = batch(name, dtype=dtype, scale=scale)
    if scale == 1e4:  # two equal rows, in student and teacher
        for x in [*leaves(seen), *seen.teacher.maps, seen.teacher.embedding, seen.teacher.logits]:
            x.data[1] = x.data[0]
    method = built(name, seen)
    with torch.autocast("cpu", torch.bfloat16):
        got = value(method, seen)
    assert got.dtype == torch.float32
    assert got.isfinite()
    if name.startswith("fsp") and dtype == torch.float16 and scale == 1e4:
        return  # the gradient goes with the cube of the activations, 1e11 here, which float16 cannot hold
    got.backward()
    for x in [*leaves(seen), *method.parameters()]:
        assert x.grad is None or x.grad.isfinite().all()


@every
def test_autocast_changes_nothing(name):
    seen = batch(name, dtype=torch.float32)
    method = built(name, seen)
    state = frozen(method)
    plain = value(method, seen, state)
    with torch.autocast("cpu", torch.bfloat16):
        assert value(method, seen, state) == plain


@pytest.mark.parametrize("name", sorted(set(MAKE) - LEARNED))
def test_zero_and_stationary_at_the_teacher(name):
    seen = batch(name)
    copies = [m.detach().clone().requires_grad_() for m in [*seen.teacher.maps, seen.teacher.embedding]]
    equal = Seen(View(seen.teacher.logits, copies[:-1], copies[-1]), seen.teacher, seen.target)
    got = value(built(name, equal), equal)
    assert got.abs() < 1e-12
    for gradient in torch.autograd.grad(got, copies, allow_unused=True):
        assert gradient is None or gradient.abs().max() < 1e-7  # pkt released adds 1e-7 to probabilities


@every
def test_learned_parts_get_gradients_are_saved_and_resume(name):
    seen = batch(name)
    method = built(name, seen)
    value(method, seen).backward()
    assert bool(list(method.parameters())) == (name in LEARNED)
    for key, parameter in method.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        # A bias in front of a batch normalisation is taken out by it.
        assert parameter.grad.any() or key == "regressor.0.bias", key
    assert {key for key, _ in [*method.named_parameters(), *method.named_buffers()]} == frozen(method).keys()
    other = built(name, batch(name, seed=9))
    other.load_state_dict(frozen(method))
    assert value(other, seen) == value(method, seen)


@every
def test_a_batch_of_one_has_a_value_or_says_why_not(name):
    seen = batch(name, n=1)
    method = built(name, batch(name))
    if name.split()[0] in ("sp", "pkt", "rkd", "cc", "reviewkd"):
        with pytest.raises(ValueError, match=f"^{method.name}: compares examples .* a batch of 1 is too small"):
            method(seen)
    else:
        assert value(method, seen).isfinite()
