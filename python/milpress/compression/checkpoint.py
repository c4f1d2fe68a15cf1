"""Weights that are compressed already, kept in files in case that a run is interrupted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from milpress._version import __version__
from milpress.compression.treating import Job, Make, Outcome
from milpress.errors import CompressionError, ConfigError, DestinationError, StorageError
from milpress.formats import Custom, Masked, Palette, PalettizeConfig, Quantized, Sparse
from milpress.plain import json
from milpress.plain.arrays import Arrays, read_arrays, write_arrays
from milpress.plain.files import system_errors

_DAMAGES = (CompressionError, ValueError, KeyError, TypeError, AttributeError, IndexError)
_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Masked, Palette, Quantized, Sparse)
}


def check_folder(folder: str | os.PathLike[str], packages: Sequence[Path]) -> None:
    """Refuse a folder that is in one of some packages, or no folder.

    Raises
    ------
    DestinationError
        If it is.
    """
    real = Path(folder).resolve()
    for package in (path.resolve() for path in packages):
        if real == package or package in real.parents:
            msg = f"{folder}: inside {package}; give a folder outside it for the checkpoint"
            raise DestinationError(msg)
    if real.exists() and not real.is_dir():
        msg = f"{folder}: a file; give a folder for the checkpoint"
        raise DestinationError(msg)


class Checkpoint:
    """Files of compressed weights in a folder.

    Parameters
    ----------
    folder
        Where.
    identity
        What tells the package, the samples and how they are used from others.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Sequence[Any]) -> None:
        self._folder = Path(folder)
        self._identity = tuple(identity)
        self._kept: set[Path] = set()

    def outcome(self, job: Job, make: Make) -> Outcome:
        """Return what was kept of a weight, or make and keep it."""
        outcome = self.load(job)
        if outcome is None:
            outcome = make(job)
            self.save(job, outcome)
        return outcome

    def load(self, job: Job) -> Outcome | None:
        """Return what was kept of a weight; ``None`` if there is nothing.

        Raises
        ------
        ConfigError
            If it is of another package, other samples or settings, or no such file.
        """
        path = self._path(job)
        if path is None or not path.exists():
            return None
        try:
            arrays = read_arrays(path)
            head = json.read(str(arrays["head"]))
            matches = head["identity"] == self._identity_of(job)
            outcome = _outcome(head, arrays, job) if matches else None
        except StorageError:
            raise
        except _DAMAGES as error:
            msg = f"{path}: not a weight of an interrupted run: {error}"
            raise ConfigError(msg) from error
        if outcome is None:
            msg = (
                f"{path}: holds weights of another package, other samples or settings; delete the "
                "folder to begin anew"
            )
            raise ConfigError(msg)
        self._kept.add(path)
        return outcome

    def save(self, job: Job, outcome: Outcome) -> None:
        """Keep a weight.

        Raises
        ------
        StorageError
            If the system refuses to.
        """
        path = self._path(job)
        if path is None:
            return
        arrays: Arrays = {}
        head = {
            "identity": self._identity_of(job),
            "value": _described(outcome.value, arrays),
            "suffix": outcome.suffix,
            "treatments": [job.treatments.index(each) for each in outcome.treatments],
            "notes": list(outcome.notes),
            "corrections": _described(dict(outcome.corrections), arrays),
            "fed_back": list(outcome.fed_back),
        }
        with system_errors(path):
            self._folder.mkdir(parents=True, exist_ok=True)
        write_arrays(path, arrays | {"head": np.array(json.text(head))})
        self._kept.add(path)

    def clear(self) -> None:
        """Delete what was kept, and the folder if nothing else is in it."""
        with system_errors(self._folder):
            for path in self._kept:
                path.unlink(missing_ok=True)
            if self._folder.is_dir() and not any(self._folder.iterdir()):
                self._folder.rmdir()

    def _path(self, job: Job) -> Path | None:
        """Return the file of a weight; ``None`` if its table is made by a user's function."""
        if any(
            isinstance(each, PalettizeConfig) and isinstance(each.table, Custom)
            for each in job.treatments
        ):
            return None
        name = hashlib.blake2b(job.weight.name.encode(), digest_size=12).hexdigest()
        return self._folder / f"weight-{name}.npz"

    def _identity_of(self, job: Job) -> str:
        early = not job.weight.graph.opset.has_blocks
        text = repr((__version__, *self._identity, job.weight.name, job.treatments, early))
        return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _described(value: Any, arrays: Arrays) -> Any:
    """Return a value as JSON holds it, with its arrays put beside."""
    if isinstance(value, np.ndarray):
        name = f"array_{len(arrays)}"
        arrays[name] = value
        return {"array": name}
    if isinstance(value, dict):
        return {"items": [[key, _described(each, arrays)] for key, each in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_described(each, arrays) for each in value]}
    if type(value).__name__ in _KINDS:
        held = {each.name: _described(getattr(value, each.name), arrays) for each in fields(value)}
        return {"kind": type(value).__name__, "fields": held}
    return value


def _restored(value: Any, arrays: Arrays) -> Any:
    """Return what `_described` was given."""
    if not isinstance(value, dict):
        return value
    if "array" in value:
        array = arrays[value["array"]]
        array.setflags(write=False)
        return array
    if "items" in value:
        return {key: _restored(each, arrays) for key, each in value["items"]}
    if "tuple" in value:
        return tuple(_restored(each, arrays) for each in value["tuple"])
    held = {name: _restored(each, arrays) for name, each in value["fields"].items()}
    return _KINDS[value["kind"]](**held)


def _outcome(head: dict[str, Any], arrays: Arrays, job: Job) -> Outcome:
    return Outcome(
        value=_restored(head["value"], arrays),
        suffix=str(head["suffix"]),
        treatments=tuple(job.treatments[i] for i in head["treatments"]),
        notes=tuple(head["notes"]),
        corrections=_restored(head["corrections"], arrays),
        fed_back=tuple(head["fed_back"]),
    )
