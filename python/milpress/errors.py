"""What can go wrong: one root, and under it one class for each kind of cause."""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Iterator
from typing import NoReturn


def printable(text: str) -> str:
    r"""Return text from a package without what would steer a terminal.

    Examples
    --------
    >>> printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return "".join(
        character
        if unicodedata.category(character)[0] not in "CZ" or character == " "
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


class CompressionError(Exception):
    """Root of every error that milpress raises on purpose.

    Its text is one line, also where it quotes names of a package, which may hold anything; where
    it is raised with several texts, as several things are wrong, a line for each.
    """

    def __str__(self) -> str:
        if len(self.args) > 1 and all(isinstance(text, str) for text in self.args):
            return "\n".join(map(printable, self.args))
        return printable(super().__str__())


class ConfigError(CompressionError, ValueError):
    """A setting, recipe or argument that is wrong by itself."""


class ConfigTypeError(ConfigError, TypeError):
    """A setting of a type that it can't have."""


class PackageError(CompressionError, ValueError):
    """A package that breaks its format, is of an unsupported kind, or climbs out of its folder."""


class ModelKindError(PackageError, TypeError):
    """A model that is no ML program, nor a pipeline with ML programs in it."""


class PackageNotFoundError(PackageError, FileNotFoundError):
    """A path at which there is nothing."""


class DestinationError(CompressionError, FileExistsError):
    """A destination that can't be written to: taken, no package, or the source itself."""


class StorageError(CompressionError, OSError):
    """The system refused to read or write: a full disk, missing permission, a broken device."""


class UnsupportedError(CompressionError, ValueError):
    """A weight or model that can't be compressed as asked."""


class WeightError(CompressionError, RuntimeError):
    """Work on one weight that failed in a way that nobody foresaw: a fault of milpress."""


class LifecycleError(CompressionError, RuntimeError):
    """A step of a workflow that is called too early, too late or out of order."""


class VerificationError(CompressionError, ValueError):
    """A compressed package that does not keep what was promised."""


class InputError(CompressionError, ValueError):
    """An input of a model that is missing, unknown, or of a type or shape that it can't have."""


class UnsupportedOpError(CompressionError, NotImplementedError):
    """An op that the interpreter does not cover.

    Parameters
    ----------
    op
        Its type.
    opset
        The deployment target of the function that it is in, such as ``iOS17``.
    place
        Where it stands: function, or model and function, and its name.
    what
        What of it is not covered, if it is not the op as such.
    """

    def __init__(self, op: str, opset: str, place: str, what: str = "") -> None:
        what = what or op
        super().__init__(
            f"{place}: an op must be one that the interpreter covers, got {what}, in {opset}"
        )
        self.op = op
        self.opset = opset
        self.place = place


class ExecutionError(CompressionError, RuntimeError):
    """An op that can't compute what the program asks of it."""


class DependencyError(CompressionError, ImportError):
    """A package that is needed and not installed."""


class ResultError(CompressionError, ValueError):
    """A result of a benchmark, or a report, that is of another form or breaks a rule."""


class DriverError(CompressionError, RuntimeError):
    """A driver that can do nothing on this machine, or a device that is not there."""


def fail_verification(message: str) -> NoReturn:
    """Raise a `VerificationError`."""
    raise VerificationError(message)


@contextlib.contextmanager
def package_errors(place: str) -> Iterator[None]:
    """Say where in a package something is wrong with it.

    Raises
    ------
    PackageError
        If the block raises one, with the place in front.
    """
    try:
        yield
    except PackageError as error:
        msg = f"{place}: {error}"
        raise PackageError(msg) from error


@contextlib.contextmanager
def weight_errors(name: str) -> Iterator[None]:
    """Name the weight in what nobody foresaw; other errors and a lack of memory pass.

    Raises
    ------
    WeightError
        If the block raises anything else.
    """
    try:
        yield
    except (CompressionError, MemoryError, OSError):
        raise
    except Exception as error:
        msg = (
            f"{name}: this weight met a fault of milpress that was not known, "
            f"{type(error).__name__}: {error}; leave it out (keep) and please report it"
        )
        raise WeightError(msg) from error
