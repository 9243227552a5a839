"""Files of strangers: what is no checkpoint, no weights or no JSON of kd's is one line, and nothing in it runs."""

import json
import os
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from kd import checkpoint
from kd.checkpoint import load_state, read_json, read_weights, weights_header, write_json
from kd.checkpoint.manifest import read_manifest
from kd.config.compose import read_recipe
from kd.errors import CheckpointError, ConfigError
from kd.models.factory import build
from kd.training.stored import read_card
from kd.verify import main

READERS = [load_state, read_weights, weights_header, read_json, read_manifest]


def link_loop(path):
    path.symlink_to(path.with_name("b"))
    path.with_name("b").symlink_to(path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.touch(), "is empty"),
        (lambda path: path.mkdir(), "is a folder"),
        (link_loop, "symbolic links"),
        (os.mkfifo, "is a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    ],
)
def test_what_is_no_file_is_said_at_once(read, make, said, tmp_path):
    path = tmp_path / "a.safetensors"
    make(path)
    with pytest.raises(CheckpointError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert said in str(error.value)


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"PK\x03\x04" + b, lambda b: b"\x00" * len(b)])
def test_a_spoilt_file_of_tensors_names_itself(tmp_path, spoil):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.randn(100)}, path, {"kd": "{}"})
    path.write_bytes(spoil(path.read_bytes()))
    for read in (load_state, read_weights, weights_header):
        with pytest.raises(CheckpointError, match=str(path)):
            read(path)


def test_a_header_larger_than_any_networks_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((2**26).to_bytes(8, "little") + b"{")
        file.truncate(2**27)  # a hole: it takes no room
    with pytest.raises(CheckpointError, match="its header claims 67,108,864 bytes"):
        read_weights(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Expecting property name"),
        ("[" * 200 + "]" * 200, "nested more than 100 deep"),
        ("[" * 100_000, "recursion"),
        ("9" * 10_000, "digits"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": Infinity}', "Infinity is no JSON"),
        ("\udcff", "utf-8"),
    ],
)
def test_json_that_is_none_or_built_to_hurt(text, said, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=rf"a\.json: cannot be read \(.*{said}|a\.json: .*{said}") as error:
        read_json(path)
    assert "\n" not in str(error.value)


def test_json_refuses_nan_when_it_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_json_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(CheckpointError, match="more than the 67,108,864"):
        read_json(path)


@pytest.mark.parametrize(
    ("card", "wrong"),
    [
        ([], "all of it: must be an object"),
        ({"data_hash": "", "teacher_checkpoint_hash": ""}, "identity: is missing"),
        ({"identity": {}, "data_hash": 3, "teacher_checkpoint_hash": ""}, "data_hash: must be text, is 3"),
    ],
)
def test_a_card_of_another_layout_is_the_files_fault(tmp_path, card, wrong):
    write_json(tmp_path / "run.json", card)
    with pytest.raises(CheckpointError, match=rf"run\.json: {wrong}.*; restore it, or resume=false"):
        read_card(tmp_path / "run.json")


# ---- .pth


def saved(tmp_path, weights, **options):
    path = tmp_path / "w.pth"
    torch.save(weights, path, **options)
    return path


def test_a_flipped_bit_of_a_tensor_in_a_pth_is_seen(tmp_path):
    """torch.load does not look at the zip's checksums: it gives the wrong weight."""
    path = saved(tmp_path, {"w": torch.full((1000,), 1.5)})
    raw = path.read_bytes()
    at = raw.index(torch.full((2,), 1.5).numpy().tobytes()) + 400
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
    assert not torch.equal(torch.load(path, weights_only=True)["w"], torch.full((1000,), 1.5))
    with pytest.raises(CheckpointError, match="checksum of its part 'w/data/0' is another"):
        read_weights(path)


