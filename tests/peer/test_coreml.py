"""coremltools' own tests of `optimize.coreml`; conftest.py fills this module with them."""

PEER = "coremltools.test.optimize.coreml.test_post_training_quantization"
REWRITTEN = {"import", "from import", "ct.optimize", "platform.machine()", "_HAS_SKLEARN"}

_GRAPH_PASS = (
    "the configuration goes to a graph pass of coremltools, which takes its own classes alone"
)

# Where milpress differs on purpose. Names of tests, `*` for anything; a test that passes in spite
# of being listed is a failure.
DIFFERENCES = {
    "TestErrorHandling::test_error_out_multifunction": "milpress compresses multifunction models",
    "TestPalettizeWeights::test_palettization_pcs[*-iOS18-*]": (
        "the scale of an output channel is multiplied into its lookup table, not kept as an op"
    ),
    "TestPalettizeWeights::test_convert_palettized_source_model_custom": _GRAPH_PASS,
    "TestPalettizeWeights::test_convert_palettized_model_with_pipeline*": _GRAPH_PASS,
    "TestPruneWeights::test_convert_sparse_source_model_custom": _GRAPH_PASS,
    "TestDecompressWeights::test_weight_decopmression_coreml_optimize": _GRAPH_PASS,
    "TestConvertMixedCompression::test_convert_sparse_and_palettized_source_model_custom": (
        _GRAPH_PASS
    ),
}

# Tests that predict without asking whether they can.
NEEDS_MACOS = {
    "TestLinearQuantizeWeights::test_skip_model_load_in_compression_pass[iOS18-*": (
        "predicts, which takes macOS"
    ),
    # Of coremltools 9.1.
    "TestPyTorchConverterExamples::test_immediate_return_getattr_model": (
        "predicts, which takes macOS"
    ),
}
