"""Which device kernels run on, where there is none but the CPU."""

from __future__ import annotations

import logging
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import milpress
import milpress._core as _core
from milpress import formats as f
from milpress.cli import root
from milpress.errors import ConfigError
from milpress.kernels.device import Kernels, devices, kernels_for, using

WEIGHT = (np.random.default_rng(3).standard_normal((16, 32)) / 8).astype(np.float16)


@pytest.fixture
def broken_gpu(monkeypatch):
    """Let a GPU be there that passes its test and then refuses the one kernel it is asked for."""

    def refuse(*arguments):
        raise _core.metal.DeviceError("out of memory")

    refuse.__name__ = "quantize"
    monkeypatch.setattr(_core.metal, "device", lambda: ("some GPU", ""))
    monkeypatch.setattr(_core.metal, "self_test", lambda: "")
    monkeypatch.setattr(_core.metal, "quantize", refuse)
    devices.cache_clear()
    yield
    devices.cache_clear()


@pytest.mark.skipif(sys.platform == "darwin", reason="there may be a GPU")
def test_without_metal_the_reason_is_told():
    cpu, metal = milpress.devices()
    assert (cpu.name, cpu.is_usable) == ("cpu", True)
    assert (metal.name, metal.reason) == ("metal", "milpress was built without Metal")


def test_a_device_that_fails_its_self_test_is_not_used(monkeypatch):
    monkeypatch.setattr(_core.metal, "device", lambda: ("some GPU", ""))
    monkeypatch.setattr(_core.metal, "self_test", lambda: "lut_assign_half differs from the CPU")
    devices.cache_clear()
    try:
        kernels = Kernels("metal")
        np.testing.assert_array_equal(
            kernels.dispatch(_core.quantize)(WEIGHT, -127, 127, False)[0],
            _core.quantize(WEIGHT, -127, 127, False)[0],
        )
    finally:
        devices.cache_clear()
    assert kernels.notes == ("all kernels ran on the CPU: lut_assign_half differs from the CPU",)


def test_a_kernel_that_the_gpu_refuses_runs_on_the_cpu_with_the_reason(broken_gpu, caplog):
    with caplog.at_level(logging.WARNING), using("metal") as kernels:
        value = f.quantize(WEIGHT)
        f.quantize(WEIGHT)
    assert value.codes.tobytes() == f.quantize(WEIGHT).codes.tobytes()
    assert kernels.notes == ("quantize ran on the CPU: out of memory (2 times)",)
    assert [record.message for record in caplog.records] == [
        "quantize ran on the CPU: out of memory"
    ]


def test_the_report_says_what_the_gpu_did_not_do(broken_gpu, build, tmp_path):
    recipe = tmp_path / "int8.yaml"
    recipe.write_text("version: 1\nsteps:\n  - quantize: {dtype: int8}\n")
    source = build("layers")
    report = milpress.compress(source, tmp_path / "out.mlpackage", recipe, device="metal")
    assert any("quantize ran on the CPU: out of memory" in note for note in report.notes)
    plain = milpress.compress(source, tmp_path / "plain.mlpackage", recipe)
    assert plain.notes == ()


def test_auto_is_the_cpu_as_long_as_no_size_is_known_at_which_the_gpu_wins(broken_gpu):
    with using("auto") as kernels:
        f.quantize(WEIGHT)
    assert kernels.notes == ()


def test_a_device_of_another_name_is_refused():
    with pytest.raises(ConfigError, match=r"device must be one of .*, got 'gpu'"):
        f.quantize(WEIGHT, device="gpu")


def test_the_device_around_holds_for_the_block_alone(broken_gpu):
    with using("metal") as outer:
        assert kernels_for(None) is outer
        with using("cpu"):
            f.quantize(WEIGHT)
        assert outer.notes == ()
    assert kernels_for(None) is not outer


def test_another_thread_may_be_given_the_kernels(broken_gpu):
    with using("metal") as kernels, ThreadPoolExecutor(1) as pool:
        pool.submit(f.quantize, WEIGHT).result()
        assert kernels.notes == ()
        pool.submit(f.quantize, WEIGHT, device=kernels).result()
    assert kernels.notes == ("quantize ran on the CPU: out of memory",)


def test_the_command_line_takes_a_device(build, tmp_path, monkeypatch, capsys):
    arguments = ["compress", str(build("layers")), str(tmp_path / "out"), "--quantize", "int8"]
    monkeypatch.setattr(sys, "argv", ["milpress", *arguments, "--device", "gpu"])
    assert root.run() == 2
    assert "error: device must be one of" in capsys.readouterr().err
