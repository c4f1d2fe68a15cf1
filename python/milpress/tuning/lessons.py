"""Samples with the outputs of the original, kept in files while a package is tuned."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from milpress.errors import ConfigError, DestinationError
from milpress.plain import json
from milpress.plain.arrays import Arrays, read_arrays, write_arrays
from milpress.plain.files import system_errors

_HEAD = "run.json"
_STATE = "state.npz"


class Lesson(NamedTuple):
    """A sample, and what the original makes of it."""

    sample: dict[str, Any]
    expected: dict[str, NDArray[np.float32]]


class WorkFolder:
    """The folder beside the destination in which a run keeps what it needs to go on.

    Parameters
    ----------
    destination
        The package that is written in the end.
    identity
        What tells packages, samples and settings from others.
    resume
        Whether to go on from what an interrupted run has left there.
    force
        Whether to begin anew if there is something.

    Raises
    ------
    DestinationError
        If something is there, without either.
    ConfigError
        If it is of another run, or there is nothing to go on from.
    """

    def __init__(self, destination: Path, identity: str, *, resume: bool, force: bool) -> None:
        self.path = destination.with_name(f"{destination.name}.milpress-tune")
        self._identity = identity
        if resume:
            self._check_own()
        elif self.path.exists() and not force:
            msg = (
                f"{self.path} is left of an interrupted run; --resume (resume=True) goes on from "
                "it, --force (force=True) begins anew"
            )
            raise DestinationError(msg)
        else:
            self._check_deletable()
            self.clear()

    def lesson(self, i: int) -> Lesson | None:
        """Return a lesson; ``None`` if it is not kept yet."""
        path = self._lesson(i)
        if not path.exists():
            return None
        sample: dict[str, Any] = {}
        expected: dict[str, NDArray[np.float32]] = {}
        for name, array in read_arrays(path).items():
            kind, own = name.split(" ", 1)
            (sample if kind == "input" else expected)[own] = array
        return Lesson(sample, expected)

    def keep_lesson(
        self, i: int, sample: Mapping[str, Any], expected: Mapping[str, NDArray[np.float32]]
    ) -> None:
        """Keep a lesson."""
        self._make()
        arrays: Arrays = {
            f"input {name}": np.asarray(each) for name, each in sample.items() if each is not None
        }
        write_arrays(
            self._lesson(i), arrays | {f"output {name}": each for name, each in expected.items()}
        )

    def state(self) -> Arrays | None:
        """Return the state that was kept last; ``None`` if there is none."""
        path = self.path / _STATE
        return read_arrays(path) if path.exists() else None

    def keep_state(self, arrays: Arrays) -> None:
        """Keep a state in place of the one before."""
        self._make()
        write_arrays(self.path / _STATE, arrays)

    def clear(self) -> None:
        """Delete the folder."""
        with system_errors(self.path):
            if self.path.exists():
                shutil.rmtree(self.path)

    def _check_deletable(self) -> None:
        if self.path.exists() and not (self.path / _HEAD).is_file():
            msg = f"{self.path} is in the way, and not of an interrupted run; move it elsewhere"
            raise DestinationError(msg)

    def _make(self) -> None:
        head = self.path / _HEAD
        if not head.exists():
            with system_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                head.write_text(json.text({"version": 1, "identity": self._identity}))

    def _check_own(self) -> None:
        head = self.path / _HEAD
        if not head.exists():
            msg = f"{self.path}: no interrupted run to resume; leave out --resume (resume=True)"
            raise ConfigError(msg)
        try:
            with system_errors(head):
                same = json.read(head.read_bytes())["identity"] == self._identity
        except (ValueError, KeyError, TypeError) as error:
            msg = f"{head}: not of an interrupted run: {error}"
            raise ConfigError(msg) from error
        if not same:
            msg = (
                f"{self.path}: left of a run with other packages, samples or settings; delete it "
                "to begin anew"
            )
            raise ConfigError(msg)

    def _lesson(self, i: int) -> Path:
        return self.path / f"sample-{i:06}.npz"
