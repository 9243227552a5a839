"""Preprocessing per network: a teacher sees images as its weights were trained, whatever the student sees."""

import json
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from timm.data import create_transform, resolve_data_config

from kd.config.schema import DataConfig, Recipe, TeacherConfig
from kd.data import load_data, mixed_alike, mixer
from kd.errors import ConfigError
from kd.models.preprocess import images_in_doubt, teacher_preprocess
from kd.training import pipeline, stage
from kd.training.predict import predict
from kd.training.run import card

ZERO = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
HALF = [0.5, 0.5, 0.5]
CONFIGS = {
    "mean 0, std 1": {"input_size": [3, 32, 32], "interpolation": "bilinear", **ZERO},
    "larger, bicubic": {"input_size": [3, 48, 48], "interpolation": "bicubic", "crop_pct": 0.95, **ZERO},
    "squash": {"input_size": [3, 40, 40], "interpolation": "lanczos", "crop_pct": 1.0, "crop_mode": "squash"},
    "border": {"input_size": [3, 40, 40], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "border", **ZERO},
    "not square": {"input_size": [3, 32, 48], "interpolation": "bicubic", "crop_pct": 0.95},
    "grey": {"input_size": [1, 32, 32], "mean": [0.4], "std": [0.3]},
    "tf_efficientnet_lite0": {"input_size": [3, 224, 224], "interpolation": "bicubic", "mean": HALF, "std": HALF},
}
AUGMENTED = {"hflip": 0.5, "auto_augment": "rand-m9-n2-mstd0.5", "random_erase": 0.7, "mixup": 0.4, "cutmix": 1.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """200 digits in two classes, in grey on a coloured ground, 40 x 32."""
    folder = tmp_path_factory.mktemp("digits")
    images, targets = load_digits(return_X_y=True)
    chosen = [i for i, target in enumerate(targets) if target < 2][:200]
    for i in chosen:
        digit = Image.fromarray((images[i].reshape(8, 8) * 15.9).astype("uint8")).resize((40, 32))
        path = folder / f"class{targets[i]}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.merge("RGB", (digit, digit.point(lambda x: x // 2), digit.point(lambda x: 255 - x))).save(path)
    return folder


def local(folder, config, name="resnet10t"):
    """A directory with weights and their pretrained_cfg, as timm saves them; its name as a teacher's."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    channels = config["input_size"][0]
    network = timm.create_model(name, num_classes=2, in_chans=channels)
    save_file(network.state_dict(), folder / "model.safetensors")
    about = {"architecture": name, "num_classes": 2, "model_args": {"in_chans": channels}}
    places = {key: network.pretrained_cfg[key] for key in ("first_conv", "classifier")}
    about["pretrained_cfg"] = {"num_classes": 2, **places, **config}
    (folder / "config.json").write_text(json.dumps(about))
    return f"local-dir:{folder}"


def recipe(root, tmp_path, teacher, **data):
    settings = {"name": "toy", "family": "folder", "image_size": 32, "workers": 0, "root": str(root), **data}
    made = Recipe(name="t", data=DataConfig(**settings), teacher=TeacherConfig(**teacher), output=str(tmp_path / "out"))
    made.student.model = "resnet10t"
    made.train.batch_size = 16
    return made


def everything(split, epoch=None, size=64):
    return list(split.batches(list(torch.arange(len(split)).split(size)), epoch))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_timm_teacher_sees_the_tensors_of_timms_own_pipeline(root, tmp_path, kind):
    name = local(tmp_path / "teacher", CONFIGS[kind], kind if timm.is_model(kind) else "resnet10t")
    run = pipeline.prepare(recipe(root, tmp_path, {"model": name, "pretrained": True}))
    network = timm.create_model(name, pretrained=True).eval()
    config = resolve_data_config(model=network)
    transform, mode = create_transform(**config, is_training=False), "L" if kind == "grey" else "RGB"
    paths = [run.data.val.images.name(i) for i in range(len(run.data.val))]
    expected = torch.stack([transform(Image.open(path).convert(mode)) for path in paths])
    (batch,) = everything(run.teacher_data.val)
    assert torch.equal(batch.images, expected)
    assert tuple(config["input_size"]) == run.teacher_data.input_shape
    assert run.data.input_shape == (3, 32, 32)
    with torch.no_grad():
        logits = network(expected)
    teacher = pipeline.find_teacher(run)
    assert torch.equal(predict(teacher, run.teacher_data.val, 64, run.accelerator), logits)


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """A teacher that learned images of mean 0 and std 1 by timm's pipeline: its directory, and the transform."""
    folder = tmp_path_factory.mktemp("zero")
    name = local(folder, CONFIGS["mean 0, std 1"])
    network = timm.create_model(name, pretrained=True)
    transform = create_transform(**resolve_data_config(model=network), is_training=False)
    paths = sorted(root.rglob("*.png"))
    images = torch.stack([transform(Image.open(path)) for path in paths])
    targets = torch.tensor([int(path.parent.name[-1]) for path in paths])
    optimizer = torch.optim.AdamW(network.parameters(), 3e-4)
    for i in range(40):
        chosen = torch.randperm(len(paths), generator=torch.Generator().manual_seed(i))[:32]
        optimizer.zero_grad()
        F.cross_entropy(network(images[chosen]), targets[chosen]).backward()
        optimizer.step()
    save_file(network.state_dict(), folder / "model.safetensors")
    with torch.no_grad():
        logits = network.eval()(images)
    assert (logits.argmax(1) == targets).float().mean() > 0.9
    return name, {path.name: row for path, row in zip(paths, logits, strict=True)}


SHORT = ("recipe=resnet34_to_18", "data=folder", "student.model=resnet10t", "train.batch_size=32", "student.epochs=1")
SHORT += ("scheduler.warmup_epochs=0", "scheduler.milestones=[9]", "control=false", "output=out", "run=one")
SHORT += ("data.image_size=32", "data.workers=0", "data.verify=false", "data.mixup=0.2", "train.channels_last=false")


def test_a_teacher_of_mean_0_and_std_1_has_timms_scores(root, trained, kd_train, called, tmp_path):
    """By the command, up to result.json; kd.evaluate finds the same."""
    from kd import evaluate

    name, logits = trained
    words = (*SHORT, f"data.root={root}", f"teacher.model={name}", "teacher.pretrained=true", "seed=3")
    done = kd_train(*words)
    assert done.code == 0
    assert "teacher  takes images of its own: 3 x 32 x 32, mean 0 0 0, std 1 1 1, bilinear" in done.out
    directory = tmp_path / "out" / "resnet34_to_18" / "one"
    result = json.loads((directory / "result.json").read_text())["teacher"]["last"]
    data = load_data(DataConfig(name="folder", family="folder", root=str(root)), 0)
    for split in ("val", "test"):
        own = getattr(data, split)
        rows = torch.stack([logits[own.images.name(i).rsplit("/", 1)[1]] for i in range(len(own))])
        assert result[split]["top1"] == pytest.approx((rows.argmax(1) == own.targets).float().mean().item())
        assert result[split]["nll"] == pytest.approx(F.cross_entropy(rows, own.targets).item(), rel=1e-4)
    assert called("kd.evaluate", evaluate.main, f"run={directory}").code == 0
    assert json.loads((directory / "run.json").read_text())["teacher_preprocess"]["mean"] == [0.0] * 3
    # a recipe.yaml of an older kd has no such setting: its teacher saw the student's images
    saved = directory / "recipe.yaml"
    saved.write_text("".join(line for line in saved.read_text().splitlines(True) if "preprocess: auto" not in line))
    assert called("kd.evaluate", evaluate.main, f"run={directory}").code == 1
    refused = kd_train(*words, "teacher.preprocess=data")
    assert refused.code == 2
    assert "run=one holds another recipe (teacher_preprocess.crop_mode: center, now None" in refused.err


# ---- one augmentation for both


def pair(root, own=None, **settings):
    """The training split for a student and for a teacher of mean 0, std 1 and 64 pixels."""
    config = {"name": "toy", "family": "folder", "image_size": 32, "workers": 0, "root": str(root), **settings}
    data = load_data(DataConfig(**config), seed=1)
    teacher = replace(data.preprocess, **{"mean": (0.0,) * 3, "std": (1.0,) * 3, **(own or {})})
    return data, data.train.rendered(data.preprocess, teacher)


@pytest.mark.parametrize("erase", [0.0, 0.7])
def test_the_student_sees_what_it_saw_alone_and_the_teacher_the_same_pixels(root, erase):
    data, both = pair(root, hflip=0.5, color_jitter=0.4, auto_augment="rand-m9-n2-mstd0.5", random_erase=erase)
    for alone, batch in zip(everything(data.train, 2), everything(both, 2), strict=True):
        assert alone.teacher is None
        assert torch.equal(alone.images, batch.images)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.mean, data.std))
        pixels = batch.images * std + mean
        same = (pixels - batch.teacher).abs() < 1e-5
        erased = (batch.images - batch.teacher).abs() < 1e-6  # noise in the units of each
        assert (same | erased).all()
        assert bool(erase) == bool((erased & ~same).any())


