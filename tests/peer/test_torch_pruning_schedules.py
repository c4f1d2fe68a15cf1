"""coremltools' own tests of its schedules; conftest.py fills this module with them."""

PEER = "coremltools.test.optimize.torch.pruning.test_pruning_scheduler"
REWRITTEN = {"from import"}
DIFFERENCES: dict[str, str] = {}
NEEDS_MACOS: dict[str, str] = {}
