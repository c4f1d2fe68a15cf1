"""The configs of milpress.torch: coremltools' fields, defaults and precedence, checked at once."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import attrs
import coremltools.optimize.torch as reference
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

import milpress as cto
from milpress.errors import ConfigError, ConfigTypeError

P, Q = cto.torch.palettization, cto.torch.quantization
TOP = {
    "PostTrainingPalettizerConfig": (P, reference.palettization),
    "SKMPalettizerConfig": (P, reference.palettization),
    "PostTrainingQuantizerConfig": (Q, reference.quantization),
}
OURS_ALONE = {"on_indivisible", "range", "per_sample"}


def plain(value: object) -> object:
    """Return a value such that those of two libraries compare."""
    return getattr(value, "value", value)


@pytest.mark.parametrize("name", TOP)
def test_fields_and_defaults_are_those_of_coremltools(name):
    for kind in (name, f"Module{name}"):
        ours, theirs = (getattr(home, kind)() for home in TOP[name])
        fields = {field.name for field in attrs.fields(type(ours))}
        assert fields - OURS_ALONE == {field.name for field in attrs.fields(type(theirs))}
        for field in fields - OURS_ALONE - {"global_config"}:
            assert plain(getattr(ours, field)) == plain(getattr(theirs, field)), field


@pytest.mark.parametrize("name", TOP)
def test_a_dictionary_without_configs_is_the_default_for_all(name):
    kind = getattr(TOP[name][0], name)
    module = getattr(TOP[name][0], f"Module{name}")
    assert kind.from_dict({}) == kind() == kind(global_config=module())
    assert kind.from_yaml(io.StringIO("")) == kind()


palettes = st.fixed_dictionaries(
    {
        "n_bits": st.sampled_from([1, 2, 3, 4, 6, 8]),
        "lut_dtype": st.sampled_from([None, torch.int8, torch.uint8]),
        "channel_axis": st.integers(0, 1),
        "on_indivisible": st.sampled_from(["leave", "divisor"]),
    }
) | st.fixed_dictionaries(
    {
        "granularity": st.just("per_grouped_channel"),
        "group_size": st.integers(1, 64),
        "enable_per_channel_scale": st.booleans(),
    }
)
integers = st.fixed_dictionaries(
    {"weight_dtype": st.sampled_from(["int8", "uint8", "int4", "uint4", "float32"])}
) | st.fixed_dictionaries(
    {
        "granularity": st.just("per_block"),
        "weight_dtype": st.sampled_from(["int4", "uint4", torch.int8]),
        "block_size": st.integers(0, 64) | st.tuples(st.integers(0, 9), st.integers(0, 9)),
        "range": st.sampled_from(["minmax", "mse"]),
    }
)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(P.PostTrainingPalettizerConfig, palettes), (Q.PostTrainingQuantizerConfig, integers)],
)
def test_as_dict_is_undone_by_from_dict(kind, settings):
    @given(settings, st.none() | settings)
    def check(everywhere, linear):
        config = kind.from_dict(
            {"global_config": everywhere, "module_type_configs": {"Linear": linear}}
        )
        assert kind.from_dict(config.as_dict()) == config

    check()


@given(
    names=st.dictionaries(st.sampled_from(["a", "a.b", "a.*", ".*b", "x|a"]), st.integers(1, 2)),
    types=st.dictionaries(st.sampled_from(["Linear", nn.Linear, "Mine"]), st.integers(3, 4)),
    everywhere=st.none() | st.just(6),
    name=st.sampled_from(["a", "a.b", "c", "x", ""]),
)
def test_precedence_is_that_of_coremltools(names, types, everywhere, name):
    class Mine(nn.Linear):
        pass

    def build(home):
        module = home.ModulePostTrainingPalettizerConfig

        def config(bits):
            return None if bits is None or bits == 3 else module(n_bits=bits)

        return home.PostTrainingPalettizerConfig(
            global_config=config(everywhere),
            module_type_configs={key: config(bits) for key, bits in types.items()},
            module_name_configs={key: config(bits) for key, bits in names.items()},
        )

    for kind in (nn.Linear, Mine, nn.Conv2d):
        module = kind(2, 2, 1) if kind is nn.Conv2d else kind(2, 2)
        found = [
            build(home).get_module_config(name, module) for home in (P, reference.palettization)
        ]
        assert (found[0] is None) == (found[1] is None)
        assert found[0] is None or found[0].n_bits == found[1].n_bits


def test_setters_chain_and_take_classes_and_names():
    module = P.ModulePostTrainingPalettizerConfig
    config = (
        P.PostTrainingPalettizerConfig()
        .set_global(None)
        .set_module_type("Linear", module(n_bits=2))
        .set_module_type(nn.Conv2d, module(n_bits=3))
        .set_module_name(r"head\.\d", None)
    )
    assert config.get_module_config("a", nn.Linear(1, 1)).n_bits == 2
    assert config.get_module_config("a", nn.Conv2d(1, 1, 1)).n_bits == 3
    assert config.get_module_config("head.7", nn.Linear(1, 1)) is None
    assert config.get_module_config("a", nn.Embedding(1, 1)) is None


def test_the_callers_dictionary_is_copied():
    given_by_caller = {"Linear": P.ModulePostTrainingPalettizerConfig()}
    config = P.PostTrainingPalettizerConfig(module_type_configs=given_by_caller)
    config.set_module_type("Conv2d", None)
    assert list(given_by_caller) == ["Linear"]


def test_the_width_follows_the_type_that_is_set():
    config = Q.ModulePostTrainingQuantizerConfig()
    assert (config.weight_dtype, config.weight_n_bits, config.dtype) == (torch.int8, 8, "int8")
    config.weight_dtype = "uint4"
    assert (config.weight_dtype, config.weight_n_bits, config.dtype) == (torch.uint8, 4, "uint4")
    config.weight_dtype = "float32"
    assert config.dtype is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_bits": 5}, "n_bits must be one of"),
        ({"n_bits": 0}, "n_bits must be one of"),
        ({"n_bits": None}, "n_bits must be an integer"),
        ({"n_bits": 4.0}, "n_bits must be an integer"),
        ({"n_bits": True}, "n_bits must be an integer"),
        ({"lut_dtype": "int4"}, "lut_dtype must be one of"),
        ({"granularity": "per_channel"}, "PalettizationGranularity must be one of"),
        ({"granularity": "per_grouped_channel"}, "group_size has to be specified"),
        ({"group_size": 4}, "group_size can't be specified"),
        ({"granularity": "per_grouped_channel", "group_size": 0}, "greater than zero"),
        ({"channel_axis": 2}, "channel_axis must be one of"),
        ({"cluster_dim": 0}, "cluster_dim must be at least 1"),
        ({"cluster_dim": 2, "enable_per_channel_scale": True}, "not supported for cluster_dim=2"),
        ({"enable_per_channel_scale": 1}, "True or False"),
        ({"on_indivisible": "skip"}, "on_indivisible must be one of"),
        ({"bits": 4}, "unrecognized key bits"),
        ([], "must be type of dict"),
    ],
)
def test_a_bad_palette_setting_is_an_error_that_names_it_and_its_place(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        P.PostTrainingPalettizerConfig.from_dict({"module_name_configs": {"head": settings}})
    assert "module_name_configs['head']" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_dtype": "int5"}, "weight_dtype must be one of"),
        ({"weight_dtype": "fp8_e4m3"}, "what Core ML decodes"),
        ({"weight_dtype": torch.float8_e5m2}, "what Core ML decodes"),
        ({"weight_dtype": torch.ones(2)}, "weight_dtype must be one of"),
        ({"weight_dtype": "int8", "weight_n_bits": 4.5}, "weight_n_bits must be"),
        ({"weight_dtype": "int4", "weight_n_bits": 8}, "weight_n_bits must be"),
        ({"granularity": "per_block"}, "block_size has to be specified"),
        ({"block_size": 4}, "block_size can't be specified"),
        ({"granularity": "per_block", "block_size": -1}, "no negative numbers"),
        ({"granularity": "per_block", "block_size": "4"}, "must be an integer or a tuple"),
        ({"quantization_scheme": "signed"}, "QuantizationScheme must be one of"),
        ({"range": "best"}, "range must be one of"),
    ],
)
def test_a_bad_quantizer_setting_is_an_error_that_names_it(settings, message):
    with pytest.raises(ConfigError, match=message):
        Q.PostTrainingQuantizerConfig.from_dict({"global_config": settings})


def test_one_quantization_scheme_holds_for_the_whole_model():
    module = Q.ModulePostTrainingQuantizerConfig
    with pytest.raises(ConfigError, match="quantization_scheme cannot be different"):
        Q.PostTrainingQuantizerConfig(
            global_config=module(),
            module_name_configs={"a": module(quantization_scheme="affine"), "b": None},
        )
    config = Q.PostTrainingQuantizerConfig()
    with pytest.raises(ConfigError, match="quantization_scheme cannot be different"):
        config.set_module_type("Linear", module(quantization_scheme="affine"))


def test_what_is_no_config_is_refused_at_once():
    config = P.PostTrainingPalettizerConfig()
    for wrong in ({"n_bits": 4}, Q.ModulePostTrainingQuantizerConfig(), 4):
        with pytest.raises(ConfigTypeError, match="must be a ModulePostTrainingPalettizerConfig"):
            config.set_global(wrong)
        with pytest.raises(ConfigTypeError, match="must be a ModulePostTrainingPalettizerConfig"):
            config.set_module_name("a", wrong)
    with pytest.raises(ConfigError, match="regular expression"):
        config.set_module_name("a(", None)
    with pytest.raises(ConfigTypeError, match="must be text"):
        config.set_module_name(4, None)
    with pytest.raises(ConfigTypeError, match="must be a class or its name"):
        config.set_module_type(4, None)
    with pytest.raises(ConfigTypeError, match="must be a PostTrainingPalettizerConfig, got"):
        P.PostTrainingPalettizer(nn.Linear(1, 1), Q.PostTrainingQuantizerConfig())


def test_yaml_is_read_as_data_and_never_run(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("global_config: {n_bits: 2}\nmodule_type_configs: {Embedding: null}\n")
    with path.open() as file:
        for source in (path, str(path), file):
            config = P.PostTrainingPalettizerConfig.from_yaml(source)
            assert config.global_config.n_bits == 2
            assert config.module_type_configs == {nn.Embedding: None}
    path.write_text("global_config: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="can't be read as an optimization config"):
        P.PostTrainingPalettizerConfig.from_yaml(path)
    path.write_text("- 4\n")
    with pytest.raises(ConfigError, match="must be type of dict"):
        P.PostTrainingPalettizerConfig.from_yaml(path)


def test_a_key_that_nothing_matches_is_a_warning(caplog):
    config = P.PostTrainingPalettizerConfig(
        module_type_configs={"Conv2d": None, nn.Linear: None}, module_name_configs={"haed": None}
    )
    with caplog.at_level(logging.WARNING, "milpress"):
        P.PostTrainingPalettizer(nn.Linear(2, 2), config).compress()
    assert [record.args for record in caplog.records] == [("Conv2d",), ("haed",)]


def test_torch_is_imported_under_milpress_torch_alone():
    code = (
        "import sys, milpress; milpress.coreml, milpress.formats;"
        "assert 'torch' not in sys.modules; milpress.torch.palettization;"
        "assert 'torch' in sys.modules and 'coremltools' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_config_objects_of_coremltools_are_taken():
    theirs = reference.quantization.PostTrainingQuantizerConfig.from_dict(
        {
            "global_config": {
                "weight_dtype": "uint4",
                "granularity": "per_block",
                "block_size": (2, 4),
                "quantization_scheme": "affine",
            },
            "module_type_configs": {"Embedding": None},
        }
    )
    ours = Q.PostTrainingQuantizer(nn.Linear(4, 4), theirs)._config
    assert ours == Q.PostTrainingQuantizerConfig.from_dict(theirs.as_dict())
    assert ours.global_config.dtype == "uint4"
    assert ours.global_config.block_size == (2, 4)
    assert ours.module_type_configs == {nn.Embedding: None}
    theirs = reference.palettization.SKMPalettizerConfig(calibration_nsamples=7)
    assert P.SKMPalettizer(nn.Linear(4, 4), theirs)._config.calibration_nsamples == 7
    theirs = reference.palettization.PostTrainingPalettizerConfig(
        reference.palettization.ModulePostTrainingPalettizerConfig(n_bits=5)
    )
    with pytest.raises(ConfigError, match="n_bits must be one of"):
        P.PostTrainingPalettizer(nn.Linear(4, 4), theirs)
