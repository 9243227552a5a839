"""Every recipe: a claim on top, a name that is its file's, and, made tiny, all of its stages run."""

import re

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from kd.config.compose import compose, recipe_files, typed

RECIPES = recipe_files()
HEADER = ("claim", "paper", "command", "time", "hardware", "expected")

# How to run each on a machine without its data, weights or hours. A new recipe must say so here.
TINY = {
    "resnet50_to_18": "dry_run=true train.batch_size=8 data.image_size=16",
    "resnet34_to_18": "dry_run=true train.batch_size=8 data.image_size=16",
    "cifar100_resnet56_to_20": "data=digits dry_run=true train.batch_size=8 data.image_size=16",
    "smoke": "",
    "logit_methods": "teacher.epochs=2 student.epochs=1",
    "timm_finetune": "data.root=images data.image_size=32 data.workers=0 data.val_fraction=0.4 data.hflip=0 "
    "data.color_jitter=0 teacher.model=test_resnet teacher.pretrained=false teacher.checkpoint=teacher.safetensors "
    "dry_run=true student.model=test_vit student.pretrained=false train.batch_size=16",
}


@pytest.fixture
def folder_and_teacher(tmp_path):
    """Two classes of real digits as JPEGs in train/ and val/, and a teacher with a head of another size."""
    digits = load_digits()
    for label in (0, 1):
        for i, image in enumerate(digits.images[digits.target == label][:120]):
            path = tmp_path / "images" / ("train" if i < 90 else "val") / str(label) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 15).astype(np.uint8)).convert("RGB").resize((40, 40)).save(path)
    save_file(timm.create_model("test_resnet", num_classes=5).state_dict(), tmp_path / "teacher.safetensors")


def test_every_recipe_has_a_tiny_form():
    assert set(TINY) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_opens_with_its_claim_and_carries_its_files_name(name):
    top = RECIPES[name].read_text().split("defaults:")[0]
    assert top.startswith("# @package _global_\n")
    for word in HEADER:
        assert re.search(rf"^# {word}:\s+\S", top, re.MULTILINE), f"{name}: no {word}"
    assert f"recipe={name}" in top
    assert typed(compose([f"recipe={name}"])).name == name


# Convolutional pairs like resnet50_to_18, which runs by default.
SLOW = ("resnet34_to_18", "cifar100_resnet56_to_20")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.torture] if name in SLOW else []) for name in RECIPES]
)
def test_every_recipe_runs_when_made_tiny(name, kd_train, folder_and_teacher):
    done = kd_train(f"recipe={name}", *TINY[name].split())
    assert done.code == 0, done.err
    assert ("about" if "dry_run=true" in TINY[name] else "result.json") in done.out.splitlines()[-1]


@pytest.mark.parametrize("data", recipe_files("data"))
def test_every_data_option_composes_with_the_main_recipe(data):
    assert typed(compose(["recipe=resnet50_to_18", f"data={data}"])).data.name == data
