"""The page of a single run: the same numbers as its result, curves and diagrams of its networks."""

import json

import pytest
from pages import DRAWN, ELEMENTS, Outline, browsed


@pytest.fixture
def run(kd_train, tmp_path):
    """The directory of a finished run of three small networks."""
    words = ["teacher.model=mlp_tiny", "student.model=mlp_nano", "run=one", "train.log_every=1"]
    assert kd_train("recipe=smoke", *words).code == 0
    return tmp_path / "checkpoints" / "smoke" / "one"


def test_the_page_of_a_run_has_its_result_curves_and_diagrams(run, kd_report):
    result = json.loads((run / "result.json").read_text())
    code, out, _ = kd_report(f"run={run}")
    made, text = Outline((run / "report.html").read_text()), (run / "report.md").read_text()
    assert code == 0
    assert "Distillation" in out
    assert {tag for tag, _ in made.elements} <= ELEMENTS | DRAWN
    rows = {row[0]: row[1:] for row in browsed(text).rows}
    shown = [f"{100 * result[name]['last']['test']['top1']:.1f}" for name in ("teacher", "student", "control")]
    assert rows["accuracy, %"] == shown
    assert rows["agreement, %"] == ["–", f"{100 * result['student']['last']['test']['agreement']:.1f}", "–"]
    assert rows["sha256"][1] == result["student"]["sha256"]
    difference = result["difference"]["last"]["test"]
    assert f"± {100 * difference['standard_error']:.2f} standard error" in text
    headings = [a["aria-label"] for _, a in made.elements if a.get("role") == "img"]
    assert headings == ["Curves", "Reliability of the last weights"]
    assert "## Training" not in text  # only drawings


def test_a_run_without_a_control_and_without_its_log_has_a_page(run, kd_report, tmp_path):
    result = json.loads((run / "result.json").read_text())
    del result["control"], result["difference"]
    (run / "result.json").write_text(json.dumps(result))
    (run / "metrics.jsonl").unlink()
    code, out, _ = kd_report(f"run={run}", f"output={tmp_path / 'page.html'}")
    assert code == 0
    assert "No control was trained" in out
    assert "control |" not in (tmp_path / "page.md").read_text()
