"""The command line in this process; in a process of its own for what only one can show."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from unittest import mock

from milpress.cli import root

MILPRESS = [sys.executable, "-c", "from milpress.cli import root; raise SystemExit(root.run())"]


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Call the command line here, with streams that are no terminals, and check the exit code."""
    command = ["milpress", *map(str, arguments)]
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with (
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
    ):
        ended = root.run()
    stdout, stderr = (stream.buffer.getvalue().decode() for stream in streams)
    assert ended == code, stdout + stderr
    return subprocess.CompletedProcess(command, ended, stdout, stderr)


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
