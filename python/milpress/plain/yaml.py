"""YAML files, with errors that name the file and the line.

What is read are trees of plain values of bounded size: a few hundred bytes of aliases can stand for
millions of values. A key that is given twice is refused, as one of its values would be lost.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import yaml
from yaml.constructor import ConstructorError

from milpress.errors import ConfigError, ConfigTypeError

_MAX_BYTES = 4 << 20
_MAX_DEPTH = 50
_MAX_VALUES = 200_000
_MAX_DIGITS = 300  # more than any float has; Python refuses to print some thousands


def load(source: str | os.PathLike[str] | IO[Any], what: str) -> Any:
    """Return what a YAML file, given by path or opened, holds; ``what`` names it in an error.

    Raises
    ------
    ConfigError
        If it is no YAML file, or holds what is more than plain values.
    ConfigTypeError
        If the source is neither a path nor a file.
    """
    place = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "stream")
    try:
        if isinstance(source, (str, os.PathLike)):
            with Path(source).open("rb") as file:
                return _values(file.read(_MAX_BYTES + 1))
        if hasattr(source, "read"):
            return _values(source.read(_MAX_BYTES + 1))
    except FileNotFoundError as error:
        msg = f"{place}: no such file"
        raise ConfigError(msg) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f", line {mark.line + 1}"
        msg = f"{place}{line}: can't be read as {what}: {error.problem or error.context}"
        raise ConfigError(msg) from error
    except (OSError, ValueError, KeyError, yaml.YAMLError, RecursionError) as error:
        # A KeyError is PyYAML's of a truth value that is none.
        msg = f"{place}: can't be read as {what}: {error}"
        raise ConfigError(msg) from error
    msg = f"{what} must be a path or an open file, got {type(source)}"
    raise ConfigTypeError(msg)


def text(data: Any, **settings: Any) -> str:
    """Return plain values as YAML, keys in their order; ``settings`` are of `yaml.safe_dump`."""
    return str(yaml.safe_dump(data, sort_keys=False, **settings))


def _values(text: str | bytes) -> Any:
    if len(text) > _MAX_BYTES:
        msg = f"more than {_MAX_BYTES} bytes"
        raise ValueError(msg)
    return yaml.load(text if isinstance(text, str) else text.decode("utf-8"), _Loader)  # noqa: S506


class _Size(NamedTuple):
    n_values: int
    depth: int


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, of what is checked first."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[int, _Size | None] = {}
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        # Deeper, Python would run out of its own levels, where no line is known.
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            msg = f"more than {_MAX_DEPTH} levels"
            raise ConstructorError(None, None, msg, self.get_mark())
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            self._check(node)
        return node

    def _check(self, node: yaml.Node) -> _Size:
        """Return how many values a node stands for once aliases are written out, and how deep.

        A node that several aliases stand for is looked at once.
        """
        if id(node) in self._sizes:
            known = self._sizes[id(node)]
            if known is None:
                _refuse(node, "an alias of what it is in")
            return known
        self._sizes[id(node)] = None
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        sizes = [self._check(part) for part in inner]
        size = _Size(
            1 + sum(each.n_values for each in sizes),
            1 + max((each.depth for each in sizes), default=0),
        )
        if size.n_values > _MAX_VALUES:
            _refuse(node, f"more than {_MAX_VALUES} values, aliases written out")
        if size.depth > _MAX_DEPTH:
            _refuse(node, f"more than {_MAX_DEPTH} levels, aliases written out")
        self._sizes[id(node)] = size
        return size

    def _check_keys(self, node: yaml.MappingNode) -> None:
        lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                _refuse(key_node, "a list or mapping as a key; a key must be a word")
            if key_node.tag == "tag:yaml.org,2002:merge":
                key: Hashable = key_node.tag
            else:
                key = self.construct_object(key_node)
            if key in lines:
                _refuse(
                    key_node,
                    f"the key {key_node.value!r} again, which line {lines[key]} has; it must be "
                    "given once",
                )
            lines[key] = key_node.start_mark.line + 1

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > _MAX_DIGITS:
            _refuse(node, f"a number of more than {_MAX_DIGITS} digits")
        return int(super().construct_yaml_int(node))

    def construct_date(self, node: Any) -> Any:
        return self.construct_scalar(node)


def _refuse(node: yaml.Node, what: str) -> NoReturn:
    raise ConstructorError(None, None, what, node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
# What looks like a date is the text that it is.
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_date)
