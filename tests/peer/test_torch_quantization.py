"""coremltools' own tests of `PostTrainingQuantizer`; conftest.py fills this module with them."""

PEER = "coremltools.test.optimize.torch.quantization.test_post_training_quantization"
REWRITTEN = {"from import"}
DIFFERENCES: dict[str, str] = {}
NEEDS_MACOS: dict[str, str] = {}
