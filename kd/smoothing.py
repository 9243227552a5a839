"""Label smoothing: its two conventions, the conversion between them, smoothed targets, and its removal from logits.

With K classes, smoothing mass eps and label y:

- ``"uniform"``: ``(1 - eps) * onehot(y) + eps / K``, so y keeps ``1 - eps + eps / K``
  (Szegedy et al. 2016 §7; PyTorch, timm, Keras; Müller et al. 2019)
- ``"others"``: ``1 - eps`` on y and ``eps / (K - 1)`` on each other class
  (Shen et al. 2021, Eq. 1; Yuan et al. 2020)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMOOTHINGS = ("uniform", "others")
MASSES = "a number ≥ 0 and < 1"


def to_uniform(label_smoothing: float, num_classes: int, smoothing: str) -> float:
    """The mass that under ``"uniform"`` gives the same targets as ``label_smoothing`` under ``smoothing``.

    Exact: ``eps_uniform = eps_others * K / (K - 1)``. It may exceed 1; F.cross_entropy rejects such a value although
    its targets are valid probabilities. With one class there is nothing to smooth and the mass is 0.

    Raises ValueError where ``label_smoothing`` is outside [0, 1), K < 1 or the convention is unknown.
    """
    _require(is_mass(label_smoothing), "label_smoothing", label_smoothing, MASSES)
    _check_convention(smoothing, num_classes)
    return uniform_mass(label_smoothing, num_classes, smoothing)


def uniform_mass(label_smoothing: float, num_classes: int, smoothing: str) -> float:
    """``to_uniform`` without its checks, for settings that have been checked."""
    if smoothing == "uniform":
        return label_smoothing
    return label_smoothing * num_classes / (num_classes - 1) if num_classes > 1 else 0.0


def from_uniform(uniform_mass: float, num_classes: int, smoothing: str) -> float:
    """The inverse of to_uniform: the ``label_smoothing`` under ``smoothing`` that gives the targets of a uniform mass.

    Raises ValueError where no ``label_smoothing`` in [0, 1) does.
    """
    _check_convention(smoothing, num_classes)
    # Multiplied, not divided by K / (K - 1): with one class any mass stands for 0.
    mass = 1.0 if smoothing == "uniform" else (num_classes - 1) / num_classes
    allowed = "a number ≥ 0 and below 1 (uniform) or K/(K-1) (others)"
    _require(is_mass(uniform_mass * mass), "uniform_mass", uniform_mass, allowed)
    return uniform_mass * mass


def smooth_targets(
    target: Tensor,
    num_classes: int,
    label_smoothing: float,
    smoothing: str = "uniform",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Smoothed class probabilities, shape ``(..., K)``; each row sums to 1.

    ``target`` is int64 labels ``(...)`` or probabilities ``(..., K)`` such as mixup's. Probabilities are smoothed by
    the same linear map, ``(1 - eps) * target + eps / K`` with the uniform mass eps. ``label_smoothing=0`` returns them
    unchanged.

    Raises ValueError or TypeError for labels outside 0..K-1, rows that are not probabilities, and arguments that
    to_uniform rejects. There is no ignore_index, because an ignored target has no probabilities.
    """
    mass = to_uniform(label_smoothing, num_classes, smoothing)
    check_target(target, num_classes)
    return mix_uniform(target, num_classes, mass, dtype)


def mix_uniform(target: Tensor, num_classes: int, uniform_mass: float, dtype: torch.dtype) -> Tensor:
    """``(1 - eps) * target + eps / K``, unchecked; a label outside 0..K-1 has no one-hot class."""
    if not target.is_floating_point():
        # F.one_hot reads the values, which vmap and a compiled graph cannot.
        target = target.unsqueeze(-1) == torch.arange(num_classes, device=target.device)
    return (1 - uniform_mass) * target.to(dtype) + uniform_mass / num_classes


def unsmooth(logits: Tensor, label_smoothing: float, smoothing: str = "uniform") -> Tensor:
    """The logits ``log p`` of the distribution p that smoothing turned into ``q = softmax(logits)``: ``(..., K)``.

    ``p = (q - eps/K) / (1 - eps)`` with the uniform mass eps, the exact inverse of ``q = (1 - eps) p + eps/K``
    (the backward correction of Lukasik et al. 2020). Computed in log space in float32, or in float64 for float64
    logits, without gradient. ``label_smoothing=0`` returns the tensor itself.

    A network trained with smoothing is not exactly smoothed: some of its q are at most eps/K, where no p > 0 exists.
    There p is set to ``eps/K / (1 - eps)`` times the machine epsilon of the dtype, as if q were one rounding step above
    eps/K.
    Such rows sum to more than 1 until the next softmax. A masked class stays -inf.

    Raises ValueError or TypeError for arguments that to_uniform rejects, a uniform mass ≥ 1, which cannot be inverted,
    and logits that are not a floating tensor.
    """
    check_floating("logits", logits)
    classes = logits.shape[-1]
    mass = to_uniform(label_smoothing, classes, smoothing)
    if mass >= 1:
        raise ValueError(f"label_smoothing={label_smoothing!r}: as a uniform mass {mass:g}; must be < 1")
    if mass == 0:
        return logits
    log_q = F.log_softmax(logits.detach().to(torch.promote_types(logits.dtype, torch.float32)), -1)
    log_floor = math.log(mass / classes)
    excess = log_q + (-(log_floor - log_q).expm1()).log()  # log (q - eps/K)
    least = log_floor + math.log(torch.finfo(log_q.dtype).eps)
    # The comparison is false for nan, which therefore stays nan.
    log_p = torch.where(log_q <= log_floor, least, excess) - math.log1p(-mass)
    return log_p.masked_fill(log_q == -math.inf, -math.inf)


