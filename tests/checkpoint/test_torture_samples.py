"""A few trials of each part of `make torture` that is quick enough."""

import io
import warnings
from functools import partial

import pytest
import torch
import yaml
from hydra.utils import instantiate

from tests.torture import faults, flips, gadget_files, gadgets, harness, kills, terms


def tried(part: harness.Part, trials: int, folder) -> dict[str, int]:
    outcome = harness.run(part, trials, seed=0, folder=folder)
    assert not outcome.broken
    assert outcome.counts["trials"] == trials
    return outcome.counts


def test_a_fault_at_every_call_of_a_save_loses_nothing(tmp_path):
    part = next(part for part in faults.PARTS if part.name == "faults")
    counts = tried(part, part.small, tmp_path)
    assert counts["faults"] == counts["recovered"] >= 4 * part.small
    assert len({faults.numbered(i) for i in range(part.trials)}) == part.trials


def test_a_full_disk_anywhere_leaves_the_checkpoint_before(tmp_path):
    part = next(part for part in faults.PARTS if part.name == "enospc")
    counts = tried(part, part.small, tmp_path)
    assert counts["previous loads"] + counts["not allowed to mount"] == part.small


def test_damaged_bytes_are_seen(tmp_path):
    (part,) = flips.PARTS
    counts = tried(part, part.small, tmp_path)
    assert counts["detected"] == sum(counts[kind] for kind in flips.KINDS) == part.small
    assert [flips.kind(i) for i in range(flips.TOTAL)].count("tails") == 200


def careless(name: str, raw: bytes) -> None:
    """A reader that does what a file says."""
    if name.endswith(".pth"):
        torch.load(io.BytesIO(raw), weights_only=False)
    else:
        values = yaml.unsafe_load(raw)
        with warnings.catch_warnings(action="ignore"):
            instantiate(values.get("data", {}))


@pytest.mark.torture
def test_every_gadget_with_code_runs_it_where_a_reader_lets_it(tmp_path):
    """So that a canary which is not there says something."""
    canary = tmp_path / "canary"
    code = {name: raw for name, raw in gadget_files.gadgets(canary).items() if str(canary).encode() in raw}
    assert len(code) == 19
    for name, raw in code.items():
        faults.in_child(partial(careless, name, raw))
        assert canary.exists(), name
        canary.unlink()


def test_files_of_others_run_nothing(tmp_path):
    (part,) = gadgets.PARTS
    assert tried(part, part.small, tmp_path)["executions"] == 0


@pytest.mark.torture
@pytest.mark.parametrize("part", [*kills.PARTS, *terms.PARTS], ids=lambda part: part.name)
def test_killed_and_stopped_at_random_moments(part, tmp_path):
    counts = tried(part, part.small, tmp_path)
    assert counts["kills" if part.name == "kills" else "signals"] > 0
