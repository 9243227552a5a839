"""From a recipe to points: which networks there are, which of them are one, and what a contrast compares."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from pandas import DataFrame

from kd.config.schema import DataConfig, LossConfig, StudentConfig, TeacherConfig
from kd.data import Preprocess
from kd.errors import ConfigError
from kd.study.axes import labelled
from kd.study.compose import compose
from kd.study.grid import Plan
from kd.study.jobs import CHUNK, jobs
from kd.study.schema import Contrast, Sides, StudyConfig, StudyRecipe
from kd.study.table import differences, sides_of

BASE = StudyRecipe(
    name="s",
    loss=LossConfig(temperature=1.0, kd_weight=1.0, ce_weight=0.0),
    study=StudyConfig(
        seeds=3,
        controls=["hard", "smoothed"],
        grid={"teacher.label_smoothing": [0.0, 0.1, 0.4], "loss.temperature": [1.0, 4.0]},
    ),
)


ROLES = ("teacher", "student", "control")


def planned(study=BASE, **changes):
    changed = replace(study, study=replace(study.study, **changes))
    return Plan(changed, lambda data: stub(f"hash of {data.name} {data.label_noise}"))


def stub(identity: str, posterior=None) -> SimpleNamespace:
    """As much of a data set as a plan needs."""
    network = Preprocess((1, 8, 8), (0.5,), (0.3,), "bilinear", 1.0, "whole")
    return SimpleNamespace(
        hash=identity, preprocess=network, train=SimpleNamespace(posterior=posterior, augments=False)
    )


def roles(made) -> dict[str, int]:
    kinds = [point.role for point in made.points.values()]
    return {role: kinds.count(role) for role in sorted(set(kinds))}


def test_overwritten_starting_weights_make_other_points(tmp_path):
    """A finished point is never trained again, so the file is part of its id."""
    path = tmp_path / "w.pth"
    teacher = TeacherConfig(model="mlp_tiny", checkpoint=str(path), finetune=True)
    start = StudentConfig(model=f"local-dir:{tmp_path}", pretrained=True)
    ids = []
    for content in (b"one", b"two"):
        path.write_bytes(content)
        made = [planned(replace(BASE, **sections)).points for sections in ({"teacher": teacher}, {"student": start})]
        ids.append([{p.id for p in points.values() if p.role == role} for points in made for role in ROLES])
    # A control has no teacher, and a teacher no student.
    assert [a == b for a, b in zip(*ids, strict=True)] == [False, False, True, True, False, False]


def test_a_teacher_with_images_of_its_own_makes_other_points_than_in_an_older_kd(monkeypatch):
    """There it took the student's images, and a finished point is never trained again."""
    study = replace(BASE, teacher=TeacherConfig(model="test_vit.r160_in1k", pretrained=True))
    ids = []
    for known in (True, False):
        if not known:
            monkeypatch.setattr("kd.study.grid.own_preprocess", lambda own, data: {})
        points = planned(study).points.values()
        ids.append([{point.id for point in points if point.role == role} for role in ROLES])
    assert [a == b for a, b in zip(*ids, strict=True)] == [False, False, True]


def test_a_teacher_is_one_for_all_its_students_and_a_control_for_all_teachers():
    made = planned()
    assert roles(made) == {"teacher": 9, "student": 18, "control": 6}
    assert len(made.cells) == 18
    for cell in made.cells:
        student = made.points[cell["point"]]
        teacher = made.points[student.teacher]
        assert teacher.role == "teacher"
        assert teacher.recipe.teacher.label_smoothing == cell["axes"]["teacher.label_smoothing"]
        assert student.recipe.loss.temperature == cell["axes"]["loss.temperature"]
        assert student.recipe.seed == teacher.recipe.seed == cell["seed"]
    assert {(c["control"], c["seed"]) for c in made.controls} == {
        (n, s) for n in ("hard", "smoothed") for s in range(3)
    }
    hard = next(p for p in made.points.values() if p.control == "hard").recipe.loss
    assert (hard.kd_weight, hard.ce_weight, hard.label_smoothing) == (0.0, 1.0, 0.0)


