"""coremltools' own tests of ranges of integers; conftest.py fills this module with them."""

from as_torch_ao import quant_range

PEER = "coremltools.test.optimize.torch.quantization.test_utils"
REWRITTEN = set()
REPLACED = {"get_quant_range": quant_range}
# They ask about classes and constants of torch.ao.
NOT_OURS = ("test_quantization_utils_is_*", "test_quantization_utils_get_n_bits_from_range*")
DIFFERENCES: dict[str, str] = {}
NEEDS_MACOS: dict[str, str] = {}
