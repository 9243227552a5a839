"""Checkpoints are whole or refused: what is kept, what is fallen back to, and what is said."""

import errno
import json
import os
import shutil
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

from kd import checkpoint
from kd.checkpoint import read_json, save_weights, write_atomically, write_json
from kd.checkpoint.manifest import _canonical
from kd.errors import CheckpointError
from kd.verify import main, rows
from tests.torture.faults import finish, loaded, save


def updates(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def spoil(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def manifest(folder: Path, update: int) -> Path:
    return folder / f"checkpoints/update-{update:08d}/manifest.json"


def rewritten(path: Path, **values) -> None:
    """A manifest with other values that is whole for all that."""
    import hashlib

    new = {k: v for k, v in (json.loads(path.read_text()) | values).items() if k != "sha256"}
    new["sha256"] = hashlib.sha256(_canonical(new)).hexdigest()
    path.write_bytes(_canonical(new))


# ---- what goes in comes out


def test_an_optimizers_state_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.8, 0.9))
    for _ in range(3):
        net(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    checkpoint.save(tmp_path, 3, {"optimizer": optimizer.state_dict(), "selected": {}, "ema": None, "update": 3})
    found = checkpoint.load(tmp_path, pytest.fail, "")
    state = found.state
    other = torch.optim.AdamW(net.parameters())
    other.load_state_dict(state["optimizer"])
    assert (state["selected"], state["ema"], state["update"], found.selected) == ({}, None, 3, None)
    assert tuple(other.param_groups[0]["betas"]) == (0.8, 0.9)
    for p in net.parameters():
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[p][key])


