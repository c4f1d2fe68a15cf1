"""Writing a page: as HTML or as Markdown, by the name of the file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from milpress.errors import ConfigError
from milpress.page.collect import Page, collect
from milpress.plain.files import write_whole

# Apple's published tables.
LITERATURE = Path(__file__).parents[1] / "device" / "literature.json"

_ENDINGS = (".html", ".md")


def write(
    sources: Iterable[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    *,
    title: str | None = None,
) -> Page:
    """Make one page of results.

    Parameters
    ----------
    sources
        Files of JSON, as ``milpress compress``, ``evaluate`` and ``bench`` write them.
    destination
        The file to write: ``.html``, one file that opens offline, or ``.md``.
    title
        Of the page; by default the original's name.

    Returns
    -------
    Page
        What it shows.

    Raises
    ------
    ResultError
        If a file is no such result.
    ConfigError
        If there is none, or the destination has another ending.
    """
    path = Path(destination)
    if path.suffix not in _ENDINGS:
        msg = f"{path}: a page must be {' or '.join(_ENDINGS)}, got {path.suffix or 'neither'!r}"
        raise ConfigError(msg)
    from milpress.page import render

    page = collect(sources, title=title)
    text = render.html(page) if path.suffix == ".html" else render.markdown(page)
    write_whole(path, text.encode())
    return page
