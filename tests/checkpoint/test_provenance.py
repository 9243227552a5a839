"""Provenance is written with a result, and is never a reason to lose one."""

import re
from importlib.metadata import version

from kd.runtime import provenance


def test_the_commit_is_known_in_a_checkout_and_the_rest_without_git(monkeypatch):
    assert re.fullmatch(r"[0-9a-f]{40}", provenance.provenance(1)["git_sha"])
    monkeypatch.setattr(provenance.shutil, "which", lambda program: None)
    written = provenance.provenance(1)
    assert (written["git_sha"], written["versions"]["torch"]) == (None, version("torch"))
