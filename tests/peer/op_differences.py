"""Cases of coremltools' tests of ops that don't pass with the interpreter as the predictor.

Names of tests, `*` for anything, and why. A listed case that passes is a failure. The reasons are
those of the table in docs/compatibility.md.
"""

from __future__ import annotations

PASSED = "pass"
SKIPPED = "are skipped by coremltools"
EXCUSED = "fail, as coremltools says of its converter or of Core ML"

NOT_RUN: dict[str, str] = {
    "*::TestSliceByIndex::test_efficient_type_inference": "measures time",
    "*::TestNms::*": "wants torchvision",
}

_NEURAL_NETWORK = "convert to a neural network, which is no ML program"
_UNDEFINED = (
    "want what Core ML does where the op's text leaves it open: an index outside that is not "
    "validated, a box outside of the image"
)
_ROUNDED = "expect a number that is written down with four digits"

_ARGUMENTS = "give PyTorch arguments that it no longer takes"
_PASSES = "look for what a pass does that programs of 32 bits do not go through"

EXPLAINED: dict[str, str] = {
    "*backend=['neuralnetwork'*": _NEURAL_NETWORK,
    "*::TestConv::test_type_inference_dynamic_x_with_groups": _NEURAL_NETWORK,
    "*::TestSliceByIndex::test_slice_by_index": _NEURAL_NETWORK,
    "*::TestSliceByIndex::test_slice_by_index_slice_squeeze_separate": _NEURAL_NETWORK,
    "*::TestHardswish::test_longer_range_input_element_values": _NEURAL_NETWORK,
    "iOS14/*::TestNormalizationLocalResponseNorm::test_builder_to_backend_smoke[*": (
        "expect what a neural network gives, which takes an array of rank 3 for an image"
    ),
    "iOS17/*::TestScatter::test_ios17_invalid_indices[*validate_indices=False*": _UNDEFINED,
    "iOS15/*::TestCropResize::test_builder_to_backend_smoke[*": _UNDEFINED,
    "iOS16/*::TestCropResize::test_builder_to_backend_ios16[*": _ROUNDED,
    "iOS17/*::TestCropResize::test_builder_to_backend_ios17[*-N=3*": _ROUNDED,
    "iOS15/*::TestResample::test_builder_to_backend_smoke[*": _PASSES,
    "*::TestStack::test_stack_dynamic_range_dim[*default_dynamic_size=2*": (
        "want an error of Core ML where the interpreter computes what is asked for"
    ),
    "*::TestLinear::test_linear_fp16[*": "compute what they expect in 16 bits",
    "*::TestBatchNorm::*[*has_running_mean=True-has_running_var=False*": _ARGUMENTS,
    "*::TestBatchNorm::*[*has_running_mean=False-has_running_var=True*": _ARGUMENTS,
    "*::TestGather::test_gather_nd_int16_indices[*dynamic=True*": _PASSES,
}
