"""Provenance of a result: code, versions, hardware and command line."""

import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_CHECKOUT = Path(__file__).resolve().parents[2]
_PACKAGES = ("kd-torch", "torch", "torchvision", "timm", "accelerate", "hydra-core", "numpy")


def _git(*arguments: str) -> str | None:
    """Output of git in kd's own checkout; None where kd is installed without one, or git cannot be run."""
    if not (_CHECKOUT / ".git").exists() or not shutil.which("git"):
        return None
    command = ["git", "-C", str(_CHECKOUT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    model = re.search(r"^model name\s*:(.*)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def provenance(world_size: int) -> dict[str, Any]:
    """Code, versions, hardware and command line of this process, one of `world_size`, as plain values."""
    status = _git("status", "--porcelain")
    return {
        "git_sha": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "hardware": {
            "cpu": _cpu(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "processes": world_size,
        },
        "system": platform.platform(),
        "command": sys.argv,
    }
