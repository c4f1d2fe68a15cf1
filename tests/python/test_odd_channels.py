"""Numbers of channels that no group and no block divides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from oracles import assert_coremltools_agrees, stored
from small_models import TARGETS, save, weight

import milpress
from milpress import coreml
from milpress import formats as f
from milpress.errors import UnsupportedError
from milpress.recipe import Recipe

GROUPS = f.PalettizeConfig(bits=4, group_size=16)
BLOCKS = f.QuantizeConfig(dtype="int4", granularity=f.PerBlock(32))


def layer(path: Path, n_outputs: int, n_inputs: int) -> Path:
    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, n_inputs), dtype=types.fp16)],
        opset_version=TARGETS["iOS18"],
    )
    def prog(x: Any) -> Any:
        return mb.linear(x=x, weight=mb.const(val=weight(n_outputs, n_inputs), name="w"))

    return save(prog, path, "iOS18")


def treated(source: Path, treatment: Any) -> tuple[Any, Any]:
    """Return what a recipe made of the one weight, and what is said of it."""
    out = source.with_name("out.mlpackage")
    report = milpress.compress(source, out, Recipe.of(treatment, min_size=10), force=True)
    assert_coremltools_agrees(out)
    milpress.verify(source, out)
    (value,) = stored(out).values()
    (found,) = (w for w in report.weights if w.name == "w")
    assert found.status == "compressed"
    return value, found


@pytest.mark.parametrize("n", [97, 131, 1009])
def test_a_prime_number_of_outputs_gets_one_table(tmp_path, n):
    source = layer(tmp_path / "in.mlpackage", n, 24)
    value, found = treated(source, GROUPS)
    assert value.lut.shape == (1, 1, 16, 1)
    assert found.treatment == "palettize 4 bits"
    assert found.note == f"one table, as no group size from 2 to 16 divides {n} output channels"
    whole, _ = treated(source, f.PalettizeConfig(bits=4))
    np.testing.assert_array_equal(value.dense(), whole.dense())


def test_a_prime_number_of_outputs_keeps_its_scales(tmp_path):
    source = layer(tmp_path / "in.mlpackage", 97, 131)
    scaled = f.PalettizeConfig(bits=4, group_size=16, channel_scale=True)
    value, found = treated(source, scaled)
    assert value.lut.shape == (97, 1, 16, 1)
    assert found.note.startswith("one table, as no group size")


@pytest.mark.parametrize("n", [97, 131, 1009])
def test_a_prime_number_of_inputs_gets_a_scale_for_each_output(tmp_path, n):
    value, found = treated(layer(tmp_path / "in.mlpackage", 24, n), BLOCKS)
    assert value.scale.shape == (24, 1)
    assert found.treatment == "quantize int4, per channel"
    assert found.note == f"one block, as no block size from 2 to 32 divides {n} input channels"


def test_groups_are_a_multiple_of_vectors(tmp_path):
    pairs = f.PalettizeConfig(bits=4, group_size=16, vector_size=2)
    value, found = treated(layer(tmp_path / "in.mlpackage", 130, 64), pairs)
    assert value.lut.shape == (13, 1, 16, 2)
    assert found.note == "group size 10, as 16 does not divide 130 output channels"


def test_groups_made_so_small_that_tables_outgrow_the_weight_become_one(tmp_path):
    # 2 x 24 weights of float16 are 96 bytes, a table of 64 entries is 128.
    source = layer(tmp_path / "in.mlpackage", 2 * 97, 24)
    value, found = treated(source, f.PalettizeConfig(bits=6, group_size=16))
    assert value.lut.shape == (1, 1, 64, 1)
    assert found.note == (
        "one table, as those of group size 2, as 16 does not divide 194 output channels would be "
        "larger than the weight"
    )


def test_a_plan_from_groups_and_blocks_alone_reaches_prime_channels(tmp_path):
    source = layer(tmp_path / "in.mlpackage", 131, 97)
    for name in ("palette-4-group-16", "int4-block-32"):
        made = milpress.plan(source, target_bits=5.0, formats=[name], min_size=10, use_cache=False)
        assert {w.format for w in made.weights if w.name == "w"} == {name}
        out = tmp_path / f"{name}.mlpackage"
        report = milpress.compress(source, out, made.recipe)
        assert report.package_bytes_after == made.package_bytes


def test_the_face_of_coremltools_leaves_them_unless_asked_otherwise(tmp_path):
    source = layer(tmp_path / "in.mlpackage", 97, 131)
    for which, status in (("leave", "left"), ("divisor", "compressed")):
        groups = coreml.OpPalettizerConfig(
            nbits=4,
            granularity="per_grouped_channel",
            group_size=16,
            weight_threshold=10,
            on_indivisible=which,
        )
        blocks = coreml.OpLinearQuantizerConfig(
            dtype="int4",
            granularity="per_block",
            block_size=32,
            weight_threshold=10,
            on_indivisible=which,
        )
        for work, config in (
            (coreml.palettize_weights, groups),
            (coreml.linear_quantize_weights, blocks),
        ):
            model = ct.models.MLModel(str(source), skip_model_load=True)
            made = work(model, coreml.OptimizationConfig(config))
            (found,) = (w for w in made.compression_report.weights if w.name == "w")
            assert found.status == status


def test_blocks_of_one_element_become_whole_axes(tmp_path):
    source = layer(tmp_path / "in.mlpackage", 64, 97)
    config = coreml.OpLinearQuantizerConfig(
        dtype="int8",
        granularity="per_block",
        block_size=[1, 32],
        weight_threshold=10,
        on_indivisible="divisor",
    )
    out = tmp_path / "out.mlpackage"
    model = ct.models.MLModel(str(source), skip_model_load=True)
    coreml.linear_quantize_weights(model, coreml.OptimizationConfig(config)).save(str(out))
    (value,) = stored(out).values()
    assert value.scale.shape == (64, 1)
    assert_coremltools_agrees(out)


def test_strict_recipes_refuse_what_would_be_otherwise(tmp_path):
    source, out = layer(tmp_path / "in.mlpackage", 97, 24), tmp_path / "out.mlpackage"
    with pytest.raises(UnsupportedError, match="w: one table, as no group size from 2 to 16"):
        milpress.compress(source, out, Recipe.of(GROUPS, min_size=10), on_unsupported="error")
    assert not out.exists()
