"""Where the report's files go: what cannot be written is said before anything is, and no name in a study is a path."""

import os
import re
from pathlib import Path

import pytest
from report_folder import EPS, Maker, T

AXES = {EPS: [0.0, 0.4], T: [1.0, 4.0]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["figures=pipe"], "figures=pipe: must be a folder"),
        (["figures=nothing"], "figures=nothing: must be a folder"),  # a link to nothing
        (["figures=no/figs"], "figures=no/figs: no such folder no"),
        (["figures=figs", f"html={'x' * 246}.html"], ".html: its name must be ≤ 240 bytes"),
        (["figures=figs", f"markdown={'é' * 120}.md"], ".md: its name must be ≤ 240 bytes"),
        ([f"figures={'x' * 241}"], ": its name must be ≤ 240 bytes"),
        (["figures=figs", "html=pipe.html"], "html=pipe.html: is there and no file"),
        (["figures=taken"], "figures=taken: taken/interaction-test.top1.svg is there and no file"),
    ],
)
def test_a_place_that_cannot_be_written_is_said_before_any_file_is(kd_report, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    Maker(Path("study"), seeds=2, few=True, axes=AXES).write()
    os.mkfifo("pipe")
    os.mkfifo("pipe.html")
    Path("nothing").symlink_to("nowhere")
    Path("taken/interaction-test.top1.svg").mkdir(parents=True)
    before = set(Path().rglob("*"))
    code, out, err = kd_report("study", *words)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err
    assert set(Path().rglob("*")) == before


def test_names_at_the_limit_are_written(kd_report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Maker(Path("study"), seeds=2, few=True, axes=AXES).write()
    html, figures = f"{'x' * 235}.html", "y" * 240
    assert kd_report("study", f"html={html}", f"figures={figures}")[0] == 0
    assert Path(html).is_file()
    assert list(Path(figures).glob("*.svg"))


@pytest.mark.parametrize("metric", ["/../../evil", "/" * 300, "\x00"])
def test_a_strangers_metric_is_no_path(kd_report, tmp_path, monkeypatch, metric):
    monkeypatch.chdir(tmp_path)
    study = Maker(Path("study"), seeds=2, few=True, axes=AXES)
    study.contrast("x", {"eps": 0.4}, {"eps": 0.0}, metric=f"test.{metric}")
    for point in study.points.values():
        point["metrics"]["test"][metric] = 0.5
    study.write()
    before = set(Path().rglob("*"))
    code, *_ = kd_report("study", "figures=figs")
    assert code == 0
    new = [path for path in set(Path().rglob("*")) - before if path.parent != Path("study")]
    assert {path.parent for path in new if path.name != "figs"} == {Path("figs")}
    assert all(re.fullmatch(r"[\w.-]+\.svg", path.name, re.ASCII) for path in new if path.name != "figs")
    assert sum(path.name.startswith("interaction-test._") for path in new) == 1
