"""A stranger's result.json: it can be read, scored against and replayed, or one line names the entry."""

import io
import json
import random

import pytest
from rich.console import Console

from kd import evaluate
from kd.errors import CheckpointError
from kd.training import replay, results
from kd.training.stored import numbers, read_result
from tests.torture.cards import WRONG, mutated, places

SCORE = {"top1": 0.5, "top5": 0.9, "nll": 1.0, "ece": 0.1, "brier": 0.2, "agreement": 0.7, "kl_to_teacher": 0.1}
SPLITS = {"val": SCORE, "test": SCORE}
NETWORK = {"model": "mlp_tiny", "parameters": 9, "weights": "runs/teachers/a/last.safetensors", "sha256": "0" * 64}
NETWORK |= {"seconds": 1.0, "last": SPLITS, "selected": SPLITS}
PAIRED = {"top1": 0.01, "standard_error": 0.01, "n": 9}
DIFFERENCE = {which: {"val": PAIRED, "test": PAIRED} for which in ("last", "selected")}
ORIGIN = {"recipe_hash": "0" * 12, "versions": {"torch": "2"}, "hardware": {"cpu": "a"}, "git_sha": None, "seed": 0}
RESULT = dict.fromkeys(("teacher", "student", "control"), NETWORK)
RESULT = {"recipe": "smoke", **RESULT, "difference": DIFFERENCE, "provenance": ORIGIN}
RESULT = json.loads(json.dumps(RESULT))  # nothing in it twice
HOSTILE = ("\x1b[2J\ud800[red]", "../../..", "a\x00b")
TEXTS = ("[" * 100_000, "1" * 5_000, '{"recipe": 1', "\x00", "null", "[]", '{"a": NaN}', '{"a": 1e999}', "\ufeff{}", "")


def read(path, text):
    """What is read, None where one line refuses it."""
    path.write_text(text, errors="surrogatepass")
    try:
        return read_result(path)
    except CheckpointError as error:
        said = str(error)
    assert said.startswith(f"{path}: "), said
    assert "\n" not in said
    return None


def test_every_entry_in_turn_taken_away_or_made_something_else(tmp_path, capsys):
    path, rng, outcomes = tmp_path / "result.json", random.Random(0), []
    assert read(path, json.dumps(RESULT)) == RESULT
    for at in places(RESULT):
        changes = [mutated(RESULT, at, wrong) for wrong in rng.sample((*WRONG, *HOSTILE), 4)]
        for changed in [*changes, *([mutated(RESULT, at, None, delete=True)] if at else [])]:
            outcomes.append(found := read(path, json.dumps(changed)))
            if found is not None:  # then whatever is made of it works
                said = io.StringIO()
                results.print_result(found, Console(file=said, width=150))
                assert "\x1b" not in said.getvalue()
                replay.report(found, RESULT)
                numbers(found)
    assert 150 < outcomes.count(None) < len(outcomes) - 150
    assert [read(path, text) for text in TEXTS] == [None] * len(TEXTS)


@pytest.mark.parametrize(
    ("at", "wrong", "said"),
    [
        (("student", "last", "test", "top1"), "high", "student.last.test.top1: must be a number, is high"),
        (("control", "selected"), [], "control.selected: must be an object, is a list"),
        (("teacher", "weights"), None, "teacher.weights: must be text, is None"),
        (("difference", "last", "val", "n"), 10**30, "difference.last.val.n: is a number of more than 64 bits"),
        (("provenance", "versions"), "2", "provenance.versions: must be an object, is 2"),
    ],
)
def test_the_line_names_the_entry_before_anything_is_loaded(at, wrong, said, tmp_path, monkeypatch):
    monkeypatch.setattr("kd.training.pipeline.prepare", lambda *_: pytest.fail("it was loaded"))
    folder = tmp_path / "name" / "run"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: smoke\n")
    (folder / "result.json").write_text(json.dumps(mutated(RESULT, at, wrong)))
    for read_it in (lambda: evaluate.main([f"run={folder}"]), lambda: results.read_run(folder, [])):
        with pytest.raises(CheckpointError) as error:
            read_it()
        assert f"{folder}/result.json: {said}" in str(error.value)
