"""Packages that are damaged or hostile, destinations that won't do, processes that die half way."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import milpress
from milpress import formats as f
from milpress.errors import (
    CompressionError,
    ConfigError,
    DestinationError,
    PackageError,
    PackageNotFoundError,
    StorageError,
    UnsupportedError,
)
from milpress.mil.package import MAX_MODEL_BYTES, Package

INT8 = milpress.Recipe.of(f.QuantizeConfig())
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


@pytest.fixture
def model(crepe_tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny CREPE that a test may damage."""
    path = tmp_path / "model.mlpackage"
    shutil.copytree(crepe_tiny, path)
    return path


def refused(source: Path, error: type[CompressionError], match: str, **options: Any) -> None:
    """Check that compressing fails so, with a short message, and leaves nothing behind."""
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(error, match=match) as caught:
        milpress.compress(source, source.parent / "out.mlpackage", INT8, **options)
    assert "\n" not in str(caught.value)
    assert sorted(source.parent.rglob("*")) == before


def test_a_missing_path_is_not_found(tmp_path):
    refused(tmp_path / "nothing.mlpackage", PackageNotFoundError, "no such package")


def test_a_folder_without_a_manifest_is_no_package(tmp_path):
    (tmp_path / "folder.mlpackage").mkdir()
    refused(
        tmp_path / "folder.mlpackage", PackageError, "not an .mlpackage, as it has no Manifest.json"
    )


def test_an_mlmodel_file_is_refused_with_advice(tmp_path):
    (tmp_path / "old.mlmodel").write_bytes(b"\x08\x04")
    refused(tmp_path / "old.mlmodel", PackageError, "convert it again.*mlprogram")


def test_a_neural_network_inside_a_package_is_refused_with_advice(model):
    # Field 500 (neuralNetwork), empty.
    (model / MODEL).write_bytes(b"\x08\x04" + bytes([0xA2, 0x1F, 0x00]))
    refused(model, PackageError, "neural network.*mlprogram")


@pytest.mark.parametrize("n_bytes", [0, 10, 63, 64, 200, 131_200, 900_000])
def test_a_truncated_weight_file_is_refused(model, n_bytes):
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[:n_bytes])
    refused(model, PackageError, r"weight\.bin, offset \d+: ")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        (0, struct.pack("<I", 0xDEADBEEE), "must begin with 0xdeadbeef, got 0xdeadbeee"),
        (4, struct.pack("<I", 99), "data type must be 1 to 17, got 99"),
        (4, struct.pack("<I", 2), r"declares float16\[128, 1, 512, 1\].*got type 2"),
        (8, struct.pack("<Q", 2**64 - 1), "must lie within the file"),
        (8, struct.pack("<Q", 131_070), "131072 bytes.*got type 1, 131070 bytes"),
        (16, struct.pack("<Q", 2**63), "must lie within the file"),
    ],
)
def test_a_corrupted_blob_header_is_refused_with_file_and_offset(model, field, value, match):
    data = bytearray((model / WEIGHTS).read_bytes())
    data[64 + field : 64 + field + len(value)] = value
    (model / WEIGHTS).write_bytes(data)
    refused(model, PackageError, match)


def edited(model: Path, change: Any) -> None:
    package = Package(model)
    change(package.model.mlProgram)
    (model / MODEL).write_bytes(package.model.SerializeToString())


def first_weight(program: Any) -> Any:
    (block,) = program.functions["main"].block_specializations.values()
    for op in block.operations:
        if op.type == "const" and op.attributes["val"].HasField("blobFileValue"):
            return op
    raise AssertionError


@pytest.mark.parametrize(
    "name",
    [
        "@model_path/../../../../etc/passwd",
        "/etc/passwd",
        "@model_path//etc/passwd",
        "@model_path/weights/../weights/weight.bin",
        "weights/weight.bin",
        "@model_path/weights/none.bin",
        "@model_path/weights",
        "@model_path/weights/\0",
        "",
    ],
)
def test_weight_files_outside_the_package_are_refused(model, name):
    def change(program: Any) -> None:
        first_weight(program).attributes["val"].blobFileValue.fileName = name

    edited(model, change)
    refused(
        model, PackageError, "must begin with @model_path/|stay inside|is missing in the package"
    )