@pytest.mark.parametrize("wrapped", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"model": w, "epoch": 3}])
@pytest.mark.parametrize("new", [True, False])
def test_a_pth_of_either_format_is_read(tmp_path, wrapped, new):
    weights = {"a": torch.randn(3), "b": torch.arange(4)}
    found = read_weights(saved(tmp_path, wrapped(weights), _use_new_zipfile_serialization=new))
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
    with pytest.raises(CheckpointError, match="unpacks to 16,777,216 bytes"):
        read_weights(path)


def test_a_zip_with_two_parts_of_one_name_is_refused(tmp_path):
    path = saved(tmp_path, {"w": torch.ones(3)})
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("w/data.pkl", b"")
    with pytest.raises(CheckpointError, match="two parts of one name"):
        read_weights(path)


def test_a_tensor_that_claims_more_than_the_file_has_is_refused(tmp_path):
    path = saved(tmp_path, {"w": torch.as_strided(torch.zeros(1), (10**12,), (0,))})
    with pytest.raises(CheckpointError, match="its tensors claim 4,000,000,000,000 bytes"):
        read_weights(path)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from /proc")
def test_memory_stays_within_twice_the_file(tmp_path):
    """Of what torch allocates on the CPU, saving and reading."""
    import subprocess
    import sys

    code = f"""
import torch, timm
from pathlib import Path
from kd import checkpoint
peak = lambda: 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
weights, folder = {{str(i): torch.ones(2**20) for i in range(32)}}, Path({str(tmp_path)!r})
checkpoint.save(folder / "small", 1, {{"w": torch.ones(1)}})
start = peak()
checkpoint.save(folder, 1, weights)
print((peak() - start) / 2**27)
checkpoint.load(folder, print, "")
torch.save(weights, folder / "w.pth")
checkpoint.read_weights(folder / "w.pth")
print((peak() - start) / 2**27)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    saving, reading = map(float, done.stdout.split())
    assert 0.5 < saving < 2
    assert reading < 2


# ---- weights for a network


def weights():
    torch.manual_seed(0)
    return build("mlp_nano", num_classes=10, input_shape=(1, 8, 8)).state_dict()


def change(key, to):
    return lambda w: {**w, key: to(w[key])}


FIRST = next(iter(weights()))
HEAD = list(weights())[-1]
CHANGES = {
    "missing": (lambda w: {k: v for k, v in w.items() if k != FIRST}, f"1 tensors missing, first {FIRST}"),
    "extra": (lambda w: {**w, "more": w[FIRST].clone()}, "1 tensors that the network does not have, first more"),
    "misshapen": (change(FIRST, lambda v: v[:1].clone()), f"tensors of another shape, first {FIRST}"),
    "nan": (change(FIRST, lambda v: v * float("nan")), f"NaN or infinite values, first {FIRST}"),
    "infinite": (change(FIRST, lambda v: v / 0), f"NaN or infinite values, first {FIRST}"),
    "beyond float32": (change(FIRST, lambda v: v.double() - 1e300), f"infinite values, first {FIRST}"),
    "nan of 8 bits": (change(FIRST, lambda v: (v / 0 * 0).to(torch.float8_e4m3fn)), f"infinite values, first {FIRST}"),
    "single number": (change(HEAD, lambda v: v.sum()), f"tensors of another shape, first {HEAD}"),
    "classes": (lambda w: {k: v[:7].clone() if len(v) == 10 else v for k, v in w.items()}, "its head has 7 classes"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_that_do_not_fit_name_the_tensor(name, suffix, tmp_path):
    alter, said = CHANGES[name]
    path = tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(alter(weights()), path)
    with pytest.raises(ConfigError) as error:
        build("mlp_nano", num_classes=10, input_shape=(1, 8, 8), checkpoint=path)
    assert str(error.value).startswith(f"teacher.checkpoint={path}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_of_8_bits_are_loaded_and_found_whole(tmp_path, capsys):
    """Some of torch's comparisons do not know these numbers."""
    given = {key: value.to(torch.float8_e4m3fn) for key, value in weights().items()}
    for name, save in (("w.safetensors", save_file), ("w.pth", torch.save)):
        save(given, tmp_path / name)
        found = build("mlp_nano", num_classes=10, input_shape=(1, 8, 8), checkpoint=tmp_path / name).state_dict()
        assert all(torch.equal(found[key], value.float()) for key, value in given.items())
        assert main(["verify", str(tmp_path / name)]) == 0, capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*(quantize|nested|Nested)")
