"""Recipes: their settings, how YAML and the command line are read, and the checked Recipe that results."""

import sys

try:
    import yaml  # noqa: F401 (every file here may import both)
    from omegaconf import OmegaConf  # noqa: F401
except ModuleNotFoundError as error:  # `pip install kd-torch` alone brings no command
    print(f"error: kd's commands need {error.name}: pip install 'kd-torch[train]'", file=sys.stderr)
    raise SystemExit(2) from error
