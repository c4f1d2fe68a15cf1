"""Configs under coremltools' names: what it takes, refuses and says, and what is mended."""

from __future__ import annotations

import copy
import subprocess
import sys
from enum import Enum
from typing import Any

import attrs
import coremltools.optimize.coreml as theirs
import numpy as np
import pytest
import yaml
from cattrs.errors import ClassValidationError
from coremltools.converters.mil.mil import types
from coremltools.optimize.coreml._config import CompressionGranularity as TheirGranularity

from milpress import coreml as ours
from milpress.coreml.optimization_config import adopted
from milpress.errors import ConfigError, ConfigTypeError

INT = "integer", 2.5, "2", [2]
PALETTIZER: list[dict[str, Any]] = [
    *({"nbits": nbits} for nbits in (1, 2, 3, 4, 6, 8, np.int64(4), 0, 5, 7, 16, -1, "4", [4])),
    *({"mode": mode} for mode in ("kmeans", "uniform", "unique", "UNIQUE", "Unique", "custom")),
    *({"mode": mode, "nbits": 4} for mode in ("KMeans", "uniform", "unique", "custom")),
    *({"mode": mode, "nbits": 4} for mode in ("", "bad", None, 3, ["kmeans"])),
    *({"mode": "custom", "lut_function": function} for function in (len, print, 1, "len")),
    {"nbits": 4, "lut_function": len},
    {"mode": "unique", "lut_function": len},
    *(
        {"nbits": 4, "granularity": granularity}
        for granularity in (
            *("per_tensor", "per_grouped_channel", "per_channel", "per_block", "PER_TENSOR"),
            *("", None, 1, ["per_tensor"]),
        )
    ),
    *({"nbits": 4, "group_size": size} for size in (0, 1, 32, np.int32(16))),
    *({"nbits": 4, "channel_axis": axis} for axis in (None, 0, 1, -1)),
    *({"nbits": 4, "cluster_dim": dim} for dim in (1, 2, 16, None, *INT)),
    *({"nbits": 4, "enable_per_channel_scale": flag} for flag in (True, False, 0, 1, None, "no")),
    *({"nbits": 4, "num_kmeans_workers": n} for n in (1, 8, None, *INT)),
    *({"nbits": 4, "weight_threshold": n} for n in (0, 1, 5000, -1, *INT)),
]
QUANTIZER: list[dict[str, Any]] = [
    {},
    *({"mode": mode} for mode in ("linear", "LINEAR", "Linear_Symmetric", "", "bad", None, 3, [])),
    *({"dtype": dtype} for dtype in ("int8", "uint8", "int4", "uint4", "int2", "INT8", "i1", "")),
    *({"dtype": dtype} for dtype in ("int32", "uint16", "fp32", "float32", "bool", "str")),
    *({"dtype": dtype} for dtype in (np.int8, np.uint8, np.dtype("int8"), np.dtype("uint8"))),
    *({"dtype": dtype} for dtype in (np.int32, np.uint16, np.float32, np.bool_, np.int8(1))),
    *({"dtype": getattr(types, name)} for name in ("int8", "uint8", "int4", "uint4")),
    *({"dtype": getattr(types, name)} for name in ("int32", "uint1", "fp32", "bool", "str")),
    *({"dtype": dtype} for dtype in (None, 8, int, str, object, [8])),
    *(
        {"granularity": granularity}
        for granularity in (
            *("per_tensor", "per_grouped_channel", "per_channel", "per_block", "PER_TENSOR"),
            *("", None, 1, ["per_tensor"]),
        )
    ),
    *({"block_size": size} for size in (0, 1, 32, -1, [], [0, 1], (1, 32, 0, 0), [-1, 2])),
    *({"block_size": size} for size in (2.0, "32", ["1"], [1.0], {1: 2})),
    *({"weight_threshold": n} for n in (0, 1, 5000, -1, *INT)),
]
MAGNITUDE: list[dict[str, Any]] = [
    {},
    *({"target_sparsity": x} for x in (0.0, 0.5, 1.0, np.float64(0.3), -0.1, 1.1, "0.5", [0.5])),
    *({"n_m_ratio": ratio} for ratio in ((1, 2), [1, 2], (2, 2), (0, 4), (6, 1), (2, 2, 2), (1,))),
    *({"n_m_ratio": ratio} for ratio in ("ab", 3, (1, "b"), {1: 2})),
    {"target_sparsity": 0.5, "n_m_ratio": (1, 2)},
    *({"target_sparsity": 0.5, "block_size": n} for n in (None, 2, 9, 1, 0, -9, True, *INT)),
    {"n_m_ratio": (1, 2), "block_size": 2},
    *({"n_m_ratio": (1, 2), "dim": dim} for dim in (None, 0, 1, 2, -1, *INT)),
    *({"target_sparsity": 0.5, "block_size": 4, "dim": dim} for dim in (None, 0, 1, 2)),
    {"target_sparsity": 0.5, "dim": 1},
    *({"target_sparsity": 0.5, "weight_threshold": n} for n in (0, 1, 5000, -1, *INT)),
]
THRESHOLD: list[dict[str, Any]] = [
    {},
    *({"threshold": x} for x in (0.0, 1e-12, 3.0, np.float64(0.3), -1.0, True, None, "0.1")),
    *({"minimum_sparsity_percentile": x} for x in (0.0, 0.5, 1.0, -9.0, 1.2, True, None, "0.1")),
    *({"weight_threshold": n} for n in (0, 1, 5000, -1, *INT)),
]
CASES = [
    *(("OpPalettizerConfig", case) for case in PALETTIZER),
    *(("OpLinearQuantizerConfig", case) for case in QUANTIZER),
    *(("OpMagnitudePrunerConfig", case) for case in MAGNITUDE),
    *(("OpThresholdPrunerConfig", case) for case in THRESHOLD),
]
KINDS = [
    "OpPalettizerConfig",
    "OpLinearQuantizerConfig",
    "OpMagnitudePrunerConfig",
    "OpThresholdPrunerConfig",
]
# Fields that coremltools lacks.
NEW = {"on_indivisible", "range"}


