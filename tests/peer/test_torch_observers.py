"""coremltools' own tests of how ranges are found; conftest.py fills this module with them."""

from as_torch_ao import RangeObserver

PEER = "coremltools.test.optimize.torch.quantization.test_observers"
REWRITTEN = set()
REPLACED = {"EMAMinMaxObserver": RangeObserver}
# It puts an observer into a layer of torch.ao.
NOT_OURS = ("test_observer_fake_quantize*",)
DIFFERENCES: dict[str, str] = {}
NEEDS_MACOS: dict[str, str] = {}
