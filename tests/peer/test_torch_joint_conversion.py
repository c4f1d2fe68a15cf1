"""coremltools' own tests of joint compression in `ct.convert`; conftest.py fills this module."""

PEER = "coremltools.test.optimize.torch.conversion.joint.test_joint_compression_conversion"
FIXTURES = ("coremltools.test.optimize.torch.models.mnist",)
REWRITTEN = {"from import", "ct.utils._macos_version()"}
NOT_OURS = ()
DIFFERENCES: dict[str, str] = {}
NEEDS_MACOS: dict[str, str] = {}
