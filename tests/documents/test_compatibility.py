"""docs/compatibility.md names all that coremltools.optimize offers, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import coremltools.optimize.coreml as reference
import coremltools.optimize.torch as torch_reference
import op_differences

import milpress as cto
from milpress import coreml

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
CONFIGS = [name for name in dir(reference) if name.startswith("Op") and name.endswith("Config")]


# The modules of coremltools.optimize.torch, and the classes whose fields and methods have rows.
TORCH_HOMES = (
    "base_model_optimizer",
    "optimization_config",
    "palettization",
    "quantization",
    "pruning",
    "layerwise_compression",
)
TORCH_CONFIGS = (
    "PostTrainingPalettizerConfig",
    "SKMPalettizerConfig",
    "PostTrainingQuantizerConfig",
    "MagnitudePrunerConfig",
    "DKMPalettizerConfig",
    "LinearQuantizerConfig",
)
TORCH_OPTIMIZERS = (
    "PostTrainingPalettizer",
    "SKMPalettizer",
    "PostTrainingQuantizer",
    "MagnitudePruner",
    "DKMPalettizer",
    "LayerwiseCompressor",
    "LinearQuantizer",
)
# Of layers, by algorithm: their names don't follow from that of the optimizer.
LAYER_CONFIGS = ("LayerwiseCompressorConfig", "ModuleGPTQConfig", "ModuleSparseGPTConfig")


def rows(part: str) -> dict[str, str]:
    text = PAGE.read_text().partition(f"# coremltools.optimize.{part}\n")[2]
    text = text.partition("\n# ")[0]
    found = re.findall(r"^\| `([\w.]+)` \| ([a-z ]+) \|", text, re.MULTILINE)
    assert len(dict(found)) == len(found)
    return dict(found)


def offered() -> set[str]:
    """Return every public name of coremltools, and the fields and methods of its configs."""
    names = {
        name
        for name in dir(reference)
        if not name.startswith("_") and (name.islower() or name.endswith(("Config", "MetaData")))
    }
    for name in CONFIGS:
        if name != "OptimizationConfig":
            names.discard(name)
            fields = attrs.fields(getattr(reference, name))
            names.update(f"{name}.{field.name}" for field in fields)
    methods = ("set_global", "set_op_type", "set_op_name", "from_dict", "from_yaml")
    return names | {f"OptimizationConfig.{method}" for method in methods}


def test_every_public_name_and_field_of_coremltools_has_a_row_and_no_other():
    assert set(rows("coreml")) == offered()


def test_what_a_row_calls_offered_is_there():
    for name, verdict in rows("coreml").items():
        assert verdict in ("same", "better", "different", "not offered")
        owner, _, member = name.partition(".")
        found = hasattr(coreml, owner)
        if found and member:
            config = getattr(coreml, owner)
            fields = {field.name for field in attrs.fields(config)}
            found = member in fields or hasattr(config, member)
        assert found == (verdict != "not offered"), name


def torch_home(name: str) -> str | None:
    """Return the module of coremltools.optimize.torch that a class belongs to."""
    return next(
        (home for home in TORCH_HOMES if hasattr(getattr(torch_reference, home), name)), None
    )


def torch_offered() -> set[str]:
    names = {
        name
        for home in TORCH_HOMES
        for name, value in vars(getattr(torch_reference, home)).items()
        if isinstance(value, type) and not name.startswith("_")
    }
    base = torch_reference.optimization_config.OptimizationConfig
    methods = [
        name for name in dir(base) if not name.startswith("_") and callable(getattr(base, name))
    ]
    names.update(f"OptimizationConfig.{name}" for name in methods)
    shared = {field.name for field in attrs.fields(base)}
    for config in TORCH_CONFIGS:
        home = getattr(torch_reference, torch_home(config))
        own = {field.name for field in attrs.fields(getattr(home, config))} - shared
        names.update(f"{config}.{field}" for field in own)
        names.discard(f"Module{config}")
        fields = attrs.fields(getattr(home, f"Module{config}"))
        names.update(f"Module{config}.{field.name}" for field in fields)
    for config in LAYER_CONFIGS:
        kind = getattr(torch_reference.layerwise_compression, config)
        own = {field.name for field in attrs.fields(kind)} - shared
        names.update(f"{config}.{field}" for field in own)
    names.add("LayerwiseCompressorConfig.get_layers")
    for optimizer in TORCH_OPTIMIZERS:
        home = getattr(torch_reference, torch_home(optimizer))
        members = vars(getattr(home, optimizer))
        names.update(f"{optimizer}.{name}" for name in members if not name.startswith("_"))
    return names


def test_every_public_name_of_coremltools_torch_has_a_row_and_no_other():
    assert set(rows("torch")) == torch_offered()


def test_what_a_row_of_torch_calls_offered_is_there():
    for name, verdict in rows("torch").items():
        assert verdict in ("same", "better", "different", "not offered")
        owner, _, member = name.partition(".")
        home = getattr(cto.torch, torch_home(owner), None)
        found = hasattr(home, owner)
        if found and member:
            kind = getattr(home, owner)
            fields = {field.name for field in attrs.fields(kind)} if attrs.has(kind) else set()
            found = member in fields or hasattr(kind, member)
        assert found == (verdict != "not offered"), name


def test_the_table_of_cases_of_ops_has_every_reason_that_is_listed_and_no_other():
    text = PAGE.read_text().partition("coremltools' tests of ops\n")[2]
    rows = dict(re.findall(r"^\| ([^|]+) \| ([\d,]+) \|$", text, re.MULTILINE))
    outcomes = {op_differences.PASSED, op_differences.SKIPPED, op_differences.EXCUSED}
    assert rows.keys() == outcomes | {*op_differences.EXPLAINED.values()}
    assert "0" not in rows.values()
