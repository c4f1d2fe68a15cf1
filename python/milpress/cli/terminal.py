"""What commands show on a terminal: tables, lines, JSON."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

import typer

from milpress.errors import StorageError, printable
from milpress.plain import json


def print_found(heading: str | None, table: Any, summary: str) -> None:
    """Print a heading, a line and a table."""
    if heading is not None:
        print_text(heading)
    print_text(summary)
    print_table(table)


def print_result(result: Any, *lines: str, as_json: bool, heading: str | None = None) -> None:
    """Print a result as JSON; or with a heading, its summary and its table, and lines behind."""
    if as_json:
        print_json(result.to_dict())
        return
    print_found(heading, result, result.summary)
    for line in lines:
        print_text(line)


def print_table(table: Any) -> None:
    """Print a table, as wide as the terminal, or as 140 columns."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            # Of its own it would exit, with the code of a failed verification.
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    width = None if sys.stdout.isatty() else 140
    with _output():
        Output(width=width).print(table)


def print_text(text: str) -> None:
    """Print a line, without what would steer a terminal."""
    with _output():
        typer.echo(printable(text))


def print_json(data: dict[str, Any]) -> None:
    """Print JSON."""
    with _output():
        typer.echo(json.text(data, indent=2))


@contextlib.contextmanager
def _output() -> Iterator[None]:
    """Say of what can't be printed that it is the output."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(error.errno or 0, reason, "standard output") from error
