"""What ran: written down with a result, and never a reason to lose one."""

import os
import re
import subprocess
from importlib.metadata import version

import pytest

from kd.config.schema import PACKAGE
from kd.runtime import provenance


def test_the_commit_is_that_of_the_checkout():
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=PACKAGE, capture_output=True, text=True, check=True)
    assert provenance.provenance(1)["git_sha"] == head.stdout.strip()
    assert re.fullmatch(r"[0-9a-f]{40}", head.stdout.strip())


@pytest.mark.parametrize("error", [FileNotFoundError("git"), OSError(24, os.strerror(24), "git")])
def test_without_git_or_files_to_open_the_rest_is_still_known(monkeypatch, error):
    def fails(*words, **options):
        raise error

    monkeypatch.setattr(provenance.subprocess, "run", fails)
    found = provenance.provenance(1)
    assert (found["git_sha"], found["versions"]["torch"]) == (None, version("torch"))
