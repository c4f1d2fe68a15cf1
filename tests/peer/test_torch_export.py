"""coremltools' own test of a quantized graph that is exported; conftest.py fills this module."""

from as_torch_ao import exported_model

PEER = "coremltools.test.optimize.torch.quantization.test_coreml_quantizer"
# It gives up on unsigned activations with a torch of today: it is not let off.
REWRITTEN = {"from import", "torch.__version__", "pytest.xfail(...)"}
# What torch has moved or taken out, and what of coremltools can't be imported since.
GONE = ("export_for_training", "convert_pt2e", "prepare_pt2e", "prepare_qat_pt2e")
REPLACED = {"quantize_model": exported_model, **dict.fromkeys((*GONE, "CoreMLQuantizer"))}
DIFFERENCES = {
    "test_weight_module_act_fusion[*-config0]": (
        "a linear layer is not fused with batch normalization along another axis than its outputs"
    )
}
NEEDS_MACOS: dict[str, str] = {}
