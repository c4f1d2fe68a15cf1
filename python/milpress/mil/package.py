"""The ``.mlpackage`` on disk: manifest, model, weight files; read safely, written atomically."""

from __future__ import annotations

import functools
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError

import milpress._core as _core
from milpress.errors import (
    ModelKindError,
    PackageError,
    PackageNotFoundError,
)
from milpress.mil import proto
from milpress.mil.dtypes import DType
from milpress.mil.graph import all_ops
from milpress.mil.program import Program, ProgramGraph, Weight
from milpress.mil.schema import count_messages, memory_of
from milpress.mil.values import blob_values
from milpress.plain.files import system_errors

# The largest seen has 7 MB.
MAX_MODEL_BYTES = 64 << 20
# What the messages of a model may take in memory: so many times its size, and some more for small
# ones. Those that converters write take 10 to 35 times theirs; empty messages take 500 times.
MAX_MEMORY_RATIO = 64
_FREE_MEMORY = 16 << 20
MAX_MANIFEST_BYTES = 1 << 20
_MAX_PIPELINE_DEPTH = 8
_MODEL_PATH = "@model_path/"


class Package:
    """An ``.mlpackage``, opened for reading. Nothing in it is trusted.

    Parameters
    ----------
    path
        The package's folder.
    model_bytes
        The model to take instead of the one in the package; its weights are the package's.

    Raises
    ------
    PackageNotFoundError
        If nothing is there.
    ModelKindError
        If it is not made of ML programs.
    PackageError
        If it is no package, too large to parse, or names files outside.
    StorageError
        If the system can't read it.
    """

    def __init__(self, path: str | os.PathLike[str], *, model_bytes: bytes | None = None) -> None:
        self.path = Path(path)
        self.retyped: dict[tuple[str, int], DType] = {}
        self._graphs: tuple[ProgramGraph, ...] | None = None
        self._readers: dict[str, _core.BlobReader] = {}
        with system_errors(self.path):
            _check_kind(self.path)
            self.model_path = self._find_model()
            if model_bytes is None:
                model_bytes = _read_bounded(self.model_path, MAX_MODEL_BYTES)
            self.model_bytes = model_bytes
            self.model = _parse(self.model_bytes, self.path)
        self.programs = tuple(_programs(self.model, self.path))
        if not self.programs:
            raise ModelKindError(_kind_message(self.path))

    def reopened(self) -> Package:
        """Return the package as it was opened, without what has been done to its model since."""
        return Package(self.path, model_bytes=self.model_bytes)

    @property
    def graphs(self) -> tuple[ProgramGraph, ...]:
        """The graph of every block of every function, in an order that the file does not give.

        They are made once, and anew where `Graph.apply` has changed one.

        Raises
        ------
        PackageError
            If a function has no block, or an op uses a value that nothing defines.
        """
        if self._graphs is None:
            self._graphs = tuple(
                graph for program in self.programs for graph in _graphs_of(program, self)
            )
        self._graphs = tuple(graph.anew() if graph.is_applied else graph for graph in self._graphs)
        return self._graphs

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The weights of all graphs, in order."""
        return tuple(weight for graph in self.graphs for weight in graph.weights)

    @functools.cached_property
    def weight_files(self) -> tuple[str, ...]:
        """The weight files that the model names, each once, sorted."""
        names = {
            value.blobFileValue.fileName
            for program in self.programs
            for function in program.functions.values()
            for block in function.block_specializations.values()
            for op in all_ops(block)
            for value in blob_values(op)
        }
        return tuple(sorted(names))

    def forget_graphs(self) -> None:
        """Make the graphs anew when they are asked for: functions have other blocks now."""
        self._graphs = None

    def reader(self, file_name: str) -> _core.BlobReader:
        """Return the reader of a weight file, by the name that the model gives it."""
        if file_name not in self._readers:
            path = self.weight_path(file_name)
            try:
                with system_errors(path):
                    self._readers[file_name] = _core.BlobReader(path)
            except _core.BlobError as error:
                raise PackageError(str(error)) from error
        return self._readers[file_name]

    def weight_path(self, file_name: str) -> Path:
        """Return the path of a weight file, by the name that the model gives it."""
        if not file_name.startswith(_MODEL_PATH):
            msg = f"a weight file's name must begin with {_MODEL_PATH}, got {file_name!r}"
            raise PackageError(msg)
        return self._inside(self.model_path.parent, file_name.removeprefix(_MODEL_PATH))

    def _find_model(self) -> Path:
        manifest_path = self._inside(self.path, "Manifest.json")
        text = _read_bounded(manifest_path, MAX_MANIFEST_BYTES)
        try:
            manifest = json.loads(text)
            entry = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            msg = f"{self.path}: Manifest.json does not name the model's file"
            raise PackageError(msg) from error
        if not isinstance(entry, str):
            msg = f"{self.path}: the path of the model in Manifest.json must be text"
            raise PackageError(msg)
        return self._inside(self.path / "Data", entry)

    def _inside(self, folder: Path, name: str) -> Path:
        """Return ``folder / name``, which must be a plain file of the package."""
        parts = name.split("/")
        if name.startswith("/") or "\0" in name or any(part in ("", ".", "..") for part in parts):
            msg = f"{self.path}: the name of a file must stay inside the package, got {name!r}"
            raise PackageError(msg)
        try:
            os.fsencode(name)
        except UnicodeEncodeError as error:
            msg = f"{self.path}: the name of a file must be text, got {name!r}"
            raise PackageError(msg) from error
        path = folder / name
        if path.resolve() != self.path.resolve() / path.relative_to(self.path):
            msg = f"{self.path}: a file must be no symbolic link, got {name!r}"
            raise PackageError(msg)
        if not path.is_file():
            msg = f"{self.path}: {path.relative_to(self.path)} is missing in the package"
            raise PackageError(msg)
        return path


def _graphs_of(program: Program, package: Package) -> Iterator[ProgramGraph]:
    functions = program.functions
    for name, function in functions.items():
        above = (*program.place, name) if len(functions) > 1 else program.place
        specializations = sorted(function.block_specializations.items())
        if not specializations:
            msg = f"{package.path}: function {name!r} has no block"
            raise PackageError(msg)
        for opset_name, block in specializations:
            shown = (*above, opset_name) if len(specializations) > 1 else above
            yield ProgramGraph(
                function,
                block,
                package,
                place=program.place,
                function_name=name,
                prefix="".join(f"{part}/" for part in shown),
            )


def n_package_bytes(path: Path) -> int:
    """Sum of the sizes of all files in a package."""
    with system_errors(path):
        return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


def _check_kind(path: Path) -> None:
    if not path.exists():
        msg = f"{path}: no such package"
        raise PackageNotFoundError(msg)
    if path.suffix == ".mlmodel" or path.is_file():
        msg = (
            f"{path}: a file, where an .mlpackage is a folder; convert it again with "
            "coremltools as an ML program (convert_to='mlprogram')"
        )
        raise ModelKindError(msg)
    if not (path / "Manifest.json").exists():
        msg = f"{path}: not an .mlpackage, as it has no Manifest.json"
        raise PackageError(msg)


def _read_bounded(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        msg = f"{path}: larger than {limit:,} bytes, the most that is read"
        raise PackageError(msg)
    return data


def _parse(data: bytes, path: Path) -> proto.Model:
    msg = f"{path}: damaged, or not a Core ML model: its protobuf message can't be read"
    try:
        counts = count_messages(data)
    except ValueError as error:
        raise PackageError(msg) from error
    _check_memory(counts, len(data), path)
    try:
        return proto.Model.FromString(data)
    except (DecodeError, RecursionError) as error:
        raise PackageError(msg) from error


def _check_memory(counts: dict[str, int], n_bytes: int, path: Path) -> None:
    """Refuse a model of more messages than a file of its size has, before it is parsed."""
    needed = memory_of(counts)
    if needed > MAX_MEMORY_RATIO * n_bytes + _FREE_MEMORY:
        kind, most = max(counts.items(), key=lambda item: item[1])
        msg = (
            f"{path}: a model must take at most {MAX_MEMORY_RATIO} bytes of memory for each byte "
            f"of its file, got {needed // n_bytes} in a file of {n_bytes} bytes, which has "
            f"{sum(counts.values())} messages, {most} of them of the kind {kind}"
        )
        raise PackageError(msg)
    if needed > _FREE_MEMORY:
        # Where memory is limited, protobuf ends the process: it is asked for here instead.
        mmap.mmap(-1, needed + 3 * n_bytes).close()


def pipeline_models(model: proto.Model) -> Iterator[tuple[str, proto.Model]]:
    """Yield the name and the model of each part of a pipeline, in order."""
    kind = model.WhichOneof("choice")
    holder = model.pipelineClassifier if kind == "pipelineClassifier" else model.pipelineRegressor
    pipeline = model.pipeline if kind == "pipeline" else holder.pipeline
    for i, part in enumerate(pipeline.models):
        yield pipeline.names[i] if i < len(pipeline.names) else f"model{i}", part


def description_of(
    model: proto.Model, function: str | None = None
) -> proto.ModelDescription | proto.FunctionDescription:
    """Return the description of the inputs, outputs and states of a function, or of the model."""
    whole = model.description
    name = function or whole.defaultFunctionName
    return next((each for each in whole.functions if each.name == name), whole)


def _programs(model: proto.Model, path: Path, place: tuple[str, ...] = ()) -> Iterator[Program]:
    kind = model.WhichOneof("choice")
    if kind == "mlProgram":
        yield Program(place, model)
    elif kind is not None and len(place) < _MAX_PIPELINE_DEPTH:
        for name, part in pipeline_models(model):
            # A pipeline may hold models of other kinds, which have no MIL weights.
            if part.WhichOneof("choice") is not None:
                yield from _programs(part, path, (*place, name))
    else:
        raise ModelKindError(_kind_message(path))


def _kind_message(path: Path) -> str:
    return (
        f"{path}: milpress is meant to be used only with mlprogram typed coreml models and "
        "pipelines of them, not with other kinds such as neural networks; convert it again with "
        "convert_to='mlprogram'"
    )
