"""The feature losses written a second time, in numpy and with loops where the library has products; float64.

They share no code with kd. s, t: arrays of student and teacher; maps (N, C, H, W), embeddings (N, D).
"""

from itertools import product
from math import exp, factorial

import numpy as np


def flat(x):
    return x.reshape(*x.shape[:2], -1)


def pool(x, h, w, reduce=np.mean):
    """Adaptive pooling: cell i covers floor(i H / h) to ceil((i + 1) H / h)."""
    height, width = x.shape[-2:]
    out = np.empty((*x.shape[:2], h, w), x.dtype)
    for i, j in product(range(h), range(w)):
        rows = slice(i * height // h, -(-(i + 1) * height // h))
        columns = slice(j * width // w, -(-(j + 1) * width // w))
        out[:, :, i, j] = reduce(x[:, :, rows, columns], axis=(2, 3))
    return out


def meet(s, t):
    h, w = min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])
    return pool(s, h, w), pool(t, h, w)


def conv(x, weight, bias=None, padding=0, stride=1):
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    k, m = weight.shape[2:]
    h, w = (x.shape[2] - k) // stride + 1, (x.shape[3] - m) // stride + 1
    out = np.zeros((len(x), len(weight), h, w), x.dtype)
    for i, j in product(range(k), range(m)):
        piece = x[:, :, i : i + stride * h : stride, j : j + stride * w : stride]
        out += np.tensordot(piece, weight[:, :, i, j], ([1], [1])).transpose(0, 3, 1, 2)
    return out if bias is None else out + bias[None, :, None, None]


def norm(x, eps=1e-5):
    """Batch normalisation in training, with its first weights."""
    return (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + eps)


