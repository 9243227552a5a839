"""Checkpoints as others save them: the network in them is found and loaded, or one line says what differs."""

import argparse
import json
import re

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.utils import ModelEmaV3

from kd import verify
from kd.errors import CheckpointError, ConfigError
from kd.models import Teacher
from kd.models.factory import build

NAME = "resnet20_cifar"
SHAPE = {"num_classes": 10, "input_shape": (3, 32, 32)}


def weights_of(name=NAME, seed=1):
    torch.manual_seed(seed)
    network = build(name, **SHAPE)
    network.train()(torch.randn(4, 3, 32, 32))  # running statistics of its own
    return network.state_dict()


@pytest.fixture(scope="module")
def weights():
    return weights_of()


@pytest.fixture(scope="module")
def other():
    return weights_of(seed=2)


def load(path, name=NAME, **more):
    """The loaded weights, and the lines that were said."""
    lines = []
    network = build(name, checkpoint=path, say=lines.append, **(SHAPE | more))
    return network.state_dict(), lines


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    return tmp_path / "w.pth"


def behind(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


ADAM = {"state": {0: {"step": torch.ones(1), "exp_avg": torch.ones(16)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def as_lightning_saves(weights):
    """Keys and kinds of values of a Lightning 2 checkpoint."""
    return {
        "epoch": 3,
        "global_step": 40,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": behind("model.", weights) | {"criterion.weight": torch.ones(10)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'acc'}": {"best_model_score": torch.tensor(0.9), "dirpath": "a/b"}},
        "optimizer_states": [ADAM],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1},
    }


FORMS = {
    "bare": lambda w: w,
    "timm": lambda w: {"state_dict": w, "epoch": 3, "arch": "r", "optimizer": ADAM, "args": argparse.Namespace(lr=1.0)},
    "torchvision's references": lambda w: {"model": w, "optimizer": ADAM, "lr_scheduler": {"last_epoch": 3}},
    "PyTorch's ImageNet example": lambda w: {"state_dict": behind("module.", w), "best_acc1": torch.tensor(76.1)},
    "PyTorch's tutorial": lambda w: {"epoch": 3, "model_state_dict": w, "optimizer_state_dict": ADAM, "loss": 0.1},
    "net": lambda w: {"net": behind("module.", w), "acc": 93.1, "epoch": 3},
    "Lightning": as_lightning_saves,
    "Lightning, net": lambda w: {"state_dict": behind("net.", w), "optimizer_states": [ADAM]},
    "compiled": lambda w: behind("_orig_mod.", w),
    "compiled under DDP": lambda w: {"weights": behind("module._orig_mod.", w)},
    "any prefix": lambda w: behind("encoder.backbone.", w),
    "EMA in a module": lambda w: {"ema": {"module": w, "updates": 3}},
    "a teacher and a student": lambda w: {"state_dict": behind("net.", w) | behind("big.", weights_of("resnet10t"))},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_network_in_a_training_scripts_checkpoint_is_found(form, weights, tmp_path):
    loaded, lines = load(saved(tmp_path, FORMS[form](weights)))
    assert same(loaded, weights)
    assert lines == []


def test_files_of_timm_and_torchvision_themselves(tmp_path):
    """Their own objects saved by their own ways."""
    torch.manual_seed(1)
    theirs = torchvision.models.resnet18(num_classes=10).state_dict()
    assert same(load(saved(tmp_path, theirs), "resnet18")[0], theirs)
    average = ModelEmaV3(timm.create_model(NAME, num_classes=10))
    loaded, _ = load(saved(tmp_path, {"state_dict_ema": average.state_dict()}))
    assert same(loaded, average.module.state_dict())


@pytest.mark.filterwarnings("ignore")  # of its own use of torch
def test_a_file_that_lightning_itself_saved(tmp_path):
    lightning = pytest.importorskip("lightning", reason="a second training framework: pip install lightning")

    class Module(lightning.LightningModule):
        def __init__(self, lr=0.1):
            super().__init__()
            self.save_hyperparameters()
            self.model = timm.create_model(NAME, num_classes=10)
            self.criterion = torch.nn.CrossEntropyLoss(weight=torch.ones(10))

        def training_step(self, batch, _):
            return self.criterion(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)

    module, images = Module(), [(torch.randn(3, 32, 32), k) for k in range(8)]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(images, batch_size=4))
    trainer.save_checkpoint(tmp_path / "w.ckpt")
    assert same(load(tmp_path / "w.ckpt")[0], module.model.state_dict())


def test_of_several_networks_that_fit_one_is_chosen_by_its_entry(weights, other, tmp_path):
    path = saved(tmp_path, {"net": behind("module.", weights), "net_ema": behind("module.", other)})
    with pytest.raises(CheckpointError) as error:
        load(path)
    several = f"{path}: holds several networks that fit (net.module, net_ema.module)"
    assert str(error.value) == f"{several}; type teacher.checkpoint_key=net.module"
    for key, wanted in (("net", weights), ("net_ema", other), ("net_ema.module", other)):
        assert same(load(path, checkpoint_key=key)[0], wanted)
    with pytest.raises(CheckpointError, match=r"has no entry teacher\.checkpoint_key=ema; has net, net_ema"):
        load(path, checkpoint_key="ema")
    path = saved(tmp_path, {"state_dict": behind("teacher.", weights) | behind("student.", other)})
    with pytest.raises(CheckpointError, match=r"type teacher\.checkpoint_key=state_dict\.teacher$"):
        load(path)
    assert same(load(path, checkpoint_key="state_dict.student")[0], other)


def test_a_copy_inside_a_network_is_not_taken_for_it(weights, other, tmp_path):
    path = saved(tmp_path, {"model": weights | behind("momentum_encoder.", other)})
    with pytest.raises(CheckpointError, match=r"unexpected tensors: 128, first momentum_encoder\.conv1\.weight"):
        load(path)
    assert same(load(path, checkpoint_key="model.momentum_encoder")[0], other)


def test_timms_average_is_taken_before_the_trained_weights_as_timm_does_and_said(weights, other, tmp_path):
    path = saved(tmp_path, {"state_dict": weights, "state_dict_ema": other, "args": argparse.Namespace(lr=0.1)})
    loaded, (line,) = load(path)
    assert same(loaded, other)
    assert line.endswith(
        "(state_dict, state_dict_ema), state_dict_ema is taken; teacher.checkpoint_key chooses another"
    )
    assert same(load(path, checkpoint_key="state_dict")[0], weights)


@pytest.mark.parametrize("count", [3.0, float("inf")])
def test_a_halved_checkpoint(count, weights, tmp_path):
    """Counts of batches are halved too, and are infinite from 65,520 on."""
    halved = {name: tensor.half() for name, tensor in weights.items()}
    halved |= {name: torch.tensor(count).half() for name in halved if name.endswith("num_batches_tracked")}
    loaded, _ = load(saved(tmp_path, {"model": halved}))
    for name, tensor in loaded.items():
        counted = tensor == (3 if count == 3 else 0)
        assert counted if "num_batches" in name else torch.equal(tensor, halved[name].float())


def test_position_embeddings_of_another_size_are_resampled_by_timm_and_said(tmp_path):
    torch.manual_seed(1)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10).state_dict()
    torch.nn.init.normal_(theirs["pos_embed"])
    loaded, (line,) = load(saved(tmp_path, behind("module.", theirs)), "vit_tiny_patch16_224")
    assert (
        "1 position embeddings are resampled to this image size, first pos_embed, (1, 17, 192) to (1, 5, 192)" in line
    )
    wanted = resample_abs_pos_embed(theirs["pos_embed"], new_size=[2, 2], num_prefix_tokens=1)
    assert torch.equal(loaded["pos_embed"], wanted)
    assert same(loaded | {"pos_embed": wanted}, theirs | {"pos_embed": wanted})
    with pytest.warns(UserWarning, match="position embeddings are resampled"):
        Teacher("vit_tiny_patch16_224", img_size=32, num_classes=10, checkpoint_path=tmp_path / "w.pth")


def test_a_windowed_network_of_another_size(tmp_path):
    theirs = timm.create_model("test_vit3", img_size=64, num_classes=10).state_dict()
    assert load(saved(tmp_path, theirs), "test_vit3")[0].keys() == theirs.keys()


def test_sharded_safetensors_with_their_index(weights, tmp_path):
    names = list(weights)
    shards = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for shard, held in shards.items():
        save_file({name: weights[name] for name in held}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    where = {name: shard for shard, held in shards.items() for name in held}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    assert same(load(index)[0], weights)
    index.write_text(json.dumps({"weight_map": {"a": "../w.safetensors"}}))
    with pytest.raises(CheckpointError, match="lists no files beside it in weight_map"):
        load(index)
    index.write_text(json.dumps({"weight_map": where | {"a": "none.safetensors"}}))
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path}/none.safetensors: ")):
        load(index)


def test_verify_reads_the_parts_of_an_index(weights, tmp_path, capsys):
    index = tmp_path / "model.safetensors.index.json"
    save_file(weights, tmp_path / "a.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "a.safetensors")}))
    assert verify.main([f"path={index}"]) == 0
    assert "128 tensors, no manifest beside it" in capsys.readouterr().out
    (tmp_path / "a.safetensors").write_bytes(b"")
    assert verify.main([f"path={index}"]) == 1


# ---- directories of timm


def directory(tmp_path, weights, architecture=NAME, **cfg):
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture, "pretrained_cfg": cfg}))
    return f"local-dir:{tmp_path}"


