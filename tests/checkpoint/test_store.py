"""Checkpoints are whole or refused: what is kept, what a stage falls back to, and what is said."""

import shutil
from pathlib import Path

import pytest
import torch

from kd.checkpoint import store
from kd.checkpoint.files import read_json
from kd.checkpoint.safetensors_io import save_weights
from kd.errors import CheckpointError, ConfigError
from kd.verify import main
from tests.torture.saves import finish, loaded, save


def updates(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def manifest(directory: Path, update: int) -> Path:
    return directory / f"checkpoints/update-{update:08d}/manifest.json"


# ---- what goes in comes out


def test_an_optimizers_state_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.8, 0.9))
    for _ in range(3):
        net(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    rest = {"list": [1, 2.5, "x", None, True], "empty": {}}
    store.save(tmp_path, 3, {"optimizer": optimizer.state_dict(), **rest})
    checkpoint = store.load(tmp_path, pytest.fail)
    other = torch.optim.AdamW(net.parameters())
    other.load_state_dict(checkpoint.state.pop("optimizer"))
    assert (checkpoint.state, checkpoint.selected) == (rest, None)
    assert tuple(other.param_groups[0]["betas"]) == (0.8, 0.9)
    for p in net.parameters():
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[p][key])


def test_a_state_refuses_what_could_hold_code(tmp_path):
    with pytest.raises(TypeError, match="/a is a function"):
        store.save(tmp_path, 1, {"a": lambda: 0})
    assert not list(tmp_path.iterdir())


def test_equal_weights_are_equal_files_and_keep_their_metadata(tmp_path):
    from kd.models.weights import weights_metadata

    about = {"model": "m", "num_classes": "10", "label_smoothing": "0.1", "smoothing": "uniform"}
    contents = set()
    for i in range(8):
        save_weights(tmp_path / f"{i}.safetensors", {"b": torch.ones(2), "a": torch.zeros(3)}, about)
        contents.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(contents) == 1
    assert weights_metadata(tmp_path / "0.safetensors") == about


# ---- what is kept


def test_the_newest_two_are_kept_each_with_all_that_it_needs(tmp_path):
    for update in range(1, 5):
        save(tmp_path, update)
    assert updates(tmp_path) == ["update-00000003", "update-00000004"]
    shutil.rmtree(manifest(tmp_path, 4).parent)
    assert loaded(tmp_path) == 3  # looks at the selected weights too


def test_a_damaged_checkpoint_does_not_count_as_one_of_the_newest_two(tmp_path):
    for update in (1, 2):
        save(tmp_path, update)
    damage(manifest(tmp_path, 2).with_name("state.safetensors"))
    save(tmp_path, 3)
    assert updates(tmp_path) == [f"update-0000000{i}" for i in (1, 2, 3)]
    damage(manifest(tmp_path, 3).with_name("selected.safetensors"))
    assert loaded(tmp_path) == 1
    save(tmp_path, 4)
    assert loaded(tmp_path) == 4
    save(tmp_path, 5)
    assert updates(tmp_path) == ["update-00000004", "update-00000005"]


def test_none_is_removed_before_the_new_one_is_seen_to_be_whole(tmp_path, monkeypatch):
    save(tmp_path, 1)
    save(tmp_path, 2)
    rename = Path.rename

    def damaging(self, target):
        damage(self / "state.safetensors")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", damaging)
        with pytest.raises(CheckpointError, match=r"3/state\.safetensors: is damaged, has sha256"):
            save(tmp_path, 3)
    assert updates(tmp_path) == [f"update-0000000{i}" for i in (1, 2, 3)]
    assert loaded(tmp_path) == 2


def test_a_second_checkpoint_of_an_update_never_replaces_the_first(tmp_path):
    """A run that was stopped while it validated saves the same update again once it has."""
    save(tmp_path, 1)
    for seen in (1, 2):
        store.save(tmp_path, 2, {"seen": seen})
    assert updates(tmp_path) == ["update-00000002", "update-00000002-2"]
    assert store.load(tmp_path, pytest.fail).state == {"seen": 2}


def test_finished_weights_have_a_manifest_and_the_checkpoints_go(tmp_path):
    save(tmp_path, 1)
    finish(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.safetensors", "selected.safetensors", "stage.json"]
    done = store.finished(tmp_path / "last.safetensors")
    assert (done["updates"], done["selected"]) == (9, {"epoch": 1})
    damage(tmp_path / "last.safetensors")
    assert store.finished(tmp_path / "selected.safetensors") == done
    with pytest.raises(CheckpointError, match=r"last\.safetensors: is damaged, .* must be .*; do this"):
        store.finished(tmp_path / "last.safetensors", "do this")


# ---- what a stage falls back to


@pytest.mark.parametrize("name", ["state.safetensors", "selected.safetensors", "manifest.json"])
@pytest.mark.parametrize("harm", [damage, Path.unlink, lambda p: p.write_bytes(p.read_bytes() + b" ")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, name, harm):
    save(tmp_path, 1)
    save(tmp_path, 2)
    harm(manifest(tmp_path, 2).with_name(name))
    said = []
    assert store.load(tmp_path, said.append).state["update"] == 1
    (line,) = said
    assert line.startswith(f"warning: {manifest(tmp_path, 2).with_name(name)}: ")
    assert line.endswith(f"falling back to {manifest(tmp_path, 1).parent}")


def test_a_newer_schema_or_another_owner_is_one_line(tmp_path, monkeypatch):
    owner = {"stage": "student", "run": "a"}
    with monkeypatch.context() as patch:
        patch.setattr("kd.checkpoint.manifest.SCHEMA", 2)
        store.save(tmp_path, 2, {}, owner=owner)
    store.save(tmp_path, 3, {}, owner=owner | {"run": "b"})
    said = r"run b, must be of stage student, run a; .*has schema 2, this kd reads 1: use a newer kd"
    with pytest.raises(CheckpointError, match=said):
        store.load(tmp_path, pytest.fail, owner)


@pytest.mark.parametrize("text", [None, "", "{", "[" * 100_000, "\udcff", "[]", '{"b": 1}'])
def test_json_that_is_missing_damaged_or_something_else_is_one_line(text, tmp_path):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"a\.json: ") as error:
        read_json(path, needs=["a"])
    assert "\n" not in str(error.value)


# ---- the command


def test_verify_says_what_is_whole(tmp_path, capsys):
    stage, done = tmp_path / "s", tmp_path / "done"
    save(stage, 5)
    finish(done)
    assert main([f"run={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert f"{manifest(stage, 5)}  update 5, schema 1, selected.safetensors, state.safetensors\n" in out
    for path in (done / "last.safetensors", manifest(stage, 5).with_name("selected.safetensors")):
        assert main([f"path={path}"]) == 0
        damage(path)
        assert main([f"path={path}"]) == main([f"run={path.parent}"]) == main([f"run={tmp_path}"]) == 1
        assert f"damaged  {path}: is damaged, has sha256" in capsys.readouterr().out
    manifest(stage, 5).unlink()
    assert main([f"run={stage}"]) == 1


@pytest.mark.parametrize("words", [["run=nothing"], ["run=."], ["verify", "."], ["run="], ["run=.", "path=a"]])
def test_verify_of_no_such_thing_is_refused(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        main(words)
