"""The page of a study: what it says of effects that are known, whatever the study's texts are, and in a browser."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image
from report_folder import EPS, METHOD, Maker, T

from kd.report import __main__ as command
from kd.report import reading, words

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


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a study with known effects and its report."""
    folder = maker(tmp_path_factory.mktemp("study") / "it").write()
    before = contents(folder)
    (folder / "figures").mkdir()
    assert command.main([str(folder), f"figures={folder / 'figures'}"]) == 0
    new = {path for path in contents(folder).keys() - before.keys() if path.parent.name != "figures"}
    assert new == {folder / "report.html", folder / "report.md"}
    assert before.items() <= contents(folder).items()  # nothing else in the folder has changed
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Outline(HTMLParser):
    """The elements of a page with their attributes, its text, and every table's rows."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.rows, self.cell = [], [], [], False
        self.feed(text)
        self.rows = [[cell.strip() for cell in row] for row in self.rows]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell &= tag not in ("th", "td")

    def handle_data(self, data):
        self.text.append(data)
        if self.cell:
            self.rows[-1][-1] += data


def browsed(markdown):
    """Markdown as a repository's page has it: rendered by another program."""
    return Outline(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))


def verdicts(rows):
    """What each contrast shows, from the rows of the table of contrasts."""
    at = next(i for i, row in enumerate(rows) if row and row[-1] == "what it shows")
    width = len(rows[at])
    found = {}
    for row in rows[at + 1 :]:
        if len(row) != width:
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
    assert all(row[3] == "5 of 5" for row in rows.values())
    assert [row[8] for row in rows.values()][:2] == ["5 / 0 / 0", "0 / 0 / 5"]


def test_a_null_and_a_reversed_sign_stand_as_large_as_the_rest(written):
    elements = Outline((written / "report.html").read_text()).elements
    cards = [a["class"] for tag, a in elements if tag == "li"]
    assert cards == ["negative", "positive", "null", "negative", "positive"]
    css = (written / "report.html").read_text()
    assert not re.search(r"(opacity|font-size)[^}]*}\s*\.findings li\.null|li\.null[^}]*(opacity|font-size)", css)


def test_the_numbers_are_those_of_the_points(written):
    rows = browsed((written / "report.md").read_text()).rows
    header = next(row for row in rows if row[:3] == ["teacher ε", "T", "n"])
    row = next(row for row in rows if row[:3] == ["0.4", "4", "5 of 5"])
    card = json.loads((written / "study.json").read_text())
    points = [cell["point"] for cell in card["cells"] if cell["axes"] == {EPS: 0.4, T: 4.0}]
    values = [json.loads((written / "points" / f"{p}.json").read_text())["metrics"]["test"]["top1"] for p in points]
    said = f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"
    assert row[header.index("test accuracy")] == said


def test_pairs_are_made_by_the_seeds_of_points_and_not_by_their_places(tmp_path):
    study = maker(tmp_path / "study", few=True)
    right = reading.read(study.write()).differences(study.contrasts[0])
    shutil.rmtree(study.folder)
    study.contrasts[0]["a"]["points"].reverse()
    wrong_order = reading.read(study.write())
    assert wrong_order.differences(wrong_order.card["contrasts"][0]) == right
    assert len(right) == 5


def test_equal_counts_of_right_answers_are_no_effect(tmp_path, kd_report):
    """(a - b) - (c - d) of three seeds is 0 in counts of 300 and positive in floats: p .038 of nothing."""
    study = Maker(tmp_path / "study", seeds=3, few=True)
    sides = [{"eps": eps, "temperature": t} for t in (4.0, 1.0) for eps in (0.4, 0.0)]
    study.contrast("nothing", *sides[:2], minus=tuple(sides[2:]))
    counts = zip((230, 202, 272, 244), (198, 197, 158, 157), (289, 264, 173, 148), strict=True)
    for side, of_seeds in zip(sides, counts, strict=True):
        for point, count in zip(study.side(**side)["points"], of_seeds, strict=True):
            study.points[point]["metrics"]["test"]["top1"] = count / 300
    code, out, _ = kd_report(study.write())
    assert code == 0
    assert "nothing: 0.00, n = 3, all seeds the same: no interval, nothing can be said" in out
    row = verdicts(browsed((tmp_path / "study" / "report.md").read_text()).rows)["nothing"]
    assert row[8] == "0 / 3 / 0"


