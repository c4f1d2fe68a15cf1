"""coremltools' own tests of reports; conftest.py fills this module with them."""

PEER = "coremltools.test.optimize.torch.test_utils.test_report_utils"
REWRITTEN = {"from import"}
NOT_OURS = ("test_report_layerwise*",)
DIFFERENCES = {
    "test_report_post_training_quantization*": (
        "embeddings are quantized too, so there is a row more"
    )
}
NEEDS_MACOS: dict[str, str] = {}
