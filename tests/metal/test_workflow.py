"""The workflows on a build whose GPU is the fake: the same bytes as on the CPU.

Run with PYTHONPATH at such a build, see .ci/steps.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

import milpress
from milpress import formats as f
from milpress.kernels.device import using


def package_bytes(package: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(package)): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file()
    }


def test_the_gpu_passes_its_self_test():
    cpu, metal = milpress.devices()
    assert cpu.is_usable
    assert (metal.hardware, metal.reason) == ("fake M1", "")


RECIPES = {
    "palette": "palettize: {bits: 4}",
    "groups": "palettize: {bits: 4, group_size: 16}",
    "int4 blocks": "quantize: {dtype: int4, block_size: 16}",
    "int8": "quantize: {dtype: int8}",
    "sparse": "prune: {sparsity: 0.5}",
    "n:m": "prune: {n_m: [2, 4]}",
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_real_package_is_the_same_byte_for_byte(crepe_tiny, tmp_path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"version: 1\ntarget: iOS18\nsteps:\n  - {RECIPES[recipe]}\n")
    milpress.compress(crepe_tiny, tmp_path / "cpu.mlpackage", path)
    report = milpress.compress(crepe_tiny, tmp_path / "gpu.mlpackage", path, device="metal")
    assert package_bytes(tmp_path / "gpu.mlpackage") == package_bytes(tmp_path / "cpu.mlpackage")
    assert any("ran on fake M1" in note for note in report.notes)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_values_are_the_same_to_the_last_bit(dtype):
    weight = (np.random.default_rng(1).standard_normal((32, 96)) / 8).astype(dtype)
    weight[3] = 0
    weight[:, ::7] = dtype(0.125)
    searched = f.QuantizeConfig(dtype="int4", granularity=f.PerBlock(32), range="mse")
    on_cpu = f.quantize(weight, searched)
    on_gpu = f.quantize(weight, searched, device="metal")
    assert on_cpu.codes.tobytes() == on_gpu.codes.tobytes()
    assert on_cpu.scale.tobytes() == on_gpu.scale.tobytes()
    grouped = f.PalettizeConfig(bits=4, group_size=8)
    palette_cpu = f.palettize(weight, grouped)
    palette_gpu = f.palettize(weight, grouped, device="metal")
    assert palette_cpu.codes.tobytes() == palette_gpu.codes.tobytes()
    assert palette_cpu.entries.tobytes() == palette_gpu.entries.tobytes()
    pruned = f.PruneConfig(threshold=0.1)
    sparse_cpu = f.sparsify(weight, pruned)
    sparse_gpu = f.sparsify(weight, pruned, device="metal")
    assert sparse_cpu.bitmask.tobytes() == sparse_gpu.bitmask.tobytes()
    assert sparse_cpu.nonzeros.tobytes() == sparse_gpu.nonzeros.tobytes()


def test_what_the_gpu_has_no_kernel_for_runs_on_the_cpu_and_is_noted(caplog):
    weight = np.random.default_rng(2).standard_normal((16, 16)).astype(np.float32)
    with caplog.at_level(logging.WARNING), using("metal") as kernels:
        f.palettize(weight)  # float32
        f.sparsify(weight, f.PruneConfig(sparsity=0.5, block_size=2))
        f.sparsify(weight, f.PruneConfig(sparsity=0.5, block_size=2))
    notes = "\n".join(kernels.notes)
    assert "kmeans1d ran on the CPU: the GPU counts the distinct values of float16" in notes
    assert "keep_blocks ran on the CPU: the GPU has no such kernel (2 times)" in notes
    assert "lut_assign ran on fake M1" in notes
    assert len(caplog.records) == 2