def test_a_larger_teacher_sees_the_same_crop_and_flip_and_erased_box(root):
    data, both = pair(root, {"shape": (3, 128, 128)}, hflip=0.5, random_erase=1.0, image_size=64)
    for batch in everything(both, 0):
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.mean, data.std))
        small = F.interpolate(batch.teacher, size=(64, 64), mode="area")
        box = (small < -0.02) | (small > 1.02)  # pixels are from 0 to 1, noise is not
        inside = F.max_pool2d(box.float(), 5, 1, 2).bool().any(1, keepdim=True)
        difference = (small - (batch.images * std + mean)).abs()
        assert difference.masked_fill(inside, 0).mean() < 0.02
        noisy = (batch.images - small).abs() < 1e-5
        assert noisy[inside.expand_as(noisy)].float().mean() > 0.5


@pytest.mark.parametrize("setting", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 0.5}, {}])
def test_both_are_mixed_by_the_same_shares_at_the_same_places(setting):
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mix, targets = mixer(DataConfig(**setting), 8), torch.arange(6)
    for seed in range(10):
        mixed = mix(images, targets, seed)[0]
        torch.testing.assert_close(mixed_alike(mix, images, images, seed), mixed)
        large = mixed_alike(mix, images, F.interpolate(images, scale_factor=2.0), seed)
        torch.testing.assert_close(large, F.interpolate(mixed, scale_factor=2.0))


