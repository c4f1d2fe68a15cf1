"""Opsets: versions of MIL, their names, and what each can express."""

from __future__ import annotations

from dataclasses import dataclass

from milpress.errors import ConfigError, PackageError


@dataclass(frozen=True, slots=True, order=True)
class Opset:
    """A version of MIL: its number, which orders, and its names."""

    version: int
    target: str
    specification: int

    @property
    def name(self) -> str:
        """The name that a program uses."""
        return f"CoreML{self.version}"

    @property
    def has_blocks(self) -> bool:
        """Whether groups, blocks and codes of 3 or 4 bits can be stored."""
        return self.version >= 8


_ALL = (
    Opset(5, "iOS15", 6),
    Opset(6, "iOS16", 7),
    Opset(7, "iOS17", 8),
    Opset(8, "iOS18", 9),
    Opset(9, "iOS26", 10),
)
_BY_NAME = {opset.name: opset for opset in _ALL}
_BY_TARGET = {opset.target: opset for opset in _ALL}
FIRST_WITH_COMPRESSION = _BY_TARGET["iOS16"]


def by_name(name: str) -> Opset:
    """Return the opset that a program names.

    Raises
    ------
    PackageError
        If it is none that milpress knows.
    """
    if name not in _BY_NAME:
        msg = f"an opset must be one of {', '.join(_BY_NAME)}, got {name!r}"
        raise PackageError(msg)
    return _BY_NAME[name]


def by_target(target: str) -> Opset:
    """Return the opset of a deployment target such as ``"iOS18"``.

    Raises
    ------
    ConfigError
        If there is no such target.
    """
    if target not in _BY_TARGET:
        msg = f"a target must be one of {', '.join(_BY_TARGET)}, got {target!r}"
        raise ConfigError(msg)
    return _BY_TARGET[target]
