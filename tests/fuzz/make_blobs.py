"""Writes the seeds of the blob reader's fuzzer: small weight files, whole and damaged."""

from __future__ import annotations

import struct
from pathlib import Path

FOLDER = Path(__file__).parent / "corpus" / "blob_reader"


def blob(offset: int, dtype: int, data: bytes, padding: int = 0, **wrong: int) -> bytes:
    fields = {
        "sentinel": 0xDEADBEEF,
        "dtype": dtype,
        "n_bytes": len(data),
        "data_offset": offset + 64,
        "padding": padding,
    } | wrong
    return struct.pack("<IIQQQ32x", *fields.values()) + data + bytes(-len(data) % 64)


def header(n_blobs: int, version: int = 2, *reserved: int) -> bytes:
    words = (*reserved, 0, 0, 0, 0, 0, 0, 0)[:7]
    return struct.pack("<II7Q", n_blobs, version, *words)


def main() -> None:
    halves = bytes(range(1, 41))
    two = header(2) + blob(64, 1, halves) + blob(192, 11, b"\x21\x03", padding=4)
    seeds = {
        "empty": b"",
        "header": header(0),
        "version-1": header(1, 1) + blob(64, 1, halves),
        "two": two,
        "truncated-data": two[:150],
        "truncated-metadata": two[:200],
        "no-data": header(1) + blob(64, 2, b""),
        "one-bit": header(1) + blob(64, 9, b"\x7f", padding=1),
        "garbage-as-padding": header(1) + blob(64, 1, halves, padding=2**60),
        "sentinel": header(1) + blob(64, 1, halves, sentinel=0xDEADBEEE),
        "type-0": header(1) + blob(64, 0, halves),
        "type-18": header(1) + blob(64, 18, halves),
        "huge": header(1) + blob(64, 1, halves, n_bytes=2**64 - 1),
        "wraps-around": header(1) + blob(64, 1, halves, n_bytes=80, data_offset=2**64 - 64),
        "data-before": header(1) + blob(64, 3, halves, data_offset=0),
        "offsets": header(1, 2, 64, 2**64 - 64, 2**63, 2**62 + 64) + blob(64, 1, halves),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, data in seeds.items():
        (FOLDER / name).write_bytes(data)


if __name__ == "__main__":
    main()
