"""coremltools' own tests of the layers of `DKMPalettizer`; conftest.py fills this module."""

PEER = "coremltools.test.optimize.torch.palettization.test_palettizer"
REWRITTEN = {"from import"}
DIFFERENCES = {
    "test_fake_palettize_insertion_weighted_modules*": "the layer has no observer of torch.ao"
}
NEEDS_MACOS: dict[str, str] = {}
