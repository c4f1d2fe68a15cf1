"""Digests of a package: of what it computes, and of its files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from milpress.mil.package import Package
from milpress.plain.files import system_errors

_CHUNK_BYTES = 1 << 20


def content_digest(package: Package) -> str:
    """Return the SHA-256 of a package's model and of the weight files that it names.

    Calibrations, checkpoints and scores are kept under it.
    """
    digest = hashlib.sha256(package.model_bytes)
    for name in package.weight_files:
        _add_file(digest, package.weight_path(name))
    return digest.hexdigest()


def files_digest(folder: Path) -> str:
    """Return the SHA-256 of all files of a package, with their names and sizes.

    Results of benchmarks name a package by it.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        _add_file(digest, path)
    return digest.hexdigest()


def _add_file(digest: Any, path: Path) -> None:
    with system_errors(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
