"""The command line in this process; in a process of its own for what only one can show."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from dataclasses import dataclass
from unittest import mock

from milpress.cli import main

MILPRESS = [sys.executable, "-c", "from milpress.cli import main; main()"]


@dataclass(frozen=True)
class Done:
    """What a call printed and how it ended."""

    stdout: str
    stderr: str
    returncode: int


def called(*arguments: object) -> Done:
    """Call the command line here, with streams that are no terminals."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with (
        mock.patch.object(sys, "argv", ["milpress", *map(str, arguments)]),
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
    ):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    printed = [stream.buffer.getvalue().decode() for stream in streams]
    return Done(*printed, code)


def run(*arguments: object, code: int = 0) -> Done:
    """Call the command line here, and check the exit code."""
    done = called(*arguments)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def failed(*arguments: object, code: int = 2) -> str:
    """Call what must fail, and return its one line."""
    done = run(*arguments, code=code)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return line


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [*MILPRESS, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
