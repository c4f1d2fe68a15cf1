"""Running a package on arrays out of files, and what came out."""

from __future__ import annotations

import io
import os
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from milpress.errors import DestinationError, InputError, PackageNotFoundError
from milpress.plain import json
from milpress.plain.files import system_errors, write_whole
from milpress.samples.data import opened, resized
from milpress.show import escaped, named_table

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """An output of a model: an array; or of a classifier, a label or the labels' probabilities."""

    name: str
    value: Any

    @property
    def numbers(self) -> NDArray[Any] | None:
        """The output's numbers, if it has any."""
        if isinstance(self.value, dict):
            return np.array(list(self.value.values()))
        return self.value if isinstance(self.value, np.ndarray) else None

    @property
    def statistics(self) -> tuple[float, float, float] | None:
        """Least, greatest and mean number; ``None`` if there is none."""
        numbers = self.numbers
        if numbers is None or not numbers.size:
            return None
        wide = numbers.astype(np.float64)
        return float(wide.min()), float(wide.max()), float(wide.mean())

    def to_dict(self) -> dict[str, Any]:
        """Return the output as JSON can hold it: of arrays, what they look like."""
        shown: dict[str, Any] = {"name": self.name}
        if isinstance(self.value, np.ndarray):
            shown |= {"shape": list(self.value.shape), "dtype": self.value.dtype.name}
        elif isinstance(self.value, dict):
            items = self.value.items()
            shown["value"] = [{"label": k, "probability": json.number(v)} for k, v in items]
        else:
            shown["value"] = self.value
        if self.statistics is not None:
            names = ("min", "max", "mean")
            shown |= {k: json.number(v) for k, v in zip(names, self.statistics, strict=True)}
        return shown


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What a run gave.

    Parameters
    ----------
    source
        The package.
    precision
        As the run was asked for.
    outputs
        What came out.
    seconds
        Wall time of the run, loading excluded.
    written
        The file that the outputs are in, if they were to be written.
    notes
        What else there is to know: stages of pipelines that were passed by, pictures that were
        resized.
    """

    source: str
    precision: str
    outputs: tuple[Output, ...]
    seconds: float
    written: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line: how many outputs, how long, where to."""
        where = f"; written to {self.written}" if self.written else ""
        return f"{len(self.outputs)} outputs in {self.seconds:.3f} s ({self.precision}){where}"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        names = ("source", "precision", "seconds", "outputs", "written", "notes")
        return {"version": 1, **json.record(self, *names)}

    def __rich__(self) -> Table:
        """Return the outputs as a table."""
        table = named_table("output", "shape", "type")
        for heading in ("min", "max", "mean"):
            table.add_column(heading, justify="right")
        for output in self.outputs:
            numbers = ["", "", ""]
            if output.statistics is not None:
                numbers = [f"{number:.6g}" for number in output.statistics]
            table.add_row(escaped(output.name), *_shape_and_type(output.value), *numbers)
        return table


def run(
    source: str | os.PathLike[str],
    inputs: Mapping[str, Any],
    *,
    function: str | None = None,
    precision: Literal["float32", "float16"] = "float32",
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> RunReport:
    """Run a package once. `milpress.interpreter.load` is for more than that.

    Parameters
    ----------
    source
        Path of an ``.mlpackage``.
    inputs
        Arrays by the names of the inputs; of an image, also the path of a picture (PNG or JPEG),
        which is resized if need be. The states of a stateful model begin as zeros.
    function
        Which function of a package with several.
    precision
        Whether values that the program declares as float16 are rounded to it.
    seed
        Where random numbers start from.
    output
        File to write the outputs to, as ``.npz``; in an existing folder, ``outputs.npz``. Of
        probabilities by label, the labels are the array ``NAME_labels``.
    force
        Replace an existing file.

    Raises
    ------
    InputError
        If an input is missing, unknown or unsuitable.
    UnsupportedOpError
        If the interpreter does not cover an op.
    DependencyError
        If torch is not installed, or for a picture Pillow.
    PackageError
        If the source is no package of ML programs.
    """
    from milpress.interpreter import load

    path = None if output is None else _destination(Path(output), force=force)
    program = load(source, function, precision=precision, seed=seed)
    given, pictures = opened(inputs, program.inputs)
    note = resized(pictures)
    state = program.make_state() if program.is_stateful else None
    started = time.perf_counter()
    made = program.run(given, state=state).outputs
    seconds = time.perf_counter() - started
    if path is not None:
        _write(path, made)
    return RunReport(
        source=str(source),
        precision=precision,
        outputs=tuple(Output(name=name, value=value) for name, value in made.items()),
        seconds=seconds,
        written=None if path is None else str(path),
        notes=(*program.notes, *([note] if note else [])),
    )


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of an ``.npz`` file by name, or of an ``.npy`` file under an empty name.

    Raises
    ------
    InputError
        If it is neither.
    """
    if not path.is_file():
        msg = f"{path}: an array must be there, got nothing"
        raise PackageNotFoundError(msg)
    try:
        with system_errors(path):
            found = np.load(path, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return {"": found}
            with found:
                return dict(found)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        msg = f"{path}: an input must be an .npy or .npz file of numbers, got: {error}"
        raise InputError(msg) from error


def _destination(path: Path, *, force: bool) -> Path:
    if path.is_dir():
        path = path / "outputs.npz"
    if path.suffix != ".npz":
        msg = f"{path}: outputs must go to a folder or an .npz file, got another"
        raise DestinationError(msg)
    if not path.parent.is_dir():
        msg = f"{path}: the folder of the destination must exist, got none"
        raise PackageNotFoundError(msg)
    if path.exists() and not force:
        msg = f"{path}: the destination must be free, got an existing one; use force"
        raise DestinationError(msg)
    return path


def _write(path: Path, outputs: Mapping[str, Any]) -> None:
    arrays: dict[str, NDArray[Any]] = {}
    for name, value in outputs.items():
        if isinstance(value, dict):
            arrays[name] = np.array(list(value.values()))
            arrays[f"{name}_labels"] = np.array(list(value))
        else:
            arrays[name] = np.asarray(value)
    # Not by np.savez, which can't take every name.
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as file:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.save(data, array, allow_pickle=False)
            file.writestr(f"{name}.npy", data.getvalue())
    with system_errors(path):
        write_whole(path, whole.getvalue())


def _shape_and_type(value: Any) -> tuple[str, str]:
    if isinstance(value, np.ndarray):
        return "x".join(map(str, value.shape)) or "scalar", value.dtype.name
    if isinstance(value, dict):
        return str(len(value)), "probabilities"
    return escaped(repr(value)), "label"
