"""Models of more messages than a file of their size has: refused before they are parsed."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from command_line import failed, run
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

import milpress._core as _core
from milpress.errors import PackageError
from milpress.mil import package as package_module
from milpress.mil import proto
from milpress.mil.package import MAX_MEMORY_RATIO, Package
from milpress.mil.schema import count_messages, memory_of

MODEL = "Data/com.apple.CoreML/model.mlmodel"
SEEDS = sorted((Path(__file__).parents[1] / "fuzz" / "corpus" / "packages").iterdir())
N = 100_000


def varint(number: int) -> bytes:
    data = b""
    while number > 127:
        data, number = data + bytes([number & 127 | 128]), number >> 7
    return data + bytes([number])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def function(name: str, block: bytes, more: bytes = b"") -> bytes:
    """Return an entry of a program's functions."""
    specialization = field(3, field(1, b"CoreML6") + field(2, block))
    return field(
        2, field(1, name.encode()) + field(2, more + field(2, b"CoreML6") + specialization)
    )


def model_of(program: bytes, description: bytes = b"") -> bytes:
    return b"\x08\x07" + field(2, description) + field(502, program)


def in_block(block: bytes) -> bytes:
    return model_of(function("main", block))


def names(prefix: bytes, n: int) -> list[bytes]:
    return [prefix + i.to_bytes(4, "big").hex().encode() for i in range(n)]


def counted(message: Any, counts: Counter[str]) -> Counter[str]:
    """Count as `count_messages` does, in what protobuf made."""
    counts[message.DESCRIPTOR.name] += 1
    for known, value in message.ListFields():
        entry = known.message_type
        if entry is not None and entry.GetOptions().map_entry:
            counts[f"{message.DESCRIPTOR.name}.{known.name}"] += len(value)
            for each in value.values():
                if isinstance(each, str):
                    counts["string"] += 1
                else:
                    counted(each, counts)
        elif entry is not None:
            for each in [value] if hasattr(value, "ListFields") else value:
                counted(each, counts)
        elif known.type == known.TYPE_STRING and not isinstance(value, str):
            counts["string"] += len(value)
    return counts


@pytest.mark.parametrize("seed", SEEDS, ids=lambda path: path.stem)
def test_the_scan_counts_what_protobuf_makes(seed):
    data = (seed / MODEL).read_bytes()
    found = {name: n for name, n in count_messages(data).items() if n}
    assert found == counted(proto.Model.FromString(data), Counter())


def test_the_models_of_a_pipeline_are_counted_too():
    part = field(1, in_block(field(3, b"") * 3))
    found = count_messages(b"\x08\x07" + field(202, part * 2))
    assert (found["Model"], found["Pipeline"], found["Operation"]) == (3, 1, 6)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), n_flips=st.integers(1, 8))
def test_what_protobuf_accepts_is_counted_and_never_too_low(seed, n_flips):
    rng = np.random.default_rng(seed)
    data = bytearray((SEEDS[seed % len(SEEDS)] / MODEL).read_bytes())
    for _ in range(n_flips):
        data[rng.integers(len(data))] = rng.integers(256)
    try:
        made = counted(proto.Model.FromString(bytes(data)), Counter())
    except DecodeError:
        return
    # Of entries of one key, and of messages that are merged, the last alone is left; an entry
    # without a value gets an empty one.
    found = count_messages(bytes(data))
    n_entries = sum(n for name, n in found.items() if "." in name)
    assert {name: n for name, n in made.items() if n > found[name] + n_entries} == {}
    assert {name: n for name, n in made.items() if "." in name and n > found[name]} == {}


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_get_the_scan_out_of_the_file(data):
    kinds = np.array([[0, 1, 2, 3, 1], [0, 2, 1, 0, 3]], np.uint8)
    try:
        counts = _core.count_messages(data, kinds)
    except ValueError:
        return
    # Each message but the whole one takes a tag and a length.
    assert counts.sum() <= 1 + len(data) // 2


