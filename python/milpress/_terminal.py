"""What is shown on a terminal, or printed where none looks on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import typer

_Made = TypeVar("_Made")


def with_progress(work: Callable[[Any], _Made]) -> _Made:
    """Run long work under a progress bar, if somebody looks on."""
    if not sys.stderr.isatty():
        return work(None)
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from milpress.report import escaped

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=escaped(name))

        return work(show)


def print_table(heading: str | None, table: Any, summary: str) -> None:
    """Print a line of summary and a table, as wide as the terminal."""
    from rich.console import Console

    if heading is not None:
        print_text(heading)
    print_text(summary)
    width = None if sys.stdout.isatty() else 140
    Console(width=width).print(table)


def print_text(text: str) -> None:
    """Print text of which nothing steers the terminal."""
    from milpress.report import printable

    typer.echo(printable(text))


def print_json(data: dict[str, Any]) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(data, indent=2))
