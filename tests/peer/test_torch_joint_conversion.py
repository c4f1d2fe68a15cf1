"""coremltools' own tests of pruned codes in `ct.convert`; conftest.py fills the module."""

PEER = "coremltools.test.optimize.torch.conversion.joint.test_joint_compression_conversion"
FIXTURES = ("coremltools.test.optimize.torch.models.mnist",)
REWRITTEN = {"from import", "ct.utils._macos_version()"}
NOT_OURS = ("test_joint_pruning_quantization*",)
DIFFERENCES: dict[str, str] = {}
NEEDS_MACOS: dict[str, str] = {}
