"""Models in and out: coremltools' ``MLModel`` as a package, and a package as an ``MLModel``."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from milpress.errors import ConfigTypeError, ModelKindError
from milpress.mil.package import Package
from milpress.plain.files import system_errors

_FOLDER_PREFIX = "milpress-"
_T = TypeVar("_T")


def is_mlmodel(mlmodel: Any) -> bool:
    """Whether something is an ``MLModel``; coremltools is not imported to find out."""
    module = sys.modules.get("coremltools.models.model")
    return module is not None and isinstance(mlmodel, module.MLModel)


def opened(mlmodel: Any) -> Package:
    """Return the package that a model stands for, with what was changed on the ``MLModel`` since.

    Parameters
    ----------
    mlmodel
        A coremltools ``MLModel``, or the path of an ``.mlpackage``.

    Raises
    ------
    ConfigTypeError
        If it is neither.
    ModelKindError
        If it is not made of ML programs.
    PackageNotFoundError
        If nothing is at the path.
    PackageError
        If the package is damaged.
    """
    if isinstance(mlmodel, (str, os.PathLike)):
        return Package(mlmodel)
    if not is_mlmodel(mlmodel):
        msg = (
            "mlmodel must be a coremltools MLModel or the path of an .mlpackage, "
            f"got {type(mlmodel).__name__}"
        )
        raise ConfigTypeError(msg)
    spec = mlmodel.get_spec()
    if mlmodel.package_path is None:
        msg = (
            "milpress is meant to be used only with mlprogram typed coreml models and pipelines of "
            f"them, got {spec.WhichOneof('Type')}; convert it again with convert_to='mlprogram'"
        )
        raise ModelKindError(msg)
    return Package(mlmodel.package_path, model_bytes=spec.SerializeToString(deterministic=True))


@contextlib.contextmanager
def temporary_package() -> Iterator[Path]:
    """Give the path for a package in a new folder, to be handed to `returned` as temporary.

    If the block raises, the folder is removed.
    """
    with system_errors(Path(tempfile.gettempdir())):
        folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX))
    try:
        yield folder / "model.mlpackage"
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def returned(
    path: str | os.PathLike[str], source: Any, *, temporary: bool, load: bool | None = None
) -> Any:
    """Return a written package as an ``MLModel`` that is set up as the source was.

    It is loaded by Core ML if ``load`` says so, by default only if the source was. Its
    ``_mil_program`` is there, as on models that coremltools converts, but read from the package
    only when it is asked for.

    Parameters
    ----------
    path
        The package.
    source
        The ``MLModel`` or the path that it was made from.
    temporary
        Whether the package is removed with the last copy of the model, or when Python ends.
    load
        Whether Core ML loads it.
    """
    settings: dict[str, Any] = {"skip_model_load": True}
    if is_mlmodel(source):
        settings = {
            "skip_model_load": source.__proxy__ is None,
            "compute_units": source.compute_unit,
            "function_name": source.function_name,
            "optimization_hints": source.optimization_hints,
        }
    if load is not None:
        settings["skip_model_load"] = not load
    return _class()(str(path), is_temp_package=temporary, **settings)


def written(
    source: Any,
    destination: str | os.PathLike[str] | None,
    write: Callable[[Path], _T],
    *,
    load: bool | None = None,
) -> tuple[Any, _T]:
    """Let a package be written and return it as an ``MLModel``, and what the writing returned.

    Parameters
    ----------
    source, load
        As of `returned`.
    destination
        Where the package is to be; ``None`` for a temporary one.
    write
        Called with the path to write to.
    """
    if destination is not None:
        result = write(Path(destination))
        return returned(Path(destination), source, temporary=False, load=load), result
    with temporary_package() as path:
        result = write(path)
        return returned(path, source, temporary=True, load=load), result


class _TemporaryFiles:
    """Removes a package once nothing refers to this; copies of a model share it."""

    def __init__(self, path: Path) -> None:
        weakref.finalize(self, _remove, path, os.getpid())

    def __deepcopy__(self, memo: Any) -> _TemporaryFiles:
        return self


def _remove(path: Path, owner: int) -> None:
    # A forked child holds copies of its parent's models, not their files.
    if os.getpid() != owner:
        return
    shutil.rmtree(path, ignore_errors=True)
    if path.parent.name.startswith(_FOLDER_PREFIX):
        with contextlib.suppress(OSError):
            path.parent.rmdir()


@functools.cache
def _class() -> type[Any]:
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.models import MLModel

    class PackagedModel(MLModel):  # type: ignore[misc]
        """An ``MLModel`` whose MIL program is read from its package on first use."""

        def __init__(self, model: str, *, is_temp_package: bool, **settings: Any) -> None:
            super().__init__(model, is_temp_package=is_temp_package, **settings)
            # MLModel sets the program to None when it is made from a path.
            self._is_program_read = False
            if is_temp_package:
                self._files = _TemporaryFiles(Path(self.package_path))

        def __del__(self) -> None:
            # From coremltools 9.1 on, any copy of a model that goes takes the package with it.
            pass

        @property
        def _mil_program(self) -> Any:
            if not self._is_program_read:
                program = None  # A pipeline is no single program.
                if self._spec.WhichOneof("Type") == "mlProgram":
                    program = load(
                        model_spec=self.get_spec(),
                        specification_version=self._spec.specificationVersion,
                        file_weights_dir=self.weights_dir or "",
                    )
                self._mil_program = program
            return self._program

        @_mil_program.setter
        def _mil_program(self, program: Any) -> None:
            self._program = program
            self._is_program_read = True

        def save(self, save_path: str | os.PathLike[str]) -> None:
            """Save the package; see ``MLModel.save``."""
            # What saving looks for in a program, debug handles, is not kept in a package: don't
            # read all weights to find none.
            was_read, self._is_program_read = self._is_program_read, True
            try:
                super().save(save_path)
            finally:
                self._is_program_read = was_read

    return PackagedModel
