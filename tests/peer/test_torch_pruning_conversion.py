"""coremltools' own tests of pruned models in `ct.convert`; conftest.py fills this module."""

PEER = "coremltools.test.optimize.torch.conversion.pruning.test_pruning_conversion"
FIXTURES = ("coremltools.test.optimize.torch.models.mnist",)
REWRITTEN = {"from import", "ct.utils._macos_version()"}
DIFFERENCES: dict[str, str] = {}
NEEDS_MACOS: dict[str, str] = {}
