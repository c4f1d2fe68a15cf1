"""coremltools' own tests of integers in `ct.convert`; conftest.py fills this module with them."""

PEER = "coremltools.test.optimize.torch.conversion.quantization.test_quantization_conversion"
FIXTURES = ("coremltools.test.optimize.torch.models.mnist",)
REWRITTEN = {
    "from import",
    "ct.utils._macos_version()",
    "pytest.importorskip('coremltools.optimize.coreml._utils')",
}
NOT_OURS = ()
DIFFERENCES: dict[str, str] = {}
NEEDS_MACOS: dict[str, str] = {}
