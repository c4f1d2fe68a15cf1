"""coremltools' own tests of the configs of `DKMPalettizer`; conftest.py fills this module."""

from milpress.torch.palettization import FakePalettize


def has_layer(module, n_bits, cluster_dim):
    assert isinstance(module.weight_fake_quant, FakePalettize)
    assert module.weight_fake_quant.n_bits == n_bits
    assert module.weight_fake_quant.cluster_dim == cluster_dim


def is_prepared(original, prepared, n_bits, cluster_dim, kmeans_max_iter):
    assert type(prepared) is type(original)
    assert prepared.weight_fake_quant.n_clusters == 2**n_bits
    assert prepared.weight_fake_quant.cluster_dim == cluster_dim
    assert prepared.weight_fake_quant.kmeans_max_iter == kmeans_max_iter


PEER = "coremltools.test.optimize.torch.palettization.test_palettization_api"
REWRITTEN = {"from import"}
REPLACED = {"_assert_changes_post_attach": has_layer, "_assert_changes_post_prepare": is_prepared}
NO_QCONFIG = "modules get no qconfig, and so none that is None"
MESSAGES = "a weight that is left is named in a warning of another logger, in other words"
DIFFERENCES = {
    "test_attach_config_simple_model_weight_threshold_test": NO_QCONFIG,
    "test_attach_config_simple_model_weight_threshold_range_test": NO_QCONFIG,
    "test_attach_config_only_on_specified_modules_*": NO_QCONFIG,
    "test_attach_config_weight_threshold_range_different_milestone": NO_QCONFIG,
    "test_prepare_*_cluster_dim_mil_check[cluster_dim_expected_std_outputs1]": MESSAGES,
    "test_prepare_*_block_size_mil_check[block_size_expected_std_outputs0]": MESSAGES,
    "test_config_initialization_from_module_name_configs": "5 bits are refused",
    "test_quantize_activations_flag": "accepted without effect: nothing of it is exported",
    "test_deprecated_api": "a setting that is gone is a ConfigError",
}
NEEDS_MACOS: dict[str, str] = {}
