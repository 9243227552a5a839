"""The environment that `make test` runs in is the one that constraints.txt describes."""

import os
import re
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

import pytest

PINNED = dict(
    line.split("==") for line in (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines() if line
)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.skipif(os.environ.get("KD_LATEST") == "1", reason="make test-latest runs the newest releases on purpose")
def test_the_installed_versions_are_those_of_the_constraints_file():
    pinned = {normal(name): version for name, version in PINNED.items()}
    folder = [sysconfig.get_path("purelib")]  # sys.path may have more: setuptools adds the packages inside it
    installed = {normal(d.name): d.version.partition("+")[0] for d in distributions(path=folder)}
    apart = {name for name in installed if name == "kd-torch" or name.startswith(("nvidia-", "cuda-"))}
    checked = installed.keys() - apart
    assert {name: installed[name] for name in checked} == {name: pinned.get(name) for name in checked}
