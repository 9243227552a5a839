"""Checkpoints tried hard, a few of the trials of `make torture`."""

from tests.torture import faults, flips, gadgets, harness


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
    assert outcome.counts == {"trials": 20, "offsets": 20, "previous loads": 20}


def test_damaged_bytes_are_seen(tmp_path):
    outcome = harness.run(flips.PARTS[0], 64, seed=0, folder=tmp_path)
    assert not outcome.broken
    assert outcome.counts["detected"] == outcome.counts["trials"] == 64
    assert sum(outcome.counts[kind] for kind in flips.KINDS) == 64
    assert [flips.kind(i) for i in range(flips.TOTAL)].count("tails") == 200


def test_files_of_strangers_run_nothing(tmp_path):
    part = gadgets.PARTS[0]
    outcome = harness.run(part, part.small, seed=0, folder=tmp_path)
    assert not outcome.broken
    assert (outcome.counts["gadgets"], outcome.counts["mutants"], outcome.counts["executions"]) == (40, 200, 0)
