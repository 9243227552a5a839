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


@pytest.mark.parametrize("part", [*faults.PARTS, *flips.PARTS, *gadgets.PARTS], ids=lambda part: part.name)
def test_a_few_trials(part, tmp_path):
    counts = tried(part, part.small, tmp_path)
    promised = {"faults": "faults", "enospc": "trials", "flips": "detected", "gadgets": "gadgets"}
    assert counts[promised[part.name]] >= part.small


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
    assert len(code) == 12
    for name, raw in code.items():
        faults.in_child(partial(careless, name, raw))
        assert canary.exists(), name
        canary.unlink()


@pytest.mark.torture
@pytest.mark.parametrize("part", [*kills.PARTS, *terms.PARTS], ids=lambda part: part.name)
def test_killed_and_stopped_at_random_moments(part, tmp_path):
    counts = tried(part, part.small, tmp_path)
    assert counts["kills" if part.name == "kills" else "signals"] > 0