def test_sets_in_memory_show_both_the_same_shift_flip_and_noise():
    data = load_data(DataConfig(image_size=16, shift=1, noise=0.3), seed=0)
    own = {"mean": (0.0,), "std": (1.0,)}
    for size in (16, 32):
        teacher = replace(data.preprocess, shape=(1, size, size), **own)
        (batch,) = data.train.rendered(data.preprocess, teacher).batches([torch.arange(64)], 3)
        (alone,) = data.train.batches([torch.arange(64)], 3)
        assert torch.equal(alone.images, batch.images)
        pixels = F.interpolate(batch.images * data.std[0] + data.mean[0], (size, size), mode="bilinear")
        assert (pixels - batch.teacher).abs().mean() < (1e-6 if size == 16 else 0.06)


# ---- what is known of a teacher's weights


def preprocess(teacher, data=None):
    own = load_data(data or DataConfig(image_size=32), 0).preprocess
    return teacher_preprocess(TeacherConfig(**teacher), own), own


def test_teachers_trained_from_scratch_and_kds_own_networks_take_the_students_images(tmp_path):
    for teacher in (
        {"model": "test_vit.r160_in1k"},
        {"model": "resnet20_cifar", "checkpoint": str(tmp_path / "a.pth")},
    ):
        own, data = preprocess(teacher)
        assert own == data
    own, data = preprocess({"model": "test_vit.r160_in1k", "pretrained": True, "preprocess": "data"})
    assert own == data


