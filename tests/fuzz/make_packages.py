"""Writes the seeds of the package reader's fuzzer: small packages with every kind of stored weight.

Takes coremltools: ``.venv/bin/python tests/fuzz/make_packages.py``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil import types

import milpress
from milpress import formats as f
from milpress.recipe import Recipe, Rule, Select, Step

FOLDER = Path(__file__).parent / "corpus" / "packages"
MODEL = "Data/com.apple.CoreML/model.mlmodel"
TARGETS = {
    "iOS15": ct.target.iOS15,
    "iOS16": ct.target.iOS16,
    "iOS17": ct.target.iOS17,
    "iOS18": ct.target.iOS18,
}


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float16)
    values.reshape(-1)[::5] = 0
    return values


def linears(n: int) -> Callable[[str], Any]:
    """Layers whose weights have 16 inputs and outputs each, in a row."""

    def make(target: str) -> Any:
        spec = mb.TensorSpec(shape=(1, 16), dtype=types.fp16)

        @mb.program(input_specs=[spec], opset_version=TARGETS[target])
        def program(x: Any) -> Any:
            for i in range(n):
                x = mb.linear(x=x, weight=weight(16, 16, seed=i), name=f"layer{i}")
            return x

        return program

    return make


def branches(target: str) -> Any:
    """A convolution, a lookup, bounds, and a condition with weights inside and shared ones."""
    specs = [
        mb.TensorSpec(shape=(1, 8, 4, 4), dtype=types.fp16),
        mb.TensorSpec(shape=(1,), dtype=types.bool),
        mb.TensorSpec(shape=(2,), dtype=types.int32),
    ]

    @mb.program(input_specs=specs, opset_version=TARGETS[target])
    def program(x: Any, flag: Any, ids: Any) -> Any:
        both = mb.const(val=weight(12, 16, seed=7), name="both")
        settings = {"validate_indices": False} if target == "iOS17" else {}
        table = mb.gather(x=weight(12, 16, seed=8), indices=ids, axis=0, **settings)
        x = mb.conv(x=x, weight=weight(16, 8, 1, 1, seed=9), bias=weight(16), name="conv")
        x = mb.clip(x=mb.reduce_mean(x=x, axes=[2, 3]), alpha=np.float16(-1), beta=np.float16(1))
        x = mb.matmul(x=mb.add(x=x, y=table), y=both, transpose_y=True, name="product")
        return mb.cond(
            pred=mb.squeeze(x=flag),
            _true_fn=lambda: mb.matmul(x=x, y=both, name="again"),
            _false_fn=lambda: mb.linear(x=x, weight=weight(16, 12, seed=10), name="inner"),
        )

    return program


def save(program: Any, path: Path, target: str) -> Path:
    model = ct.convert(
        program,
        minimum_deployment_target=TARGETS[target],
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    model.save(str(path))
    return path


def treated(source: Path, name: str, *steps: f.Treatment | list[tuple[str, f.Treatment]]) -> None:
    made = []
    for step in steps:
        if isinstance(step, list):
            rules = tuple(
                Rule(select=Select(name=f"glob:{pattern}", min_size=0), treatment=t)
                for pattern, t in step
            )
            made.append(Step(rules=rules))
        else:
            made.append(Step(treatment=step, select=Select(min_size=0)))
    destination = FOLDER / f"{name}.mlpackage"
    report = milpress.compress(source, destination, Recipe(steps=tuple(made)), force=True)
    print(name, [weight.status for weight in report.weights])


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.iterdir():
        shutil.rmtree(old)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        save(branches("iOS15"), FOLDER / "branches-iOS15.mlpackage", "iOS15")
        save(branches("iOS17"), FOLDER / "branches-iOS17.mlpackage", "iOS17")
        early = save(linears(3)("iOS16"), folder / "early.mlpackage", "iOS16")
        late = save(linears(5)("iOS18"), folder / "late.mlpackage", "iOS18")
        few = save(linears(2)("iOS18"), folder / "few.mlpackage", "iOS18")
        treated(
            early,
            "early-iOS16",
            [
                ("*layer0*", f.PalettizeConfig(bits=2)),
                ("*layer1*", f.QuantizeConfig(dtype="uint8", offset=True)),
                ("*layer2*", f.PruneConfig(sparsity=0.5)),
            ],
        )
        treated(
            late,
            "each-iOS18",
            [
                ("*layer0*", f.PalettizeConfig(bits=3, group_size=8)),
                ("*layer1*", f.PalettizeConfig(bits=2, vector_size=2)),
                ("*layer2*", f.QuantizeConfig(dtype="int4", granularity=f.PerBlock(8))),
                ("*layer3*", f.QuantizeConfig(dtype="uint8", offset=True)),
                ("*layer4*", f.PruneConfig(sparsity=0.5)),
            ],
        )
        treated(
            few, "pruned-palettized-iOS18", f.PruneConfig(sparsity=0.5), f.PalettizeConfig(bits=2)
        )
        treated(few, "pruned-quantized-iOS18", f.PruneConfig(sparsity=0.5), f.QuantizeConfig())
        treated(few, "palettized-quantized-iOS18", f.PalettizeConfig(bits=4), f.QuantizeConfig())
        describe = ct.utils.MultiFunctionDescriptor()
        describe.add_function(str(few), "main", "one")
        describe.add_function(str(few), "main", "two")
        describe.default_function_name = "one"
        ct.utils.save_multifunction(describe, str(FOLDER / "functions-iOS18.mlpackage"))
    # Identifiers are drawn anew each time; without them the seeds stay the same.
    for package in sorted(FOLDER.iterdir()):
        manifest = package / "Manifest.json"
        data = json.loads(manifest.read_text())
        for i, (key, entry) in enumerate(sorted(data["itemInfoEntries"].items(), key=str)):
            del data["itemInfoEntries"][key]
            data["itemInfoEntries"][f"item{i}"] = entry
            if data["rootModelIdentifier"] == key:
                data["rootModelIdentifier"] = f"item{i}"
        manifest.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
