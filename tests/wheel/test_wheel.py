"""An installed wheel by itself: only NumPy and pytest beside it."""

from __future__ import annotations

import platform
import subprocess
import sys

import numpy as np
import pytest

import milpress
import milpress._core as _core
from milpress import formats as f

WEIGHT = (np.random.default_rng(0).standard_normal((32, 64)) / 8).astype(np.float16)


def test_quantizing_stays_within_half_a_step():
    value = f.quantize(WEIGHT, f.QuantizeConfig(dtype="int4", granularity=f.PerBlock(32)))
    steps = np.repeat(value.scale.astype(np.float64), 32, axis=1)
    error = np.abs(value.dense().astype(np.float64) - WEIGHT)
    # Half a step, and half a last place of quotient and product: 2^-11 of the weight each.
    assert (error <= steps / 2 + 2.0**-10 * np.abs(WEIGHT) + 2.0**-24).all()


def test_every_index_names_the_nearest_entry():
    value = f.palettize(WEIGHT, f.PalettizeConfig(bits=4))
    entries = value.entries.reshape(-1).astype(np.float64)
    distance = np.abs(WEIGHT[..., None].astype(np.float64) - entries)
    chosen = np.take_along_axis(distance, value.codes[..., None].astype(np.intp), axis=-1)[..., 0]
    np.testing.assert_array_equal(chosen, distance.min(axis=-1))


def test_pruning_keeps_the_largest():
    value = f.sparsify(WEIGHT, f.PruneConfig(sparsity=0.5))
    kept = np.sort(np.abs(value.nonzeros))
    np.testing.assert_array_equal(kept, np.sort(np.abs(WEIGHT).reshape(-1))[WEIGHT.size // 2 :])


def test_the_command_line_starts():
    command = [sys.executable, "-m", "milpress", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"milpress {milpress.__version__}\n"


def test_the_gpu_is_built_in_on_apple_silicon_alone():
    hardware, reason = _core.metal.device()
    is_left_out = reason == "milpress was built without Metal"
    is_apple_silicon = sys.platform == "darwin" and platform.machine() == "arm64"
    assert is_left_out == (not is_apple_silicon)
    assert hardware or reason


def test_the_gpu_has_the_results_of_the_cpu():
    metal = milpress.devices()[1]
    print(f"metal: {metal.hardware or 'no GPU'}: {metal.reason or 'usable'}")
    hardware, gate = _core.metal.device()
    if gate:
        pytest.skip(f"the GPU does not pass the gate: {gate} {hardware}")
    assert metal.reason == ""
    on_cpu, on_gpu = (
        f.quantize(WEIGHT, f.QuantizeConfig(dtype="int4", range="mse"), device=device)
        for device in ("cpu", "metal")
    )
    assert on_cpu.codes.tobytes() == on_gpu.codes.tobytes()
    assert on_cpu.scale.tobytes() == on_gpu.scale.tobytes()