def test_a_state_without_tensors_comes_back(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": [1, 2.5, "x", None, True]})
    assert checkpoint.load(tmp_path, pytest.fail, "").state == {"a": [1, 2.5, "x", None, True]}


def test_a_state_refuses_what_could_hold_code(tmp_path):
    with pytest.raises(TypeError, match="/a is a function"):
        checkpoint.save(tmp_path, 1, {"a": lambda: 0})
    assert not list(tmp_path.iterdir())


def test_equal_weights_are_equal_files_and_keep_their_metadata(tmp_path):
    from kd.models.weights import weights_metadata

    about = {"model": "m", "num_classes": "10", "label_smoothing": "0.1", "smoothing": "uniform"}
    texts = set()
    for i in range(8):
        save_weights(tmp_path / f"{i}.safetensors", {"b": torch.ones(2), "a": torch.zeros(3)}, about)
        texts.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(texts) == 1
    assert weights_metadata(tmp_path / "0.safetensors") == about


# ---- what is kept


def test_the_newest_two_are_kept_each_with_all_that_it_needs(tmp_path):
    for update in range(1, 5):
        save(tmp_path, update)
    assert updates(tmp_path) == ["update-00000003", "update-00000004"]
    shutil.rmtree(manifest(tmp_path, 4).parent)
    assert loaded(tmp_path) == 3  # looks at the selected weights too


def test_one_that_is_damaged_meanwhile_does_not_count_as_one_of_the_newest_two(tmp_path):
    for update in (1, 2):
        save(tmp_path, update)
    spoil(manifest(tmp_path, 2).with_name("state.safetensors"))
    save(tmp_path, 3)
    assert updates(tmp_path) == [f"update-0000000{i}" for i in (1, 2, 3)]
    spoil(manifest(tmp_path, 3).with_name("selected.safetensors"))
    assert loaded(tmp_path) == 1
    save(tmp_path, 4)
    assert loaded(tmp_path) == 4
    save(tmp_path, 5)
    assert updates(tmp_path) == ["update-00000004", "update-00000005"]


def test_damaged_ones_of_later_updates_do_not_crowd_out_the_new_one(tmp_path):
    for update in (1, 8, 9):
        save(tmp_path, update)
    for update in (8, 9):
        spoil(manifest(tmp_path, update))
    save(tmp_path, 2)
    assert loaded(tmp_path) == 2


def test_none_is_removed_before_the_new_one_is_seen_to_be_whole(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)
    rename = Path.rename

    def spoilt(self, target):
        spoil(self / "state.safetensors")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", spoilt)
        with pytest.raises(CheckpointError, match=r"3/state\.safetensors: has sha256"):
            save(tmp_path, 3)
    assert updates(tmp_path) == [f"update-0000000{i}" for i in (1, 2, 3)]
    assert loaded(tmp_path) == 2


def test_a_second_checkpoint_of_an_update_never_replaces_the_first(tmp_path):
    """A run that was stopped while it validated saves the same update again once it has."""
    save(tmp_path, 1)
    for seen in (1, 2):
        checkpoint.save(tmp_path, 2, {"seen": seen})
    assert updates(tmp_path) == ["update-00000002", "update-00000002-2"]
    assert checkpoint.load(tmp_path, pytest.fail, "").state == {"seen": 2}


def test_what_a_dead_process_left_is_ignored_and_goes(tmp_path):
    save(tmp_path, 1)
    left = tmp_path / "checkpoints/.update-00000002.tmp"
    left.mkdir()
    (left / "state.safetensors").write_bytes(b"half")
    (tmp_path / ".last.safetensors.tmp").write_bytes(b"half")
    assert loaded(tmp_path) == 1
    save(tmp_path, 2)
    assert not list(tmp_path.rglob(".*"))


def test_finished_weights_have_a_manifest_and_the_checkpoints_go(tmp_path):
    save(tmp_path, 1)
    finish(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.safetensors", "selected.safetensors", "stage.json"]
    done = checkpoint.finished(tmp_path / "last.safetensors")
    assert (done["updates"], done["selected"]) == (9, {"epoch": 1})
    spoil(tmp_path / "last.safetensors")
    assert checkpoint.finished(tmp_path / "selected.safetensors") == done
    with pytest.raises(CheckpointError, match=r"last\.safetensors: has sha256 .* was written; do this"):
        checkpoint.finished(tmp_path / "last.safetensors", "do this")


# ---- what is fallen back to


@pytest.mark.parametrize("name", ["state.safetensors", "selected.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [spoil, Path.unlink, lambda p: p.write_bytes(b""), lambda p: os.truncate(p, 9)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, name, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(manifest(tmp_path, 2).with_name(name))
    said = []
    found = checkpoint.load(tmp_path, said.append, "")
    assert (found.state["update"], len(said), [p.name for p in found.damaged]) == (1, 1, ["update-00000002"])
    assert said[0].startswith(f"warning: {manifest(tmp_path, 2).with_name(name)}: ")
    assert said[0].endswith(f"taken, {manifest(tmp_path, 1).parent}")


FAILURES = {
    "files of the library": (
        "kd.checkpoint.safetensors_io.safe_open",
        OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    ),
    "files of torch": (
        "kd.checkpoint.safetensors_io.safe_open",
        RuntimeError("unable to open file <a>: Too many open files"),
    ),
    "memory": ("kd.checkpoint.safetensors_io.safe_open", MemoryError("Cannot allocate memory (os error 12)")),
    "memory for the sum": ("hashlib.file_digest", MemoryError()),
    "memory for the manifest": ("pathlib.Path.read_bytes", MemoryError()),
}  # what the libraries say when a process is at its limits, except for the last two


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("every", [False, True])
def test_a_checkpoint_that_fails_to_be_read_once_is_not_called_damaged(name, every, tmp_path, monkeypatch):
    for update in (1, 2):
        save(tmp_path, update)
    what, failure = FAILURES[name]
    left, called = [failure] * (99 if every else 1), resolve_name(what)

    def failing(*arguments, **options):
        if left:
            raise left.pop()
        return called(*arguments, **options)

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(what, failing)
        if every:
            with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read now: .* the same command goes"):
                checkpoint.load(tmp_path, said.append, "remove it")
        else:
            found = checkpoint.load(tmp_path, said.append, "")
            assert (found.state["update"], found.damaged, len(said)) == (1, [], 1)
            assert "update-00000002/" in said[0]
            assert str(failure).removeprefix("[Errno 24] ") in said[0]
            assert "code" not in said[0]
    assert loaded(tmp_path) == 2


def test_a_cut_file_says_how_long_it_was(tmp_path):
    save(tmp_path, 1)
    path = manifest(tmp_path, 1).with_name("state.safetensors")
    size = path.stat().st_size
    os.truncate(path, 9)
    with pytest.raises(CheckpointError, match=rf"state\.safetensors: has 9 bytes, {size:,} were written"):
        checkpoint.verified(manifest(tmp_path, 1))


def test_where_no_checkpoint_is_whole_it_is_said_of_each(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    spoil(manifest(tmp_path, 2))
    manifest(tmp_path, 1).unlink()
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(tmp_path, pytest.fail, "do this")
    said = str(error.value)
    assert "\n" not in said
    for part in ("no checkpoint in ", "2/manifest.json: its own sha256", "1/manifest.json: no such file", "; do this"):
        assert part in said


def test_a_newer_schema_is_one_line_and_nothing_is_fallen_back_to(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    rewritten(manifest(tmp_path, 2), schema=2)
    with pytest.raises(CheckpointError, match="has schema 2, this kd reads 1; it takes a newer kd"):
        checkpoint.load(tmp_path, pytest.fail, "")


@pytest.mark.parametrize("change", [{"update": 7}, {"files": {}}, {"files": {"../x": {"sha256": "", "bytes": 1}}}])
def test_a_manifest_with_the_right_sum_over_the_wrong_things_is_refused(tmp_path, change):
    save(tmp_path, 1)
    rewritten(manifest(tmp_path, 1), **change)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoint.load(tmp_path, pytest.fail, "")


def test_blanks_in_a_manifest_are_seen(tmp_path):
    save(tmp_path, 1)
    path = manifest(tmp_path, 1)
    for text in (path.read_text() + "\n", path.read_text().replace('": 1', '":  1', 1), " " + path.read_text()):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="its own sha256"):
            checkpoint.verified(path)


# ---- writing that fails


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.with_name("elsewhere"))])
def test_what_stands_in_the_place_of_a_temporary_file_is_neither_followed_nor_waited_for(tmp_path, make):
    (tmp_path / "elsewhere").write_text("of somebody else")
    make(tmp_path / ".result.json.tmp")
    write_json(tmp_path / "result.json", {"a": 1})
    assert read_json(tmp_path / "result.json") == {"a": 1}
    assert (tmp_path / "elsewhere").read_text() == "of somebody else"
    assert {path.name for path in tmp_path.iterdir()} == {"result.json", "elsewhere"}


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})

    def fail(temporary):
        temporary.write_text('{"a":')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(
        CheckpointError, match=r"cannot write .*result\.json: No space left .*; 7 bytes needed, [\d,]+ "
    ):
        write_atomically(path, fail, 7)
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


