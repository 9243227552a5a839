"""The schema: ranges, identity and hashes."""

import math

import pytest

from kd.config.schema import (
    DataConfig,
    LossConfig,
    OptimizerConfig,
    Recipe,
    TeacherConfig,
    TrainConfig,
    content_hash,
    identity,
)
from kd.errors import ConfigError


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (LossConfig, {"temperature": -1.0}, r"loss\.temperature=-1\.0: must be ≥ 0\.001 and ≤ 1000 \(divides"),
        (LossConfig, {"student_temperature": 1e-40}, r"loss\.student_temperature=1e-40: must be ≥ 0\.001 and ≤ 1000"),
        (LossConfig, {"kd_weight": math.nan}, r"loss\.kd_weight=nan: must be ≥ 0 and ≤ 1000000 \("),
        (LossConfig, {"ce_weight": math.inf}, r"loss\.ce_weight=inf: must be ≥ 0 and ≤ 1000000 \("),
        (TeacherConfig, {"label_smoothing": 1.0}, r"teacher\.label_smoothing=1\.0: must be ≥ 0 and < 1 \("),
        (DataConfig, {"val_fraction": 0.5}, r"data\.val_fraction=0\.5: must be > 0 and < 0\.5"),
        (OptimizerConfig, {"lr": 1e39}, r"optimizer\.lr=1e\+39: must be > 0 and ≤ 1000000 \("),
        (TrainConfig, {"precision": "fp8"}, r"train\.precision=fp8: must be one of fp32, bf16, fp16"),
        (TeacherConfig, {"checkpoint": ""}, r"^teacher\.checkpoint=: must not be empty"),
        (Recipe, {"run": ""}, r"^run=: must not be empty"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(section, values, message):
    with pytest.raises(ConfigError, match=message):
        section(**values)


def test_the_edges_of_ranges_are_allowed():
    assert LossConfig(temperature=1e-3, label_smoothing=0.0, kd_weight=0.0).student_temperature is None


def test_identity_changes_with_what_is_computed_and_not_with_where_it_is_kept():
    base = content_hash(identity(Recipe(name="a")))
    moved = Recipe(name="a", output="elsewhere", run="x", data=DataConfig(root="/mnt", workers=9))
    assert content_hash(identity(moved)) == base
    assert content_hash(identity(Recipe(name="a", seed=1))) != base
    assert content_hash(identity(Recipe(name="a", loss=LossConfig(temperature=2.0)))) != base


def test_the_hash_does_not_depend_on_the_order_of_keys():
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
