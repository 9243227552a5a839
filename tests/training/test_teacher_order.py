"""A teacher whose classes are in another order than the data's: put in order by name, or told by its predictions."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

import kd.models.networks
from kd import evaluate, probe
from kd.checkpoint.safetensors_io import save_weights
from kd.models.weights import weights_metadata
from kd.training.class_order import other_order

MIXED = ["Cat", "ant", "bee", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay"]  # timm's order differs in three
NUMBERS = [str(i) for i in range(12)]


def digits_of(names):
    """Real digits of as many classes; the 11th and 12th are the negatives of 4 and 7."""
    images, targets = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * 15.9).astype(np.uint8)[:1000]
    parts = [images[targets[:1000] == k] for k in range(10)] + [255 - images[targets[:1000] == k] for k in (4, 7)]
    return dict(zip(names, parts, strict=False))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Per kind of names: a folder of images, and plain weights of a network trained in the order of timm's reader."""
    assert kd.models.networks  # registers mlp_tiny with timm
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    made = {}
    for kind, names in (("mixed", MIXED), ("numbers", NUMBERS)):
        root = tmp_path_factory.mktemp(kind)
        for name, images in digits_of(names).items():
            (root / "images" / name).mkdir(parents=True)
            for i, image in enumerate(images):
                Image.fromarray(image).save(root / "images" / name / f"{i:03}.png")
        reader = ReaderImageFolder(str(root / "images"))
        pixels = np.stack([np.asarray(Image.open(path)) for path, _ in reader.samples])
        images = (torch.tensor(pixels)[:, None].repeat(1, 3, 1, 1) / 255 - torch.tensor([0.45])) / 0.225
        targets = torch.tensor([target for _, target in reader.samples])
        torch.manual_seed(0)
        network = timm.create_model("mlp_tiny", num_classes=len(names), img_size=8)
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for _ in range(150):
            chosen = torch.randint(len(targets), (128,))
            torch.nn.functional.cross_entropy(network(images[chosen]), targets[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
        save_file(network.state_dict(), root / "timms.safetensors")
        made[kind] = root
    return made


def words(root, *more, weights="timms.safetensors"):
    data = ("data=folder", f"data.root={root / 'images'}", "data.image_size=8", "data.crop_pct=1", "data.workers=0")
    teacher = ("teacher.model=mlp_tiny", f"teacher.checkpoint={root / weights}")
    student = ("student.model=mlp_nano", "student.epochs=1", "control=false", "scheduler.warmup_epochs=0")
    return ("recipe=smoke", *data, "data.verify=false", "data.hflip=0", *teacher, *student, *more)


def stopped(done):
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "student" not in done.out
    return done.err


def top1(done):
    assert done.code == 0, done.err
    return json.loads(Path(done.out.splitlines()[-1]).read_text())["teacher"]["last"]["val"]["top1"]


@pytest.mark.parametrize(
    ("kind", "differs"),
    [("mixed", "output 0 is 'ant' and not 'Cat'"), ("numbers", "output 2 is '2' and not '10'")],
)
def test_a_teacher_in_timms_order_stops_the_run_which_names_it(kd_train, trained, kind, differs):
    said = stopped(kd_train(*words(trained[kind])))
    assert "its classes are in another order: validation top-1 is " in said
    assert f"in timm's natural order, where {differs}" in said
    assert said.endswith("; type data.class_order=natural\n")
    now, then = map(float, re.findall(r"([\d.]+)%", said)[:2])
    right = kd_train(*words(trained[kind], "data.class_order=natural"))
    assert top1(right) == pytest.approx(then / 100, abs=1e-4)
    assert then > 90
    assert now < 75


def test_a_teacher_in_torchvisions_order_is_named_too(kd_train, trained):
    """The weights' head put into plain order by hand, against data in timm's."""
    weights = load_file(trained["numbers"] / "timms.safetensors")
    order = [int(name) for name in sorted(NUMBERS)]
    for key in ("fc.weight", "fc.bias"):
        weights[key] = weights[key][order].contiguous()
    save_file(weights, trained["numbers"] / "sorted.safetensors")
    run = partial(words, trained["numbers"], weights="sorted.safetensors")
    assert stopped(kd_train(*run("data.class_order=natural"))).endswith("; type data.class_order=sorted\n")
    assert top1(kd_train(*run())) > 0.9


def test_a_teacher_at_chance_whose_order_is_right_is_told_of_its_images(kd_train, trained):
    run = words(trained["numbers"], "data.class_order=natural", "data.mean=[30,30,30]", "teacher.preprocess=data")
    said = stopped(kd_train(*run))
    assert "is no better than chance" in said
    assert "and images prepared as in its training (teacher.preprocess=data: as the student's)" in said


def test_another_order_is_named_by_its_first_classes_and_a_file_gives_it(kd_train, trained, tmp_path):
    weights, names = load_file(trained["mixed"] / "timms.safetensors"), sorted(MIXED, key=str.lower)
    for key in ("fc.weight", "fc.bias"):
        weights[key] = weights[key].flip(0).contiguous()
    save_file(weights, trained["mixed"] / "reversed.safetensors")
    run = partial(words, trained["mixed"], weights="reversed.safetensors")
    said = stopped(kd_train(*run()))
    assert "output 0 is 'jay' and not 'Cat', 1 is 'ibis' and not 'ant', 2 is 'hen' and not 'bee', ...;" in said
    (tmp_path / "map.txt").write_text("\n".join(names[::-1]))
    assert top1(kd_train(*run(f"data.class_order={tmp_path / 'map.txt'}"))) > 0.9


# --- no false alarm


def test_networks_that_know_little_or_nothing_are_not_said_to_be_in_another_order():
    """Random and hardly trained networks on real digits, balanced and not."""
    images, targets = (torch.tensor(each) for each in load_digits(return_X_y=True))
    images, said = images.float() / 16, []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        kept = torch.rand(len(targets), generator=generator) < torch.rand(10, generator=generator)[targets]
        x, y = images[kept], targets[kept]
        network = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
        optimizer = torch.optim.SGD(network.parameters(), 0.3)
        for _ in range(seed % 6 * 4):
            chosen = torch.randint(len(y), (64,))
            torch.nn.functional.cross_entropy(network(x[chosen]), y[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
        order = y.argsort(stable=True)
        said.append(other_order(network(x[order]).argmax(-1), y[order], [f"{(k * 7) % 10}x{k}" for k in range(10)]))
    assert not any(said)


def test_a_few_images_tell_timms_order_from_noise():
    """Three of ten classes change places, with three images each."""
    targets, names = torch.arange(10).repeat_interleave(3), MIXED
    timms = torch.tensor([2, 0, 1, *range(3, 10)])[targets]
    timms[0] = 7
    assert other_order(timms, targets, names).startswith("96.67% in timm's natural order, where output 0 is 'ant'")
    assert other_order(targets, targets, names) == ""


def test_guessing_one_class_and_two_classes_that_are_mixed_up_are_no_order():
    targets = torch.arange(10).repeat_interleave(30)
    names = list("BaCdEfGhIj")
    assert other_order(torch.zeros_like(targets), targets, names) == ""
    mixed_up = torch.where((targets < 2) & (torch.arange(300) % 2 == 0), 1 - targets, targets)
    assert other_order(mixed_up, targets, names) == ""
    swapped = torch.where(targets < 2, 1 - targets, targets)
    assert other_order(swapped, targets, names).startswith("100.00% in timm's natural order")


# --- names that weights record


@pytest.fixture
def finished(kd_train, trained, tmp_path):
    """A run of kd's own on numbers, in timm's order; its teacher's file, whose weights have names."""
    done = kd_train(*words(trained["numbers"], "data.class_order=natural", "run=one", "train.batch_size=100"))
    assert done.code == 0
    student = tmp_path / "checkpoints/smoke/one/student/last.safetensors"
    assert weights_metadata(student)["class_names"] == NUMBERS
    return student


def test_kds_own_weights_follow_the_data_by_name_in_training_and_probe(kd_train, called, finished, trained):
    use = ("teacher.model=mlp_nano", f"teacher.checkpoint={finished}", "train.batch_size=100", "dry_run=true")
    done = kd_train(*words(trained["numbers"], *use))
    line = f"checkpoint={finished}: has the data's classes in another order, first '2' for '10': reordered by name\n"
    assert done.out.count(line) == 1
    place = (f"data.root={trained['numbers'] / 'images'}", "data.image_size=8", "data.workers=0")
    probed = called("kd.probe", probe.main, "data=folder", *place, f"checkpoint={finished}", "split=val")
    assert probed.out.count(line) == 1


def test_other_names_are_refused_and_a_file_says_what_they_mean(kd_train, finished, trained, tmp_path):
    mixed = trained["mixed"]
    named = finished.with_name("named.safetensors")
    weights, old = load_file(mixed / "timms.safetensors"), [f"class {k}" for k in range(10)]
    save_weights(named, weights, {"class_names": old})
    use = (f"teacher.checkpoint={named}", "train.batch_size=100", "run=two")
    said = stopped(kd_train(*words(mixed, *use)))
    assert "it has 'class 0', which the data lacks; the data has 'Cat', which it lacks; in a recipe teacher.cl" in said
    path = tmp_path / "names.txt"
    path.write_text("\n".join(sorted(MIXED, key=str.lower)))
    done = kd_train(*words(mixed, *use, f"teacher.classes={path}"))
    assert f"{named}: has the data's classes in another order, first 'ant' for 'Cat': reordered by name" in done.out
    assert top1(done) > 0.9
    path.write_text("\n".join(sorted(MIXED)))  # another teacher under the same name
    assert "run=two holds another recipe" in stopped(kd_train(*words(mixed, *use, f"teacher.classes={path}")))
    random = kd_train(*words(mixed, f"teacher.classes={path}", "teacher.checkpoint=null"))
    assert "only for weights that are loaded" in stopped(random)


def test_evaluate_of_a_run_whose_classes_changed_places_scores_it_by_name(called, finished):
    done = called("kd.evaluate", evaluate.main, "run=checkpoints/smoke/one", "data.class_order=sorted")
    assert f"{finished}: has the data's classes in another order" in done.out
    assert "(teacher." in done.out.splitlines()[-1]  # only its plain weights are scored in the new order
