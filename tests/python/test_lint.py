"""What is known of which weights run where: each fact fires where it must, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest
import yaml
from command_line import failed, run
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from small_models import TARGETS, save, weight

import milpress
from milpress import formats as f
from milpress.errors import ConfigError
from milpress.planner.facts import Facts, Platform
from milpress.planner.linting import warning
from milpress.recipe import Recipe, Step

PALETTE = f.PalettizeConfig(bits=4, group_size=16)
INT8 = f.QuantizeConfig()
BLOCKS = f.QuantizeConfig(dtype="int4", granularity=f.PerBlock(32))
PRUNED = f.PruneConfig(sparsity=0.5)


def one_linear(path: Path, target: str, *, dtype: type = np.float16) -> Path:
    element = types.fp16 if dtype is np.float16 else types.fp32

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 64), dtype=element)], opset_version=TARGETS[target]
    )
    def prog(x: Any) -> Any:
        return mb.linear(x=x, weight=weight(96, 64, dtype=dtype), name="y")

    return save(prog, path, target)


def with_states(path: Path) -> Path:
    @mb.program(
        input_specs=[
            mb.TensorSpec(shape=(1, 64), dtype=types.fp16),
            mb.StateTensorSpec((1, 96), dtype=types.fp16),
        ],
        opset_version=TARGETS["iOS18"],
    )
    def prog(x: Any, total: Any) -> Any:
        y = mb.linear(x=x, weight=weight(96, 64), name="y")
        return mb.add(x=mb.read_state(input=total), y=y, name="sum")

    return save(prog, path, "iOS18")


def with_quantized_activations(path: Path, target: str = "iOS17") -> Path:
    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 64), dtype=types.fp16)],
        opset_version=TARGETS[target],
    )
    def prog(x: Any) -> Any:
        scale = np.float16(0.05)
        x = mb.quantize(input=x, scale=scale, output_dtype="int8")
        x = mb.dequantize(input=x, scale=scale)
        return mb.linear(x=x, weight=weight(96, 64), name="y")

    return save(prog, path, target)


def scaled_by_coremltools(path: Path, target: str) -> Path:
    """Palettize with a scale for each channel as coremltools does, floats times a scale."""
    model = ct.models.MLModel(
        str(one_linear(path.with_name("plain.mlpackage"), target)), skip_model_load=True
    )
    config = cto.OpPalettizerConfig(nbits=2, enable_per_channel_scale=True)
    cto.palettize_weights(model, cto.OptimizationConfig(config)).save(str(path))
    return path


def compressed(source: Path, *treatments: Any) -> Path:
    out = source.with_name("compressed.mlpackage")
    recipe = Recipe(steps=tuple(Step(treatment=treatment) for treatment in treatments))
    milpress.compress(source, out, recipe, force=True)
    return out


def linear_with(*treatments: Any, target: str = "iOS18", dtype: type = np.float16) -> Any:
    def make(folder: Path) -> Path:
        source = one_linear(folder / "in.mlpackage", target, dtype=dtype)
        return compressed(source, *treatments) if treatments else source

    return make


def activations(*treatments: Any, target: str = "iOS17") -> Any:
    def make(folder: Path) -> Path:
        source = with_quantized_activations(folder / "in.mlpackage", target)
        return compressed(source, *treatments) if treatments else source

    return make


def states(*treatments: Any) -> Any:
    return lambda folder: compressed(with_states(folder / "in.mlpackage"), *treatments)


PALETTE_OF_INTEGERS = (f.PalettizeConfig(bits=4), f.QuantizeConfig(granularity=f.PerTensor()))
DENSE = linear_with()
# For each fact: a model that has the trait, and the platform; models and platforms without.
CASES: dict[str, tuple[Any, dict[str, str], list[tuple[Any, dict[str, str]]]]] = {
    "needs-ios16": (
        linear_with(INT8, target="iOS16"),
        {"os": "iOS15"},
        [(linear_with(INT8, target="iOS16"), {"os": "macOS13"}), (DENSE, {"os": "iOS15"})],
    ),
    "needs-ios17": (
        activations(),
        {"os": "iOS16"},
        [(activations(), {"os": "iOS17"}), (DENSE, {"os": "iOS16"})],
    ),
    "needs-ios18-bits": (
        linear_with(f.PalettizeConfig(bits=3)),
        {"os": "iOS17"},
        [
            (linear_with(f.PalettizeConfig(bits=3)), {"os": "iOS18"}),
            (linear_with(f.PalettizeConfig(bits=4)), {"os": "iOS17"}),
        ],
    ),
    "needs-ios18-groups": (
        linear_with(PALETTE),
        {"os": "macOS14"},
        [
            (linear_with(PALETTE), {"os": "macOS15"}),
            (linear_with(f.PalettizeConfig(bits=4)), {"os": "macOS14"}),
        ],
    ),
    "needs-ios18-tables": (
        linear_with(*PALETTE_OF_INTEGERS),
        {"os": "iOS17"},
        [
            (linear_with(*PALETTE_OF_INTEGERS), {}),
            (linear_with(PALETTE), {"os": "iOS17"}),
        ],
    ),
    "needs-ios18-int4": (
        linear_with(f.QuantizeConfig(dtype="int4")),
        {"os": "iOS17"},
        [
            (linear_with(f.QuantizeConfig(dtype="int4")), {"os": "iOS26"}),
            (linear_with(INT8), {"os": "iOS17"}),
        ],
    ),
    "needs-ios18-blocks": (
        linear_with(f.QuantizeConfig(granularity=f.PerBlock(16))),
        {"os": "iOS17"},
        [(linear_with(INT8), {"os": "iOS17"})],
    ),
    "needs-ios18-joint": (
        linear_with(PRUNED, f.PalettizeConfig(bits=4)),
        {"os": "iOS17"},
        [(linear_with(PRUNED), {"os": "iOS17"})],
    ),
    "scaled-floats-crash": (
        lambda folder: scaled_by_coremltools(folder / "scaled.mlpackage", "iOS18"),
        {"unit": "ane", "os": "macOS26"},
        [
            (
                lambda folder: scaled_by_coremltools(folder / "scaled.mlpackage", "iOS18"),
                {"unit": "ane", "os": "macOS15"},
            ),
            (
                lambda folder: scaled_by_coremltools(folder / "scaled.mlpackage", "iOS18"),
                {"unit": "gpu"},
            ),
            (linear_with(f.PalettizeConfig(bits=2, channel_scale=True)), {"os": "macOS26"}),
            (linear_with(BLOCKS), {"os": "macOS26"}),
        ],
    ),
    "blocks-leave-ane": (
        linear_with(BLOCKS),
        {"unit": "ane"},
        [(linear_with(f.QuantizeConfig(dtype="int4")), {}), (linear_with(BLOCKS), {"unit": "gpu"})],
    ),
    "blocks-wrong-on-ane": (
        linear_with(f.QuantizeConfig(granularity=f.PerBlock(32))),
        {"os": "iOS27"},
        [
            (linear_with(f.QuantizeConfig(granularity=f.PerBlock(32))), {"os": "iOS26"}),
            (linear_with(PALETTE), {"os": "iOS27"}),
        ],
    ),
    "signed-int8-before-ios18": (
        linear_with(INT8, target="iOS17"),
        {},
        [
            (linear_with(f.QuantizeConfig(dtype="uint8"), target="iOS17"), {}),
            (linear_with(INT8, target="iOS18"), {}),
        ],
    ),
    "palette4-stateful-crash": (
        states(PALETTE),
        {},
        [(linear_with(PALETTE), {}), (states(f.PalettizeConfig(bits=6)), {})],
    ),
    "small-groups-slow": (
        linear_with(f.PalettizeConfig(bits=2, group_size=2)),
        {"unit": "ane"},
        [
            (linear_with(f.PalettizeConfig(bits=2, group_size=4)), {}),
            (linear_with(f.PalettizeConfig(bits=2)), {}),
        ],
    ),
    "int8-tables-leave-ane": (
        linear_with(*PALETTE_OF_INTEGERS),
        {},
        [(linear_with(PALETTE), {}), (linear_with(INT8), {})],
    ),
    "float-tables-with-int8-activations": (
        activations(f.PalettizeConfig(bits=6)),
        {},
        [
            (activations(INT8), {}),
            (linear_with(f.PalettizeConfig(bits=6)), {}),
        ],
    ),
    "int8-activations-older-chips": (
        activations(),
        {"chip": "A16"},
        [
            (activations(), {"chip": "A17 Pro"}),
            (activations(), {"chip": "M4"}),
            (activations(), {}),
            (DENSE, {"chip": "A16"}),
        ],
    ),
    "int8-activations-off-ane": (
        activations(),
        {"unit": "cpu"},
        [(activations(), {"unit": "ane"}), (DENSE, {})],
    ),
    "palettes-on-gpu": (
        linear_with(PALETTE),
        {"unit": "gpu"},
        [(linear_with(BLOCKS), {}), (linear_with(PALETTE), {"unit": "ane"})],
    ),
    "vectors-of-large-tables-leave-ane": (
        linear_with(f.PalettizeConfig(bits=8, vector_size=2)),
        {"unit": "ane"},
        [
            (linear_with(f.PalettizeConfig(bits=6, vector_size=2)), {}),
            (linear_with(f.PalettizeConfig(bits=8)), {}),
        ],
    ),
    "vectors-in-groups-leave-ane": (
        linear_with(f.PalettizeConfig(bits=4, vector_size=2, group_size=16)),
        {"unit": "ane"},
        [
            (linear_with(f.PalettizeConfig(bits=4, vector_size=2)), {}),
            (linear_with(f.PalettizeConfig(bits=4, group_size=16)), {}),
        ],
    ),
    "vectors-on-older-ane": (
        linear_with(f.PalettizeConfig(bits=6, vector_size=2)),
        {"unit": "ane", "chip": "A17"},
        [
            (linear_with(f.PalettizeConfig(bits=6, vector_size=2)), {"chip": "M6"}),
            (linear_with(f.PalettizeConfig(bits=6, vector_size=2)), {"unit": "gpu"}),
            (linear_with(f.PalettizeConfig(bits=6)), {"chip": "A17"}),
        ],
    ),
    "float32-leaves-ane": (
        linear_with(dtype=np.float32),
        {"unit": "ane"},
        [(DENSE, {}), (linear_with(PALETTE, dtype=np.float32), {"unit": "cpu"})],
    ),
}


def firing(package: Path, **platform: str) -> set[str]:
    return {finding.fact.id for finding in milpress.lint(package, **platform).findings}


def test_every_fact_is_tried():
    assert CASES.keys() == Facts.load().by_id.keys()


@pytest.mark.parametrize("fact", CASES)
def test_a_fact_fires_on_a_model_that_has_the_trait_and_on_no_other(fact, tmp_path):
    model, platform, others = CASES[fact]
    assert fact in firing(model(tmp_path), **platform)
    for i, (other, elsewhere) in enumerate(others):
        folder = tmp_path / str(i)
        folder.mkdir()
        assert fact not in firing(other(folder), **elsewhere)


@pytest.mark.parametrize("fact", Facts.load().by_id.values(), ids=lambda fact: fact.id)
def test_a_fact_has_a_public_source_and_says_what_to_write_instead(fact):
    assert fact.says
    assert fact.instead
    for source in fact.sources:
        assert re.fullmatch(r"https://(apple\.github\.io|github\.com)/\S+", source)


@pytest.mark.parametrize("target", ["iOS18", "iOS26"])
def test_scales_of_coremltools_are_seen_in_both_of_its_forms(tmp_path, target):
    package = scaled_by_coremltools(tmp_path / "scaled.mlpackage", target)
    (finding,) = [
        one for one in milpress.lint(package).findings if one.fact.id == "scaled-floats-crash"
    ]
    assert (finding.traits.form, finding.traits.bits) == ("palette", 2)


def test_a_dense_float16_model_has_no_risk(crepe_tiny):
    found = milpress.lint(crepe_tiny)
    assert found.findings == ()
    assert "no risk is known" in found.summary


def test_no_weight_is_read(tmp_path):
    package = linear_with(BLOCKS)(tmp_path)
    (package / "Data/com.apple.CoreML/weights/weight.bin").write_bytes(b"")
    assert "blocks-leave-ane" in firing(package)


def test_a_device_stands_for_its_chip(tmp_path):
    package = activations()(tmp_path)
    fact = "int8-activations-older-chips"
    assert fact in firing(package, device="iPhone15,2")
    assert fact not in firing(package, device="iphone16,1")


def test_a_file_of_facts_refutes_changes_and_adds(tmp_path):
    package = linear_with(BLOCKS)(tmp_path)
    own = tmp_path / "own.yaml"
    own.write_text(
        yaml.safe_dump(
            {
                "version": 1,
                "chips": {"M4": ["Mac16,9"]},
                "facts": [
                    {"id": "blocks-leave-ane", "status": "refuted"},
                    {
                        "id": "ours",
                        "when": {"bits": 4, "used_by": ["linear"]},
                        "unit": "any",
                        "effect": "slow",
                        "says": "slow here",
                        "instead": "8 bits",
                        "status": "measured",
                        "sources": ["our.json"],
                    },
                ],
            }
        )
    )
    found = milpress.lint(package, facts=[own], device="Mac16,9")
    ids = {finding.fact.id for finding in found.findings}
    assert "ours" in ids
    assert "blocks-leave-ane" not in ids
    assert "slow here\n  instead: 8 bits\n  measured: our.json\n  weights: " in found.details


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"id": "new"}, r"facts\[0\]: when, unit, effect, says, instead, status, sources must be"),
        (
            {"id": "blocks-leave-ane", "unit": "npu"},
            r"facts\[0\]: unit must be one of ane, gpu",
        ),
        ({"id": "blocks-leave-ane", "effect": "bad"}, "effect must be one of"),
        ({"id": "blocks-leave-ane", "status": "true"}, "status must be one of"),
        ({"id": "blocks-leave-ane", "sources": []}, "sources must name"),
        ({"id": "blocks-leave-ane", "sources": "here"}, r"sources must be a list, got 'here'"),
        ({"id": "blocks-leave-ane", "when": {"colour": 1}}, "when must be conditions on"),
        ({"id": "blocks-leave-ane", "when": {"bits": {"under": 1}}}, "below or above"),
        ({"id": "blocks-leave-ane", "from_os": "Linux"}, "a system must be such as"),
        ({"id": "blocks-leave-ane", "before_chip": ["X1"]}, "a chip must be such as"),
        (
            {"id": "blocks-leave-ane", "wen": {}},
            r"facts\[0\]: unknown key wen; the keys are",
        ),
        ({"says": "no id"}, r"facts\[0\]: id, when, .* must be given"),
    ],
)
def test_a_wrong_fact_is_named(tmp_path, entry, message):
    path = tmp_path / "facts.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "facts": [entry]}))
    with pytest.raises(ConfigError, match=message) as caught:
        Facts.load(path)
    assert "facts.yaml" in str(caught.value) or "such as" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": "npu"}, "a compute unit must be one of"),
        ({"chip": "Z80"}, "a chip must be such as A17"),
        ({"os": "Windows11"}, "a system must be such as iOS18"),
        ({"device": "iPhone99,1"}, "a device must be"),
        ({"device": "iPhone15,2", "chip": "A16"}, "only one of device and chip"),
    ],
)
def test_a_wrong_platform_is_named(crepe_tiny, arguments, message):
    with pytest.raises(ConfigError, match=message):
        milpress.lint(crepe_tiny, **arguments)


def test_systems_of_one_autumn_are_one_generation():
    names = ("iOS18", "macOS15", "watchOS11", "visionOS2", "tvOS18", "iPadOS18.0.1")
    assert {Platform(os=name).generation for name in names} == {18.0}
    assert Platform(os="macOS26.1").generation == 26.1


def test_the_command_line_prints_facts_and_json(tmp_path):
    package = linear_with(BLOCKS)(tmp_path)
    shown = run("lint", package, "--unit", "ane", "--os", "iOS18").stdout
    assert "1 weight: 1 at risk (Neural Engine: runs elsewhere)" in shown
    assert "https://github.com/apple/coremltools/issues/2510" in shown
    run("lint", package, "--strict", code=1)
    assert "got 'Z80'" in failed("lint", package, "--chip", "Z80")


def test_compress_warns_in_one_line(tmp_path):
    source = one_linear(tmp_path / "in.mlpackage", "iOS18")
    out = tmp_path / "out.mlpackage"
    done = run("compress", source, out, "--quantize", "int4", "--block-size", 32)
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: 1 weight at risk (Neural Engine: ")
    assert run("compress", source, out, "--palettize", 4, "--force").stderr == ""
    assert warning(out) == ""
