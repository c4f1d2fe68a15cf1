"""Classes that configs name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from milpress.errors import ConfigError

_T = TypeVar("_T", bound=type)
_CLASSES: dict[tuple[type, str], type] = {}


class Registered:
    """A base whose subclasses can be had by a name."""

    __slots__ = ()

    @classmethod
    def register(cls, name: str) -> Callable[[_T], _T]:
        """Return a decorator that gives a class a name; the last one of that name counts."""

        def add(registered: _T) -> _T:
            _CLASSES[cls, name] = registered
            return registered

        return add

    @classmethod
    def get_class(cls, name: Any) -> Any:
        """Return the class of a name; a class is its own.

        Raises
        ------
        ConfigError
            If there is none.
        """
        if isinstance(name, type) and issubclass(name, cls):
            return name
        known = {key: kind for (base, key), kind in _CLASSES.items() if base is cls}
        if not isinstance(name, str) or name not in known:
            msg = f"a {cls.__name__} must be one of {sorted(known)}, got {name!r}"
            raise ConfigError(msg)
        return known[name]