def test_a_finetuned_teacher_has_the_values_of_its_weights_and_the_size_of_the_data():
    vit = {"model": "test_vit.r160_in1k", "pretrained": True}
    own, data = preprocess(vit | {"finetune": True})
    assert (own.shape, own.mean, own.std, own.interpolation) == ((1, 32, 32), (0.5,), (0.5,), "bicubic")
    assert (own.crop_mode, own.crop_pct) == (data.crop_mode, data.crop_pct)
    assert preprocess(vit)[0].shape == (1, 160, 160)
    assert preprocess(vit | {"image_size": 48})[0].shape == (1, 48, 48)
    assert preprocess(vit | {"image_size": 48, "preprocess": "data"})[0] == replace(data, shape=(1, 48, 48))


def test_the_size_of_another_file_is_in_doubt(tmp_path):
    """Nobody knows it: the teacher takes the data's, and a line says what is usual."""
    torch.manual_seed(0)
    path = tmp_path / "a.safetensors"
    save_file(timm.create_model("test_vit", num_classes=10).state_dict(), path)
    vit = {"model": "test_vit.r160_in1k", "checkpoint": str(path)}
    own, _ = preprocess(vit)
    assert (own.shape, own.mean) == ((1, 32, 32), (0.5,))
    assert "usually of 160 x 160 pixels and sees 32 x 32" in images_in_doubt(TeacherConfig(**vit), own)
    for more in ({"image_size": 160}, {"finetune": True}, {"preprocess": "data"}, {"checkpoint": None}):
        assert not images_in_doubt(TeacherConfig(**vit | more), own)
    assert not images_in_doubt(TeacherConfig(model="resnet20_cifar", checkpoint=str(path)), own)


def test_a_preprocessing_that_timm_does_not_have_is_one_line(tmp_path):
    name = local(tmp_path, CONFIGS["mean 0, std 1"] | {"interpolation": "antialias"})
    with pytest.raises(ConfigError, match=r"antialias.* which timm does not have; type teacher\.preprocess=data"):
        preprocess({"model": name, "pretrained": True})


def test_weights_of_kd_are_used_with_what_they_record(root, tmp_path):
    """The teacher is trained by kd on images of another mean, size and interpolation than the student's are."""
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.5], "interpolation": "bicubic", "crop_pct": 1.0}
    first = recipe(root, tmp_path, {"model": "resnet10t", "epochs": 1}, image_size=48, **own)
    first.scheduler.warmup_epochs = 0
    run = pipeline.prepare(first)
    teacher = pipeline.find_teacher(run)
    expected = predict(teacher, run.teacher_data.val, 64, run.accelerator)
    path = run.weights("teacher")
    assert (run.data.mean, run.data.std) == ((0.1, 0.2, 0.3), (0.5,) * 3)
    again = pipeline.prepare(recipe(root, tmp_path, {"model": "resnet10t", "checkpoint": str(path)}))
    assert again.teacher_data.preprocess == run.data.preprocess != again.data.preprocess
    assert torch.equal(predict(pipeline.find_teacher(again), again.teacher_data.val, 64, again.accelerator), expected)
    # weights of before, and of the defaults, hold no more than they did
    usual = pipeline.prepare(recipe(root, tmp_path, {"model": "resnet10t"}))
    assert not stage.USUAL.keys() & stage.metadata("teacher", usual.recipe, usual.teacher_data).keys()


