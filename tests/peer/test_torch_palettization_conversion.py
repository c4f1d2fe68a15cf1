"""coremltools' own tests of palettes in `ct.convert`; conftest.py fills this module with them."""

PEER = "coremltools.test.optimize.torch.conversion.palettization.test_palettization_conversion"
FIXTURES = ("coremltools.test.optimize.torch.models.mnist",)
REWRITTEN = {"from import", "ct.utils._macos_version()"}
DIFFERENCES: dict[str, str] = {}
NEEDS_MACOS: dict[str, str] = {}
