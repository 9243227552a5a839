"""Whose a directory is: another run's is refused before anything is written."""

import pytest

RUN = ("recipe=smoke", "control=false", "run=one", "output=runs")


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(kd_train, folder) -> str:
    """What one line says of a command that changes nothing on the disk."""
    before = files(folder)
    done = kd_train(*RUN)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert files(folder) == before
    return done.err


@pytest.mark.parametrize("left", ["student", "control", "teacher", "result.json"])
def test_a_run_that_does_not_say_of_which_recipe_it_is_is_not_gone_on_with(left, kd_train, tmp_path):
    (tmp_path / "runs/smoke/one" / left).mkdir(parents=True)
    said = refused(kd_train, tmp_path)
    assert f"run=one: runs/smoke/one has {left} but no run.json to identify its recipe; restore it" in said


def test_a_card_that_kd_has_not_written_is_named_with_what_to_do(kd_train, tmp_path):
    assert kd_train(*RUN).code == 0
    card = tmp_path / "runs/smoke/one/run.json"
    (card.parent / "result.json").unlink()
    whole = card.read_text()
    for text, wrong in {
        "": "is empty",
        whole[:50]: "cannot be read (",
        whole.replace("{", '{"extra": 1,', 1): "extra: kd writes no such entry",
        whole.replace("data_hash", "date_hash"): "data_hash: is missing",
    }.items():
        card.write_text(text)
        said = refused(kd_train, tmp_path)
        assert f"run.json: {wrong}" in said
        assert said.endswith("; restore it, or resume=false to set that run aside\n")
