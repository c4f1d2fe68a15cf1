"""coremltools' own tests of the bases; conftest.py fills this module with them."""

PEER = "coremltools.test.optimize.torch.test_base_optimizer"
REWRITTEN = {"from import"}
DIFFERENCES = {
    "test_inplace_behavior_for_optimizers*": (
        "the uncompressed model is not kept: inplace copies nothing"
    )
}
NEEDS_MACOS: dict[str, str] = {}
