"""coremltools' own tests of `LinearQuantizer`; conftest.py fills this module with them."""

PEER = "coremltools.test.optimize.torch.quantization.test_quantizer"
FIXTURES = ("coremltools.test.optimize.torch.models.mnist",)
REWRITTEN = {"from import"}
OWN_LAYERS = "layers that round are milpress' own, not those of torch.ao"
UNFUSED = "modules are not replaced by fused ones: they keep their classes and names"
DIFFERENCES = {
    "test_config_illegal_options*": "an unknown key is a ConfigError, not one of cattrs",
    "test_linear_quantizer_quantization_scheme_setting*": "looks at a private attribute",
    "test_activation_defaults*": OWN_LAYERS,
    "test_linear_quantizer_fq_insert*": OWN_LAYERS,
    "test_linear_quantizer_step_mechanism*": UNFUSED,
    "test_linear_quantizer_compression_metadata*qint8*": UNFUSED,
}
NEEDS_MACOS: dict[str, str] = {}