@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (lambda v: v.to("meta"), "meta"),
        (lambda v: v.to_sparse(), "torch.sparse_coo"),
        (lambda v: torch.nested.nested_tensor([v, v[:1]]), "torch.nested"),
        (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), "torch.qint8"),
        (lambda v: v.half().view(torch.bits16), "torch.bits16"),
        (lambda v: v.to(torch.uint8).view(torch.float4_e2m1fn_x2), "torch.float4_e2m1fn_x2"),
    ],
)
def test_tensors_that_nothing_computes_with_are_named_by_training_and_by_verify(alter, said, tmp_path, capsys):
    path = tmp_path / "w.pth"
    torch.save(change(FIRST, alter)(weights()), path)
    said = f"{FIRST} is a {said} tensor, must be a dense one"
    with pytest.raises(ConfigError, match=f"w.pth: {said}"):
        build("mlp_nano", num_classes=10, input_shape=(1, 8, 8), checkpoint=path)
    assert main(["verify", str(path)]) == 1
    assert f"{path}: {said}" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_no_tensors_are_no_weights(suffix, tmp_path):
    path = tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)({}, path)
    with pytest.raises(CheckpointError, match="holds no state_dict of tensors"):
        read_weights(path)
    assert main(["verify", str(path)]) == 1


def test_a_file_cannot_choose_what_is_fetched(tmp_path):
    from kd.probe import main

    path = tmp_path / "w.safetensors"
    save_file(weights(), path, {"kd": json.dumps({"model": "hf-hub:some/where"})})
    with pytest.raises(ConfigError, match=r"records model='hf-hub:some/where'; type it"):
        main([f"checkpoint={path}", "data=digits"])


# ---- recipe.yaml, run.json and result.json of a run


def test_a_runs_recipe_is_read_and_names_no_code(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\nstudent: {layers: []}\n")
    assert read_recipe(path) == {"name": "x", "student": {"layers": []}}
    canary = tmp_path / "canary"
    for text in (
        f"name: !!python/object/apply:os.system ['touch {canary}']",
        "a: &a [x, x]\nb: [*a, *a]",
        "a: " + "[" * 5000,
        "a: [",
        "a: \x00",
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"recipe\.yaml"):
            read_recipe(path)
    assert not canary.exists()


def test_a_runs_own_files_that_are_not_what_kd_writes_are_one_line(kd_train, tmp_path):
    from kd import evaluate

    words = ("recipe=smoke", "control=false", "run=one", "output=runs")
    assert kd_train(*words).code == 0
    folder = tmp_path / "runs/smoke/one"
    result = json.loads((folder / "result.json").read_text())
    with_text = result | {
        "student": json.loads(json.dumps(result["student"]).replace('"top1": ', '"top1": "", "was": '))
    }
    for name, values in {
        "run.json": ([], {}, {"identity": 3}, {"identity": {}, "data_hash": 1, "teacher_checkpoint_hash": ""}),
        "result.json": (
            [],
            {},
            result | {"student": 3},
            with_text,
            result | {"teacher": {"weights": 3, "model": "[/x]"}},
        ),
    }.items():
        whole = (folder / name).read_bytes()
        for value in values:
            (folder / name).write_text(json.dumps(value))
            done = kd_train(*words)
            assert (done.code, done.err.count("\n")) == (2, 1), (name, value)
            if name == "result.json":
                with pytest.raises(CheckpointError):
                    evaluate.main([f"run={folder}"])
        (folder / name).write_bytes(whole)
    assert kd_train(*words).code == 0
    assert checkpoint.finished(folder / "student/last.safetensors")["updates"] == 5
