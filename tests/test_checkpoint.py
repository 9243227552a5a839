"""State and weights on disk: what goes in comes out, and a write that fails leaves the old file."""

import os

import pytest
import torch

from kd.checkpoint import CheckpointError, load_state, read_json, save_state, save_weights, write_atomically, write_json


def test_an_optimizers_state_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.8, 0.9))
    for _ in range(3):
        net(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    save_state(tmp_path / "s", {"optimizer": optimizer.state_dict(), "selected": {}, "ema": None, "update": 3})
    state = load_state(tmp_path / "s")
    other = torch.optim.AdamW(net.parameters())
    other.load_state_dict(state["optimizer"])
    assert (state["selected"], state["ema"], state["update"]) == ({}, None, 3)
    assert tuple(other.param_groups[0]["betas"]) == (0.8, 0.9)
    for p in net.parameters():
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[p][key])


def test_a_state_without_tensors_comes_back(tmp_path):
    save_state(tmp_path / "s", {"a": [1, 2.5, "x", None, True]})
    assert load_state(tmp_path / "s") == {"a": [1, 2.5, "x", None, True]}


def test_a_state_refuses_what_could_hold_code(tmp_path):
    with pytest.raises(TypeError, match="/a is a function"):
        save_state(tmp_path / "s", {"a": lambda: 0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"PK\x03\x04" + b])
def test_a_spoilt_state_is_an_error_that_names_the_file(tmp_path, spoil):
    path = tmp_path / "s"
    save_state(path, {"w": torch.randn(100)})
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match=str(path)):
        load_state(path)


def test_equal_weights_are_equal_files_and_keep_their_metadata(tmp_path):
    from kd.models import weights_metadata

    about = {"model": "m", "num_classes": "10", "label_smoothing": "0.1", "smoothing": "uniform"}
    texts = set()
    for i in range(8):
        save_weights(tmp_path / f"{i}.safetensors", {"b": torch.ones(2), "a": torch.zeros(3)}, about)
        texts.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(texts) == 1
    assert weights_metadata(tmp_path / "0.safetensors") == about


def test_another_schema_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(1)}, tmp_path / "s", {"kd": '{"schema": 99}'})
    with pytest.raises(CheckpointError, match="schema 99"):
        load_state(tmp_path / "s")


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})

    def fail(temporary):
        temporary.write_text('{"a":')
        raise OSError(28, os.strerror(28))

    with pytest.raises(CheckpointError, match=r"cannot write .*result\.json: No space left"):
        write_atomically(path, fail)
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_json_refuses_nan_and_names_a_torn_file(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    (tmp_path / "y.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"y\.json"):
        read_json(tmp_path / "y.json")