def result(make: Any, *args: Any, **settings: Any) -> Any:
    try:
        return make(*args, **settings)
    except Exception as error:
        return error


def normal(value: Any) -> Any:
    """Return an attribute of either side's config in one form."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, type) and hasattr(value, "is_unsigned"):
        return f"{'u' if value.is_unsigned() else ''}int{value.get_bitwidth()}"
    return value


def fields(config: Any) -> Any:
    """Return the class and the attributes that both sides have, or None."""
    if config is None:
        return None
    kind = type(config).__name__
    names = [field.name for field in attrs.fields(getattr(theirs, kind))]
    derived = [name for name in ("nbits", "signed") if hasattr(config, name)]
    return kind, {name: normal(getattr(config, name)) for name in (*names, *derived)}


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=repr)
def test_a_config_is_what_coremltools_makes_of_the_same_settings(kind, settings):
    expected = result(getattr(theirs, kind), **settings)
    config = result(getattr(ours, kind), **settings)
    if isinstance(expected, Exception):
        assert isinstance(config, ConfigError), config
        if isinstance(expected, (TypeError, ValueError)):
            assert isinstance(config, TypeError if isinstance(expected, TypeError) else ValueError)
    else:
        assert fields(config) == fields(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_fields_come_in_the_order_and_with_the_defaults_of_coremltools(kind):
    def signature(module):
        return [
            (field.name, normal(field.default))
            for field in attrs.fields(getattr(module, kind))
            if not field.kw_only
        ]

    assert signature(ours) == signature(theirs)
    added = [field.name for field in attrs.fields(getattr(ours, kind)) if field.kw_only]
    assert set(added) <= NEW


def test_granularities_have_the_values_of_coremltools():
    assert {g.name: g.value for g in ours.CompressionGranularity} == {
        g.name: g.value for g in TheirGranularity
    }


# What coremltools' own tests look for in a message.
MESSAGES = [
    ("OpLinearQuantizerConfig", {"mode": "x"}, "for weight affine quantization. Got mode"),
    (
        "OpLinearQuantizerConfig",
        {"mode": "DUMMY"},
        r"Only mode \('LINEAR_SYMMETRIC', 'LINEAR'\) supported for weight affine quantization. "
        'Got mode: "DUMMY".',
    ),
    ("OpLinearQuantizerConfig", {"dtype": np.int32}, "Should be int4/8 or uint4/8, but got int32"),
    ("OpLinearQuantizerConfig", {"dtype": "int32"}, "Should be int4/8 or uint4/8, but got int32"),
    (
        "OpLinearQuantizerConfig",
        {"dtype": "int2"},
        "Invalid dtype int2. Only support int8/uint8/int4/uint4",
    ),
    (
        "OpThresholdPrunerConfig",
        {"threshold": -1.0},
        r'Invalid value of "threshold": \-1.0. Needs to be in \[0, inf\)',
    ),
    (
        "OpMagnitudePrunerConfig",
        {"target_sparsity": 1.2},
        r'Invalid value of "target_sparsity": 1.2. Needs to be in \[0, 1\]',
    ),
    (
        "OpPalettizerConfig",
        {"mode": "invalid_mode"},
        'supported for weight palettization. Got "mode"',
    ),
    ("OpPalettizerConfig", {}, '"nbits" must be provided for'),
    ("OpPalettizerConfig", {"mode": "uniform"}, '"nbits" must be provided for'),
    ("OpPalettizerConfig", {"mode": "unique", "nbits": 2}, '"nbits" must NOT be provided for'),
    ("OpPalettizerConfig", {"mode": "custom", "nbits": 2}, '"nbits" must NOT be provided for'),
    (
        "OpPalettizerConfig",
        {"mode": "custom"},
        '"lut_function" can not be None, if "mode" is "custom".',
    ),
    (
        "OpPalettizerConfig",
        {"mode": "unique", "lut_function": len},
        '"lut_function" must be None, if "mode" is not "custom".',
    ),
    (
        "OpPalettizerConfig",
        {"mode": "custom", "lut_function": 1},
        'A function object must be provided as "lut_function"',
    ),
    (
        "OpPalettizerConfig",
        {"nbits": 4, "granularity": "per_channel"},
        '"granularity" must be one of .*, but got CompressionGranularity.PER_CHANNEL',
    ),
    (
        "OpThresholdPrunerConfig",
        {"minimum_sparsity_percentile": -9.0},
        'Invalid value of "minimum_sparsity_percentile":',
    ),
    *(
        (kind, {**needed, "weight_threshold": -9}, '"weight_threshold" must be a non-negative int')
        for kind, needed in zip(
            KINDS, ({"nbits": 2}, {}, {"target_sparsity": 1.0}, {}), strict=True
        )
    ),
    (
        "OpMagnitudePrunerConfig",
        {},
        'Either "target_sparsity" or "n_m_ratio" need to be set. They cannot be set at the same',
    ),
    (
        "OpMagnitudePrunerConfig",
        {"n_m_ratio": (2, 2), "block_size": 9},
        '"block_size" and "n_m_ratio" cannot be set at the same time.',
    ),
    (
        "OpMagnitudePrunerConfig",
        {"target_sparsity": 0.9, "block_size": 1},
        r'"block_size" must be an integer \> 1',
    ),
    *(
        (
            "OpMagnitudePrunerConfig",
            {"n_m_ratio": ratio},
            r'"n_m_ratio" must be a tuple of two integers \(n, m\). n \<\= m. Got',
        )
        for ratio in ((2, 2, 2), (6, 1), (1, "b"))
    ),
    ("OpMagnitudePrunerConfig", {"n_m_ratio": (1, 1), "dim": -1}, '"dim" must be 1 or 0'),
    (
        "OpMagnitudePrunerConfig",
        {"target_sparsity": 0.5, "dim": 0},
        '"dim" can only be set along with "block_size" or "n_m_ratio".',
    ),
]


@pytest.mark.parametrize(("kind", "settings", "message"), MESSAGES, ids=repr)
def test_an_error_says_what_coremltools_says(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        getattr(ours, kind)(**settings)


# What coremltools takes and then trips over, or takes for something else.
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *(("OpPalettizerConfig", {"nbits": 4, "group_size": n}) for n in (-1, "32", None, 2.0)),
        *(("OpPalettizerConfig", {"nbits": 4, "channel_axis": n}) for n in ("0", 1.0, [0])),
        *(("OpPalettizerConfig", {"nbits": 4, "cluster_dim": n}) for n in (0, -2)),
        *(("OpPalettizerConfig", {"nbits": 4, "num_kmeans_workers": n}) for n in (0, -2)),
        ("OpPalettizerConfig", {"nbits": 4.0}),
        *(
            ("OpPalettizerConfig", {"nbits": 4, name: True})
            for name in (
                *("nbits", "group_size", "channel_axis", "cluster_dim"),
                *("num_kmeans_workers", "weight_threshold"),
            )
        ),
        *(
            ("OpMagnitudePrunerConfig", {"n_m_ratio": ratio})
            for ratio in ((0, 0), (-2, -1), (-1, 2), ("a", "b"), (1.0, 2.0), (False, True))
        ),
        ("OpMagnitudePrunerConfig", {"n_m_ratio": (1, 2), "dim": True}),
        ("OpMagnitudePrunerConfig", {"target_sparsity": float("nan")}),
        ("OpThresholdPrunerConfig", {"minimum_sparsity_percentile": float("nan")}),
        *(("OpThresholdPrunerConfig", {"threshold": float(x)}) for x in ("nan", "inf")),
        *(("OpLinearQuantizerConfig", {"block_size": size}) for size in (True, [True])),
    ],
    ids=repr,
)
def test_a_setting_that_coremltools_takes_and_cannot_use_is_refused(kind, settings):
    getattr(theirs, kind)(**settings)
    with pytest.raises(ConfigError):
        getattr(ours, kind)(**settings)


@pytest.mark.parametrize(
    ("kind", "settings", "value"),
    [
        ("OpMagnitudePrunerConfig", {"target_sparsity": 1}, 1.0),
        ("OpMagnitudePrunerConfig", {"target_sparsity": np.float32(0.5)}, 0.5),
        ("OpThresholdPrunerConfig", {"threshold": 1}, 1.0),
        ("OpThresholdPrunerConfig", {"minimum_sparsity_percentile": 0}, 0.0),
        ("OpLinearQuantizerConfig", {"block_size": np.int64(3)}, 3),
        ("OpLinearQuantizerConfig", {"block_size": [np.int64(3), 0]}, (3, 0)),
        ("OpLinearQuantizerConfig", {"weight_threshold": np.int64(3)}, 3),
    ],
    ids=repr,
)
def test_a_number_may_be_an_integer_or_of_numpy(kind, settings, value):
    (name,) = settings
    with pytest.raises((TypeError, ValueError)):
        getattr(theirs, kind)(**settings)
    taken = getattr(getattr(ours, kind)(**settings), name)
    assert taken == value
    assert type(taken) is type(value)


def test_a_number_beyond_float_is_out_of_range():
    for number in (10**400, -(10**400)):
        with pytest.raises(ConfigError, match="Needs to be in"):
            ours.OpThresholdPrunerConfig(threshold=number)


def test_none_stands_for_the_default():
    for kind, needed in zip(KINDS, ({"nbits": 2}, {}, {"target_sparsity": 1.0}, {}), strict=True):
        config = getattr(ours, kind)(weight_threshold=None, **needed)
        assert config.weight_threshold == 2048
    assert ours.OpLinearQuantizerConfig(block_size=None).block_size == 32


def test_a_mode_and_a_dtype_set_later_are_kept_in_one_form():
    config = ours.OpLinearQuantizerConfig()
    config.mode = "linear"
    config.dtype = types.uint4
    assert (config.mode, config.dtype, config.nbits, config.signed) == ("LINEAR", "uint4", 4, False)
    with pytest.raises(ConfigTypeError):
        config.mode = 3
    with pytest.raises(AttributeError):
        config.modus = "linear"


def test_what_coremltools_lacks_is_given_by_name():
    palettizer = ours.OpPalettizerConfig(nbits=4, on_indivisible="divisor")
    quantizer = ours.OpLinearQuantizerConfig(on_indivisible="divisor", range="mse")
    assert palettizer.on_indivisible == quantizer.on_indivisible == "divisor"
    assert quantizer.range == "mse"
    assert ours.OpPalettizerConfig(nbits=4).on_indivisible == "leave"
    assert ours.OpLinearQuantizerConfig().range == "minmax"
    with pytest.raises(ConfigError, match="on_indivisible must be one of"):
        ours.OpPalettizerConfig(nbits=4, on_indivisible="pad")
    with pytest.raises(ConfigError, match="range must be one of"):
        ours.OpLinearQuantizerConfig(range=["mse"])


def test_the_base_of_op_configs_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        ours.OpCompressorConfig()
    assert all(issubclass(getattr(ours, kind), ours.OpCompressorConfig) for kind in KINDS)


def test_configs_do_not_need_coremltools():
    code = (
        "import sys; sys.modules['coremltools'] = None; import milpress.coreml as c;"
        "c.OptimizationConfig(c.OpLinearQuantizerConfig(dtype='int4'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- OptimizationConfig ---------------------------------------------------------------------------

FOUR = ours.OpPalettizerConfig(nbits=4)
TWO = ours.OpPalettizerConfig(nbits=2)
EIGHT = ours.OpLinearQuantizerConfig()

DICTS: list[Any] = [
    {"config_type": "OpPalettizerConfig"},
    {
        "config_type": "OpPalettizerConfig",
        "global_config": {"mode": "kmeans", "nbits": 4, "granularity": "per_grouped_channel"},
        "op_type_configs": {"conv": {"mode": "uniform", "nbits": 1}, "linear": None},
        "op_name_configs": {"conv_1": {"mode": "unique"}, "x": None},
    },
    {
        "config_type": "OpThresholdPrunerConfig",
        "global_config": {"threshold": 0.01},
        "op_type_configs": {
            "conv": {"config_type": "OpMagnitudePrunerConfig", "n_m_ratio": [3, 4]}
        },
    },
    {
        "config_type": "OpLinearQuantizerConfig",
        "global_config": {"dtype": "uint4", "granularity": "per_block", "block_size": [1, 32]},
        "op_type_configs": None,
    },
    {"config_type": "OpLinearQuantizerConfig", "global_config": {}},
    {"config_type": "OpLinearQuantizerConfig", "global_config": None},
    {"config_type": "OpMagnitudePrunerConfig", "global_config": {"target_sparsity": 1}},
    {},
    {"bobby_joe": 56},
    {"config_type": None},
    {"config_type": 3},
    {"global_config": None},
    {"config_type": "OpLinearQuantizerConfig", "op_type_configs": 123},
    {"config_type": "OpLinearQuantizerConfig", "op_name_configs": "eric"},
    {"config_type": "OpLinearQuantizerConfig", "global_config": 3},
    {"config_type": "OpLinearQuantizerConfig", "global_config": {"nbits": 4}},
    {"config_type": "OpLinearQuantizerConfig", "global_config": {"mode": 3}},
    {"config_type": "OpPalettizerConfig", "global_config": {"nbits": 5}},
    {"config_type": "OpPalettizerConfig", "op_type_configs": {"conv": {"nbits": None}}},
    {"config_type": "Nonsense", "global_config": {}},
    {"config_type": "OpPalettizerConfig", "global_config": {"config_type": None, "nbits": 4}},
    {"config_type": "OpMagnitudePrunerConfig", "global_config": {"n_m_ratio": [1, 2, 3]}},
    {"config_type": "OpMagnitudePrunerConfig", "op_type_configs": {"add": {"n_m_ratio": [1, 2]}}},
    {"config_type": "OpPalettizerConfig", "global_config": {"lut_function": "len"}},
    3,
    None,
    [],
    ["config_type"],
]


def everything(config: Any) -> Any:
    return [
        fields(config.global_config),
        *(
            {key: fields(op) for key, op in configs.items()}
            for configs in (config.op_type_configs, config.op_name_configs)
        ),
    ]


@pytest.mark.parametrize("data", DICTS, ids=repr)
@pytest.mark.parametrize("way", ["dict", "path", "str", "stream"])
def test_a_dictionary_or_yaml_makes_what_it_makes_in_coremltools(data, way, tmp_path):
    expected = result(theirs.OptimizationConfig.from_dict, copy.deepcopy(data))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    if way == "dict":
        before = copy.deepcopy(data)
        config = result(ours.OptimizationConfig.from_dict, data)
        assert data == before
    elif way == "stream":
        with path.open() as stream:
            config = result(ours.OptimizationConfig.from_yaml, stream)
    else:
        config = result(ours.OptimizationConfig.from_yaml, str(path) if way == "str" else path)
    if isinstance(expected, Exception):
        assert isinstance(config, ConfigError), config
        if isinstance(expected, (TypeError, ValueError, ClassValidationError)):
            kinds = (TypeError, ValueError, ClassValidationError)
            assert isinstance(config, next(k for k in kinds if isinstance(expected, k)))
    else:
        assert everything(config) == everything(expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"bobby_joe": 56}, "Invalid key bobby_joe to construct an OptimizationConfig object."),
        ({"global_config": None}, "config_type must be provided with type of string."),
        (
            {"config_type": "OpPalettizerConfig", "op_type_configs": 123},
            "op_type_configs must be type of dict. Got",
        ),
        (
            {"config_type": "OpPalettizerConfig", "op_name_configs": "eric"},
            "op_name_configs must be type of dict. Got",
        ),
        (
            {"config_type": "OpPalettizerConfig", "op_name_configs": {"a": {"nbit": 4}}},
            r"op_name_configs\['a'\]: .*nbit",
        ),
        (
            {"config_type": "OpPalettizerConfig", "global_config": {"nbits": 5}},
            r'^global_config: Invalid value of "nbits" \(5\) .*\(1, 2, 3, 4, 6, 8\)$',
        ),
        ({"config_type": "OptimizationConfig"}, "config_type must be one of OpPalettizerConfig, "),
        ({"config_type": "sys", "global_config": {}}, "config_type must be one of"),
        (
            {"config_type": "OpPalettizerConfig", "global_config": {"config_type": "np"}},
            "global_config: config_type must be one of",
        ),
        (
            {"config_type": "OpPalettizerConfig", "global_config": {"lut_function": 3}},
            "_from_dict method does not support lut_function",
        ),
        (
            {"config_type": "OpPalettizerConfig", "op_type_configs": {3: {"nbits": 4}}},
            "op_type_configs must have text keys, got 3",
        ),
    ],
    ids=repr,
)
def test_an_error_in_a_dictionary_names_the_place(data, message):
    with pytest.raises(ConfigError, match=message):
        ours.OptimizationConfig.from_dict(data)


# cattrs alone makes 4, True and 2 of these.
@pytest.mark.parametrize(
    "settings",
    [
        {"nbits": "4"},
        {"nbits": 4, "enable_per_channel_scale": "no"},
        {"nbits": 4, "cluster_dim": 2.7},
    ],
)
def test_a_value_of_the_wrong_type_in_a_dictionary_is_not_bent(settings):
    data = {"config_type": "OpPalettizerConfig", "global_config": settings}
    assert theirs.OptimizationConfig.from_dict(copy.deepcopy(data))
    with pytest.raises(ConfigError):
        ours.OptimizationConfig.from_dict(data)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_field_is_the_error_that_cattrs_raises(kind):
    with pytest.raises(ClassValidationError) as caught:
        getattr(ours, kind)._from_dict({"invalid": 2})
    assert isinstance(caught.value, ConfigError)
    assert "invalid" in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "bad.yaml").write_text("{")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    unreadable = "can't be read as an optimization config"
    for name, sentence in {
        "none.yaml": "none.yaml: no such file",
        "bad.yaml": rf"bad.yaml, line 1: {unreadable}",
        "binary.yaml": f"binary.yaml: {unreadable}",
        ".": unreadable,
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            ours.OptimizationConfig.from_yaml(tmp_path / name)
    with pytest.raises(ConfigTypeError):
        ours.OptimizationConfig.from_yaml(3)


@pytest.mark.parametrize(
    "settings",
    [
        {"global_config": "str"},
        {"op_type_configs": {"op": 123}},
        {"op_name_configs": {"name": []}},
        {"global_config": ours.OpPalettizerConfig},
    ],
    ids=repr,
)
def test_only_op_configs_are_taken(settings):
    with pytest.raises(ConfigError, match="config must be type of OpCompressorConfig"):
        ours.OptimizationConfig(**settings)


def test_a_setter_checks_what_the_constructor_checks():
    config = ours.OptimizationConfig()
    ratio = ours.OpMagnitudePrunerConfig(n_m_ratio=(2, 3))
    message = "block sparsity or n:m pruning does not support op type add"
    for attempt in (
        lambda: config.set_global(3),
        lambda: config.set_op_type("conv", 3),
        lambda: config.set_op_name("conv", 3),
        lambda: config.set_op_type(3, None),
        lambda: config.set_op_name(3, None),
        lambda: config.set_op_name("re:(", None),
        lambda: ours.OptimizationConfig(op_name_configs={"re:(": None}),
        lambda: ours.OptimizationConfig(op_type_configs=[1]),
    ):
        with pytest.raises(ConfigError):
            attempt()
    with pytest.raises(ConfigError, match=message):
        config.set_op_type("add", ratio)
    with pytest.raises(ConfigError, match=message):
        ours.OptimizationConfig(op_type_configs={"add": ratio})
    assert config == ours.OptimizationConfig()
    config.set_global(FOUR)
    config.set_op_type("conv", ratio)
    config.set_op_name("add_1", ratio)
    assert config == ours.OptimizationConfig(FOUR, {"conv": ratio}, {"add_1": ratio})


def test_a_setter_leaves_the_dictionaries_that_the_config_was_made_of():
    by_type: dict[str, Any] = {}
    by_name: dict[str, Any] = {}
    config = ours.OptimizationConfig(None, by_type, by_name)
    config.set_op_type("conv", FOUR)
    config.set_op_name("a", FOUR)
    assert by_type == by_name == {}


def test_the_name_of_a_weight_comes_before_its_ops_and_these_go_by_name_type_and_all():
    config = ours.OptimizationConfig(
        EIGHT, {"conv": TWO, "linear": None}, {"w": FOUR, "gone": None, "conv_1": FOUR}
    )
    assert config.config_for("w", []) is FOUR
    assert config.config_for("w", [("conv_9", "conv"), ("a", "add")]) is FOUR
    assert config.config_for("gone", [("conv_1", "conv")]) is None
    assert config.config_for("v", [("conv_1", "conv")]) is FOUR
    assert config.config_for("v", [("conv_2", "conv")]) is TWO
    assert config.config_for("v", [("fc", "linear")]) is None
    assert config.config_for("v", [("a", "add")]) is EIGHT
    assert config.config_for("v", []) is None
    assert config.is_explicit("w")
    assert config.is_explicit("gone")
    assert not config.is_explicit("v")


def test_ops_that_share_a_weight_must_agree():
    config = ours.OptimizationConfig(
        TWO, op_name_configs={"add_2": FOUR, "same": ours.OpPalettizerConfig(nbits=2)}
    )
    assert config.config_for("w", [("add_1", "add"), ("same", "add")]) == TWO
    with pytest.raises(ConfigError, match="compression config conflict detected between ops") as e:
        config.config_for("w", [("add_1", "add"), ("same", "add"), ("add_2", "add")])
    assert all(part in str(e.value) for part in ("add_1", "add_2", str(TWO), str(FOUR)))
    assert "same" not in str(e.value)
    config.set_op_name("add_2", None)
    with pytest.raises(ConfigError, match="conflict"):
        config.config_for("w", [("add_1", "add"), ("add_2", "add")])


def test_a_config_for_the_type_const_is_an_error_when_it_is_asked_for():
    config = ours.OptimizationConfig(op_type_configs={"const": FOUR}, op_name_configs={"w": TWO})
    message = "const ops cannot be set by the `set_op_type` function. Please use `set_global`"
    for children in ([], [("a", "add")]):
        assert config.config_for("w", children) is TWO
        with pytest.raises(ConfigError, match=message):
            config.config_for("v", children)


def test_a_name_comes_before_patterns_and_these_in_their_order():
    config = ours.OptimizationConfig(
        op_name_configs={"re:layer[12]_.*": TWO, "glob:*_weight": FOUR, "layer1_weight": None}
    )
    conv = [("conv", "conv")]
    assert config.config_for("layer1_weight", conv) is None
    assert config.config_for("layer2_weight", conv) is TWO
    assert config.config_for("layer3_weight", conv) is FOUR
    assert config.config_for("my_layer2_", conv) is None
    assert config.config_for("w", [("layer1_conv", "conv")]) is TWO
    assert config.is_explicit("layer3_weight")
    assert not config.is_explicit("my_layer2_")


def test_keys_that_nothing_answers_to_are_told():
    config = ours.OptimizationConfig(
        op_type_configs={"conv": TWO, "covn": TWO},
        op_name_configs={"w": TWO, "v": TWO, "re:w.": TWO, "re:w": TWO, "glob:c*": None},
    )
    assert config.unmatched(iter(["w", "conv_1"]), ["conv", "add"]) == ["covn", "v", "re:w."]


@pytest.mark.parametrize(
    "config",
    [
        ours.OptimizationConfig(EIGHT),
        ours.OptimizationConfig(op_type_configs={"op": EIGHT}),
        ours.OptimizationConfig(FOUR, op_name_configs={"name": EIGHT}),
    ],
)
def test_a_config_of_the_wrong_class_is_an_error(config):
    with pytest.raises(ConfigError) as caught:
        config.check_types(
            ours.OpMagnitudePrunerConfig, ours.OpPalettizerConfig, function="prune_weights"
        )
    assert str(caught.value) == (
        "prune_weights only accept OpMagnitudePrunerConfig, OpPalettizerConfig type config. "
        "Got OpLinearQuantizerConfig."
    )
    config.check_types(ours.OpLinearQuantizerConfig, ours.OpPalettizerConfig, function="any")


def test_structural_pruning_is_for_the_weights_of_conv_and_linear():
    structural = ours.OpMagnitudePrunerConfig(target_sparsity=0.5, block_size=2)
    plain = ours.OpMagnitudePrunerConfig(target_sparsity=0.5)
    assert structural.supports("conv", "weight")
    assert not structural.supports("conv", "bias")
    assert not structural.supports("matmul", "y")
    assert plain.supports("matmul", "y")
    assert FOUR.supports("matmul", "y")


# --- configs of coremltools -----------------------------------------------------------------------


def lut_function(weight):
    return [0.0], [0] * weight.size


def test_a_config_of_coremltools_is_adopted_field_by_field():
    config = theirs.OptimizationConfig(
        global_config=theirs.OpPalettizerConfig(mode="custom", lut_function=lut_function),
        op_type_configs={
            "conv": theirs.OpLinearQuantizerConfig(
                mode="linear", dtype=types.uint4, granularity="per_block", block_size=[1, 32]
            ),
            "add": None,
        },
        op_name_configs={
            "a": theirs.OpMagnitudePrunerConfig(n_m_ratio=[1, 2], weight_threshold=None),
            "b": theirs.OpThresholdPrunerConfig(threshold=0.5),
        },
    )
    assert adopted(config) == ours.OptimizationConfig(
        global_config=ours.OpPalettizerConfig(mode="custom", lut_function=lut_function),
        op_type_configs={
            "conv": ours.OpLinearQuantizerConfig(
                mode="linear", dtype="uint4", granularity="per_block", block_size=(1, 32)
            ),
            "add": None,
        },
        op_name_configs={
            "a": ours.OpMagnitudePrunerConfig(n_m_ratio=(1, 2)),
            "b": ours.OpThresholdPrunerConfig(threshold=0.5),
        },
    )


@pytest.mark.parametrize(("kind", "settings"), CASES, ids=repr)
def test_an_op_config_of_coremltools_is_adopted_for_all_weights(kind, settings):
    given = result(getattr(theirs, kind), **settings)
    if not isinstance(given, Exception):
        expected = ours.OptimizationConfig(getattr(ours, kind)(**settings))
        assert adopted(given) == expected


def test_ours_is_adopted_as_it_is():
    config = ours.OptimizationConfig(FOUR)
    assert adopted(config) is config
    assert adopted(FOUR) == config


def test_a_subclass_of_coremltools_config_is_adopted():
    class Mine(theirs.OpPalettizerConfig):
        pass

    assert adopted(Mine(nbits=4)) == ours.OptimizationConfig(FOUR)


@pytest.mark.parametrize("config", [1, "12", [12, 3], None, theirs.OpPalettizerConfig, object()])
def test_anything_else_is_not_adopted(config):
    with pytest.raises(ConfigError, match="config must be of type OptimizationConfig") as caught:
        adopted(config)
    assert str(type(config)) in str(caught.value)


def test_what_coremltools_cannot_use_is_refused_when_adopted():
    with pytest.raises(ConfigError, match="group_size must be at least 0"):
        adopted(theirs.OpPalettizerConfig(nbits=4, group_size=-1))