def test_a_mean_over_fewer_seeds_than_finished_says_so(tmp_path, kd_report):
    study = maker(tmp_path / "study", few=True)
    name = study.cells[0]["point"]  # eps 0, T 1, seed 0
    study.points[name]["metrics"]["test"]["nll"] = None
    kd_report(study.write())
    rows = browsed((tmp_path / "study" / "report.md").read_text()).rows
    header = next(row for row in rows if row[:3] == ["teacher ε", "T", "n"])
    few, all_ = (
        row[header.index("test NLL")] for row in rows if row[:3] in (["0", "1", "5 of 5"], ["0", "4", "5 of 5"])
    )
    assert few.endswith(" (n = 4)")
    assert "n =" not in all_


def test_the_picture_of_the_interaction_has_the_differences(written):
    root = ElementTree.fromstring((written / "figures" / "interaction-test.top1.svg").read_text())
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    numbers = [float(text.replace("−", "-")) for text in texts if re.fullmatch(r"[+−]?\d\.\d\d", text)]
    assert len(numbers) == 4  # two temperatures by two eps
    assert max(numbers) == pytest.approx(3, abs=0.4)
    assert min(numbers) == pytest.approx(-5, abs=0.4)


def test_the_probe_stands_beside_the_truth(written):
    rows = browsed((written / "report.md").read_text()).rows
    header = next(row for row in rows if "trained with" in row)
    row = dict(zip(header, next(row for row in rows if row[:2] == ["teacher ε 0.4", "0.4"]), strict=True))
    assert (row["train, estimate"], row["test, estimate"]) == ("0.405 ± 0.000", "0.600 ± 0.000")
    assert (row["train, interval holds it"], row["test, interval holds it"]) == ("5 of 5", "0 of 5")
    assert row["doubts on train"] == "few samples (5 of 5)"


def test_metrics_that_mislead_are_labelled_where_they_are_printed(written):
    for text in (
        Outline((written / "report.html").read_text()).text,
        browsed((written / "report.md").read_text()).text,
    ):
        cells = [piece.strip() for piece in text]
        assert any(re.fullmatch(r"test predictive KL ⚠ misleading alone", cell) for cell in cells)
        assert any(re.fullmatch(r"train γ ⚠ misleading alone", cell) for cell in cells)
        assert not any(re.search(r"accuracy ⚠", cell) for cell in cells)


def test_two_reports_of_one_study_are_the_same_bytes(tmp_path):
    folder = maker(tmp_path / "study", seeds=2, few=True).write()
    made = []
    for _ in range(2):
        assert command.main([str(folder)]) == 0
        made.append(contents(folder))
    assert made[0] == made[1]


# ---- any study


def test_one_seed_has_no_interval_and_says_so(tmp_path, kd_report):
    _, out, _ = kd_report(maker(tmp_path / "study", seeds=1, few=True, jitter=0).write())
    assert "harm: −5.00, n = 1" in out
    assert out.count("one seed: no interval, nothing can be said") == 5
    assert "± 0.0" not in (tmp_path / "study" / "report.md").read_text()


def test_an_unfinished_study_says_what_is_missing_and_what_failed(tmp_path, kd_report):
    study = maker(tmp_path / "study", few=True)
    broken, gone = study.contrasts[0]["a"]["points"][0], study.contrasts[0]["b"]["points"][1]
    study.fail(broken, "RuntimeError: the loss is not finite | at step 3")
    code, out, _ = kd_report(study.write(missing=[gone]))
    text = (tmp_path / "study" / "report.md").read_text()
    rows = browsed(text).rows
    assert code == 0
    assert "53 of 55 finished, 1 failed, 1 missing" in out
    assert "53 of 55 finished, 1 failed, 1 missing" in text
    assert verdicts(rows)["harm"][3] == "3 of 5"
    assert [broken, "student", "0", "teacher ε 0.4, T 4", "RuntimeError: the loss is not finite | at step 3"] in rows
    assert [gone, "teacher ε 0, T 4"] in rows


