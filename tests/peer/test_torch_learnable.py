"""coremltools' own tests of layers that learn scales; conftest.py fills this module."""

from as_torch_ao import LearnableLayer, RangeObserver

PEER = "coremltools.test.optimize.torch.quantization.test_learnable_fake_quantize"
REWRITTEN = set()
REPLACED = {"EMAMinMaxObserver": RangeObserver, "LearnableFakeQuantize": LearnableLayer}
DIFFERENCES: dict[str, str] = {}
NEEDS_MACOS: dict[str, str] = {}