# ---- the command


def test_verify_says_what_is_whole(tmp_path, capsys):
    save(tmp_path / "s", 5)
    assert main(["verify", str(tmp_path / "s"), str(manifest(tmp_path / "s", 5).parent)]) == 0
    out = capsys.readouterr().out
    assert "mlp_nano, 10 classes, smoothing 0.1 uniform, update 5, schema 1" in out
    state = manifest(tmp_path / "s", 5).with_name("state.safetensors")
    import hashlib

    assert f"{state}  {state.stat().st_size:,} bytes  sha256 {hashlib.sha256(state.read_bytes()).hexdigest()}" in out
    spoil(state)
    assert main(["verify", str(tmp_path / "s")]) == 1
    assert f"damaged  {state}: has sha256" in capsys.readouterr().out
    finish(tmp_path / "done")
    assert main(["verify", str(tmp_path / "done/last.safetensors")]) == 0
    assert "10 classes" in capsys.readouterr().out
    spoil(tmp_path / "done/last.safetensors")
    assert main(["verify", str(tmp_path / "done/selected.safetensors")]) == 0
    assert main(["verify", str(tmp_path / "done/last.safetensors")]) == 1
    assert main(["verify", str(tmp_path / "done")]) == 1


@pytest.mark.parametrize("words", [["verify", "nothing"], ["verify", "."], ["check"], ["verify"], ["verify", "--all"]])
def test_verify_of_no_such_thing_is_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert (stop.value.code, capsys.readouterr().err.count("\n")) == (2, 1)


def test_verify_of_what_stands_at_the_root_looks_no_further_up(tmp_path, monkeypatch):
    assert "no such file" in rows(Path("/none.safetensors"))[0].wrong
    save(tmp_path, 5)
    monkeypatch.setattr("kd.verify._place", lambda path: Path("/here"))
    assert [row.wrong for row in rows(manifest(tmp_path, 5).parent)] == ["", "", ""]


def test_verify_helps(capsys):
    assert main(["--help"]) == 0
    assert "usage: python -m kd.verify verify PATH" in capsys.readouterr().out