@pytest.mark.parametrize(
    ("axes", "missing"),
    [
        ({}, "the grid has one cell"),
        ({METHOD: ["kd", "dist"]}, "no axis of this study changes its teachers"),
        ({EPS: [0.0, 0.4]}, "is the only axis"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_sentence(tmp_path, axes, missing):
    folder = Maker(tmp_path / "study", axes=axes, seeds=2, few=True).write()
    assert command.main([str(folder)]) == 0
    assert missing in (folder / "report.md").read_text()


def test_many_methods_are_rows_of_one_drawing(tmp_path):
    axes = {EPS: [0.0, 0.4], METHOD: [f"method {i}" for i in range(12)]}
    folder = Maker(tmp_path / "study", axes=axes, seeds=2, few=True, effect=lambda axes: -0.1 * axes[EPS]).write()
    (folder / "figures").mkdir()
    assert command.main([str(folder), f"figures={folder / 'figures'}"]) == 0
    rows = []
    for name in ("against-test.top1", "interaction-test.top1"):
        root = ElementTree.fromstring((folder / "figures" / f"{name}.svg").read_text())
        texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
        rows.append([text for text in texts if text.startswith("method ")])
    assert rows[0] == rows[1] == axes[METHOD]
    numbers = [float(text.replace("−", "-")) for text in texts if re.fullmatch(r"−\d\.\d\d", text)]
    assert len(numbers) == 12
    assert np.mean(numbers) == pytest.approx(-4, abs=0.3)


def test_a_study_of_which_nothing_has_run_has_a_page(tmp_path):
    study = maker(tmp_path / "study")
    folder = study.write(missing=list(study.points))
    assert command.main([str(folder)]) == 0
    assert "0 of 55 finished, 55 missing" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({T: [1, 4], EPS: [0.0, 0.4], "loss.kd_weight": [0.5, 1.0]}, (EPS, T, ("loss.kd_weight",))),
        ({EPS: [0.0, 0.4], METHOD: ["kd", "dist"]}, (EPS, METHOD, ())),
        ({EPS: [0.0, 0.4], METHOD: list("abcdefghi")}, (EPS, None, (METHOD,))),
        ({EPS: [0.1], T: [1, 2]}, (T, None, ())),
        ({EPS: [0.1]}, (None, None, ())),
    ],
)
def test_the_axes_of_a_grid_find_their_places(tmp_path, axes, expected):
    facets = reading.read(Maker(tmp_path / "study", axes=axes, seeds=1).write()).facets
    assert (facets.x, facets.line, facets.rest) == expected


def test_numbers_are_printed_with_their_unit_and_sign():
    assert words.difference(-0.0123, "test.top1") == "−1.23"
    assert words.difference(0.0123, "test.nll") == "+0.012"
    assert words.difference(3e-9, "test.nt_kl") == "+3e−09"  # an exact oracle's rounding is not 0
    assert words.difference(0.0, "test.nt_kl") == "0.000"
    assert words.spread([0.5, 0.7], "test.top1") == "60.0 ± 14.1"
    assert words.shown(None) == "–"


# ---- hostile text

PAYLOADS = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "a\nb\r\n\n<b>c</b>\x00\x1b\u202e| d | `e` ```",
    "</td></svg></details></style><iframe src=//x>",
    "$\\frac{1}$ {{ 7 * 7 }} {% raw %} [x](javascript:alert(1)) ![y](http://x/y.png) <!-- -->",
    "\ud800 lone" + "x" * 10_000,
)


class Hostile:
    """Gives each text of a study the next payload."""

    def __init__(self):
        self.given = 0

    def __call__(self, name):
        self.given += 1
        return f"{PAYLOADS[self.given % len(PAYLOADS)]} {name}"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    text = Hostile()
    axes = {EPS: [0.0, 0.4], T: [1.0, 4.0], METHOD: [text("kd"), text("dist")]}
    study = Maker(tmp_path_factory.mktemp("hostile") / "it", axes=axes, seeds=2, text=text)
    for payload in PAYLOADS:
        study.contrast(payload, POSITIVE, POSITIVE | {"eps": 0.0})
        study.contrast(payload, POSITIVE, POSITIVE | {"eps": 0.0}, metric=f"test.{payload}")
    for payload, control in zip(PAYLOADS, study.controls, strict=False):
        control["control"] = payload
    for payload, (name, point) in zip(PAYLOADS, list(study.points.items())[4:], strict=False):
        point["metrics"]["test"][f"{payload}"] = 0.5
        point["settings"][payload] = payload
        point["provenance"] = point["provenance"] | {"git_sha": payload, "system": payload}
        if point["role"] != "teacher":
            study.fail(name, payload)
    folder = study.write()
    (folder / "figures").mkdir()
    assert command.main([str(folder), f"figures={folder / 'figures'}"]) == 0
    return folder


