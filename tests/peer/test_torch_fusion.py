"""coremltools' own tests of what `LinearQuantizer` rounds; conftest.py fills this module."""

from as_torch_ao import PreparedQuantizer

PEER = "coremltools.test.optimize.torch.quantization.test_configure"
FIXTURES = ("coremltools.test.optimize.torch.models.mnist",)
REWRITTEN = {"from import"}
SAMPLE = 31  # prime, so that all values of all parameters come up
REPLACED = {"LinearQuantizer": PreparedQuantizer}
DIFFERENCES = {
    "test_functional_relu_qscheme_for_symmetric[*-relu_-*": (
        "relu_ counts as part of the layer before it, as relu does: nothing is rounded between"
    ),
    "test_concat_uint_and_int[*-ReLU*": (
        "what is concatenated behind Identity is rounded once, to the range of all parts; "
        "coremltools rounds it twice: to its own range, and behind Identity to that of all"
    ),
}
NEEDS_MACOS: dict[str, str] = {}
