"""Runs coremltools' own tests of ops, with the interpreter as the predictor; see README.md.

``python tests/peer/op_tests.py [options of pytest, and of predictor.py]``
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = ("mil/ops/tests", "frontend/torch/test/test_torch_ops.py")


def main() -> int:
    """Run them, and return pytest's exit code."""
    found = importlib.util.find_spec("coremltools").submodule_search_locations
    tests = [str(Path(found[0], "converters", "mil", name)) for name in FILES]
    options = ["-q", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    # Neither the doctests of coremltools nor a cache in this folder.
    options += ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
    here = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.getenv("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", *options, "-p", "predictor", *tests, *sys.argv[1:]]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": here}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