ELEMENTS = {"html", "head", "meta", "title", "style", "body", "header", "div", "p", "h1", "h2", "h3", "pre", "code"}
ELEMENTS |= {"nav", "a", "main", "section", "dl", "dt", "dd", "ul", "li", "figure", "svg", "figcaption", "table"}
ELEMENTS |= {"caption", "thead", "tbody", "tr", "th", "td", "details", "summary"}
DRAWN = {"defs", "g", "path", "use", "text", "tspan", "clippath", "rect"}
ATTRIBUTES = {"lang", "charset", "name", "content", "http-equiv", "class", "href", "id", "scope", "style", "role"}
ATTRIBUTES |= {"aria-label", "type", "viewbox", "version", "d", "x", "y", "width", "height", "transform", "xlink:href"}
ATTRIBUTES |= {"clip-path", "xmlns", "xmlns:xlink"}


def test_no_live_node_of_the_page_comes_from_a_name(hostile):
    made = Outline((hostile / "report.html").read_text())
    assert {tag for tag, _ in made.elements} <= ELEMENTS | DRAWN
    for tag, attributes in made.elements:
        assert attributes.keys() <= ATTRIBUTES, tag
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
        for url in re.findall(r"url\(([^)]*)\)", " ".join(value or "" for value in attributes.values())):
            assert url.startswith("#")
    # The same elements as on a page whose names are plain: nothing opened and nothing closed.
    text = "".join(made.text)
    assert "<script>alert(1)</script>" in text  # shown, as text
    assert "{{ 7 * 7 }}" in text
    assert len([tag for tag, _ in made.elements if tag == "section"]) == 10


def test_long_names_are_cut_and_control_characters_are_gone(hostile):
    for name in ("report.html", "report.md"):
        text = (hostile / name).read_text()
        assert "x" * 2001 not in text  # the command's limit; names have far less
        assert not set("\x00\x1b\u202e\r") & set(text)
    assert words.clean("a" * 100) == "a" * (words.LONGEST - 1) + "…"


def test_no_live_node_of_the_markdown_comes_from_a_name(hostile):
    text = (hostile / "report.md").read_text()
    made = browsed(text)
    known = {"strong", "em", "blockquote", "img", "h1", "h2"}
    assert {tag for tag, _ in made.elements} <= ELEMENTS | known
    assert all(attributes.keys() <= {"src", "alt", "class"} for _, attributes in made.elements)
    sources = {attributes["src"] for tag, attributes in made.elements if tag == "img"}
    assert sources
    for source in sources:
        assert (hostile / source).is_file()
    assert "<script>alert(1)</script>" in "".join(made.text)


def test_no_row_of_a_markdown_table_is_broken_by_a_name(hostile):
    tables = re.findall(r"(?:^\|.*\n)+", (hostile / "report.md").read_text(), re.MULTILINE)
    assert len(tables) > 8
    for table in tables:
        made = browsed(table)
        assert len(made.rows) == len(table.splitlines()) - 1  # the rule under the header is no row
        lines = [re.sub(r"\\.", "", line) for line in table.splitlines()]  # without what is escaped
        assert len({line.count("|") for line in lines}) == 1


def test_no_live_node_of_a_drawing_comes_from_a_name(hostile):
    files = list((hostile / "figures").glob("*.svg"))
    assert len(files) >= 8
    for path in files:
        for node in ElementTree.fromstring(path.read_text()).iter():
            assert node.tag.rpartition("}")[2].lower() in DRAWN | {"svg", "style"}
            assert not any(name.startswith("on") for name in node.attrib)
    assert any("<script>" in "".join(ElementTree.fromstring(path.read_text()).itertext()) for path in files)


# ---- the command line


def test_help(kd_report):
    code, out, _ = kd_report("--help")
    assert (code, out.splitlines()[0][:32]) == (0, "usage: python -m kd.report DIR [")


