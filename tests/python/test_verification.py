"""Packages that were tampered with, each of which verification refuses in its words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest

import milpress
from milpress import formats as f
from milpress.errors import VerificationError
from milpress.formats import sparse
from milpress.mil import treatments
from milpress.mil.package import Package
from milpress.verification import compare_packages

# Pruning

STRUCTURES = {
    "runs": f.PruneConfig(n_m=(2, 4)),
    "runs of outputs": f.PruneConfig(n_m=(1, 3), axis=0),
    "blocks": f.PruneConfig(sparsity=0.5, block_size=2),
    "blocks of inputs": f.PruneConfig(sparsity=0.5, block_size=4, axis=1),
    "sparsity": f.PruneConfig(sparsity=0.5),
    "threshold": f.PruneConfig(threshold=0.05),
}


def keep_nothing(array: np.ndarray, *_: Any) -> np.ndarray:
    return np.zeros((array.size + 7) // 8, np.uint8)


def keep_the_first(array: np.ndarray, *_: Any) -> np.ndarray:
    """Keep two of four, whatever they are."""
    mask = np.resize(np.uint8([1, 1, 0, 0]), array.size) & (array.reshape(-1) != 0)
    return np.packbits(mask, bitorder="little")


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kernel", [keep_nothing, keep_the_first])
def test_what_a_broken_kernel_pruned_does_not_verify(
    structure, kernel, build, tmp_path, monkeypatch
):
    source, recipe = build("layers"), milpress.Recipe.of(STRUCTURES[structure], name="glob:*lin*")
    milpress.compress(source, tmp_path / "right.mlpackage", recipe)
    (check,) = milpress.verify(source, tmp_path / "right.mlpackage").weights
    assert check.promise == "pruned"
    monkeypatch.setattr(sparse, "kept", kernel)
    with pytest.raises(VerificationError, match=r"linear_weight_0: .*(zero|pruned)"):
        milpress.compress(source, tmp_path / "out.mlpackage", recipe)
    assert not (tmp_path / "out.mlpackage").exists()


def edited(package: Path, change: Callable[[Package], Any]) -> Package:
    """Return a package whose model was changed in memory."""
    changed = Package(package)
    change(changed)
    return Package(package, model_bytes=changed.model.SerializeToString(deterministic=True))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_without_a_record_is_known_that_the_rest_of_a_pruned_weight_is_as_it_was(
    structure, build, tmp_path
):
    source, out = build("shared"), tmp_path / "out.mlpackage"
    milpress.compress(source, out, milpress.Recipe.of(STRUCTURES[structure]))
    bare = edited(out, lambda package: treatments.forget(package.model))
    checks = compare_packages(Package(source), bare).weights
    assert {check.promise for check in checks} == {"pruned"}


THEIRS = {
    "sparsity": cto.OpMagnitudePrunerConfig(target_sparsity=0.5),
    "runs": cto.OpMagnitudePrunerConfig(n_m_ratio=(2, 4)),
    "blocks": cto.OpMagnitudePrunerConfig(target_sparsity=0.5, block_size=2),
    "threshold": cto.OpThresholdPrunerConfig(threshold=0.05, minimum_sparsity_percentile=0.0),
}


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize(
    ("coding", "promise"),
    [(f.PalettizeConfig(bits=4), "nearest"), (f.QuantizeConfig(), "half_step")],
)
def test_codes_of_what_coremltools_pruned_are_held_to_what_is_promised(
    kind, coding, promise, build, tmp_path
):
    source, out = tmp_path / "theirs.mlpackage", tmp_path / "out.mlpackage"
    model = ct.models.MLModel(str(build("shared")), skip_model_load=True)
    cto.prune_weights(model, cto.OptimizationConfig(THEIRS[kind])).save(str(source))
    milpress.compress(source, out, milpress.Recipe.of(coding))
    assert {check.promise for check in milpress.verify(source, out).weights} == {promise}
