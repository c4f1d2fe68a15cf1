"""coremltools' own tests of `PostTrainingPalettizer`; conftest.py fills this module with them."""

PEER = "coremltools.test.optimize.torch.palettization.test_post_training_palettization"
FIXTURES = ("coremltools.test.optimize.torch.models.mnist",)
REWRITTEN = {"from import"}
DIFFERENCES: dict[str, str] = {}
NEEDS_MACOS: dict[str, str] = {}
