"""coremltools' own tests of `MagnitudePruner`; conftest.py fills this module with them."""

PEER = "coremltools.test.optimize.torch.pruning.test_magnitude_pruner"
REWRITTEN = {"from import"}
DIFFERENCES = {
    "test_magnitude_pruner_config_global_config_set[config_dict0]": (
        "a class named by text becomes that class, so that both mean the same"
    )
}
NEEDS_MACOS: dict[str, str] = {}
