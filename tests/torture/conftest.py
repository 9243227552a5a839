"""Random numbers of the torture tests."""

import os
import random

import pytest


@pytest.fixture
def rng(request):
    """Random numbers of one test: the same in every run, and others with KD_SEED=1."""
    return random.Random(f"{os.environ.get('KD_SEED', '0')}/{request.node.name}")