def broken(folder, what):
    study = maker(folder, seeds=1)
    folder = study.write()
    card, point = folder / "study.json", folder / "points" / f"{min(study.points)}.json"
    if what == "none":
        shutil.rmtree(folder)
    elif what == "no card":
        card.unlink()
    elif what == "torn card":
        card.write_text(card.read_text()[:100])
    elif what == "torn point":
        point.write_text("{")
    elif what == "card's schema":
        card.write_text(json.dumps(study.card() | {"schema": 99}))
    elif what == "point's schema":
        point.write_text(json.dumps(json.loads(point.read_text()) | {"schema": 99}))
    elif what == "list":
        card.write_text("[]")
    elif what == "point's metrics":
        point.write_text(json.dumps(json.loads(point.read_text()) | {"metrics": 3}))
    elif what == "id":
        card.write_text(json.dumps(study.card() | {"points": ["../../secret"]}))
    return folder


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("none", "study: no such folder; give the folder of a study"),
        ("no card", "study: holds no study.json; give the folder of a study"),
        ("torn card", "study/study.json: "),
        ("torn point", "study/points/000000000000.json: "),
        ("card's schema", "study/study.json: schema 99, this kd reads 1"),
        ("point's schema", "study/points/000000000000.json: schema 99, this kd reads 1"),
        ("list", "study/study.json: all of it: must be an object, is a list"),
        ("point's metrics", "study/points/000000000000.json: metrics: must be an object, is 3; remove the file and"),
        ("id", "study/study.json: points: '../../secret' is no id of 12 hex digits"),
    ],
)
def test_what_is_no_study_is_one_line_and_writes_nothing(tmp_path, kd_report, what, said):
    folder = broken(tmp_path / "study", what)
    code, out, err = kd_report(folder)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.rglob("report.*"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a", "b"], "type the folder of one study"),
        (["--force"], "type the folder of one study"),
        (["a", "html=x.txt"], "html=x.txt: must end in .html"),
        (["a", "markdown="], "markdown=: must end in .md"),
        (["a", "html=/nowhere/x.html"], "html=/nowhere/x.html: no such folder /nowhere"),
        (["a", "html"], "type the folder of one study"),
    ],
)
def test_a_wrong_command_line_is_one_line(kd_report, arguments, said):
    code, _, err = kd_report(*arguments)
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def opened(folder: Path, place: Path, *options: str):
    """The page of a folder in Chromium, without a window and without a network."""
    assert CHROMIUM is not None
    quiet = "--headless --no-sandbox --disable-gpu --hide-scrollbars --disable-background-networking "
    quiet += "--disable-component-update --no-first-run --disable-dev-shm-usage --window-size=1200,1400 "
    arguments = [CHROMIUM, *quiet.split(), "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"]
    arguments += [f"--user-data-dir={place / 'profile'}", *options, (folder / "report.html").as_uri()]
    env = {**os.environ, "HOME": str(place)}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done


def looked(folder, place, dark):
    """What the browser printed, and the grey values of its picture."""
    picture = place / f"{dark}.png"
    scheme = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    done = opened(folder, place, *scheme, "--dump-dom", f"--screenshot={picture}")
    return done, np.asarray(Image.open(picture).convert("L"), dtype=float)


@pytest.fixture(scope="module")
def seen(request, tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; apt-get install chromium")
    hostile, written = (request.getfixturevalue(name) for name in ("hostile", "written"))
    place = tmp_path_factory.mktemp("browser")
    return looked(written, place, dark=False), looked(written, place, dark=True), opened(hostile, place, "--dump-dom")


def test_the_page_has_its_headings_and_no_error_in_a_browser(seen):
    (light, _), _, attacked = seen
    for done in (light, attacked):
        headings = re.findall(r"<h2>(.*?)</h2>", done.stdout)
        assert headings[1:4] == [
            "The declared contrasts, and what they show",
            "Students against teacher ε",
            "Calibration",
        ]
        assert done.stdout.count("<svg") >= 8
        # A page that asked for anything would break its own policy, which the console would tell.
        assert "CONSOLE" not in done.stderr
        assert "Content Security Policy" not in done.stderr


def test_a_browser_finds_no_live_node_either(seen):
    elements = Outline(seen[2].stdout).elements
    assert {tag for tag, _ in elements} <= ELEMENTS | DRAWN
    assert not any(name.startswith("on") for _, attributes in elements for name in attributes)


def test_it_is_to_be_seen_in_light_and_in_dark(seen):
    (_, light), (_, dark), _ = seen
    assert np.median(light) > 240
    assert np.median(dark) < 40
    for picture in (light, dark):  # ink on paper: something is far from the background, not much of it
        far = np.abs(picture - np.median(picture)) > 100
        assert 0.01 < far.mean() < 0.3
        head = np.abs(picture[:400] - np.median(picture)) > 180  # the claim, in ink, above any drawing
        assert 0.002 < head.mean() < 0.3
