"""Files of weights: what kd recorded in them, and loading one into a network that it has to fit exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from kd.errors import CheckpointError, require

if TYPE_CHECKING:
    from kd.config.schema import Recipe, StudentConfig, TeacherConfig

# kd.checkpoint is imported where it is used: Teacher and Student need torch only, it needs safetensors.
_TIMM_LOOKS_FOR = (".safetensors", ".pth", ".tar", ".bin")  # in a directory


def weights_metadata(path: str | Path) -> dict[str, Any]:
    """What kd wrote beside the weights; empty for other files.

    The model's name, num_classes, label_smoothing and smoothing (or the methods of the teacher; neither where class
    weights gave each class a smoothing of its own), class_names, input_shape, and mean and std of pixels from 0 to 1,
    with which new images are prepared.

    Raises:
        CheckpointError: a .safetensors file is missing, or is not one.
    """
    from kd.checkpoint.safetensors_io import weights_header

    path = Path(path)
    return weights_header(path) if path.suffix == ".safetensors" else {}


def load_weights(model: nn.Module, path: Path, finetune: bool = False) -> None:
    """Load a file into a network that it fits exactly: the same names, shapes and nothing else, all finite.

    Args:
        model: the network.
        path: .safetensors, or .pth and its like, which is read without code.
        finetune: the network will be trained further, so that a head that is missing or of other classes stays the
            fresh one of the network.

    Raises:
        CheckpointError: the file cannot be read, or does not fit; names the first tensor of each kind of misfit.
    """
    from kd.checkpoint.safetensors_io import read_weights

    weights, own, head = read_weights(path), model.state_dict(), head_keys(model)
    if finetune and any(key not in weights or weights[key].shape != own[key].shape for key in head):
        weights |= {key: own[key] for key in head}
    reshaped = [key for key in weights if key in own and weights[key].shape != own[key].shape]
    if reshaped and head.issuperset(reshaped):
        classes, needed = (tensors[reshaped[0]].shape[:1] for tensors in (weights, own))
        if classes != needed and classes:  # not another width in front of the head, nor a single number
            raise CheckpointError(f"{path}: {other_classes(classes[0], needed[0])}")
    misfits = {
        "missing tensors": [key for key in own if key not in weights],
        "unexpected tensors": [key for key in weights if key not in own],
        "tensors of another shape": reshaped,
        "tensors with NaN or infinite values": _not_finite(model, weights),
    }
    said = [f"{what}: {len(keys)}, first {keys[0]}" for what, keys in misfits.items() if keys]
    if reshaped:
        first = reshaped[0]
        said.append(f"{first} is {tuple(weights[first].shape)} in the file, {tuple(own[first].shape)} in the network")
    require(not said, f"{path}: does not fit the network: {'; '.join(said)}", CheckpointError)
    model.load_state_dict(weights)


def checkpoint_hash(recipe: Recipe) -> str:
    """The sha256 of teacher.checkpoint, '' without one: another teacher may be saved under the same path."""
    from kd.checkpoint.files import digest

    return digest(Path(recipe.teacher.checkpoint)) if recipe.teacher.checkpoint else ""


def weight_files(*sections: TeacherConfig | StudentConfig) -> dict[str, str]:
    """The sha256 of the files on this machine that networks start from, by section and name; `checkpoint_hash` has
    teacher.checkpoint. Runs without such files record nothing, so that older ones keep their hashes.
    """
    from kd.checkpoint.files import digest
    from kd.config.types import leaves

    files: dict[str, Path] = {}
    for section in sections:
        paths = []
        if section.model.startswith("local-dir:"):  # which weights timm takes follows from all that lie there
            read = (".json", *_TIMM_LOOKS_FOR) if section.pretrained else (".json",)
            beside = sorted(Path(section.model.removeprefix("local-dir:")).glob("*"))
            paths = [path for path in beside if path.suffix in read]
        if section.pretrained:  # timm's pretrained_cfg, or its overlay, may name a file
            paths += [Path(value) for key, value in leaves(section.model_kwargs) if key.endswith(".file")]
        files |= {section.section + path.name: path for path in paths if path.is_file()}
    return {name: digest(path) for name, path in files.items()}


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
