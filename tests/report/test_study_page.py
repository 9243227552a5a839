"""The page of a study: what it says of effects that are known, and of studies that are small, broken or unfinished."""

import json

import numpy as np
import pytest
from pages import Outline, browsed
from report_folder import EPS, METHOD, Maker, T

from kd.report import formatting
from kd.report.study import Study

NEGATIVE, POSITIVE, NULL = {"eps": 0.4, "temperature": 4.0}, {"eps": 0.4}, {"eps": 0.1}


def effect(axes):
    """Smoothing by .4 costs 5 points at T 4 and brings 3 at T 1; smoothing by .1 does nothing."""
    return 0.0 if axes[EPS] < 0.4 else {1.0: 0.03, 4.0: -0.05}[axes[T]]


def maker(folder, **more):
    study = Maker(folder, effect=effect, **more)
    study.contrast("harm", NEGATIVE, NEGATIVE | {"eps": 0.0})
    study.contrast("help", POSITIVE, POSITIVE | {"eps": 0.0})
    study.contrast("nothing", NULL, NULL | {"eps": 0.0})
    study.contrast("interaction", NEGATIVE, NEGATIVE | {"eps": 0.0}, (POSITIVE, POSITIVE | {"eps": 0.0}))
    return study.contrast("likelihood", NEGATIVE, NEGATIVE | {"eps": 0.0}, metric="test.nll")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The directory of a study with known effects and its page."""
    from kd.report.__main__ import main

    folder = maker(tmp_path_factory.mktemp("study") / "it").write()
    before = contents(folder)
    assert main([f"study={folder}"]) == 0
    assert contents(folder).keys() - before.keys() == {folder / "report.html", folder / "report.md"}
    assert before.items() <= contents(folder).items()  # nothing else in the directory has changed
    return folder


def tables(folder):
    return browsed((folder / "report.md").read_text()).rows


def verdicts(rows):
    """The row of each contrast, by its name."""
    at = next(i for i, row in enumerate(rows) if row and row[-1] == "what it shows")
    found = {}
    for row in rows[at + 1 :]:
        if len(row) != len(rows[at]):
            break
        found[row[0]] = row
    return found


# ---- what it says


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_known_effects_are_called_by_their_names(written, name):
    text = (written / name).read_text()
    rows = verdicts((Outline(text) if name.endswith("html") else browsed(text)).rows)
    assert {contrast: row[-1] for contrast, row in rows.items()} == {
        "harm": "negative (worse)",
        "help": "positive (better)",
        "nothing": "not distinguished from 0",
        "interaction": "negative",
        "likelihood": "positive (worse)",
    }
    means = {contrast: float(row[4].replace("−", "-")) for contrast, row in rows.items()}
    assert means["harm"] == pytest.approx(-5, abs=0.4)  # in points; four standard errors
    assert means["help"] == pytest.approx(3, abs=0.4)
    assert means["interaction"] == pytest.approx(-8, abs=0.6)
    assert means["likelihood"] == pytest.approx(0.05, abs=0.004)
    assert rows["harm"][2] == "teacher ε 0.4, T 4 − teacher ε 0, T 4"
    assert [row[7] for row in rows.values()][:2] == ["5 / 0 / 0", "0 / 0 / 5"]


def test_the_page_is_one_file_with_every_section_and_figure(written):
    made = Outline((written / "report.html").read_text())
    tags = [tag for tag, _ in made.elements]
    assert (tags.count("section"), tags.count("svg")) == (10, 10)
    cards = [attributes["class"] for tag, attributes in made.elements if tag == "li"]
    assert cards == ["negative", "positive", "null", "negative", "positive"]
    assert not any(attributes.get("src") for _, attributes in made.elements)


def test_the_numbers_are_those_of_the_points(written):
    rows = tables(written)
    header = next(row for row in rows if row[:3] == ["teacher ε", "T", "n"])
    row = next(row for row in rows if row[:3] == ["0.4", "4", "5 of 5"])
    card = json.loads((written / "study.json").read_text())
    points = [cell["point"] for cell in card["cells"] if cell["axes"] == {EPS: 0.4, T: 4.0}]
    values = [json.loads((written / "points" / f"{p}.json").read_text())["metrics"]["test"]["top1"] for p in points]
    said = f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"
    assert row[header.index("test accuracy")] == said
    assert "test predictive KL ⚠ misleading alone" in header


def test_the_probe_stands_beside_the_truth(written):
    rows = tables(written)
    header = next(row for row in rows if "trained with" in row)
    row = dict(zip(header, next(row for row in rows if row[:2] == ["teacher ε 0.4", "0.4"]), strict=True))
    assert (row["train, estimate"], row["test, estimate"]) == ("0.405 ± 0.000", "0.600 ± 0.000")
    assert (row["train, interval holds it"], row["test, interval holds it"]) == ("5 of 5", "0 of 5")
    assert row["doubts on train"] == "few samples (5 of 5)"


def test_equal_counts_of_right_answers_are_no_effect(tmp_path, kd_report):
    """(a - b) - (c - d) of three seeds is 0 in counts of 300 and positive in floats: p .038 of nothing."""
    study = Maker(tmp_path / "study", seeds=3, few=True)
    sides = [{"eps": eps, "temperature": t} for t in (4.0, 1.0) for eps in (0.4, 0.0)]
    study.contrast("nothing", *sides[:2], minus=tuple(sides[2:]))
    counts = zip((230, 202, 272, 244), (198, 197, 158, 157), (289, 264, 173, 148), strict=True)
    for side, of_seeds in zip(sides, counts, strict=True):
        for point, count in zip(study.side(**side)["points"], of_seeds, strict=True):
            study.points[point]["metrics"]["test"]["top1"] = count / 300
    folder = study.write()
    code, out, _ = kd_report(f"study={folder}")
    assert code == 0
    made = contents(folder)
    assert kd_report(f"study={folder}")[0] == 0
    assert contents(folder) == made  # the same bytes again
    assert "nothing: 0.00, n = 3, all seeds the same: no interval, nothing can be said" in out


# ---- any study


def test_an_unfinished_study_says_what_is_missing_and_what_failed(tmp_path, kd_report):
    study = maker(tmp_path / "study", few=True)
    broken, gone = study.contrasts[0]["a"]["points"][0], study.contrasts[0]["b"]["points"][1]
    study.points[study.cells[0]["point"]]["metrics"]["test"]["nll"] = None  # eps 0, T 1, seed 0
    study.fail(broken, "RuntimeError: the loss is not finite | at step 3")
    code, out, _ = kd_report(f"study={study.write(missing=[gone])}")
    rows = tables(tmp_path / "study")
    assert code == 0
    assert "53 of 55 finished, 1 failed, 1 missing" in out
    assert "53 of 55 finished, 1 failed, 1 missing" in (tmp_path / "study" / "report.html").read_text()
    assert verdicts(rows)["harm"][3] == "3 of 5"
    assert [broken, "teacher ε 0.4, T 4, seed 0", "RuntimeError: the loss is not finite | at step 3"] in rows
    assert [gone, "teacher ε 0, T 4, seed 1", "has not run yet"] in rows
    header = next(row for row in rows if row[:3] == ["teacher ε", "T", "n"])
    few = next(row for row in rows if row[:3] == ["0", "1", "5 of 5"])
    assert few[header.index("test NLL")].endswith(" (n = 4)")  # of the five that finished


def test_a_study_of_which_nothing_has_run_has_a_page(tmp_path, kd_report):
    study = maker(tmp_path / "study")
    assert kd_report(f"study={study.write(missing=list(study.points))}")[0] == 0
    assert "0 of 55 finished, 55 missing" in (tmp_path / "study" / "report.html").read_text()


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({T: [1, 4], EPS: [0.0, 0.4], "loss.kd_weight": [0.5, 1.0]}, (EPS, [T], ["loss.kd_weight"])),
        ({EPS: [0.0, 0.4], METHOD: list("abcdefghi")}, (METHOD, [EPS], [])),  # more than can be told apart as lines
        ({EPS: [0.1]}, ("", [], [])),
    ],
)
def test_the_axes_of_a_grid_find_their_places(tmp_path, kd_report, axes, expected):
    folder = Maker(tmp_path / "study", axes=axes, seeds=1, few=True).write()
    study = Study(folder)
    assert study.facets == expected
    assert study.teacher_axes == [axis for axis in (EPS,) if len(axes.get(EPS, ())) > 1]
    assert kd_report(f"study={folder}")[0] == 0
    assert "± 0.0" not in (folder / "report.md").read_text()  # one seed has no deviation


def test_numbers_are_printed_with_their_unit_and_sign():
    assert formatting.difference(-0.0123, "test.top1") == "−1.23"
    assert formatting.difference(0.0123, "test.nll") == "+0.012"
    assert formatting.difference(3e-9, "test.nt_kl") == "+3e−09"  # an exact oracle's rounding is not 0
    assert formatting.difference(0.0, "test.nt_kl") == "0.000"
    assert formatting.number(None) == "–"
    assert formatting.clean("a" * 100) == "a" * (formatting.LONGEST - 1) + "…"


# ---- the command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["study=nowhere"], "study=nowhere: no such directory"),
        (["study=."], "holds no study.json"),
        (["run=."], "result.json: cannot be read (No such file or directory); give the directory of a finished run"),
        (["study=.", "run=."], "give one of study=DIR and run=DIR"),
        (["study=.", "output=x.txt"], "output=x.txt: must end in .html"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_writes_nothing(kd_report, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = kd_report(*words)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err
    assert not list(tmp_path.iterdir())