def is_mass(value: object) -> bool:
    """Whether it is a number in [0, 1), as a smoothing mass must be; nan fails every comparison."""
    return isinstance(value, int | float) and 0 <= value < 1


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def _check_convention(smoothing: str, num_classes: int) -> None:
    _require(smoothing in SMOOTHINGS, "smoothing", smoothing, f"one of {', '.join(SMOOTHINGS)}")
    _require(num_classes >= 1 and num_classes % 1 == 0, "num_classes", num_classes, "a whole number ≥ 1")


def check_floating(name: str, value: object) -> None:
    """Raise TypeError unless it is a tensor of a real floating dtype."""
    if isinstance(value, Tensor) and value.is_floating_point():
        check_local(name, value)
        return
    got = value.dtype if isinstance(value, Tensor) else type(value).__name__
    hint = "; pass its .logits" if isinstance(getattr(value, "logits", None), Tensor) else ""
    raise TypeError(f"{name}: must be a floating tensor, got {got}{hint}")


def check_local(name: str, value: object) -> None:
    """Raise TypeError for a DTensor, whose rows or classes may be on several processes."""
    if hasattr(value, "to_local"):
        raise TypeError(f"{name} is a {type(value).__name__}: must be a tensor of this process; pass {name}.to_local()")


def check_target(target: Tensor, num_classes: int, ignore_index: int | None = None, read_values: bool = True) -> bool:
    """Raise unless target is int64 labels in 0..K-1 (or ignore_index) or floating rows of K probabilities.

    Returns True where it has read labels and every one is in 0..K-1. ``read_values=False`` checks dtype and shape only,
    because reading values makes the host wait for a GPU.
    """
    check_local("target", target)
    soft = isinstance(target, Tensor) and target.is_floating_point()
    if not soft and (not isinstance(target, Tensor) or target.dtype != torch.int64):
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target: must be int64 labels (use target.long()) or floating probabilities, got {got}")
    if soft and (target.ndim == 0 or target.shape[-1] != num_classes):
        raise ValueError(
            f"target of {target.dtype} with shape {tuple(target.shape)}: must be probabilities of shape "
            f"(..., {num_classes}), or class indices by target.long()"
        )
    if not read_values or not values_readable(target):
        return False
    if not soft:
        return _check_labels(target, num_classes, ignore_index)
    bad = ~are_probabilities(target)
    if bad.any():
        row = target[bad][0].double()
        got = f"sums to {row.sum().item():g}, with {row.min().item():g} as its smallest value"
        raise ValueError(f"target has a row that {got}: must be probabilities, which are ≥ 0 and sum to 1")
    return False


def _check_labels(target: Tensor, num_classes: int, ignore_index: int | None) -> bool:
    if target.numel() == 0:
        return True
    low, high = target.aminmax()  # one operation settles most batches; the loss calls this at every step
    if low.item() >= 0 and high.item() < num_classes:
        return True
    bad = (target < 0) | (target >= num_classes)
    if ignore_index is not None:
        bad &= target != ignore_index
    if bad.any():
        also = "" if ignore_index is None else f" or ignore_index={ignore_index}"
        raise ValueError(f"target has label {target[bad][0].item()}: must be 0..{num_classes - 1}{also}")
    return False


def is_transformed() -> bool:
    """Whether torch.func (grad, vmap, jvp ...) changes operations, or make_fx or torch.jit.trace records them.

    A value that is read is a constant to a record.
    """
    recorded = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None or torch._C._is_tracing()
    return recorded or torch._C._are_functorch_transforms_active()


def is_plain(tensor: Tensor) -> bool:
    """Whether it is PyTorch's own tensor, which has memory, and no subclass such as DTensor or a fake tensor."""
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def values_readable(*tensors: Tensor) -> bool:
    """Whether a check may read values: of plain tensors, outside compilers, torch.func and recording."""
    if torch.compiler.is_compiling() or is_transformed():
        return False
    if not all(is_plain(tensor) and not tensor.is_meta for tensor in tensors):
        return False
    return not (any(tensor.is_cuda for tensor in tensors) and torch.cuda.is_current_stream_capturing())


def are_probabilities(rows: Tensor) -> Tensor:
    """Whether each row ``(..., K)`` is ≥ 0 and sums to 1 within 1e-4, or 4 epsilons of a half precision; nan is not."""
    off = (rows.sum(-1, dtype=torch.promote_types(rows.dtype, torch.float32)) - 1).abs()
    return (rows >= 0).all(-1) & (off <= max(1e-4, 4 * torch.finfo(rows.dtype).eps))
