"""The root of the command line: however a command ends, it is a sentence and an exit code.

Nothing is imported here that takes time, so that what goes wrong while the rest is imported is met.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

FAILED = 1
REFUSED = 2
READER_GONE = 128 + 13  # what a shell says of a process that SIGPIPE ended

# What a process is asked to stop by, and the word for it.
_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
_TRACEBACK = "MILPRESS_TRACEBACK"


class _StoppedError(BaseException):
    """A signal asked to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


class _Signals:
    """What is done at a signal: while a command works, `_StoppedError` is raised, once.

    At a second one, or once the command has ended anyway, drafts are taken back and the process
    ends at once: an exception would meet nobody.
    """

    def __init__(self) -> None:
        self.is_ending = False
        self._before: dict[int, Any] = {}

    def catch(self) -> None:
        for number in _SIGNALS:
            # One that is ignored, as of a process in the background, stays so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._stop)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def forget(self) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self.is_ending:
            _take_back()
            os._exit(128 + number)
        self.is_ending = True
        raise _StoppedError(number)


def main() -> NoReturn:
    """Run the command line as all that this process is for."""
    signals = _Signals()
    signals.catch()
    code = _run(signals)
    signals.forget()  # nothing is left to take back while Python ends
    raise SystemExit(code)


def run() -> int:
    """Run the command line, and return the exit code.

    It is 0 when all is done; 1 for a failed verification; 2 for all other errors; 130 for an
    interrupt, 143 and 129 for SIGTERM and SIGHUP; 141 if who read the output went away. All but 0
    and 141 come with a sentence on standard error.
    """
    signals = _Signals()
    signals.catch()
    try:
        return _run(signals)
    finally:
        signals.restore()


def _run(signals: _Signals) -> int:
    try:
        try:
            _prepare_streams()
            code = _command()
            sys.stdout.flush()
        finally:
            signals.is_ending = True
    except BaseException as error:
        code = _ended_by(error)
    else:
        if code == 128 + signal.SIGINT:  # typer's, of an interrupt that Python raised
            _say(_SIGNALS[signal.SIGINT])
    _take_back()
    return code


def _command() -> int:
    from milpress.cli.app import call

    return call()


def _prepare_streams() -> None:
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    if sys.stdout is None:
        # The next file that is opened would get its number, and whatever is printed.
        raise OSError("standard output is closed")  # noqa: EM101
    with contextlib.suppress(AttributeError):  # a stream of a test
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def _take_back() -> None:
    """Take back what is half written; what was never imported has written nothing."""
    files = sys.modules.get("milpress.plain.files")
    if files is not None:
        files.end_all_drafts()


def _ended_by(error: BaseException) -> int:
    """Say what ended a command, and return the exit code."""
    if os.environ.get(_TRACEBACK) and not isinstance(error, SystemExit):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        error = error.__context__  # typer's way to end then
    if isinstance(error, _StoppedError):
        _say(_SIGNALS[error.number])
        return 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        _say(_SIGNALS[signal.SIGINT])
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else REFUSED
    if isinstance(error, OSError):
        _drop_output()
    if isinstance(error, BrokenPipeError):
        return READER_GONE
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # typer's, of wrong usage
        with contextlib.suppress(OSError):
            error.show()
        return int(error.exit_code)
    _say(f"error: {_sentence(error)}")
    errors = sys.modules.get("milpress.errors")
    is_failed = errors is not None and isinstance(error, errors.VerificationError)
    return FAILED if is_failed else REFUSED


def _sentence(error: BaseException) -> str:
    """Return what is wrong, in words for whom it concerns."""
    from milpress.errors import CompressionError, printable

    if isinstance(error, CompressionError):
        return str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        detail = f": {error}" if str(error) else ""
        return printable(f"out of memory{detail}")
    if isinstance(error, OSError):
        return printable(str(error))
    place = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if f"{os.sep}milpress{os.sep}" in code.co_filename:
            place = f" in {Path(code.co_filename).name}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return printable(
        f"this is a bug of milpress: {type(error).__name__}{place}: {error}; please report it, "
        f"with what {_TRACEBACK}=1 shows"
    )


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def _drop_output() -> None:
    """Send what standard output holds nowhere, or Python would try once more as it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
