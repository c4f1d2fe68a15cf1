"""A run of a package: its outputs, as a table, as JSON and in a file."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from milpress.errors import DestinationError
from milpress.plain import json
from milpress.plain.arrays import write_arrays
from milpress.plain.files import check_free
from milpress.samples.data import opened
from milpress.samples.pictures import resized
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
    """Outputs of a run.

    Parameters
    ----------
    source
        The package.
    precision
        Of the run: ``"float32"`` or ``"float16"``.
    outputs
        The model's outputs.
    seconds
        Wall time of the run, loading excluded.
    written
        The file that the outputs were written to, if any.
    notes
        Remarks: stages of pipelines that were passed by, pictures that were resized.
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
        table = named_table("output", "shape", "type", right=("min", "max", "mean"))
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
    from milpress.interpreter.program import load, run_once

    path = None if output is None else _destination(Path(output), force=force)
    program = load(source, function, precision=precision, seed=seed)
    sample, pictures = opened(inputs, program.inputs)
    note = resized(pictures)
    started = time.perf_counter()
    outputs = run_once(program, sample).outputs
    seconds = time.perf_counter() - started
    if path is not None:
        _write(path, outputs)
    return RunReport(
        source=str(source),
        precision=precision,
        outputs=tuple(Output(name=name, value=value) for name, value in outputs.items()),
        seconds=seconds,
        written=None if path is None else str(path),
        notes=(*program.notes, *([note] if note else [])),
    )


def _destination(path: Path, *, force: bool) -> Path:
    if path.is_dir():
        path = path / "outputs.npz"
    if path.suffix != ".npz":
        msg = f"{path}: outputs are written to a folder or an .npz file; name one"
        raise DestinationError(msg)
    check_free(path, force=force)
    return path


def _write(path: Path, outputs: Mapping[str, Any]) -> None:
    arrays: dict[str, NDArray[Any]] = {}
    for name, value in outputs.items():
        if isinstance(value, dict):
            arrays[name] = np.array(list(value.values()))
            arrays[f"{name}_labels"] = np.array(list(value))
        else:
            arrays[name] = np.asarray(value)
    write_arrays(path, arrays)


def _shape_and_type(value: Any) -> tuple[str, str]:
    if isinstance(value, np.ndarray):
        return "x".join(map(str, value.shape)) or "scalar", value.dtype.name
    if isinstance(value, dict):
        return str(len(value)), "probabilities"
    return escaped(repr(value)), "label"
