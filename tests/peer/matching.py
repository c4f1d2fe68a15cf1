"""Lists of tests by name, each with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase


def reasons(table: Mapping[str, str], name: str) -> list[str]:
    """Return the values of `table` whose key matches `name`; only `*` is special in a key."""
    return [table[key] for key in table if fnmatchcase(name, key.replace("[", "[[]"))]
