"""The recipe: every setting of a run with its unit, default and allowed range, and the hash of what a run computes.

Nothing here imports torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kd.errors import ConfigError, require
from kd.losses.ranges import HIGHEST_TEMPERATURE, LARGEST_WEIGHT, LOWEST_TEMPERATURE
from kd.text import plain

PACKAGE = Path(__file__).resolve().parent.parent
TEMPERATURES = {"ge": LOWEST_TEMPERATURE, "le": HIGHEST_TEMPERATURE}
WEIGHTS = {"ge": 0, "le": LARGEST_WEIGHT}
MOST_EPOCHS = 1_000_000
CONVENTIONS = {"among": ("uniform", "others")}  # of label smoothing with mass eps over K classes
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash", "border")
SCHEDULES = ("cosine", "step", "multistep", "poly", "tanh", "constant")
RATES = {"le": 1_000_000}  # far beyond any that trains; optimizers square it, and float32 holds 1e38


def setting(default: Any, doc: str, *, common=False, ge=None, gt=None, le=None, lt=None, among: tuple = ()) -> Any:
    """A field of the recipe: its default, one line of documentation, and the allowed range.

    The plain --help shows the `common` settings, and --help all shows the others too.
    """
    metadata = {"doc": doc, "common": common, "ge": ge, "gt": gt, "le": le, "lt": lt, "among": among}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


BOUNDS = {"ge": ("≥", operator.ge), "gt": (">", operator.gt), "le": ("≤", operator.le), "lt": ("<", operator.lt)}


def allowed(metadata: Any) -> str:
    """The allowed values of a setting in words; "" where every value of its type is allowed."""
    if metadata["among"]:
        return "one of " + ", ".join(map(str, metadata["among"]))
    return " and ".join(f"{sign} {metadata[key]}" for key, (sign, _) in BOUNDS.items() if metadata[key] is not None)


def _in_range(value: Any, metadata: Any) -> bool:
    if metadata["among"]:
        return {*value} <= {*metadata["among"]} if isinstance(value, list) else value in metadata["among"]
    bounds = [(compare, metadata[key]) for key, (_, compare) in BOUNDS.items() if metadata[key] is not None]
    return not bounds or (abs(value) < math.inf and all(compare(value, bound) for compare, bound in bounds))


def _class_weight(key: str, value: Any) -> Any:
    """Class weights with their numbers as floats, so that 1 and 1.0 are one recipe. Raises ConfigError.

    How many there must be is known with the data: kd.training.preflight checks that.
    """
    if value in (None, "balanced"):
        return value
    numbers = value if isinstance(value, list) else [value]
    require(
        numbers is value and all(type(x) in (int, float) and 0 <= x <= LARGEST_WEIGHT for x in numbers),
        f"{key}={plain(str(value), 80)}: must be null, balanced, or a list of numbers from 0 to {LARGEST_WEIGHT} "
        f"such as [1,2.5], one for each class",
    )
    return [float(x) for x in numbers]


class Checked:
    """A section of the recipe. Making one raises ConfigError for a value outside its range."""

    def __init_subclass__(cls, section: str = ""):
        cls.section = section

    def __post_init__(self):
        for f in fields(self):  # type: ignore[arg-type]
            value, key = getattr(self, f.name), f"{self.section}{f.name}"
            if f.metadata and value is not None and not _in_range(value, f.metadata):
                raise ConfigError(f"{key}={value}: must be {allowed(f.metadata)} ({f.metadata['doc']})")
            # A shell variable that is not set leaves an empty value, which must not stand for null in silence.
            if value == "" and f.type == "str | None":
                raise ConfigError(f"{key}=: must not be empty; type null, or leave it out ({f.metadata['doc']})")


@dataclass
class DataConfig(Checked, section="data."):
    """The data set, its split, and the augmentation of training images."""

    name: str = setting("digits", "name of the data set in tables and directories")
    family: str = setting("digits", "reader, such as digits, folder or torchvision; a wrong name prints them all")
    dataset: str = setting("", "torchvision's class, such as CIFAR10, or timm's name (families torchvision and timm)")
    root: str | None = setting(None, "directory that holds the data set", common=True)
    download: bool = setting(False, "download a torchvision set that data.root does not hold")
    class_order: str = setting(
        "sorted", "sorted (the data set's own), natural (timm's), or a file with a class name a line"
    )
    image_size: int = setting(32, "input height and width in pixels", ge=1, le=4096, common=True)
    val_fraction: float = setting(0.1, "fraction of the training images held out for validation", gt=0, lt=0.5)
    test_fraction: float = setting(0.2, "fraction held out for testing, for sets without a test split", gt=0, lt=0.5)
    split_seed: int = setting(0, "seed of split, subset and label noise, independent of `seed`", ge=0, lt=2**32)
    train_size: int | None = setting(None, "number of training images, stratified by class; null: all", ge=1)
    missing_classes: str = setting(
        "refuse", "classes without images in val or test; allow: scored over those present", among=("refuse", "allow")
    )
    omit_class: int | None = setting(None, "class left out of the training images of student and control", ge=0)
    label_noise: float = setting(0.0, "probability that a training label is replaced by a wrong one", ge=0, lt=1)
    shift: int = setting(0, "maximum random shift in pixels of the stored image (sets held in memory)", ge=0)
    hflip: float = setting(0.0, "probability of a horizontal flip", ge=0, le=1)
    noise: float = setting(0.0, "standard deviation of added Gaussian noise, in normalised pixel units", ge=0)
    crop_scale: float = setting(0.08, "minimum area of a random resized crop (streamed sets)", gt=0, le=1)
    channels: int | None = setting(None, "1: grey images; null: 3, colour (streamed sets)", among=(1, 3))
    mean: list[float] = setting(
        [], "pixel mean per channel, such as [0.5,0.5,0.5]; empty: ImageNet's, in memory its own"
    )
    std: list[float] = setting([], "pixel standard deviation of each channel, like data.mean")
    interpolation: str = setting("bilinear", "how images are resized", among=INTERPOLATIONS)
    crop_mode: str = setting("center", "evaluation crop, as timm names them (streamed sets)", among=CROP_MODES)
    crop_pct: float = setting(0.875, "centre crop: image_size over the size resized to (streamed sets)", gt=0, le=1)
    color_jitter: float = setting(0.0, "strength of the colour jitter (streamed sets)", ge=0)
    auto_augment: str = setting("", "timm policy such as rand-m9-mstd0.5 (streamed sets); empty: none")
    random_erase: float = setting(0.0, "probability of random erasing (streamed sets)", ge=0, le=1)
    mixup: float = setting(0.0, "parameter of mixup's Beta distribution; 0: no mixup", ge=0)
    cutmix: float = setting(0.0, "parameter of CutMix's Beta distribution; 0: no CutMix", ge=0)
    workers: int = setting(2, "worker processes per data loader, at most the cores (streamed sets)", ge=0)
    verify: bool = setting(False, "decode every image once before training (streamed sets)")
    unreadable: str = setting(
        "stop", "images that data.verify cannot decode; skip verifies and leaves them out", among=("stop", "skip")
    )

    def __post_init__(self):
        super().__post_init__()
        for name, lowest in (("mean", -math.inf), ("std", 0)):
            value = getattr(self, name)
            finite = all(lowest < x < math.inf for x in value)
            require(finite, f"data.{name}={value}: must be > {lowest} and < inf, for pixels scaled to 0..1")
        both = f"data.omit_class={self.omit_class} with data.label_noise={self.label_noise}: cannot be combined"
        instead = "type data.omit_class=null or data.label_noise=0"
        # a wrong label would show the omitted class
        require(self.omit_class is None or not self.label_noise, f"{both}; {instead}")


@dataclass
class TeacherConfig(Checked, section="teacher."):
    """The network that the student learns from."""

    model: str = setting(
        "resnet50.tv_in1k", "timm model name, hf-hub:NAME, local-dir:PATH or FILE.py:NAME", common=True
    )
    pretrained: bool = setting(False, "start from timm's pretrained weights", common=True)
    checkpoint: str | None = setting(None, "weights file, .safetensors or .pth", common=True)
    checkpoint_key: str | None = setting(None, "entry of that file with the network, where several fit")
    finetune: bool = setting(False, "train loaded weights further, with a new head if needed", common=True)
    epochs: int = setting(10, "epochs of the teacher", ge=1, le=MOST_EPOCHS, common=True)
    label_smoothing: float = setting(0.0, "label-smoothing mass of its training targets", ge=0, lt=1, common=True)
    smoothing: str = setting("uniform", "convention: eps/K on every class, or eps/(K-1) on the others", **CONVENTIONS)
    ce_weight: float = setting(1.0, "weight of the cross entropy in the teacher's own loss", **WEIGHTS)
    class_weight: Any = setting(None, "class weights of the teacher's own CE, as loss.class_weight")
    methods: dict[str, Any] = setting({}, "other terms of its own loss, such as {maxsup: {weight: 1}}")
    members: int = setting(1, "networks, trained with different seeds, whose predictions are averaged", ge=1, le=64)
    averaging_temperature: float = setting(1.0, "temperature of the averaged probabilities", **TEMPERATURES)
    preprocess: str = setting(
        "auto", "auto: images as its weights were trained (kd's record, or pretrained_cfg); data: as the student's",
        among=("auto", "data"),
    )  # fmt: skip
    image_size: int | None = setting(
        None, "its input size; null: that of its weights, or data.image_size", ge=1, le=4096
    )
    classes: str | None = setting(None, "file that names the classes of loaded weights, in their order, one a line")
    model_kwargs: dict[str, Any] = setting({}, "further arguments of timm.create_model")
    layers: list[str] = setting([], "teacher layers for feature losses, shallow to deep; empty: timm's stages")

    def __post_init__(self):
        super().__post_init__()
        self.class_weight = _class_weight("teacher.class_weight", self.class_weight)
        if self.ce_weight == 0 and not self.methods:
            raise ConfigError("teacher.ce_weight=0 without teacher.methods: nothing to learn; must be > 0")

    def own_loss(self) -> LossConfig:
        """The loss that the teacher itself is trained with."""
        return LossConfig(
            kd_weight=0.0,
            ce_weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            smoothing=self.smoothing,
            class_weight=self.class_weight,
            methods=self.methods,
        )


@dataclass
class StudentConfig(Checked, section="student."):
    """The network that learns. Its control is the same network trained on labels alone."""

    model: str = setting("resnet18.tv_in1k", "timm model name, or as teacher.model", common=True)
    pretrained: bool = setting(False, "start from timm's pretrained weights", common=True)
    checkpoint: str | None = setting(None, "weights file to start from, as teacher.checkpoint; a head may be replaced")
    checkpoint_key: str | None = setting(None, "entry of that file with the network, where several fit")
    epochs: int = setting(10, "epochs of student and control", ge=1, le=MOST_EPOCHS, common=True)
    model_kwargs: dict[str, Any] = setting({}, "further arguments of timm.create_model")
    layers: list[str] = setting(
        [], "student layers for feature losses, as many as teacher.layers (list_layers=true prints the names)"
    )


@dataclass
class LossConfig(Checked, section="loss."):
    """``ce_weight * CE(label_smoothing, class_weight) + kd_weight * T² * KL(teacher || student)``, and further methods.

    Terms are means over the batch of an update, CE a weighted one with class weights. `reduction` is no setting: a sum
    is the mean times train.batch_size.
    """

    temperature: float = setting(4.0, "divides both logits before the softmax", **TEMPERATURES, common=True)
    student_temperature: float | None = setting(None, "the student's; null: loss.temperature", **TEMPERATURES)
    kd_weight: float = setting(0.9, "weight of the distillation term", **WEIGHTS, common=True)
    ce_weight: float = setting(0.1, "weight of the cross entropy with the labels", **WEIGHTS, common=True)
    label_smoothing: float = setting(0.0, "label-smoothing mass of student and control", ge=0, lt=1, common=True)
    smoothing: str = setting("uniform", "convention: eps/K on every class, or eps/(K-1) on the others", **CONVENTIONS)
    class_weight: Any = setting(
        None, "class weights of CE: balanced, n / (K n_k) by training labels, or a list such as [1,2.5]; null: all 1"
    )
    teacher_smoothing: float = setting(0.0, "uniform mass to remove from the teacher", ge=0, lt=1, common=True)
    backend: str = setting("auto", "implementation of the loss", among=("auto", "reference", "cpu", "triton"))
    methods: dict[str, Any] = setting({}, "further methods with their weights and settings; loss=NAME fills it in")

    def __post_init__(self):
        super().__post_init__()
        self.class_weight = _class_weight("loss.class_weight", self.class_weight)
        # `loss=NAME` sets the methods of a recipe that it replaces to null.
        self.methods = {name: settings for name, settings in self.methods.items() if settings is not None}
        if self.kd_weight == 0 and self.ce_weight == 0 and not self.methods:
            raise ConfigError("loss.kd_weight=0 with loss.ce_weight=0: nothing to learn; one of them must be > 0")


@dataclass
class OptimizerConfig(Checked, section="optimizer."):
    """A timm optimizer."""

    name: str = setting("adamw", "timm optimizer: sgd (Nesterov), momentum, adamw, lamb, ...", common=True)
    lr: float = setting(1e-3, "learning rate at train.batch_size", gt=0, **RATES, common=True)
    weight_decay: float = setting(0.05, "weight decay", ge=0, **RATES)
    momentum: float = setting(0.9, "momentum, for optimizers that have one", ge=0, lt=1)
    decay_norm_and_bias: bool = setting(False, "apply weight decay to normalisation and bias parameters too")


@dataclass
class SchedulerConfig(Checked, section="scheduler."):
    """A timm learning-rate schedule, stepped after every update."""

    name: str = setting("cosine", "schedule", among=SCHEDULES, common=True)
    warmup_epochs: int = setting(0, "epochs of linear warmup", ge=0)
    warmup_lr: float = setting(1e-6, "learning rate at the start of warmup", ge=0, **RATES)
    min_lr: float = setting(0.0, "learning rate at the end of the decay", ge=0, **RATES)
    decay_epochs: int = setting(30, "epochs between decays (step)", ge=1)
    milestones: list[int] = setting([], "epochs at which the learning rate decays (multistep)")
    decay_rate: float = setting(0.1, "factor of each decay (step, multistep)", gt=0, le=1)

    def __post_init__(self):
        super().__post_init__()
        rising = [0, *self.milestones] == sorted({0, *self.milestones})
        if not rising or (self.name == "multistep" and not self.milestones):
            wanted = "rising epochs ≥ 1, at least one for multistep, such as [150,180,210]"
            raise ConfigError(f"scheduler.milestones={self.milestones}: must be {wanted}")


@dataclass
class TrainConfig(Checked, section="train."):
    """The training loop; teacher, student and control share these settings."""

    batch_size: int = setting(128, "images per update, over all processes and passes", ge=1, common=True)
    accumulation: int = setting(1, "forward and backward passes per update", ge=1, common=True)
    clip_grad: float = setting(0.0, "maximum gradient norm; 0: no clipping", ge=0)
    ema_decay: float = setting(0.0, "decay of the moving average of the weights (EMA); 0: no average", ge=0, lt=1)
    ema_warmup: bool = setting(True, "raise the decay of the average to train.ema_decay over the updates, as timm does")
    precision: str = setting("fp32", "autocast precision", among=("fp32", "bf16", "fp16"), common=True)
    compile: bool = setting(False, "compile the networks with torch.compile")
    channels_last: bool = setting(False, "keep images in channels-last memory format")
    log_every: int = setting(10, "updates between lines of metrics.jsonl", ge=1)
    save_every: float = setting(60.0, "seconds between checkpoints", ge=0)


@dataclass
class Recipe(Checked):
    """All settings of a run. ``--cfg job`` prints them."""

    name: str = setting("", "name of the recipe; its runs are kept in OUTPUT/NAME/")
    seed: int = setting(0, "seed of weights, data order and augmentation", ge=0, lt=2**31, common=True)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    control: bool = setting(True, "also train the same student on labels alone", common=True)
    tracker: str = setting("none", "experiment tracker", among=("none", "tensorboard", "trackio"))
    output: str = setting("checkpoints", "directory that holds all runs", common=True)
    run: str | None = setting(None, "name of the run directory; null: from seed and recipe hash", common=True)
    resume: bool = setting(True, "resume the run; false: set it aside and start again", common=True)
    dry_run: bool = setting(False, "build, take two steps, print the plan, write nothing", common=True)
    list_layers: bool = setting(False, "print the layer names of both networks and exit")


# Where a run is kept, how it is logged and how quickly it is fed do not change what it computes.
_NOT_IDENTITY = {"output", "run", "resume", "dry_run", "list_layers", "tracker"}
_NOT_TRAIN_IDENTITY = {"log_every", "save_every"}
# The data's hash says which images were left out, and which classes of a split.
_NOT_DATA_IDENTITY = {"root", "download", "workers", "verify", "unreadable", "missing_classes"}


_ADDED_LATER = (
    ("teacher", "class_weight", None),
    ("loss", "class_weight", None),
    ("teacher", "preprocess", "auto"),
    ("teacher", "image_size", None),
    ("teacher", "checkpoint_key", None),
    ("student", "checkpoint", None),
    ("student", "checkpoint_key", None),
    ("data", "class_order", "sorted"),
    ("teacher", "classes", None),
    ("data", "channels", None),
    ("data", "mean", []),
    ("data", "std", []),
    ("data", "interpolation", "bilinear"),
    ("data", "crop_mode", "center"),
)  # section, setting, default


def identity(recipe: Recipe) -> dict[str, Any]:
    """The settings that determine what a run computes, as plain values."""
    values: dict[str, Any] = {k: v for k, v in asdict(recipe).items() if k not in _NOT_IDENTITY}
    # Settings that were added later are left out at their defaults, so that older runs keep their hashes.
    if recipe.teacher.members == 1:
        del values["teacher"]["members"], values["teacher"]["averaging_temperature"]
    if recipe.teacher.ce_weight == 1 and not recipe.teacher.methods:
        del values["teacher"]["ce_weight"], values["teacher"]["methods"]
    if not (recipe.train.ema_decay and recipe.train.ema_warmup):  # averages were without warm-up
        del values["train"]["ema_warmup"]
    for section, name, default in _ADDED_LATER:
        if values[section][name] == default:
            del values[section][name]
    values["data"] = {k: v for k, v in values["data"].items() if k not in _NOT_DATA_IDENTITY}
    values["train"] = {k: v for k, v in values["train"].items() if k not in _NOT_TRAIN_IDENTITY}
    return values


def content_hash(values: Any) -> str:
    """First 12 hex digits of the sha256 of plain values. The order of keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
