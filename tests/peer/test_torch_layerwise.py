"""coremltools' own tests of `LayerwiseCompressor`; conftest.py fills this module with them."""

PEER = "coremltools.test.optimize.torch.layerwise_compression.test_algorithms"
REWRITTEN = {"from import"}
_SHAPE = "the scales of a convolution have its weight's rank, as those of other classes have"
DIFFERENCES = {
    "test_gptq_metadata[model1-input_shape1-config2]": _SHAPE,
    "test_gptq_metadata[model1-input_shape1-config3]": _SHAPE,
    "test_gptq_static_blocking": (
        "the symmetric range of a block without negative weights holds its greatest one"
    ),
}
NEEDS_MACOS: dict[str, str] = {}
