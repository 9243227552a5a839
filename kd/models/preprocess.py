"""What a teacher takes: the preprocessing that its weights were trained with, or the student's."""

import json
from dataclasses import asdict, replace
from typing import Any

from kd.config.schema import CROP_MODES, INTERPOLATIONS, TeacherConfig
from kd.data.base import Preprocess, for_channels
from kd.errors import require
from kd.models.factory import published
from kd.models.weights import weights_metadata
from kd.runtime.own_code import own_file


def teacher_preprocess(own: TeacherConfig, data: Preprocess) -> Preprocess:
    """How images are made for the teacher, where the student takes `data`.

    With teacher.preprocess=auto, what kd recorded in teacher.checkpoint; else what the network's pretrained_cfg says,
    where it starts from weights. What neither says is as for the student, and so is everything of a teacher that is
    trained from scratch.

    The size is teacher.image_size; else that of the weights where they are kd's or timm's and stay as they are; else
    data.image_size: of other files nobody knows it, and what is trained here is trained at data.image_size.

    Raises:
        ConfigError: the network is unknown, its pretrained_cfg names what timm does not have, or teacher.image_size is
            given for vectors.
        CheckpointError: the file cannot be read.
    """
    said = _said(own) if own.preprocess == "auto" else {}
    if len(data.shape) == 1:
        require(own.image_size is None, f"teacher.image_size={own.image_size}: only for images")
        return replace(data, mean=tuple(said.get("mean", data.mean)), std=tuple(said.get("std", data.std)))
    size = said.pop("input_size", data.shape)
    if len(size) != 3:  # weights for vectors: loading them says that they do not fit
        return data
    channels = own.model_kwargs.get("in_chans", size[0])
    if data.crop_mode == "whole":  # sets held in memory have no crop, and their own number of channels
        channels, said = data.shape[0], said | {"crop_mode": data.crop_mode, "crop_pct": data.crop_pct}
    height, width = (own.image_size,) * 2 if own.image_size else size[1:]
    said |= {name: for_channels(said.get(name, getattr(data, name)), channels) for name in ("mean", "std")}
    made = replace(data, **said, shape=(channels, height, width))
    known = made.interpolation in INTERPOLATIONS and made.crop_mode in (*CROP_MODES, "whole")
    advice = "type teacher.preprocess=data, and data.interpolation and data.crop_mode as it was trained"
    require(known, f"teacher.model={own.model}: takes {describe(made)}, which timm does not have; {advice}")
    return made


def own_preprocess(own: TeacherConfig, data: Preprocess) -> dict[str, Any]:
    """The teacher's preprocessing as plain values where it is not the student's, else {}."""
    made = teacher_preprocess(own, data)
    return {} if made == data else json.loads(json.dumps(asdict(made)))


def images_in_doubt(own: TeacherConfig, network: Preprocess) -> str:
    """A line about weights that are used as they are, of one's own network or of a file at another size than the
    network's pretrained_cfg has; '' where there is nothing to say.
    """
    loads = own.pretrained or own.checkpoint
    known = own.preprocess == "data" or own.finetune or not loads
    if known or "input_shape" in weights_metadata(own.checkpoint or ""):
        return ""
    if own_file(own.model):
        made = f"{own.model} takes images as the data set's, {describe(network)}"
        return f"{made}: if its weights are of others set data.mean and the like, else teacher.preprocess=data"
    if own.image_size or not own.checkpoint:
        return ""
    cfg = published(own.model, own.section, own.model_kwargs)
    size = tuple(cfg.get("input_size", ()))[1:]
    if "mean" not in cfg or size == network.shape[1:]:  # kd's networks say nothing of images
        return ""
    used, usual = (" x ".join(map(str, each)) for each in (network.shape[1:], size))
    return (
        f"{own.model} is usually of {usual} pixels and sees {used}: if its file is of {usual}, set teacher.image_size"
    )


def describe(network: Preprocess) -> str:
    """A Preprocess on one line, for people."""
    values = [" ".join(f"{x:.3g}" for x in each) for each in (network.mean, network.std)]
    size, crop = " x ".join(map(str, network.shape)), f"{network.crop_mode} crop {network.crop_pct:g}"
    return f"{size}, mean {values[0]}, std {values[1]}, {network.interpolation}, {crop}"


def _said(own: TeacherConfig) -> dict[str, Any]:
    """What is known of the images that the weights were trained with, by the names of pretrained_cfg; input_size where
    the network has to take it.
    """
    names = {"mean", "std", "interpolation", "crop_pct", "crop_mode"}
    recorded = weights_metadata(own.checkpoint) if own.checkpoint else {}
    if {"mean", "std", "input_shape"} <= recorded.keys():
        # Of an older kd, and of kd's defaults, only mean and std are recorded.
        known = {"interpolation": "bilinear", "input_size": recorded["input_shape"], **recorded}
    elif own.checkpoint or own.pretrained:
        known = published(own.model, own.section, own.model_kwargs)
        if own.checkpoint:  # the size is that of timm's weights
            known.pop("input_size", None)
    else:
        return {}
    kept = names if own.finetune else names | {"input_size"}
    return {name: value for name, value in known.items() if name in kept and value is not None}