def test_grey_weights_whose_config_says_nothing_of_channels_are_loaded_as_they_are(tmp_path):
    grey = build("resnet10t", num_classes=10, input_shape=(1, 32, 32)).state_dict()
    where = directory(tmp_path, grey, "resnet10t", num_classes=10, first_conv="conv1.0", classifier="fc")
    assert same(build(where, num_classes=10, input_shape=(1, 32, 32), pretrained=True).state_dict(), grey)
    with pytest.raises(ConfigError, match=r"its weights are for 1 channels, the data has 3; .*finetune=true adapts it"):
        build(where, pretrained=True, **SHAPE)


def test_weights_of_another_network_in_a_directory_are_no_matter_of_inputs(weights, tmp_path):
    renamed = {name.replace("bn1", "norm1"): tensor for name, tensor in weights.items()}
    where = directory(tmp_path, renamed, num_classes=10, input_size=[3, 32, 32])
    with pytest.raises(ConfigError) as error:
        build(where, pretrained=True, **SHAPE)
    said = f"teacher.model={where}: its weights do not fit the network: first missing tensor: bn1.weight; "
    assert str(error.value).startswith(said + "first unexpected tensor: ")
    assert "norm1." in str(error.value).removeprefix(said)  # torch lists these in any order


# ---- what does not fit