def nearest(x, h, w):
    rows = [i * x.shape[2] // h for i in range(h)]
    columns = [j * x.shape[3] // w for j in range(w)]
    return x[:, :, rows][:, :, :, columns]


def relu(x):
    return np.maximum(x, 0)


def hint(s, t, weight, bias):
    r = conv(s, weight, bias)
    r, t = meet(r, t)
    return ((r - t) ** 2).sum((1, 2, 3)) / 2


def hint_released(s, t, weight, bias, stride, padding):
    r = relu(norm(conv(s, weight, bias, padding, stride)))
    return ((r - t) ** 2).mean((1, 2, 3))


def at(maps_s, maps_t, power=2.0):
    total = 0
    for s, t in zip(maps_s, maps_t, strict=True):
        attention = [(abs(x) ** power).sum(1).reshape(len(x), -1) for x in meet(s, t)]
        q, r = (a / np.sqrt((a**2).sum(1, keepdims=True)) for a in attention)
        total = total + np.sqrt(((q - r) ** 2).sum(1))
    return total


def vid(maps_s, maps_t, weights, scales, released):
    total = 0
    for s, t, layers, scale in zip(maps_s, maps_t, weights, scales, strict=True):
        s, t = meet(s, t)
        for i, weight in enumerate(layers):
            s = conv(relu(s) if i else s, weight)
        variance = (np.log1p(np.exp(scale)) + 1e-5)[None, :, None, None]
        density = -np.log(variance) / 2 - (t - s) ** 2 / (2 * variance)
        total = total - (density.mean((1, 2, 3)) if released else density.sum((1, 2, 3)))
    return total


def nst(maps_s, maps_t):
    total = np.zeros(len(maps_s[0]), maps_s[0].dtype)
    for s, t in zip(maps_s, maps_t, strict=True):
        s, t = (flat(x) for x in meet(s, t))
        for n in range(len(s)):
            a, b = ([c / np.sqrt(c @ c) for c in x[n]] for x in (s, t))

            def mean(p, q):
                return np.mean([(x @ y) ** 2 for x in p for y in q])

            total[n] += mean(a, a) + mean(b, b) - 2 * mean(a, b)
    return total


def fsp(maps_s, maps_t, released):
    total = np.zeros(len(maps_s[0]), maps_s[0].dtype)
    reduce = np.mean if released else np.max

    def flow(a, b):
        h, w = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
        a, b = flat(pool(a, h, w, reduce)), flat(pool(b, h, w, reduce))
        return np.stack([x @ y.T for x, y in zip(a, b, strict=True)]) / (h * w)

    for j in range(len(maps_s) - 1):
        gap = (flow(maps_s[j], maps_s[j + 1]) - flow(maps_t[j], maps_t[j + 1])) ** 2
        total += gap.mean((1, 2)) if released else gap.sum((1, 2))
    return total


def pkt(s, t):
    n = len(s)

    def probabilities(x, i):
        similar = [0 if j == i else (x[i] @ x[j] / np.sqrt((x[i] @ x[i]) * (x[j] @ x[j])) + 1) / 2 for j in range(n)]
        return np.array(similar) / sum(similar)

    total = 0
    for i in range(n):
        p, q = probabilities(s, i), probabilities(t, i)
        total += sum(q[j] * np.log(q[j] / p[j]) for j in range(n) if j != i)
    return total / n


def huber(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def rkd(s, t, distance_weight=25, angle_weight=50):
    n = len(s)
    pairs = [(i, j) for i, j in product(range(n), repeat=2) if i != j]
    triples = [(i, j, k) for i, j, k in product(range(n), repeat=3) if len({i, j, k}) == 3]

    def distances(x):
        d = np.array([np.linalg.norm(x[i] - x[j]) for i, j in pairs])
        return d / d.mean()

    def cosine(x, i, j, k):
        a, b = x[j] - x[i], x[k] - x[i]
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    apart = np.mean([huber(a) for a in distances(s) - distances(t)])
    turned = np.mean([huber(cosine(s, *ijk) - cosine(t, *ijk)) for ijk in triples])
    return distance_weight * apart + angle_weight * turned


def cc(s, t, gamma=0.4, order=2):
    def kernel(a, b):
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        return exp(-2 * gamma) * sum((2 * gamma * cosine) ** p / factorial(p) for p in range(order + 1))

    n = len(s)
    return np.mean([(kernel(s[i], s[j]) - kernel(t[i], t[j])) ** 2 for i, j in product(range(n), repeat=2)])


def crd(s, t, memory_s, memory_t, index, negatives, temperature, constants):
    """s, t: already in the common space, of length 1; constants: what the exponentials are divided by."""
    total, n, size = 0, negatives.shape[1], len(memory_s)
    for x, memory, z in ((s, memory_t, constants[0]), (t, memory_s, constants[1])):
        for i in range(len(x)):
            true = np.exp(x[i] @ memory[index[i]] / temperature) / z
            total -= np.log(true / (true + n / size))
            for j in negatives[i]:
                false = np.exp(x[i] @ memory[j] / temperature) / z
                total -= np.log(1 - false / (false + n / size))
    return total / len(s)


def ofd(maps_s, maps_t, weights, margins, decay=0.5):
    """The three cases one by one, as the paper writes the partial distance."""
    total = 0
    for j, (s, t, weight, margin) in enumerate(zip(maps_s, maps_t, weights, margins, strict=True)):
        s, t = meet(norm(conv(s, weight)), t)
        margin = np.broadcast_to(margin[None, :, None, None], t.shape)
        loss = 0
        for a, b, m in zip(s.ravel(), t.ravel(), margin.ravel(), strict=True):
            aim = b if b > m else m
            loss += 0 if (b <= 0 and a <= aim) else (a - aim) ** 2
        total += decay ** (len(maps_s) - 1 - j) * loss / len(s)
    return total


def hcl(a, b):
    total, weights = 0, 0
    h = a.shape[2]
    sides = [h, *(side for side in (4, 2, 1) if side < h)]
    for k, side in enumerate(sides):
        total += 0.5**k * ((pool(a, side, side) - pool(b, side, side)) ** 2).mean()
        weights += 0.5**k
    return total / weights


def reviewkd(levels_s, levels_t, fusions):
    """Levels from shallow to deep; fusions: their (enter, leave, weigh, weigh's bias), weigh None for the deepest."""
    total, deeper = 0, None
    for s, t, (enter, leave, weigh, bias) in list(zip(levels_s, levels_t, fusions, strict=True))[::-1]:
        x = norm(conv(s, enter))
        if weigh is not None:
            up = nearest(deeper, *x.shape[2:])
            share = 1 / (1 + np.exp(-conv(np.concatenate([x, up], 1), weigh, bias)))
            x = x * share[:, :1] + up * share[:, 1:]
        deeper = nearest(x, *t.shape[2:])
        total += hcl(norm(conv(deeper, leave, padding=1)), t)
    return total


def simkd(s, t, weights):
    s, t = meet(s, t)
    for weight in weights:
        s = relu(norm(conv(s, weight, padding=weight.shape[2] // 2)))
    return ((s - t) ** 2).mean()