@pytest.mark.parametrize("entry", ["../x", "/etc/passwd", "com.apple.CoreML/../../x", 7, None])
def test_a_manifest_that_points_elsewhere_is_refused(model, entry):
    manifest = json.loads((model / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = entry
    (model / "Manifest.json").write_text(json.dumps(manifest))
    refused(model, PackageError, "must stay inside|must be text")


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", "[" * 100_000, '{"a": NaN}'])
def test_a_manifest_that_is_none_is_refused(model, text):
    (model / "Manifest.json").write_text(text)
    refused(model, PackageError, "does not name the model's file")


@pytest.mark.parametrize("victim", [MODEL, WEIGHTS, "Manifest.json"])
def test_symbolic_links_are_refused(model, tmp_path, victim):
    elsewhere = tmp_path / "elsewhere"
    (model / victim).rename(elsewhere)
    (model / victim).symlink_to(elsewhere)
    refused(model, PackageError, "symbolic link")


def test_a_linked_extra_file_is_refused(model):
    (model / "Data" / "extra").symlink_to("/etc/passwd")
    refused(model, PackageError, "not a plain file")


def test_a_shape_that_does_not_match_the_payload_is_refused(model):
    def change(program: Any) -> None:
        value = first_weight(program).attributes["val"]
        value.type.tensorType.dimensions[0].constant.size = 2**62

    edited(model, change)
    refused(model, PackageError, "the model declares|must be")


def test_an_immediate_value_that_does_not_match_its_shape_is_refused(model):
    def change(program: Any) -> None:
        value = first_weight(program).attributes["val"]
        value.immediateValue.tensor.bytes.values = b"1234"

    edited(model, change)
    refused(model, PackageError, "must have 131072 bytes, got 4")


def test_a_value_that_nothing_defines_is_refused(model):
    def change(program: Any) -> None:
        (block,) = program.functions["main"].block_specializations.values()
        next(op for op in block.operations if op.type == "relu").inputs["x"].arguments[
            0
        ].name = "[/red]\x1b[31m"

    edited(model, change)
    refused(model, PackageError, "nothing defines")


def test_a_model_larger_than_the_bound_is_not_parsed(model):
    with (model / MODEL).open("r+b") as file:
        file.truncate(MAX_MODEL_BYTES + 1)
    refused(model, PackageError, "larger than .* bytes, the most that is read")


def test_nesting_without_a_bottom_is_refused(model):
    def wrapped(field: int, payload: bytes) -> bytes:
        length, size = len(payload), b""
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        return bytes([field << 3 | 2]) + size + bytes([length]) + payload

    block = b""
    for _ in range(300):
        block = wrapped(3, wrapped(4, block))  # a block's operation's block
    entry = wrapped(1, b"CoreML6") + wrapped(2, block)
    function = wrapped(2, b"CoreML6") + wrapped(3, entry)
    program = wrapped(2, wrapped(1, b"main") + wrapped(2, function))
    # Field 502 (mlProgram).
    length, size = len(program), b""
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    (model / MODEL).write_bytes(b"\x08\x07\xb2\x1f" + size + bytes([length]) + program)
    refused(model, PackageError, "its protobuf message can't be read")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), n_flips=st.integers(1, 40))
def test_a_damaged_model_is_an_error_of_ours_or_compresses(crepe_tiny, tmp_path, seed, n_flips):
    path = tmp_path / f"{seed}-{n_flips}.mlpackage"
    shutil.copytree(crepe_tiny, path, dirs_exist_ok=True)
    rng = np.random.default_rng(seed)
    data = bytearray((path / MODEL).read_bytes())
    for _ in range(n_flips):
        data[rng.integers(len(data))] = rng.integers(256)
    (path / MODEL).write_bytes(data)
    out = tmp_path / "out.mlpackage"
    try:
        milpress.inspect(path)
        milpress.compress(path, out, INT8, force=True)
    except CompressionError:
        assert not list(tmp_path.glob(".out*"))
    finally:
        shutil.rmtree(path)


def test_a_source_that_shrinks_while_it_is_read_is_refused(model, tmp_path):
    def shrink(done: int, total: int, name: str) -> None:
        if done > 0:
            os.truncate(model / WEIGHTS, 300_000)

    with pytest.raises(PackageError, match=r"weight\.bin, offset \d+: "):
        milpress.compress(model, tmp_path / "out.mlpackage", INT8, progress=shrink)
    assert sorted(tmp_path.iterdir()) == [model]


def test_an_existing_destination_is_kept_without_force(model, tmp_path):
    out = tmp_path / "out.mlpackage"
    milpress.compress(model, out, INT8)
    before = (out / MODEL).read_bytes()
    with pytest.raises(DestinationError, match=r"out\.mlpackage exists already; --force"):
        milpress.compress(model, out, milpress.Recipe.of(f.PalettizeConfig()))
    assert (out / MODEL).read_bytes() == before


def test_force_replaces_packages_only(model, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("years of work")
    refused_message = "exists and is not an .mlpackage, so it is not replaced"
    with pytest.raises(DestinationError, match=refused_message):
        milpress.compress(model, out, INT8, force=True)
    link = tmp_path / "link.mlpackage"
    link.symlink_to(model)
    with pytest.raises(DestinationError, match="apart from the source"):
        milpress.compress(model, link, INT8, force=True)
    assert (out / "chapter.txt").read_text() == "years of work"


@pytest.mark.parametrize("place", [".", "inside/it", ".."])
def test_a_destination_that_overlaps_the_source_is_refused(model, place):
    with pytest.raises(DestinationError, match="apart from the source"):
        milpress.compress(model, model / place, INT8, force=True)


def test_a_destination_without_a_folder_is_refused(model, tmp_path):
    with pytest.raises(PackageNotFoundError, match=r"the folder .* does not exist"):
        milpress.compress(model, tmp_path / "none" / "out.mlpackage", INT8)


def test_groups_need_ios18(model):
    with pytest.raises(UnsupportedError, match="iOS18 model, got iOS16; raise it with --upgrade"):
        milpress.compress(
            model,
            model.parent / "out.mlpackage",
            milpress.Recipe.of(f.PalettizeConfig(bits=4, group_size=16)),
        )


def test_threads_below_one_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="threads must be at least 1, got 0"):
        milpress.compress(model, tmp_path / "out.mlpackage", INT8, threads=0)


def run_in_child(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_a_full_disk_leaves_nothing_behind(crepe_tiny, tmp_path):
    code = """
import resource, signal, sys
import milpress
from milpress import formats as f
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    milpress.compress(sys.argv[1], sys.argv[2], milpress.Recipe.of(f.QuantizeConfig()))
except milpress.errors.StorageError as error:
    print(error)
"""
    done = run_in_child(code, crepe_tiny, tmp_path / "out.mlpackage")
    assert "File too large" in done.stdout, done.stderr
    assert str(tmp_path) in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert issubclass(StorageError, OSError)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


def test_a_killed_run_leaves_a_hidden_folder_that_the_next_run_removes(crepe_full, tmp_path):
    code = """
import os, signal, sys
import milpress
from milpress import formats as f
def die(done, total, name):
    if done > total / 3:
        os.kill(os.getpid(), signal.SIGKILL)
milpress.compress(sys.argv[1], sys.argv[2], milpress.Recipe.of(f.QuantizeConfig()), progress=die)
"""
    out = tmp_path / "out.mlpackage"
    done = run_in_child(code, crepe_full, out)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.mlpackage.milpress-")
    milpress.compress(crepe_full, out, INT8)
    assert list(tmp_path.iterdir()) == [out]


def test_a_run_killed_between_two_renames_gives_the_old_package_back(model, tmp_path):
    out = tmp_path / "out.mlpackage"
    milpress.compress(model, out, INT8)
    before = (out / MODEL).read_bytes()
    stage = tmp_path / ".out.mlpackage.milpress-00000000"
    stage.mkdir()
    out.rename(stage / "previous.mlpackage")
    with pytest.raises(DestinationError, match="exists already"):
        milpress.compress(model, out, milpress.Recipe.of(f.PalettizeConfig()))
    assert (out / MODEL).read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [model, out]


def test_a_folder_that_another_run_is_writing_is_left_alone(model, tmp_path):
    code = """
import sys, time
import milpress
from milpress import formats as f
def wait(done, total, name):
    print("begun", flush=True)
    sys.stdin.readline()
milpress.compress(sys.argv[1], sys.argv[2], milpress.Recipe.of(f.QuantizeConfig()), progress=wait)
"""
    out = tmp_path / "out.mlpackage"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(model), str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    child.stdout.readline()
    (stage,) = tmp_path.glob(".out*")
    milpress.compress(model, out, INT8)
    assert stage.exists()
    child.stdin.close()
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    child.stdout.close()
    # The other run finds the destination taken meanwhile, and cleans up after itself.
    assert child.returncode == 1
    assert sorted(tmp_path.iterdir()) == [model, out]
