"""Files of weights: what kd recorded in them, and loading one into a network that it has to fit exactly."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from kd.errors import CheckpointError, require
from kd.runtime.own_code import own_file

if TYPE_CHECKING:
    from kd.config.schema import Recipe, StudentConfig, TeacherConfig

Say = Callable[[str], object]
# kd.checkpoint is imported where it is used: Teacher and Student need torch only, it needs safetensors.
_PREFERRED = ("state_dict_ema", "model_ema", "state_dict", "model")  # by timm, of several networks in a file
_TIMM_LOOKS_FOR = (".safetensors", ".pth", ".tar", ".bin")  # in a directory


def unsaid(line: str) -> None:
    """The listener of those who need no line of what was chosen in a file."""


def weights_metadata(path: str | Path) -> dict[str, Any]:
    """What kd wrote beside the weights; empty for other files.

    The model's name, num_classes, label_smoothing and smoothing (or the methods of the teacher; neither where class
    weights gave each class a smoothing of its own), class_names, input_shape, and mean and std of pixels from 0 to 1,
    with which new images are prepared; interpolation, crop_pct, crop_mode where not bilinear, .875, center.

    Raises:
        CheckpointError: a .safetensors file is missing, or is not one.
    """
    from kd.checkpoint.safetensors_io import weights_header

    path = Path(path)
    return weights_header(path) if path.suffix == ".safetensors" else {}


def load_weights(
    model: nn.Module,
    path: Path,
    finetune: bool = False,
    *,
    key: str | None = None,
    section: str = "",
    say: Say = unsaid,
) -> None:
    """Load a file into a network that it fits exactly: the same names, shapes and nothing else, all finite.

    Names may be those of the network behind one prefix, such as "model." or "state_dict.module.": the prefix is found.
    Position embeddings for another image size are resampled by timm.

    Args:
        model: the network.
        path: .safetensors, or .pth and its like, which is read without code, or the .index.json of several of them.
        finetune: the network will be trained further, so that a head that is missing or of other classes stays the
            fresh one of the network.
        key: the entry of the file that holds the network, where several fit.
        section: of the recipe, which messages name.
        say: is told in one line what was chosen or resampled.

    Raises:
        CheckpointError: the file cannot be read, or does not fit; names the first tensor of each kind of misfit.
    """
    from kd.checkpoint.safetensors_io import read_weights

    own, head = model.state_dict(), head_keys(model)
    tensors, setting = read_weights(path), f"{section}checkpoint_key"
    if key is not None:
        entries = ", ".join(sorted({name.partition(".")[0] for name in tensors})[:8])
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{key}.")}
        require(tensors, f"{path}: has no entry {setting}={key}; has {entries}", CheckpointError)
    prefix = _prefix(tensors, own, path, setting, say)
    weights = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    for name, held in own.items():  # a count of batches that overflowed when the file was halved
        if name in weights and not held.is_floating_point() and not bool(weights[name].float().isfinite().all()):
            weights[name] = held
    if finetune and any(name not in weights or weights[name].shape != own[name].shape for name in head):
        weights |= {name: own[name] for name in head}
    weights = _resampled(model, weights, path, say)
    _check_fit(model, weights, path)
    model.load_state_dict(weights)


def _prefix(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path, setting: str, say: Say) -> str:
    """What stands before a network's own names in a file. Raises CheckpointError where several networks fit."""
    named: Counter[str] = Counter()  # tensors of a name of the network's, by what stands before it
    alike: Counter[str] = Counter()  # those of its shape too
    for name, tensor in tensors.items():
        words = name.split(".")
        for i in range(len(words)):
            if (held := own.get(".".join(words[i:]))) is not None:
                prefix = "".join(f"{word}." for word in words[:i])
                named[prefix] += 1
                alike[prefix] += held.shape == tensor.shape
    most = [p for p in named if 2 * named[p] >= len(own)]  # a few names that are alike are no network
    # A copy inside a whole network, such as its own average, is no second one: the whole has to fit.
    outer = [p for p in most if not any(p != q and p.startswith(q) and named[q] >= named[p] for q in most)]
    fit = {p: alike[p] + named[p] - sum(name.startswith(p) for name in tensors) for p in outer}
    best = [p for p in outer if fit[p] == max(fit.values())]
    if len(best) < 2:
        return best[0] if best else ""
    entries = [p.rstrip(".") for p in best]
    tops = [entry.partition(".")[0] for entry in entries]
    taken = next((top for top in _PREFERRED if top in tops), "")
    several = f"{path}: holds several networks that fit ({', '.join(entries)})"
    require(tops.count(taken) == 1, f"{several}; type {setting}={entries[0]}", CheckpointError)
    say(f"{several}, {taken} is taken; {setting} chooses another")
    return best[tops.index(taken)]