def test_a_finetuned_teacher_learns_from_images_of_its_own(root, tmp_path):
    """And has a directory apart from one of another preprocessing; without any of its own, that of before."""
    name = local(tmp_path / "teacher", CONFIGS["larger, bicubic"])
    own = {"model": name, "pretrained": True, "finetune": True}
    run, plain = (
        pipeline.prepare(recipe(root, tmp_path, {**own, "preprocess": each}, mixup=0.3)) for each in ("auto", "data")
    )
    assert plain.teacher_data is plain.data
    assert run.teacher_directory != plain.teacher_directory
    # as in the run.json of an older kd
    assert "teacher_preprocess" not in card(plain)
    assert card(plain)["identity"] == card(run)["identity"]
    assert "preprocess" not in card(run)["identity"]["teacher"]
    trains = pipeline.teacher_stage(run).data
    assert (trains.mean, trains.input_shape) == ((0.0,) * 3, (3, 32, 32))
    larger = pipeline.prepare(recipe(root, tmp_path, {**own, "image_size": 48}, mixup=0.3))
    assert pipeline.teacher_stage(larger).data.input_shape == (3, 48, 48)
    student = pipeline.student_stage(larger, pipeline.Teacher(pipeline.teacher_network(larger)))
    (batch,) = student.data.train.batches([torch.arange(8)], 0)
    assert (batch.images.shape, batch.teacher.shape) == ((8, 3, 32, 32), (8, 3, 48, 48))
    assert batch.images.min() < 0 <= batch.teacher.min()
    shown = []
    student.teacher.model.register_forward_pre_hook(lambda network, inputs: shown.append(inputs[0]))
    mixed = stage.as_trained(batch, mixer(larger.recipe.data, 2), 0, channels_last=False)
    student.see(mixed, 0.0, student.model, larger.accelerator)
    assert torch.equal(shown[0], mixed.teacher)
    assert not torch.equal(shown[0], batch.teacher)
    assert everything(student.data.val)[0].teacher is None


# ---- settings of the student


def test_a_student_has_the_tensors_of_timms_transform_with_the_same_values(root):
    values = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic", "crop_pct": 0.8}
    values["crop_mode"] = "border"
    data = load_data(DataConfig(name="toy", family="folder", image_size=24, workers=0, root=str(root), **values), 0)
    transform = create_transform(24, **{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    images = [transform(Image.open(data.val.images.name(i))) for i in range(len(data.val))]
    assert torch.equal(everything(data.val)[0].images, torch.stack(images))


def test_grey_images_are_those_of_the_colour_network_made_grey(root):
    shared = {"name": "toy", "family": "folder", "image_size": 24, "workers": 0, "root": str(root)}
    values = {"mean": [0.0], "std": [1.0]}
    colour, grey = (load_data(DataConfig(**shared, **values, channels=channels), 2) for channels in (3, 1))
    assert grey.input_shape == (1, 24, 24)
    for epoch in (None, 1):
        (seen,), (made) = everything(colour.val, epoch), everything(grey.val, epoch)[0].images
        weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        assert ((seen.images * weights).sum(1, keepdim=True) - made).abs().max() < 1.5 / 255
    usual = load_data(DataConfig(name="toy", family="folder", root=str(root), channels=1), 0)
    assert (usual.mean, usual.std) == (pytest.approx((0.449,)), pytest.approx((0.226,)))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mean": [0.1, 0.2]}, "data.mean=[0.1, 0.2]: must be a list of one number, or of 1, the channels of digits"),
        ({"channels": 3}, "data.channels=3: only for streamed sets"),
        ({"crop_mode": "squash"}, "data.crop_mode=squash: only for streamed sets"),
        ({"interpolation": "lanczos"}, "data.interpolation=lanczos: sets held in memory take bilinear or bicubic"),
        ({"std": [0.0]}, "data.std=[0.0]: must be > 0"),
        ({"crop_mode": "centre"}, "data.crop_mode=centre: must be one of center, squash, border"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(setting, message):
    with pytest.raises(ConfigError) as error:
        load_data(DataConfig(**setting), 0)
    assert str(error.value).startswith(message)


def test_sets_in_memory_take_a_mean_and_std_of_their_own():
    plain, own = (load_data(DataConfig(**each), 0) for each in ({}, {"mean": [0.0], "std": [2.0]}))
    pixels = everything(plain.val)[0].images * plain.std[0] + plain.mean[0]
    torch.testing.assert_close(everything(own.val)[0].images * 2, pixels)