def test_the_same_network_by_two_names_is_one_point():
    """At T 1 a student temperature of 1 and none are the same."""
    grid = {"loss.temperature": [1.0, 4.0], "loss.student_temperature": [None, 1.0]}
    made = planned(grid=grid, seeds=1, controls=[])
    at = {tuple(cell["axes"].values()): cell["point"] for cell in made.cells}
    assert at[1.0, None] == at[1.0, 1.0]
    assert len({at[1.0, None], at[4.0, None], at[4.0, 1.0]}) == 3
    # Without a cross entropy its class weights change nothing.
    made = planned(grid={"loss.class_weight": [None, "balanced"]}, seeds=1, controls=[])
    assert roles(made) == {"teacher": 1, "student": 1}
    # An omitted class changes the student but not its teacher.
    made = planned(grid={"data.omit_class": [None, 7]}, seeds=1, controls=["hard"])
    assert roles(made) == {"teacher": 1, "student": 2, "control": 2}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"output": "elsewhere", "dry_run": True, "run": "x"}, True),
        ({"loss": replace(BASE.loss, backend="reference")}, True),
        ({"teacher": TeacherConfig(epochs=11)}, False),
        ({"data": DataConfig(label_noise=0.3)}, False),
        ({"seed": 1}, False),
    ],
)
def test_only_what_a_network_depends_on_is_its_identity(change, same):
    before, after = (set(planned(study, seeds=1, controls=[]).points) for study in (BASE, replace(BASE, **change)))
    assert (before == after) is same
    if not same:
        assert not before & after


def test_labels_stand_for_settings_and_methods_and_a_later_axis_wins():
    grid = {
        "loss.temperature": [1.0, 4.0],
        "how": {
            "plain": {},
            "dist": {"loss": "dist", "loss.methods.dist.temperature": 2.0},
            "usual": {"loss": "dist"},
            "cold": {"loss.temperature": 0.5},
        },
    }
    made = planned(grid=grid, seeds=1, controls=[])
    at = {tuple(cell["axes"].values()): made.points[cell["point"]].recipe.loss for cell in made.cells}
    assert at[4.0, "plain"].temperature == 4.0
    assert not at[4.0, "plain"].methods
    assert at[1.0, "cold"] == at[4.0, "cold"]
    assert at[1.0, "cold"].temperature == 0.5
    assert at[4.0, "dist"].methods["dist"]["temperature"] == 2.0
    assert at[4.0, "usual"].methods["dist"]["temperature"] == 4.0  # the label before it changes nothing here
    assert (at[4.0, "dist"].kd_weight, at[4.0, "dist"].ce_weight) == (0.0, 1.0)  # as `loss=dist` sets them


def test_the_sides_of_a_contrast_are_points_in_the_order_of_the_seeds():
    contrast = Contrast(
        name="c",
        metric="val.nll",
        a={"teacher.label_smoothing": 0.4, "loss.temperature": 4.0},
        b={"control": "smoothed"},
        minus=Sides(a={"role": "teacher", "teacher.label_smoothing": 0.4}, b={"teacher.label_smoothing": 0.0}),
    )
    made = planned(contrasts=[contrast])
    (entry,) = made.contrasts
    found = [[made.points[i] for i in side["points"]] for side in sides_of(entry)]
    for side in found:
        assert [point.recipe.seed for point in side] == [0, 1, 2]
    a, b, minus_a, minus_b = (side[0] for side in found)
    assert (a.role, a.recipe.teacher.label_smoothing, a.recipe.loss.temperature) == ("student", 0.4, 4.0)
    assert b.control == "smoothed"
    assert (minus_a.role, minus_a.recipe.teacher.label_smoothing) == ("teacher", 0.4)
    assert (minus_b.role, minus_b.recipe.loss.temperature) == ("student", 1.0)


def test_a_contrast_outside_the_grid_is_left_out_and_said():
    outside = Contrast(name="hot", a={"loss.temperature": 3.0})
    same = Contrast(name="it", a={"loss.temperature": 1}, b={})
    made = planned(contrasts=[outside, same, Contrast(a={"loss.temperature": 4.0})])
    assert len(made.contrasts) == 1
    hot, it = made.left_out
    assert '{"loss.temperature": 3.0} is not in the grid' in hot
    assert "it: a and b are the same points" in it


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"contrasts": [Contrast(metric="test.top2")]}, "metric=test.top2: no such metric; did you mean test.top"),
        ({"grid": {"loss.temperature": [1, 1.0]}}, "different plain values"),
        ({"grid": {"loss.temperature": {"hot": {}}}}, "must be a name of letters"),
        ({"grid": {"how": {1: {}, "1": {}}}}, "with different labels"),
        ({"grid": {"how": {"x": 3}}}, "must be {label: {setting: value}}"),
        ({"grid": {"how": {"x": {"seed": 3}}}}, "seed is no axis; leave it out, and type study.seeds=N"),
        ({"grid": {"loss": ["dsit"]}}, "did you mean dist?"),
        ({"grid": {"loss.temperature": [0.0]}}, "loss.temperature=0.0: must be "),
    ],
)
def test_a_grid_that_cannot_be_is_one_line(changes, said):
    with pytest.raises(ConfigError) as caught:
        planned(**changes)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.temperature=1,2"], "loss.temperature: taught=T 4 sets it too"),  # the label would lose
        (["data.train_size=300"], "data.train_size: points=20000 sets it too; leave data.train_size out"),
        # what no label sets that is left, and what changes one field of a method that a label chooses
        (["data.train_size=300", "points=600", "loss.temperature=1,2", "taught='T 1'"], None),
        (["loss.methods.smoothed_teacher.taken_out=.1,.2", "taught='T 4, exactly smoothed by .4'"], None),
    ],
)  # fmt: skip
def test_what_is_typed_and_what_a_label_sets_are_not_at_odds(words, said):
    """Of the two one would not be so: the label hides what was typed, or its cell is not what it says."""
    words = ["recipe=studies/mixture_bayes", *words]
    if said:
        with pytest.raises(ConfigError, match=re.escape(said)):
            compose(words)
        return
    study, *_ = compose(words)
    made = Plan(study, lambda data: stub(data.name, posterior=True))
    for cell in made.cells:
        typed = {k: v for k, v in cell["axes"].items() if k in made.points[cell["point"]].settings}
        assert typed.items() <= made.points[cell["point"]].settings.items()


