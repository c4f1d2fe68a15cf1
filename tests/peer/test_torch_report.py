"""coremltools' own tests of reports; conftest.py fills this module with them."""

PEER = "coremltools.test.optimize.torch.test_utils.test_report_utils"
REWRITTEN = {"from import"}
DIFFERENCES = {
    "test_report_post_training_quantization*": (
        "embeddings are quantized too, so there is a row more"
    ),
    "test_report_layerwise_compressor*": (
        "the model can't be called as a whole: its children take what no Sequential gives them"
    ),
}
NEEDS_MACOS: dict[str, str] = {}
