"""Checkpoints tried hard, a few of the trials of `make torture`."""

import io
import warnings
from functools import partial

import torch
import yaml
from hydra.utils import instantiate

from tests.torture import faults, flips, gadget_files, gadgets, harness


def test_a_fault_at_every_call_of_a_save_loses_nothing(tmp_path):
    (part,) = (part for part in faults.PARTS if part.name == "faults")
    outcome = harness.run(part, part.small, seed=0, folder=tmp_path)
    assert not outcome.broken
    assert outcome.counts["trials"] == 25
    assert outcome.counts["faults"] == outcome.counts["recovered"] >= 100
    assert len({faults.numbered(i) for i in range(100)}) == 100


def test_a_full_disk_anywhere_leaves_the_checkpoint_before(tmp_path):
    (part,) = (part for part in faults.PARTS if part.name == "enospc")
    outcome = harness.run(part, part.small, seed=0, folder=tmp_path)
    assert not outcome.broken
    full = outcome.counts.pop("full disks")  # or none, where the kernel does not let us mount a small one
    assert (outcome.counts, full in (0, 20)) == ({"trials": 20, "offsets": 20, "previous loads": 20}, True)


def test_damaged_bytes_are_seen(tmp_path):
    outcome = harness.run(flips.PARTS[0], 64, seed=0, folder=tmp_path)
    assert not outcome.broken
    assert outcome.counts["detected"] == outcome.counts["trials"] == 64
    assert sum(outcome.counts[kind] for kind in flips.KINDS) == 64
    assert [flips.kind(i) for i in range(flips.TOTAL)].count("tails") == 200


def careless(name: str, raw: bytes) -> None:
    """A reader that does what a file says."""
    if name.endswith(".pth"):
        torch.load(io.BytesIO(raw), weights_only=False)
    else:
        values = yaml.unsafe_load(raw)
        with warnings.catch_warnings(action="ignore"):
            instantiate(values.get("data", {}))


def test_every_gadget_with_code_runs_it_where_a_reader_lets_it(tmp_path):
    """So that a canary which is not there says something."""
    canary = tmp_path / "canary"
    code = {name: raw for name, raw in gadget_files.gadgets(canary).items() if str(canary).encode() in raw}
    assert len(code) == 19
    for name, raw in code.items():
        faults.in_child(partial(careless, name, raw))
        assert canary.exists(), name
        canary.unlink()


def test_files_of_strangers_run_nothing(tmp_path):
    part = gadgets.PARTS[0]
    outcome = harness.run(part, part.small, seed=0, folder=tmp_path)
    assert not outcome.broken
    assert (outcome.counts["gadgets"], outcome.counts["mutants"], outcome.counts["executions"]) == (40, 200, 0)