def test_a_misfit_names_an_unexpected_tensor_beside_a_missing_one(weights, tmp_path):
    renamed = {name.replace("bn1", "norm1"): tensor for name, tensor in weights.items()}
    with pytest.raises(CheckpointError) as error:
        load(saved(tmp_path, {"state_dict": behind("model.", renamed)}))
    missing = next(name for name in weights if "bn1" in name)
    said = f"first {missing}; unexpected tensors: {sum('bn1' in name for name in weights)}, first "
    assert said + missing.replace("bn1", "norm1") in str(error.value)


def test_a_wholly_other_network_is_named_as_it_is_in_the_file(weights, tmp_path):
    """Names that happen to be alike, here norm.weight and norm.bias, are no network behind a prefix."""
    file = {"a": weights, "b": {"norm.weight": torch.ones(96), "norm.bias": torch.ones(96)}}
    with pytest.raises(CheckpointError) as error:
        load(saved(tmp_path, file), "test_vit3")
    assert "does not fit the network: missing tensors: " in str(error.value)
    assert f"; unexpected tensors: {len(weights) + 2}, first a.conv1.weight" in str(error.value)


def test_another_network_of_other_classes_is_no_matter_of_classes(tmp_path):
    deeper = timm.create_model("resnet34", num_classes=7).state_dict()
    with pytest.raises(CheckpointError) as error:
        load(saved(tmp_path, deeper), "resnet18")
    assert "its head has" not in str(error.value)
    assert "unexpected tensors: " in str(error.value)
    assert "first layer1.2.conv1.weight" in str(error.value)
