"""coremltools' own tests of what pruners share; conftest.py fills this module with them."""

PEER = "coremltools.test.optimize.torch.pruning.test_base_pruner"
REWRITTEN = {"from import"}
DIFFERENCES: dict[str, str] = {}
NEEDS_MACOS: dict[str, str] = {}
