"""What an installation needs and carries."""

import subprocess
import sys
import tomllib

from kd.recipe import PACKAGE

PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]

# The import names of everything in the extras.
EXTRAS = "hydra omegaconf accelerate torchvision timm einops torchmetrics safetensors rich sklearn mlxtend mnist1d PIL numba"


def test_the_loss_and_the_wrappers_need_torch_and_nothing_else():
    code = (
        f"import sys; [sys.modules.__setitem__(name, None) for name in '{EXTRAS}'.split()];"
        "import torch; from kd import DistillLoss, Student, Teacher, distill_loss, smoothing;"
        "s, t, y = Student(torch.nn.Linear(3, 4)), Teacher(torch.nn.Linear(3, 4)), torch.tensor([0, 3]);"
        "x = torch.randn(2, 3); DistillLoss()(s(x).logits, t(x).logits, y).backward();"
        "assert abs(smoothing.smooth_targets(y, 4, 0.1).sum() - 2) < 1e-6"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(PROJECT["dependencies"]) == 1
    assert PROJECT["dependencies"][0].startswith("torch>=")


def test_importing_kd_imports_nothing():
    code = "import sys, kd; assert 'torch' not in sys.modules; assert 'DistillLoss' in dir(kd)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error():
    code = "import kd\ntry:\n    kd.nothing\nexcept AttributeError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "module 'kd' has no attribute 'nothing'\n"


def test_the_version_is_said_once():
    import kd

    assert PROJECT["version"] == kd.__version__
    assert f"version: {kd.__version__}" in (PACKAGE.parent / "CITATION.cff").read_text()