def _resampled(model: nn.Module, weights: dict[str, Tensor], path: Path, say: Say) -> dict[str, Tensor]:
    """The weights, with position embeddings of another image size resampled as timm does for its own weights."""
    own = model.state_dict()
    other = [name for name in weights if name in own and weights[name].shape != own[name].shape]
    # The function by which a file of timm's networks adapts weights to a network; its module alone knows it.
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if not other or adapt is None or not all("pos" in name for name in other):
        return weights
    try:
        adapted = adapt(dict(weights), model)
        shapes = f"{tuple(weights[other[0]].shape)} to {tuple(adapted[other[0]].shape)}"
    except Exception:  # timm knows no way: then they do not fit
        return weights
    say(f"{path}: {len(other)} position embeddings are resampled to this image size, first {other[0]}, {shapes}")
    return adapted


def _check_fit(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError unless the weights are the network's, tensor for tensor."""
    own = model.state_dict()
    reshaped = [name for name in weights if name in own and weights[name].shape != own[name].shape]
    misfits = {
        "missing tensors": [name for name in own if name not in weights],
        "unexpected tensors": [name for name in weights if name not in own],
        "tensors of another shape": reshaped,
        "tensors with NaN or infinite values": _not_finite(model, weights),
    }
    said = [f"{what}: {len(names)}, first {names[0]}" for what, names in misfits.items() if names]
    if reshaped:
        first = reshaped[0]
        classes, needed = (tensors[first].shape[:1] for tensors in (weights, own))
        # Not another width in front of the head, nor a single number, nor another network.
        if head_keys(model).issuperset(reshaped) and weights.keys() == own.keys() and classes != needed and classes:
            raise CheckpointError(f"{path}: {other_classes(classes[0], needed[0])}")
        said.append(f"{first} is {tuple(weights[first].shape)} in the file, {tuple(own[first].shape)} in the network")
    require(not said, f"{path}: does not fit the network: {'; '.join(said)}", CheckpointError)


def checkpoint_hash(recipe: Recipe) -> str:
    """The sha256 of teacher.checkpoint, '' without one: another teacher may be saved under the same path."""
    return _hash(Path(recipe.teacher.checkpoint)) if recipe.teacher.checkpoint else ""


def _hash(path: Path) -> str:
    """The sha256 of a file, or of all that an index lists."""
    from kd.checkpoint.files import digest
    from kd.checkpoint.safetensors_io import parts
    from kd.config.schema import content_hash

    files = parts(path)
    return digest(path) if files == [path] else content_hash([digest(file) for file in (path, *files)])


def weight_files(*sections: TeacherConfig | StudentConfig) -> dict[str, str]:
    """The sha256 of the files on this machine that networks start from, of those with networks of one's own, and of
    teacher.classes, by section and name; `checkpoint_hash` has teacher.checkpoint. Runs without such files record
    nothing, so that older ones keep their hashes.
    """
    from kd.config.types import leaves

    files: dict[str, Path] = {}
    for section in sections:
        paths = []
        if section.model.startswith("local-dir:"):  # which weights timm takes follows from all that lie there
            read = (".json", *_TIMM_LOOKS_FOR) if section.pretrained else (".json",)
            beside = sorted(Path(section.model.removeprefix("local-dir:")).glob("*"))
            paths = [path for path in beside if path.suffix in read]
        if file := own_file(section.model):
            paths.append(file)
        if classes := getattr(section, "classes", None):  # a student has no such setting
            paths.append(Path(classes))
        if section.pretrained:  # timm's pretrained_cfg, or its overlay, may name a file
            paths += [Path(value) for key, value in leaves(section.model_kwargs) if key.endswith(".file")]
        if section.section == "student." and section.checkpoint:
            paths.append(Path(section.checkpoint))
        files |= {section.section + path.name: path for path in paths if path.is_file()}
    return {name: _hash(path) for name, path in files.items()}


def other_classes(classes: int, needed: int) -> str:
    """What is wrong with a head of other classes than the data has, and what helps."""
    return f"its head has {classes} classes, the data has {needed}; in a recipe teacher.finetune=true trains a new head"


def head_keys(model: nn.Module) -> set[str]:
    """The state dict's keys of the classifier, or of all classifiers, as timm's networks name them."""
    cfg: Any = getattr(model, "pretrained_cfg", {})
    names = cfg.get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    return {key for key in model.state_dict() if key.startswith(prefixes)}


def _not_finite(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Keys of NaN, or of infinite parameters, in the network's type; a buffer may be infinite, as masks are."""
    parameters, wrong = dict(model.named_parameters()), []
    for key, held in model.state_dict().items():
        value = weights.get(key, held).to(held.dtype)
        if bool(value.isnan().any()) or (key in parameters and not bool(value.isfinite().all())):
            wrong.append(key)
    return wrong
