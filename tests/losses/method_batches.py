"""Batches with everything that a method may look at, and methods built from them; float64 unless told otherwise."""

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from kd.losses.methods.base import Method, Seen, View
from kd.losses.methods.registry import library
from kd.losses.reference import wide_dtype

SAMPLES = 20  # examples in the training set


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n=6, k=5, seed=0):
    return torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))


def leaf(x):
    return x.detach().clone().requires_grad_()


def view(n, k, seed):
    """Two maps, from shallow to deep, the embedding and its classifier.

    The embedding is the average of the deep map, and the classifier gives the logits from it.
    """
    logits, embedding = draw(n, k, seed=seed, scale=3.0), draw(n, 6, seed=seed + 3)
    weight, bias = draw(k, 6, seed=seed + 4), draw(k, seed=seed + 5)
    embedding += (logits - F.linear(embedding, weight, bias)) @ torch.linalg.pinv(weight).T
    shallow, deep = draw(n, 3, 4, 4, seed=seed + 1), draw(n, 6, 2, 2, seed=seed + 2)
    deep += (embedding - deep.mean((2, 3)))[..., None, None]
    return View(logits, [shallow, deep], embedding, weight, bias)


def batch(n=5, k=4, seed=0, same=False, dtype=torch.float64) -> Seen:
    """The student's tensors take gradients. `same`: the teacher gave what the student gave."""
    student = view(n, k, seed).map(lambda x: leaf(x.to(dtype)))
    teacher = view(n, k, seed if same else seed + 10).map(lambda x: x.to(dtype))
    index = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))[:n]
    images = draw(n, 3, 4, 4, seed=seed + 30).to(wide_dtype(dtype))
    return Seen(student, teacher, labels(n, k, seed), index, epoch=1.0, epochs=4, images=images, num_samples=SAMPLES)


def take(seen: Seen, rows) -> Seen:
    """Some examples of the batch, in this order."""
    student, teacher = (v.map(lambda x: x[rows]) for v in seen.views)
    parts = {"target": seen.target[rows], "index": seen.index[rows], "images": seen.images[rows]}
    return replace(seen, student=student, teacher=teacher, **parts)


def leaves(method: Method, seen: Seen) -> list[torch.Tensor]:
    """The student's tensors that the method says it looks at, logits always."""
    tensors = [seen.student.logits]
    tensors += seen.student.maps if "maps" in method.needs else []
    return tensors + ([seen.student.embedding] if "embedding" in method.needs else [])


def with_leaves(method: Method, seen: Seen, tensors) -> Seen:
    """The batch with other tensors in the place of `leaves`."""
    rest = list(tensors)
    student = replace(seen.student, logits=rest.pop(0))
    if "maps" in method.needs:
        student = replace(student, maps=[rest.pop(0) for _ in student.maps])
    if "embedding" in method.needs:
        student = replace(student, embedding=rest.pop(0))
    return replace(seen, student=student)


def built(name, seen: Seen, seed=0, **settings) -> Method:
    """The method with its learned parts made, in float64 for a float64 batch and float32 otherwise."""
    torch.manual_seed(seed)
    method = library()[name](**settings)
    student, teacher = (v.map(lambda x: x.detach().to(wide_dtype(x))) for v in seen.views)
    peer = nn.Sequential(nn.Flatten(), nn.Linear(seen.images[0].numel(), seen.student.logits.shape[1]))
    method.build(replace(seen, student=student, teacher=teacher, peer=peer))
    return method


def call(method: Method, seen: Seen) -> torch.Tensor:
    """Its values, with no trace of the call left in it, and the same draws each time."""
    torch.manual_seed(1)
    return copy.deepcopy(method).evaluate(seen)


def gradients(method: Method, value, seen: Seen) -> list[torch.Tensor]:
    tensors = leaves(method, seen)
    found = torch.autograd.grad(value, tensors, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, tensors, strict=True)]


def logit_batch(n=6, k=5, seed=0, scale=3.0):
    """Logits of a student, which take gradients, and of a teacher, and labels."""
    return (
        draw(n, k, seed=seed, scale=scale).requires_grad_(),
        draw(n, k, seed=seed + 1, scale=scale),
        labels(n, k, seed),
    )


def logit_values(method: Method, s, t, y):
    """The method's values of these logits, by the call that a user types; one where it compares examples."""
    method.reduction = "mean" if "batch" in method.needs else "none"
    return method(s, t, y)