def test_the_values_of_an_axis_are_read_as_in_a_recipe(monkeypatch, tiny_study, tmp_path):
    """OmegaConf's YAML reads 010 as eight, no as false and 1e-3 as text."""
    monkeypatch.chdir(tmp_path)
    words = ["recipe=studies/tiny", "loss.temperature=010,1e-3", "student.model=no,'a, b'"]
    words += ['loss.teacher_smoothing=0,"${teacher.label_smoothing}"', "loss.methods.x.weight=010,0.5"]
    study, *_ = compose(words)
    axes = {axis: list(values) for axis, values in labelled(study.study.grid).items()}
    assert axes["loss.temperature"] == [10.0, 0.001]
    assert axes["student.model"] == ["no", "a, b"]
    assert axes["loss.teacher_smoothing"] == [0.0, "${teacher.label_smoothing}"]
    assert axes["loss.methods.x.weight"] == [10, 0.5]


def test_a_typed_setting_that_follows_another_follows_that_of_its_point(monkeypatch, tiny_study, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["recipe=studies/tiny", "loss.teacher_smoothing=${teacher.label_smoothing}", "study.seeds=1"]
    study, _ = compose([*words, "loss.student_temperature=1"])
    made = Plan(study, lambda data: stub(data.name))
    assert len(made.contrasts) == 2  # what they do not mention is as on the axis of one value
    students = [point for point in made.points.values() if point.role == "student"]
    pairs = {(p.recipe.loss.teacher_smoothing, p.recipe.teacher.label_smoothing) for p in students}
    assert (len(students), pairs) == (4, {(0.0, 0.0), (0.4, 0.4)})


def test_jobs_hold_each_point_once_in_cohorts_of_one_seed():
    many = {"loss.temperature": [float(t) for t in range(1, 31)], "teacher.label_smoothing": [0.0, 0.1, 0.4]}
    made = planned(grid=many)
    found = jobs(made, dict.fromkeys(made.points, "population"))
    assert sorted(p.id for job in found for p in job.points) == sorted(made.points)
    for job in found:
        assert len({point.recipe.seed for point in job.points}) == 1
        assert len({point.role == "teacher" for point in job.points}) == 1
        assert len(job.points) <= CHUNK
    sizes = [len(job.points) for job in found if job.phase == "students"]
    assert (sum(sizes), max(sizes) - min(sizes)) == (3 * 92, 1)
    alone = jobs(made, dict.fromkeys(made.points, "runs"))
    assert all(len(job.points) == 1 for job in alone)
    assert [job.phase for job in alone] == sorted((job.phase for job in alone), reverse=True)  # teachers first


def test_equal_counts_make_no_difference_and_the_smallest_other_one_does():
    counts = [(230, 202, 272, 244), (289, 264, 173, 148), (198, 197, 158, 157), (300, 299, 1, 0)]
    shares = [[count / 300 for count in each] for each in counts]
    assert all(a - b - c + d for a, b, c, d in shares[:3])  # what floats make of it
    cases = [*shares, [1e6 * share for share in shares[0]], (0.5, 0.5 - 1e-6, 0.25, 0.25), (1e-13, 2e-13, 0, 0)]
    rows = [(f"{side}{i}", i, value) for i, case in enumerate(cases) for side, value in zip("abcd", case, strict=True)]
    table = DataFrame(rows, columns=["point", "seed", "test.top1"]).set_index("point")
    a, b, c, d = ({"points": [f"{side}{i}" for i in range(len(cases))]} for side in "abcd")
    made = differences({"metric": "test.top1", "a": a, "b": b, "minus": {"a": c, "b": d}}, table)
    assert list(made[:5]) == [0.0] * 5  # whatever the metric's size
    assert list(made[5:]) == pytest.approx([1e-6, -1e-13], abs=0, rel=1e-3)  # small metrics keep theirs
