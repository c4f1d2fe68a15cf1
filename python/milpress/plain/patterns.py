"""Names and patterns of names: ``re:`` and ``glob:`` in front make a pattern."""

from __future__ import annotations

import fnmatch
import re

from milpress.errors import ConfigError


def is_pattern(key: str) -> bool:
    """Whether a key stands for more names than itself."""
    return key.startswith(("re:", "glob:"))


def check(key: str) -> None:
    """Raise `ConfigError` if a key is a pattern that can't be read."""
    if key.startswith("re:"):
        _regex(key)


def matches(key: str, name: str) -> bool:
    """Whether a key, a name or a pattern, stands for a name."""
    if key.startswith("glob:"):
        return fnmatch.fnmatchcase(name, key.removeprefix("glob:"))
    if key.startswith("re:"):
        return _regex(key).fullmatch(name) is not None
    return key == name


def _regex(key: str) -> re.Pattern[str]:
    try:
        return re.compile(key.removeprefix("re:"))
    except re.error as error:
        msg = f"name must be a regular expression behind re:, got {key!r}: {error}"
        raise ConfigError(msg) from error
