"""The schema: ranges, identity and hashes."""

import math

import pytest

from kd.config.schema import (
    DataConfig,
    LossConfig,
    OptimizerConfig,
    Recipe,
    SchedulerConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    content_hash,
    identity,
)
from kd.errors import ConfigError


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (LossConfig, {"temperature": -1.0}, r"loss\.temperature=-1\.0: must be ≥ 0\.001 and ≤ 1000 "),
        (LossConfig, {"temperature": math.inf}, r"loss\.temperature=inf: must be finite and ≥ 0\.001"),
        (LossConfig, {"student_temperature": 0.0}, r"loss\.student_temperature=0\.0: must be ≥ 0\.001"),
        (LossConfig, {"temperature": 1e30}, r"loss\.temperature=1e\+30: must be ≥ 0\.001 and ≤ 1000 \(divides"),
        (LossConfig, {"student_temperature": 1e-40}, r"loss\.student_temperature=1e-40: must be ≥ 0\.001 and ≤ 1000"),
        (LossConfig, {"kd_weight": 1e300}, r"loss\.kd_weight=1e\+300: must be ≥ 0 and ≤ 1000000 \("),
        (LossConfig, {"ce_weight": 1e300}, r"loss\.ce_weight=1e\+300: must be ≥ 0 and ≤ 1000000 \("),
        (TeacherConfig, {"ce_weight": 2e6}, r"teacher\.ce_weight=2000000\.0: must be ≥ 0 and ≤ 1000000 \("),
        (TeacherConfig, {"averaging_temperature": 1e4}, r"teacher\.averaging_temperature=10000\.0: must be ≥ 0\.001"),
        (LossConfig, {"kd_weight": math.nan}, r"loss\.kd_weight=nan: must be finite and ≥ 0"),
        (StudentConfig, {"epochs": 0}, r"student\.epochs=0: must be ≥ 1"),
        (DataConfig, {"val_fraction": 0.5}, r"data\.val_fraction=0\.5: must be > 0 and < 0\.5"),
        (OptimizerConfig, {"lr": 1e39}, r"optimizer\.lr=1e\+39: must be > 0 and ≤ 1000000 \("),
        (OptimizerConfig, {"weight_decay": 1e300}, r"optimizer\.weight_decay=1e\+300: must be ≥ 0 and ≤ 1000000 \("),
        (SchedulerConfig, {"warmup_lr": 1e300}, r"scheduler\.warmup_lr=1e\+300: must be ≥ 0 and ≤ 1000000 \("),
        (SchedulerConfig, {"min_lr": 1e300}, r"scheduler\.min_lr=1e\+300: must be ≥ 0 and ≤ 1000000 \("),
        (TeacherConfig, {"checkpoint": ""}, r"^teacher\.checkpoint=: must not be empty; null, or left out, is none \("),
        (DataConfig, {"root": ""}, r"^data\.root=: must not be empty; null, or left out, is none \(folder on"),
        (Recipe, {"run": ""}, r"^run=: must not be empty; null, or left out, is none \("),
        (TrainConfig, {"precision": "fp8"}, r"train\.precision=fp8: must be one of fp32, bf16, fp16"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(section, values, message):
    with pytest.raises(ConfigError, match=message):
        section(**values)


def test_the_edges_of_ranges_are_allowed():
    LossConfig(temperature=1e-3, label_smoothing=0.0, kd_weight=0.0)
    assert LossConfig(student_temperature=None).student_temperature is None


def test_identity_changes_with_what_is_computed_and_not_with_where_it_is_kept():
    base = content_hash(identity(Recipe(name="a")))
    moved = Recipe(name="a", output="elsewhere", run="x", data=DataConfig(root="/mnt", workers=9))
    assert content_hash(identity(moved)) == base
    assert content_hash(identity(Recipe(name="a", seed=1))) != base
    assert content_hash(identity(Recipe(name="a", loss=LossConfig(temperature=2.0)))) != base


def test_the_hash_does_not_depend_on_the_order_of_keys():
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
