"""A page as text, by a template: nothing that is filled in is markup, wherever it stands.

A page of HTML is one file: styles and script inside, nothing fetched. The script gets its data as
JSON and puts text into text nodes. A policy in the page allows just that script and those styles,
by their hashes, and no request.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from milpress.errors import printable
from milpress.page.collect import Page
from milpress.page.view import view
from milpress.plain import json
from milpress.show import human_bytes, human_snr


def html(page: Page) -> str:
    """Return the page as HTML."""
    style, script = (
        resources.files("milpress.page").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    )
    template = _environment(printable).get_template("page.html.j2")
    return template.render(
        view(page),
        style=style,
        script=script,
        style_digest=_digest(style),
        script_digest=_digest(script),
    )


def markdown(page: Page) -> str:
    """Return the page as Markdown: the same tables."""
    template = _environment(_escaped).get_template("page.md.j2")
    return template.render(view(page)).strip() + "\n"


@functools.cache
def _environment(fill: Callable[[str], str]) -> Environment:
    """Return the templates, in which each value but markup is filled in by a function."""
    environment = Environment(
        loader=PackageLoader("milpress.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else fill(str(value)),
    )
    environment.filters.update(order=_order, shown=_shown)
    environment.tests["infinite"] = math.isinf
    environment.globals.update(size=human_bytes, snr=human_snr)
    # In JSON that no text can end the element which holds it.
    environment.policies["json.dumps_function"] = json.text
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _order(value: float | None) -> float | str:
    """Return what a cell is sorted by."""
    if value is None:
        return ""
    return math.copysign(1e300, value) if math.isinf(value) else value


def _shown(value: Any, form: str | Callable[[Any], str]) -> str:
    """Return a value as a format or a function shows it; nothing if there is none."""
    if value is None:
        return ""
    return form.format(value) if isinstance(form, str) else form(value)


def _escaped(text: str) -> Markup:
    # What is escaped for Markdown must not be escaped for HTML too.
    return Markup(re.sub(r"([\\`*_{}\[\]<>()#+!|~$&-])", r"\\\1", printable(text)))  # noqa: S704
