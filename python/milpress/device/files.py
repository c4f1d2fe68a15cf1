"""Results of benchmarks in files: reading checks all that must hold of one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from milpress.device import rules
from milpress.device.schema import SCHEMA, Result
from milpress.errors import PackageNotFoundError, ResultError
from milpress.plain import json
from milpress.plain.files import system_errors, write_whole
from milpress.plain.structure import brief, structured

# Parsed, JSON takes up to 25 times its size.
MAX_RESULT_BYTES = 64 << 20


def parse(data: Any, place: str = "the result") -> Result:
    """Return the run that JSON holds, if all that must hold of it does.

    Raises
    ------
    ResultError
        If it is of another form, or breaks a rule; every breach is named.
    """
    if isinstance(data, Mapping) and data.get("schema") != SCHEMA:
        msg = f"{place}: schema must be {SCHEMA!r}, got {brief(data.get('schema'))}"
        raise ResultError(msg)
    result: Result = structured(data, Result, place)
    breaches = rules.problems(result)
    if breaches:
        raise ResultError(*(f"{place}: {breach}" for breach in breaches))
    return result


def read_json(path: str | os.PathLike[str]) -> tuple[Any, str]:
    """Return what a JSON file holds, and its hash.

    Raises
    ------
    PackageNotFoundError
        If nothing is there.
    ResultError
        If it is no JSON, or too large.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"{path}: no such file"
        raise PackageNotFoundError(msg)
    with system_errors(path), path.open("rb") as file:
        data = file.read(MAX_RESULT_BYTES + 1)
    if len(data) > MAX_RESULT_BYTES:
        msg = f"{path}: larger than {MAX_RESULT_BYTES:,} bytes, the most that a result may have"
        raise ResultError(msg)
    try:
        return json.read(data), hashlib.sha256(data).hexdigest()
    except ValueError as error:
        msg = f"{path}: not valid JSON: {error}"
        raise ResultError(msg) from error


def load(path: str | os.PathLike[str]) -> Result:
    """Return the run that a file holds.

    Raises
    ------
    ResultError
        If it is no valid result.
    PackageNotFoundError
        If nothing is there.
    """
    return parse(read_json(path)[0], str(path))


def save(result: Result, path: str | os.PathLike[str]) -> None:
    """Write a run, which must be valid.

    Raises
    ------
    ResultError
        If it breaks a rule; nothing is written then.
    """
    path = Path(path)
    text = json.text(parse(result.to_dict(), str(path)).to_dict(), indent=1)
    write_whole(path, f"{text}\n".encode())


def check_origin(result: Result, origin: str | os.PathLike[str], place: str) -> None:
    """Check that a replay is one of a file.

    Raises
    ------
    ResultError
        If it is none, or one of another file or kind.
    """
    data, digest = read_json(origin)
    recorded = parse(data, str(origin))
    named = result.provenance.origin
    if named is None or (named.sha256, named.kind) != (digest, recorded.provenance.kind):
        wanted = f"{recorded.provenance.kind} {digest}, {origin}"
        msg = f"{place}: it must be a replay of {wanted}"
        if named is not None:
            msg += f", got {named.kind} {named.sha256}"
        raise ResultError(msg)
