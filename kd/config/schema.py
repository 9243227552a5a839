"""The recipe: every setting of a run, its unit and its allowed range, and how text from a user becomes one.

Only this file and Hydra read what a user typed. Nothing here imports torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from kd.errors import ConfigError
from kd.losses.ranges import HIGHEST_TEMPERATURE, LARGEST_WEIGHT, LOWEST_TEMPERATURE

PACKAGE = Path(__file__).resolve().parent.parent
TEMPERATURES = {"ge": LOWEST_TEMPERATURE, "le": HIGHEST_TEMPERATURE}
WEIGHTS = {"ge": 0, "le": LARGEST_WEIGHT}
MOST_EPOCHS = 1_000_000
RATES = {"le": 1_000_000}  # far beyond any that trains, and float32 has room for what optimizers make of it


def setting(default: Any, doc: str, *, ge=None, gt=None, le=None, lt=None, among: tuple = ()) -> Any:
    """A field of the recipe with one line of documentation and its allowed range."""
    metadata = {"doc": doc, "ge": ge, "gt": gt, "le": le, "lt": lt, "among": among}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def allowed(metadata: Any) -> str:
    """The allowed values of a field in words, '' where everything of its type is."""
    if metadata["among"]:
        return "one of " + ", ".join(metadata["among"])
    bounds = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return " and ".join(f"{sign} {metadata[key]}" for key, sign in bounds.items() if metadata[key] is not None)


def _in_range(value: Any, m: Any) -> bool:
    if value is None or not allowed(m):
        return True
    if m["among"]:
        return value in m["among"]
    return (
        math.isfinite(value)
        and (m["ge"] is None or value >= m["ge"])
        and (m["gt"] is None or value > m["gt"])
        and (m["le"] is None or value <= m["le"])
        and (m["lt"] is None or value < m["lt"])
    )


class Checked:
    """A section of the recipe; raises ConfigError when a value is outside its range."""

    section: ClassVar[str] = ""

    def __post_init__(self):
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if f.metadata and not _in_range(value, f.metadata):
                finite = "finite and " if isinstance(value, float) and not math.isfinite(value) else ""
                raise ConfigError(
                    f"{self.section}{f.name}={value}: must be {finite}{allowed(f.metadata)} ({f.metadata['doc']})"
                )
            if value == "" and f.type == "str | None":  # as of a shell variable that is not set
                raise ConfigError(
                    f"{self.section}{f.name}=: must not be empty; null, or left out, is none ({f.metadata['doc']})"
                )


@dataclass
class DataConfig(Checked):
    """Which images, how they are split, and how training images are augmented."""

    section: ClassVar[str] = "data."

    name: str = setting("digits", "name of the data set in tables and folders")
    family: str = setting("digits", "how it is read, such as digits, folder or torchvision; a wrong name lists all")
    dataset: str = setting("", "torchvision class (CIFAR10) or timm data set name, for those two families")
    root: str | None = setting(None, "folder on this machine that holds the data set")
    download: bool = setting(False, "fetch a torchvision set into data.root when it is not there")
    image_size: int = setting(32, "height and width the model sees, in pixels", ge=1, le=4096)
    val_fraction: float = setting(0.1, "share of the training images held out to select on", gt=0, lt=0.5)
    test_fraction: float = setting(0.2, "share held out to test on, for sets that come unsplit", gt=0, lt=0.5)
    split_seed: int = setting(
        0, "seed of the split, apart from `seed` so that all runs test on the same images", ge=0, lt=2**32
    )
    train_size: int | None = setting(None, "training images, stratified by class; null: all", ge=1)
    omit_class: int | None = setting(
        None, "class, from 0, that student and control never see; teacher and test images keep it", ge=0
    )
    label_noise: float = setting(
        0.0, "probability that a training label is replaced by another class, by split_seed", ge=0, lt=1
    )
    shift: int = setting(0, "largest random shift, in pixels of the stored image (small sets)", ge=0)
    hflip: float = setting(0.0, "probability of a horizontal flip", ge=0, le=1)
    noise: float = setting(0.0, "standard deviation of added Gaussian noise, in units of normalised pixels", ge=0)
    crop_scale: float = setting(0.08, "smallest area of a random resized crop (streamed sets)", gt=0, le=1)
    crop_pct: float = setting(
        0.875, "image_size over the size resized to before the centre crop (streamed)", gt=0, le=1
    )
    color_jitter: float = setting(0.0, "strength of random colour changes (streamed sets)", ge=0)
    auto_augment: str = setting("", "timm policy such as rand-m9-mstd0.5 (streamed sets); empty for none")
    random_erase: float = setting(0.0, "probability of random erasing (streamed sets)", ge=0, le=1)
    mixup: float = setting(0.0, "Beta parameter of mixup; 0 for none", ge=0)
    cutmix: float = setting(0.0, "Beta parameter of CutMix; 0 for none", ge=0)
    workers: int = setting(2, "worker processes of each loader (streamed sets)", ge=0)
    verify: bool = setting(False, "decode every image once before training starts (streamed sets)")

    def __post_init__(self):
        super().__post_init__()
        if self.omit_class is not None and self.label_noise:  # wrong labels would show the class after all
            raise ConfigError(
                f"data.omit_class={self.omit_class} with data.label_noise={self.label_noise}: one of them only, "
                f"omit_class=null or label_noise=0"
            )


@dataclass
class TeacherConfig(Checked):
    """The network that is learned from."""

    section: ClassVar[str] = "teacher."

    model: str = setting("resnet50.tv_in1k", "timm model name, hf-hub:... or local-dir:...")
    pretrained: bool = setting(False, "start from timm's weights instead of training from nothing")
    checkpoint: str | None = setting(None, "path of weights of your own (.safetensors, or .pth read as tensors only)")
    finetune: bool = setting(
        False, "train pretrained or checkpoint weights further; a head that does not fit is replaced"
    )
    epochs: int = setting(
        10, "passes over the training images, where the teacher is trained here", ge=1, le=MOST_EPOCHS
    )
    label_smoothing: float = setting(0.0, "smoothing mass of the teacher's own training targets", ge=0, lt=1)
    smoothing: str = setting("uniform", "convention of that mass", among=("uniform", "others"))
    ce_weight: float = setting(1.0, "weight of the cross entropy in the teacher's own training", **WEIGHTS)
    methods: dict[str, Any] = setting({}, "methods beside it that need no teacher, such as {maxsup: {weight: 1}}")
    members: int = setting(1, "networks, each trained from its own seed, that teach as one", ge=1, le=64)
    averaging_temperature: float = setting(
        1.0, "temperature at which the members' probabilities are averaged", **TEMPERATURES
    )
    model_kwargs: dict[str, Any] = setting({}, "further arguments of timm.create_model")
    layers: list[str] = setting([], "layers that feature methods read, from shallow to deep; empty: timm's stages")

    def __post_init__(self):
        super().__post_init__()
        if self.ce_weight == 0 and not self.methods:
            raise ConfigError("teacher.ce_weight=0 without teacher.methods leaves nothing to learn: make it > 0")

    def own_loss(self) -> LossConfig:
        """What the teacher itself minimises."""
        return LossConfig(
            kd_weight=0.0,
            ce_weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            smoothing=self.smoothing,
            methods=self.methods,
        )


@dataclass
class StudentConfig(Checked):
    """The network that learns; its control is the same network with hard labels."""

    section: ClassVar[str] = "student."

    model: str = setting("resnet18.tv_in1k", "timm model name")
    pretrained: bool = setting(False, "start from timm's weights")
    epochs: int = setting(
        10, "passes over the training images, for the student and for its control", ge=1, le=MOST_EPOCHS
    )
    model_kwargs: dict[str, Any] = setting({}, "further arguments of timm.create_model")
    layers: list[str] = setting([], "the student's, as many; list_layers=true prints those of both")


@dataclass
class LossConfig(Checked):
    """ce_weight * CE(label_smoothing) + kd_weight * T² * KL(teacher || student), and further methods."""

    section: ClassVar[str] = "loss."

    temperature: float = setting(4.0, "divides both logits before the softmax", **TEMPERATURES)
    student_temperature: float | None = setting(None, "the student's own temperature; null: the same", **TEMPERATURES)
    kd_weight: float = setting(0.9, "weight of the distillation term", **WEIGHTS)
    ce_weight: float = setting(0.1, "weight of the cross entropy with the labels", **WEIGHTS)
    label_smoothing: float = setting(0.0, "smoothing mass of the student's and its control's labels", ge=0, lt=1)
    smoothing: str = setting(
        "uniform", "convention: eps/K on every class, or eps/(K-1) on the others", among=("uniform", "others")
    )
    teacher_smoothing: float = setting(
        0.0, "uniform smoothing mass to take out of the teacher's probabilities, exactly", ge=0, lt=1
    )
    backend: str = setting("auto", "which implementation computes it", among=("auto", "reference", "cpu", "triton"))
    methods: dict[str, Any] = setting({}, "further methods by name, their weights and settings; loss=NAME writes them")

    def __post_init__(self):
        super().__post_init__()
        self.methods = {name: settings for name, settings in self.methods.items() if settings is not None}
        if self.kd_weight == 0 and self.ce_weight == 0 and not self.methods:
            raise ConfigError("loss.kd_weight=0 with loss.ce_weight=0 leaves nothing to learn: make one of them > 0")


@dataclass
class OptimizerConfig(Checked):
    """Any optimizer of timm, by name."""

    section: ClassVar[str] = "optimizer."

    name: str = setting("adamw", "timm optimizer: sgd (Nesterov), momentum, adamw, lamb, ...")
    lr: float = setting(1e-3, "learning rate at the given batch size", gt=0, **RATES)
    weight_decay: float = setting(0.05, "weight decay", ge=0, **RATES)
    momentum: float = setting(0.9, "momentum, for the optimizers that have one", ge=0, lt=1)
    decay_norm_and_bias: bool = setting(False, "apply weight decay to normalisation parameters and biases too")


@dataclass
class SchedulerConfig(Checked):
    """Any schedule of timm, stepped after every update."""

    section: ClassVar[str] = "scheduler."

    name: str = setting(
        "cosine", "shape of the decay", among=("cosine", "step", "multistep", "poly", "tanh", "constant")
    )
    warmup_epochs: int = setting(0, "epochs of linear warm-up", ge=0)
    warmup_lr: float = setting(1e-6, "learning rate at the start of the warm-up", ge=0, **RATES)
    min_lr: float = setting(0.0, "learning rate at the end", ge=0, **RATES)
    decay_epochs: int = setting(30, "epochs between decays (step)", ge=1)
    milestones: list[int] = setting([], "epochs at which to decay (multistep)")
    decay_rate: float = setting(0.1, "factor of each decay (step, multistep)", gt=0, le=1)

    def __post_init__(self):
        super().__post_init__()
        rising = [0, *self.milestones] == sorted({0, *self.milestones})
        if not rising or (self.name == "multistep" and not self.milestones):
            raise ConfigError(
                f"scheduler.milestones={self.milestones}: must be rising epochs ≥ 1, at least one for multistep, "
                f"such as [150,180,210]"
            )


@dataclass
class TrainConfig(Checked):
    """How the one loop steps; the same for teacher, student and control."""

    section: ClassVar[str] = "train."

    batch_size: int = setting(128, "images in one update, over all processes and accumulation steps", ge=1)
    accumulation: int = setting(1, "forward passes that make one update", ge=1)
    clip_grad: float = setting(0.0, "largest norm of the gradient; 0 for no clipping", ge=0)
    ema_decay: float = setting(
        0.0, "decay of the averaged weights that are evaluated and saved; 0 for none", ge=0, lt=1
    )
    precision: str = setting("fp32", "autocast", among=("fp32", "bf16", "fp16"))
    compile: bool = setting(False, "torch.compile the models")
    channels_last: bool = setting(False, "keep images with their channels last in memory")
    log_every: int = setting(10, "updates between two lines of metrics.jsonl", ge=1)
    save_every: float = setting(60.0, "seconds between two saves of the state that a killed run resumes from", ge=0)


@dataclass
class Recipe(Checked):
    """Everything that decides a run. Read it with --cfg job."""

    name: str = setting("", "name of the recipe; the run lands in <output>/<name>/")
    seed: int = setting(0, "seed of weights, order, augmentation and dropout", ge=0, lt=2**31)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    control: bool = setting(True, "also train the same student alone, with equal budget")
    tracker: str = setting("none", "also log to", among=("none", "tensorboard", "trackio"))
    output: str = setting("checkpoints", "folder of all runs, not empty")
    run: str | None = setting(None, "name of the run's folder; null: made from the seed and the recipe's hash")
    resume: bool = setting(True, "go on where the same run stopped; false: set the old run aside and start again")
    dry_run: bool = setting(False, "build everything, take two steps, print the plan, write nothing")
    list_layers: bool = setting(False, "print the layers of both networks and stop")


# Where a run is kept, how it is watched and how quickly it is fed do not change what it computes.
_NOT_IDENTITY = {"output", "run", "resume", "dry_run", "list_layers", "tracker"}
_NOT_TRAIN_IDENTITY = {"log_every", "save_every"}
_NOT_DATA_IDENTITY = {"root", "download", "workers", "verify"}


def identity(recipe: Recipe) -> dict[str, Any]:
    """The settings that decide what the run computes, as plain values."""
    values: dict[str, Any] = {k: v for k, v in asdict(recipe).items() if k not in _NOT_IDENTITY}
    if recipe.teacher.members == 1:  # then there is nothing to average
        del values["teacher"]["members"], values["teacher"]["averaging_temperature"]
    if recipe.teacher.ce_weight == 1 and not recipe.teacher.methods:  # as all teachers were before there were others
        del values["teacher"]["ce_weight"], values["teacher"]["methods"]
    values["data"] = {k: v for k, v in values["data"].items() if k not in _NOT_DATA_IDENTITY}
    values["train"] = {k: v for k, v in values["train"].items() if k not in _NOT_TRAIN_IDENTITY}
    return values


def content_hash(values: Any) -> str:
    """First 12 hex digits of the sha256 of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
