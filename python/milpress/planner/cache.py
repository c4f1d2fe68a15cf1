"""Scores kept beside a package, by what they are of, so that a plan is made anew quickly."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from milpress.plain import json

SUFFIX = ".milpress-scores"


def path_for(package: Path) -> Path:
    """Return where the scores of a package are kept: a file beside it."""
    whole = package.resolve()
    return whole.with_name(f"{whole.name}{SUFFIX}")


class ScoreCache:
    """Numbers by the hash of what they were made of, one line each, written as they come.

    A scan that was interrupted leaves what it had; a line that is cut off counts as missing. A file
    that can't be read or written is no error: scores are then made anew. Without a ``path``,
    nothing is kept beyond this object.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, list[float]] = {}
        self.is_writable = path is not None
        if path is not None:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                for line in path.read_text(encoding="utf-8").splitlines():
                    with contextlib.suppress(ValueError, TypeError):
                        key, numbers = json.read(line)
                        if isinstance(key, str) and isinstance(numbers, list):
                            self._known[key] = [float(number) for number in numbers]

    def get(self, key: str, length: int) -> list[float] | None:
        """Return what is known by a key, if it is so many numbers."""
        numbers = self._known.get(key)
        return numbers if numbers is not None and len(numbers) == length else None

    def put(self, entries: dict[str, list[float]]) -> None:
        """Keep numbers by their keys."""
        self._known.update(entries)
        if not entries or not self.is_writable or self._path is None:
            return
        lines = "".join(json.text([key, numbers]) + "\n" for key, numbers in entries.items())
        try:
            # A line that was cut off must not swallow the next one.
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, f"\n{lines}".encode())
            finally:
                os.close(descriptor)
        except OSError:
            self.is_writable = False


def cache_key(*parts: Any) -> str:
    """Return a key made of parts."""
    return json.text(parts, separators=(",", ":"), sort_keys=True)