BOMBS = {
    "operations": (in_block(field(3, b"") * N), "Operation"),
    "operations with unknown fields": (in_block(field(3, b"\x78\x01") * N), "Operation"),
    "named operations": (
        in_block(b"".join(field(3, field(3, field(1, x))) for x in names(b"", N))),
        "Operation",
    ),
    "outputs": (in_block(field(3, field(3, b"") * N)), "NamedValueType"),
    "bindings": (
        in_block(field(3, field(2, field(1, b"x") + field(2, field(1, b"") * N)))),
        "Binding",
    ),
    "blocks": (in_block(field(3, field(4, b"") * N)), "Block"),
    "inputs of a block": (in_block(field(1, b"") * N), "NamedValueType"),
    "inputs of a function": (
        model_of(function("main", b"", field(1, b"") * N)),
        "NamedValueType",
    ),
    "functions": (model_of(field(2, field(2, b"")) * N), "Function"),
    "specializations": (
        model_of(function("main", b"", b"".join(field(3, field(1, x)) for x in names(b"", N)))),
        "Function.block_specializations",
    ),
    "models of a pipeline": (b"\x08\x07" + field(202, field(1, b"") * N), "Model"),
    "programs of a pipeline": (
        b"\x08\x07" + field(202, field(1, field(502, b"")) * N),
        "Model",
    ),
}


def with_model(data: bytes, folder: Path) -> Path:
    path = folder / "model.mlpackage"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(SEEDS[0], path)
    (path / MODEL).write_bytes(data)
    return path


@pytest.mark.parametrize("what", BOMBS)
def test_a_bomb_is_refused_before_it_is_parsed(what, tmp_path):
    data, kind = BOMBS[what]
    path = with_model(data, tmp_path)
    parses_nothing = mock.Mock()
    parses_nothing.Model.FromString.side_effect = AssertionError("parsed")
    with (
        mock.patch.object(package_module, "proto", parses_nothing),
        pytest.raises(PackageError, match=rf"at most 64 bytes of memory.*of the kind {kind}$"),
    ):
        Package(path)


def test_converted_models_take_half_of_what_is_allowed_at_most(crepe_tiny, crepe_full):
    for path in (*SEEDS, crepe_tiny, crepe_full):
        data = (path / MODEL).read_bytes()
        assert memory_of(count_messages(data)) < MAX_MEMORY_RATIO * len(data) * 0.6, path


MEASURE = """
import resource, sys
import milpress
milpress.inspect(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
milpress.inspect(sys.argv[2])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.parametrize(
    ("block", "n"),
    [
        # As many as are let through; an unknown field, which takes its bytes alone, fills up.
        (lambda i: field(3, field(20, b"-" * 6)), 50_000),
        (lambda i: field(3, field(3, field(1, b"%08d" % i)) + field(20, b"-" * 9)), 40_000),
        (lambda i: field(3, field(4, b"") + field(20, b"-" * 17)), 30_000),
    ],
    ids=["operations", "outputs", "blocks"],
)
def test_what_is_let_through_takes_no_more_memory_than_is_said(block, n, tmp_path):
    data = in_block(b"".join(block(i) for i in range(n)))
    path = with_model(data, tmp_path)
    # It is near the bound, or it would show nothing.
    allowed = MAX_MEMORY_RATIO * len(data) + package_module._FREE_MEMORY
    assert memory_of(count_messages(data)) > 0.7 * allowed
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(SEEDS[0]), str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < allowed


def test_memory_that_the_system_does_not_give_is_a_sentence(tmp_path):
    # Enough operations that it is asked for before protobuf, which would end the process.
    path = with_model(in_block(field(3, field(20, b"-" * 200)) * (N // 4)), tmp_path)
    assert run("inspect", path).stdout
    refusal = OSError(errno.ENOMEM, "Cannot allocate memory")
    with mock.patch.object(package_module.mmap, "mmap", side_effect=refusal):
        line = failed("inspect", path)
    assert line == f"error: [Errno {errno.ENOMEM}] Cannot allocate memory: '{path}'"
