"""Weights that are used, or stored, for several: what they are asked for differs."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from command_line import failed
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from oracles import decoded
from small_models import TARGETS, save, weight

import milpress
from milpress import coreml
from milpress.coreml import (
    OpLinearQuantizerConfig,
    OpMagnitudePrunerConfig,
    OpPalettizerConfig,
    OpThresholdPrunerConfig,
    OptimizationConfig,
)
from milpress.errors import ConfigError, UnsupportedError

ROWS = (200, 64)
EIGHT, FOUR = OpPalettizerConfig(nbits=8), OpPalettizerConfig(nbits=4)


def language_model(folder: Path, name: str = "tied") -> Path:
    """An embedding, a layer, and a head whose weight is the embedding."""

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(5,), dtype=types.int32)],
        opset_version=TARGETS["iOS18"],
    )
    def prog(ids: Any) -> Any:
        words = mb.const(val=weight(*ROWS), name="words")
        rows = mb.gather(x=words, indices=ids, axis=0, validate_indices=False, name="rows")
        x = mb.linear(x=rows, weight=weight(64, 64, seed=1), name="inner")
        return mb.linear(x=x, weight=words, name="head")

    return save(prog, folder / f"{name}.mlpackage", "iOS18")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model(tmp_path_factory.mktemp("tied"))


# A function, two settings of which the first keeps more; `None` is to leave a weight.
PAIRS: dict[str, tuple[Any, Any, Any]] = {
    "quantize or not": (coreml.linear_quantize_weights, None, OpLinearQuantizerConfig()),
    "palettize or not": (coreml.palettize_weights, None, FOUR),
    "prune or not": (
        coreml.prune_weights,
        None,
        OpMagnitudePrunerConfig(target_sparsity=0.5),
    ),
    "8 or 4 bits": (coreml.palettize_weights, EIGHT, FOUR),
    "groups or not": (
        coreml.palettize_weights,
        OpPalettizerConfig(nbits=4, granularity="per_grouped_channel", group_size=8),
        FOUR,
    ),
    "int8 or int4": (
        coreml.linear_quantize_weights,
        OpLinearQuantizerConfig(granularity="per_tensor"),
        OpLinearQuantizerConfig(dtype="int4", granularity="per_block", block_size=32),
    ),
    "half or three quarters": (
        coreml.prune_weights,
        OpMagnitudePrunerConfig(target_sparsity=0.5),
        OpMagnitudePrunerConfig(target_sparsity=0.75),
    ),
    "thresholds": (
        coreml.prune_weights,
        OpThresholdPrunerConfig(threshold=0.01, minimum_sparsity_percentile=0),
        OpThresholdPrunerConfig(threshold=0.1, minimum_sparsity_percentile=0),
    ),
}
PLACES = {
    "types": lambda gather, linear: {"op_type_configs": {"gather": gather, "linear": linear}},
    "names": lambda gather, linear: {"op_name_configs": {"rows": gather, "head": linear}},
    "global": lambda gather, linear: {
        "global_config": linear,
        "op_name_configs": {"rows": gather},
    },
}


def named(report: Any) -> dict[str, Any]:
    return {each.name: each for each in report.weights}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("pair", PAIRS)
def test_the_stricter_of_two_configs_wins_and_the_report_says_so(tied, tmp_path, pair, place):
    call, more, less = PAIRS[pair]
    alone = None
    if more is not None:
        call(tied, OptimizationConfig(more), destination=tmp_path / "alone")
        alone = decoded(tmp_path / "alone")
    source = decoded(tied)
    for i, (gather, linear) in enumerate([(more, less), (less, more)]):
        out = tmp_path / f"{i}"
        config = OptimizationConfig(**PLACES[place](gather, linear))
        report = named(call(tied, config, destination=out).compression_report)
        assert report["words"].status == ("left" if more is None else "compressed")
        winner, loser = ("gather rows", "linear head") if i == 0 else ("linear head", "gather rows")
        assert f"as {winner} asks; {loser} asks for " in report["words"].note
        (found,) = [value for name, value in decoded(out).items() if name.startswith("words")]
        expected = source if alone is None else alone
        (same,) = [value for name, value in expected.items() if name.startswith("words")]
        np.testing.assert_array_equal(found, same)
        milpress.verify(tied, out)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_error_gives_the_line_that_settles_it(tied, tmp_path, pair):
    call, more, less = PAIRS[pair]
    settings: dict[str, Any] = {"global_config": less, "op_type_configs": {"gather": more}}
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="compression config conflict") as error:
        call(tied, OptimizationConfig(**settings), destination=out, on_unsupported="error")
    assert not out.exists()
    assert "words" in str(error.value)
    (line,) = re.findall(r"op_name_configs=(\{.*?\})", str(error.value))
    chosen = ast.literal_eval(line)
    assert chosen == {"words": None}
    made = call(
        tied,
        OptimizationConfig(**settings, op_name_configs=chosen),
        destination=out,
        on_unsupported="error",
    )
    assert named(made.compression_report)["words"].status == "not asked"


def test_settings_that_come_to_the_same_are_no_conflict(tied):
    config = OptimizationConfig(
        OpPalettizerConfig(nbits=4, num_kmeans_workers=2, weight_threshold=100),
        op_type_configs={"gather": FOUR},
    )
    made = coreml.palettize_weights(tied, config, on_unsupported="error")
    assert named(made.compression_report)["words"].status == "compressed"
    # Neither is for weights of this size.
    config = OptimizationConfig(
        OpPalettizerConfig(nbits=4, weight_threshold=200 * 64),
        op_type_configs={"gather": OpPalettizerConfig(nbits=8, weight_threshold=200 * 64)},
    )
    made = coreml.palettize_weights(tied, config, on_unsupported="error")
    assert named(made.compression_report)["words"].status == "not asked"


def test_a_threshold_that_a_weight_does_not_reach_is_a_request_to_leave_it(tied):
    config = OptimizationConfig(
        FOUR, op_type_configs={"gather": OpPalettizerConfig(nbits=4, weight_threshold=200 * 64)}
    )
    made = named(coreml.palettize_weights(tied, config).compression_report)
    assert made["words"].status == "left"
    assert "as gather rows asks" in made["words"].note


@pytest.mark.parametrize("stricter", ["gather", "linear"])
def test_a_group_that_does_not_divide_is_left_if_either_says_so(tied, stricter):
    groups: dict[str, Any] = {"nbits": 4, "granularity": "per_grouped_channel", "group_size": 48}
    config = OptimizationConfig(
        OpPalettizerConfig(**groups, on_indivisible="divisor"),
        op_type_configs={stricter: OpPalettizerConfig(**groups, on_indivisible="leave")},
    )
    made = named(coreml.palettize_weights(tied, config).compression_report)
    assert made["words"].status == "left"


def test_a_threshold_and_a_sparsity_leave_the_weight(tied):
    config = OptimizationConfig(
        OpMagnitudePrunerConfig(target_sparsity=0.5),
        op_type_configs={"gather": OpThresholdPrunerConfig(threshold=0.05)},
    )
    made = named(coreml.prune_weights(tied, config).compression_report)
    assert made["words"].status == "left"
    assert "can't be told" in made["words"].note


BY_TYPE = {
    "linear": {"op_types": ["linear"], "palettize": {"bits": 4}},
    "gather": {"op_types": ["gather"], "palettize": {"bits": 8}},
    "kept": {"op_types": ["gather"], "keep": True},
}


def recipe(*steps: Any) -> milpress.Recipe:
    return milpress.Recipe.from_dict({"steps": list(steps)})


@pytest.mark.parametrize(
    ("rules", "note", "is_settled"),
    [
        (["linear", "gather"], "palettize 8 bits, as gather rows asks; linear head asks for", True),
        (["linear", "kept"], "left, as gather rows asks; linear head asks for", True),
        # As the first rule that matches says already.
        (
            ["gather", "linear"],
            "palettize 8 bits, as gather rows asks; linear head asks for",
            False,
        ),
    ],
)
def test_the_stricter_of_two_rules_wins(tied, tmp_path, rules, note, is_settled):
    made = recipe({"rules": [BY_TYPE[rule] for rule in rules]})
    report = named(milpress.compress(tied, tmp_path / "out.mlpackage", made))
    assert report["words"].note.startswith(note)
    assert report["words"].status == ("left" if "kept" in rules else "compressed")
    assert report["inner_weight_0"].note == ""
    strict = tmp_path / "strict.mlpackage"
    if is_settled:
        with pytest.raises(ConfigError, match=r"\{name: words, keep: true\}"):
            milpress.compress(tied, strict, made, on_unsupported="error")
        assert not strict.exists()
    else:
        milpress.compress(tied, strict, made, on_unsupported="error")


def test_a_rule_for_larger_weights_alone_is_a_request_to_leave_smaller_ones(tied, tmp_path):
    rules = [BY_TYPE["linear"], {**BY_TYPE["gather"], "min_size": 200 * 64 + 1}]
    report = named(milpress.compress(tied, tmp_path / "out.mlpackage", recipe({"rules": rules})))
    assert report["words"].status == "left"
    assert report["words"].note.startswith("left, as gather rows asks; linear head asks for")


def test_a_rule_by_name_settles_it(tied, tmp_path):
    first = {"name": "words", "palettize": {"bits": 2}}
    made = recipe({"rules": [first, BY_TYPE["linear"], BY_TYPE["kept"]]})
    out = tmp_path / "out.mlpackage"
    report = named(milpress.compress(tied, out, made, on_unsupported="error"))
    assert (report["words"].treatment, report["words"].note) == ("palettize 2 bits", "")


def test_ops_that_a_selection_does_not_name_ask_for_nothing(tied, tmp_path):
    made = recipe({"palettize": {"bits": 4}, "select": {"op_types": ["linear"]}})
    report = named(
        milpress.compress(tied, tmp_path / "out.mlpackage", made, on_unsupported="error")
    )
    assert (report["words"].status, report["words"].note) == ("compressed", "")


def test_each_step_is_settled_by_itself(tied, tmp_path):
    made = recipe(
        {"prune": {"sparsity": 0.5}},
        {"rules": [BY_TYPE["linear"], BY_TYPE["gather"]]},
    )
    report = named(milpress.compress(tied, tmp_path / "out.mlpackage", made))
    assert report["words"].treatment == "prune 50%, then palettize 8 bits"


def test_the_command_line_says_how_to_settle_it(tied, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe({"rules": [BY_TYPE["linear"], BY_TYPE["kept"]]}).to_yaml())
    out = tmp_path / "out.mlpackage"
    line = failed("compress", tied, out, "--recipe", path, "--strict")
    assert "{name: words, keep: true}" in line
    assert not out.exists()


@pytest.fixture
def functions(tied, tmp_path) -> Path:
    description = ct.utils.MultiFunctionDescriptor()
    for name in ("one", "two"):
        description.add_function(str(tied), "main", name)
    description.default_function_name = "one"
    path = tmp_path / "functions.mlpackage"
    ct.utils.save_multifunction(description, str(path))
    return path


def n_weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("weight.bin"))


def test_functions_that_share_a_weight_get_the_stricter_treatment(functions, tied, tmp_path):
    made = recipe(
        {
            "palettize": {"bits": 4},
            "rules": [{"name": "glob:two/*", "palettize": {"bits": 8}}],
        }
    )
    out, alone = tmp_path / "out.mlpackage", tmp_path / "alone.mlpackage"
    report = named(milpress.compress(functions, out, made))
    assert {each.treatment for each in report.values() if each.treatment} == {"palettize 8 bits"}
    assert report["one/words"].note == (
        "stored once for one/words and two/words: palettize 8 bits, as two/words asks; one/words "
        "asks for palettize 4 bits"
    )
    assert report["two/words"].note == ""
    milpress.compress(tied, alone, recipe({"palettize": {"bits": 8}}))
    assert n_weight_bytes(out) == n_weight_bytes(alone)
    with pytest.raises(ConfigError, match=r"\{name: one/words, keep: true\}, \{name: two/words"):
        milpress.compress(functions, out, made, on_unsupported="error", force=True)


def test_a_weight_that_one_function_leaves_is_left(functions, tmp_path):
    rules = [{"name": "two/words", "keep": True}]
    made = recipe({"palettize": {"bits": 4}, "rules": rules})
    out = tmp_path / "out.mlpackage"
    report = named(milpress.compress(functions, out, made))
    assert report["one/words"].status == "left"
    assert "as two/words asks" in report["one/words"].note
    assert (
        report["one/inner_weight_0"].status == report["two/inner_weight_0"].status == "compressed"
    )
    assert n_weight_bytes(out) < n_weight_bytes(functions)


def test_a_weight_that_one_function_can_not_have_treated_is_left(tmp_path):
    @mb.program(
        input_specs=[mb.TensorSpec(shape=(5,), dtype=types.int32)], opset_version=TARGETS["iOS18"]
    )
    def embedding(ids: Any) -> Any:
        return mb.gather(x=weight(*ROWS), indices=ids, axis=0, validate_indices=False, name="y")

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(5, 64), dtype=types.fp16)],
        opset_version=TARGETS["iOS18"],
    )
    def head(x: Any) -> Any:
        return mb.linear(x=x, weight=weight(*ROWS), name="y")

    description = ct.utils.MultiFunctionDescriptor()
    for prog in (embedding, head):
        name = "embedding" if prog is embedding else "head"
        path = save(prog, tmp_path / f"{name}.mlpackage", "iOS18")
        description.add_function(str(path), "main", name)
    description.default_function_name = "head"
    source = tmp_path / "functions.mlpackage"
    ct.utils.save_multifunction(description, str(source))
    # Of embeddings, coremltools prunes no runs.
    made = coreml.prune_weights(
        source,
        OptimizationConfig(OpMagnitudePrunerConfig(n_m_ratio=(2, 4))),
        destination=tmp_path / "out.mlpackage",
    )
    one, two = (each for each in made.compression_report.weights if each.shape == ROWS)
    assert {one.status, two.status} == {"left"}
    assert n_weight_bytes(tmp_path / "out.mlpackage") == n_weight_bytes(source)


def test_one_function_alone_can_not_be_compressed_where_all_is_shared(functions, tmp_path):
    made = recipe({"palettize": {"bits": 4}, "select": {"name": "glob:one/*"}})
    with pytest.raises(
        UnsupportedError, match=r"can be compressed \(one/words: stored once for one/words"
    ):
        milpress.compress(functions, tmp_path / "out.mlpackage", made)
