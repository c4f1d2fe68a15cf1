"""Packages that tests share, each written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
from small_models import PROGRAMS, save

import milpress
from milpress import formats as f
from milpress.recipe import Recipe, Step

Build = Callable[..., Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return a function that builds the model of a kind, once for each kind, target and dtype."""
    folder = tmp_path_factory.mktemp("models")
    built: dict[Any, Path] = {}

    def make(kind: str, target: str = "iOS18", dtype: str = "fp16") -> Path:
        key = (kind, target, dtype)
        if key not in built:
            path = folder / f"{kind}-{target}-{dtype}.mlpackage"
            program = PROGRAMS[kind](target, np.float16 if dtype == "fp16" else np.float32)
            built[key] = save(program, path, target)
        return built[key]

    return make


@pytest.fixture(scope="session")
def shared_pipeline(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models alike, the second of which takes what the first gives."""
    path = tmp_path_factory.mktemp("pipeline") / "source.mlpackage"
    models = [ct.models.MLModel(str(build("shared", dtype="fp32")), skip_model_load=True)] * 2
    spec = models[1].get_spec()
    middle = spec.description.output[0].name
    ct.utils.rename_feature(spec, "x", "between", rename_outputs=False)
    ct.utils.rename_feature(spec, middle, "z", rename_inputs=False)
    ct.utils.rename_feature(spec, "between", middle, rename_outputs=False)
    second = ct.models.MLModel(spec, weights_dir=models[1].weights_dir, skip_model_load=True)
    ct.utils.make_pipeline(models[0], second).save(str(path))
    return path


@pytest.fixture(scope="session")
def made(
    build: Build, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """Return a function that gives a model and what steps make of it, each made once."""
    folder = tmp_path_factory.mktemp("made")
    found: dict[Any, tuple[Path, Path]] = {}

    def make(kind: str, *steps: f.Treatment, target: str = "iOS18") -> tuple[Path, Path]:
        key = (kind, steps, target)
        if key not in found:
            source, out = build(kind, target), folder / f"{len(found)}.mlpackage"
            recipe = Recipe(steps=tuple(Step(treatment=step) for step in steps))
            milpress.compress(source, out, recipe)
            found[key] = source, out
        return found[key]

    return make
