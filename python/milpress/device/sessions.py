"""Sessions with a process that holds one model: requests, answers, and the ways it can fail."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, Any, Protocol, cast

_STDERR_TAIL = 2000
_MAX_REPLY_BYTES = 256 << 20


class SessionError(Exception):
    """What became of a request that was not answered.

    Parameters
    ----------
    message
        What is known of it.
    reason
        A word for its kind: ``"error"``, ``"crashed"``, ``"killed"``, ``"timed_out"``...
    """

    def __init__(self, message: str, reason: str = "error") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    @property
    def is_over(self) -> bool:
        """Whether the process is gone."""
        return self.reason != "error"


class Session(Protocol):
    """Something that holds one model and answers requests about it."""

    def ask(self, command: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Return the answer to a request, or raise `SessionError`."""

    def close(self) -> None:
        """End it."""


class ProcessSession:
    """A session in a process of its own, which may hang, crash or be killed without harm here.

    Parameters
    ----------
    command
        What is run. It reads requests and writes answers, one JSON object a line; see `worker`.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        # In a session of its own, so that what it starts ends with it.
        self._process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
            bufsize=0,
        )
        self._unread = b""

    def ask(self, command: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises
        ------
        SessionError
            If it is answered with an error, not in time, or not at all.
        """
        line = json.dumps({"command": command, "arguments": arguments}) + "\n"
        try:
            cast("IO[bytes]", self._process.stdin).write(line.encode())
        except OSError:
            raise self._ended() from None
        reply: dict[str, Any] = json.loads(self._read_line(command, timeout))
        if "error" in reply:
            raise SessionError(reply["error"])
        return reply

    def close(self) -> None:
        """End the process, and all that it started."""
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                cast("IO[bytes]", stream).close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._kill()
        self._stderr.close()

    def _read_line(self, command: str, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        stdout = cast("IO[bytes]", self._process.stdout).fileno()
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([stdout], [], [], left)[0]:
                self._kill()
                msg = f"{command}: no answer in {timeout:g} s"
                raise SessionError(msg, "timed_out")
            data = os.read(stdout, 1 << 16)
            if not data:
                raise self._ended()
            self._unread += data
            if len(self._unread) > _MAX_REPLY_BYTES:
                self._kill()
                msg = f"an answer is larger than {_MAX_REPLY_BYTES:,} bytes"
                raise SessionError(msg, "crashed")
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _ended(self) -> SessionError:
        code = self._process.wait()
        tail = self._tail()
        if code == -signal.SIGKILL:
            message = "the system killed the process, as it does where memory runs out"
            return SessionError(f"{message}{tail}", "killed")
        if code < 0:
            return SessionError(f"ended by {signal.Signals(-code).name}{tail}", "crashed")
        return SessionError(f"ended with exit code {code}{tail}", "crashed")

    def _tail(self) -> str:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _STDERR_TAIL))
        text = self._stderr.read().decode(errors="replace").strip()
        return f"; last words: {text.splitlines()[-1]}" if text else ""

    def _kill(self) -> None:
        # The group is the process' own: it began a session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def worker_command(driver: str, **options: Any) -> list[str]:
    """Return what runs a driver in a process."""
    return [sys.executable, "-m", "milpress.device.worker", driver, json.dumps(options)]
