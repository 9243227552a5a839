"""Files of others: what is no checkpoint or no weights is one line, and nothing in it runs."""

import json
import os
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kd.checkpoint.safetensors_io import load_state, read_weights, weights_header
from kd.errors import CheckpointError, ConfigError
from kd.models.factory import build
from kd.verify import main

READERS = [load_state, read_weights, weights_header]


def saved(tmp_path, weights, **options):
    path = tmp_path / "w.pth"
    torch.save(weights, path, **options)
    return path


@pytest.mark.timeout(20)
@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(bytes(100)), "not a readable .safetensors file"),
        (lambda path: save_file({"w": torch.ones(99)}, path) or os.truncate(path, 200), "not a readable .safetensors"),
    ],
)
def test_what_is_no_file_of_tensors_is_one_line(read, make, said, tmp_path):
    path = tmp_path / "a.safetensors"
    make(path)
    with pytest.raises(CheckpointError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_of_a_tensor_in_a_pth_is_seen(tmp_path):
    """torch.load does not look at the zip's checksums: it gives the wrong weight."""
    path = saved(tmp_path, {"w": torch.full((1000,), 1.5)})
    raw = path.read_bytes()
    at = raw.index(torch.full((2,), 1.5).numpy().tobytes()) + 400
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
    assert not torch.equal(torch.load(path, weights_only=True)["w"], torch.full((1000,), 1.5))
    with pytest.raises(CheckpointError, match="checksum of its part 'w/data/0' differs"):
        read_weights(path)


@pytest.mark.parametrize("new", [True, False])
def test_a_pth_of_either_format_is_read_with_the_dotted_names_of_nested_dicts(tmp_path, new):
    a, b = torch.randn(3), torch.arange(4)
    content = {"a": a, "model": {"b": b}, "epoch": 3, "optimizer": {"state": {0: {"step": b}}, "params": [a]}}
    read, weights = read_weights(saved(tmp_path, content, _use_new_zipfile_serialization=new)), {"a": a, "model.b": b}
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[key], weights[key]) for key in weights)


def test_a_pth_without_tensors_is_told_from_weights(tmp_path):
    with pytest.raises(CheckpointError, match="holds no state_dict of tensors"):
        read_weights(saved(tmp_path, {}))


@pytest.mark.parametrize(
    ("content", "needs"),
    [
        (torch.nn.Linear(2, 2), "it needs torch.nn.modules.linear.Linear"),  # the network itself, not its state_dict
        ({"w": torch.ones(2), "best": np.float64(0.9)}, "it needs numpy."),
    ],
)
def test_what_a_pth_needs_beside_tensors_is_named(content, needs, tmp_path):
    with pytest.raises(CheckpointError) as error:
        read_weights(saved(tmp_path, content))
    assert f"kd runs no code from a file; save the state_dict as .safetensors ({needs}" in str(error.value)
    assert "\n" not in str(error.value)


# ---- weights for a network


def weights():
    torch.manual_seed(0)
    return build("mlp_nano", num_classes=10, input_shape=(1, 8, 8)).state_dict()


def test_weights_of_8_bits_are_loaded_and_found_whole(tmp_path, capsys):
    """Some of torch's comparisons do not know these numbers."""
    given = {key: value.to(torch.float8_e4m3fn) for key, value in weights().items()}
    for name, save in (("w.safetensors", save_file), ("w.pth", torch.save)):
        save(given, tmp_path / name)
        held = build("mlp_nano", num_classes=10, input_shape=(1, 8, 8), checkpoint=tmp_path / name).state_dict()
        assert all(torch.equal(held[key], value.float()) for key, value in given.items())
        assert main([f"path={tmp_path / name}"]) == 0, capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize(
    ("alter", "kind"),
    [
        (lambda v: v.to_sparse(), "torch.float32, torch.sparse_coo, cpu"),
        (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), "torch.qint8, torch.strided, cpu"),
    ],
)
def test_tensors_that_nothing_computes_with_are_named_by_training_and_by_verify(alter, kind, tmp_path, capsys):
    given = weights()
    first = next(iter(given))
    path = saved(tmp_path, {**given, first: alter(given[first])})
    said = f"{first} ({kind}) must be a dense tensor"
    with pytest.raises(CheckpointError, match=re.escape(said)):
        build("mlp_nano", num_classes=10, input_shape=(1, 8, 8), checkpoint=path)
    assert main([f"path={path}"]) == 1
    assert f"{path}: {said}" in capsys.readouterr().out


@pytest.mark.parametrize(("value", "code"), [(float("-inf"), 0), (float("nan"), 1)])
def test_verify_takes_infinities_but_not_nan(value, code, tmp_path):
    """A mask may hold infinities."""
    save_file({"mask": torch.tensor([0.0, value])}, tmp_path / "w.safetensors")
    assert main([f"path={tmp_path / 'w.safetensors'}"]) == code


def test_a_file_cannot_choose_what_is_fetched(tmp_path):
    from kd.probe import main

    path = tmp_path / "w.safetensors"
    save_file(weights(), path, {"kd": json.dumps({"model": "hf-hub:some/where"})})
    with pytest.raises(ConfigError, match=r"records model='hf-hub:some/where'; type it"):
        main([f"checkpoint={path}", "data=digits"])
