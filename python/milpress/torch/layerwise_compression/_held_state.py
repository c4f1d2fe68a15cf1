"""What modules hold beside their weights, kept apart for runs that take turns with one model.

A forward may keep something on a module: the size of a grid, a memory for another module, a cache;
or on the module's class, or as a global of the file that defines the class. Between two turns of a
run it is taken off, so that no other run meets it. What runs have added to containers of classes
and globals is there in the end, for they may be someone's notes.
"""

from __future__ import annotations

import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, TypeAlias

import torch
from torch import nn

# What torch itself keeps in a module, other than buffers: weights, submodules, hooks.
_INTERNAL = frozenset(vars(nn.Module())) - {"_buffers", "_non_persistent_buffers_set", "training"}
_ATOMS = (type(None), bool, int, float, str)
_NONE = object()
_MOST = 10_000  # entries of a container that is still looked into

_Put: TypeAlias = Callable[[], None]


class HeldState:
    """What the modules of a model hold at first, which each run begins with.

    That is all attributes and buffers of its modules, and what lists, dictionaries, sets, tensors
    and objects among them hold; no weights, submodules or hooks. Of classes and globals it is which
    names stand for what, and what lists, dictionaries and sets of that hold.

    Parameters
    ----------
    model
        The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors: list[_HeldTensor] = []
        self._notes: list[_Put] = []
        self.refresh()

    def refresh(self) -> None:
        """Take what the modules hold now for what they hold at first."""
        containers, tensors = _reached(self._model)
        known = {id(held.tensor): held for held in self._tensors}
        self._tensors = [
            held if held is not None and held.is_unchanged() else _HeldTensor(tensor)
            for tensor in tensors
            for held in [known.get(id(tensor))]
        ]
        self._dicts = [_HeldEntries(each) for each in containers if isinstance(each, dict)]
        self._others: list[_Held] = [
            _held_container(each) for each in containers if not isinstance(each, dict)
        ]
        names, self._shared = _names_around(self._model, {id(each) for each in containers})
        self._others += [*names, *self._shared]
        self._entries = [held.container for held in self._dicts]
        self._sizes = list(map(len, self._entries))
        self._keys = list(chain.from_iterable(self._entries))
        self._values = list(chain.from_iterable(map(_values, self._entries)))

    def leave(self) -> Callable[[], None]:
        """Have the modules hold what they held at first; return what undoes that."""
        held: Iterable[_Held] = self._others
        if not self._has_same_entries():
            held = chain(self._dicts, held)
        changed = [each for each in chain(held, self._tensors) if not each.is_unchanged()]
        changes = [each.take_off() for each in changed]

        def come_back() -> None:
            for put in changes:
                put()

        return come_back

    def end(self) -> None:
        """Have the modules hold what they held at first, at the end of a run."""
        for held in self._shared:
            if not held.is_unchanged():
                self._notes.append(held.added())
        self.leave()

    def close(self) -> None:
        """Give containers of classes and globals what runs have added to them."""
        for add in self._notes:
            add()
        self._notes.clear()

    def _has_same_entries(self) -> bool:
        # By far most dictionaries are those of modules: no loop of Python's goes through them.
        return (
            list(map(len, self._entries)) == self._sizes
            and all(map(is_, chain.from_iterable(self._entries), self._keys))
            and all(map(is_, chain.from_iterable(map(_values, self._entries)), self._values))
        )


def _values(container: Mapping[Any, Any]) -> Collection[Any]:
    return container.values()


class _HeldEntries:
    """A dictionary, such as that of an object's attributes, and what is in it at first."""

    def __init__(self, container: dict[Any, Any]) -> None:
        self.container = container
        self._first = dict(container)

    def is_unchanged(self) -> bool:
        mine, first = self.container, self._first
        return (
            len(mine) == len(first)
            and all(map(is_, mine, first))
            and all(map(is_, mine.values(), first.values()))
        )

    def take_off(self) -> _Put:
        now = dict(self.container)
        self._fill(self._first)
        return lambda: self._fill(now)

    def added(self) -> _Put:
        container, first = self.container, self._first
        new = {k: v for k, v in container.items() if k not in first or first[k] is not v}
        return lambda: container.update(new)

    def _fill(self, entries: dict[Any, Any]) -> None:
        self.container.clear()
        self.container.update(entries)


class _HeldItems:
    """A list or deque, and what is in it at first."""

    def __init__(self, container: list[Any] | deque[Any]) -> None:
        self._container = container
        self._first = tuple(container)

    def is_unchanged(self) -> bool:
        return len(self._container) == len(self._first) and all(
            map(is_, self._container, self._first)
        )

    def take_off(self) -> _Put:
        now = tuple(self._container)
        self._fill(self._first)
        return lambda: self._fill(now)

    def added(self) -> _Put:
        container, n = self._container, len(self._first)
        new = tuple(container)[n:] if all(map(is_, container, self._first)) else ()
        return lambda: container.extend(new)

    def _fill(self, items: Sequence[Any]) -> None:
        self._container.clear()
        self._container.extend(items)


class _HeldMembers:
    """A set, and what is in it at first."""

    def __init__(self, container: set[Any]) -> None:
        self._container = container
        self._first = frozenset(container)

    def is_unchanged(self) -> bool:
        return self._container == self._first

    def take_off(self) -> _Put:
        now = frozenset(self._container)
        self._fill(self._first)
        return lambda: self._fill(now)

    def added(self) -> _Put:
        container, new = self._container, self._container - self._first
        return lambda: container.update(new)

    def _fill(self, members: frozenset[Any]) -> None:
        self._container.clear()
        self._container.update(members)


class _HeldNames:
    """The names of a class or of globals, and what they stand for at first."""

    def __init__(self, owner: type | types.ModuleType) -> None:
        self._owner = owner
        self._first = dict(vars(owner))

    def is_unchanged(self) -> bool:
        now = vars(self._owner)
        # A name that is bound anew keeps its place.
        return len(now) == len(self._first) and all(map(is_, now.values(), self._first.values()))

    def take_off(self) -> _Put:
        first, now = self._first, dict(vars(self._owner))
        changed = [
            name
            for name in {*now, *first}
            if not name.startswith("__") and now.get(name, _NONE) is not first.get(name, _NONE)
        ]
        self._bind(changed, first)
        return lambda: self._bind(changed, now)

    def _bind(self, names: Iterable[str], values: Mapping[str, Any]) -> None:
        for name in names:
            if name in values:
                setattr(self._owner, name, values[name])
            else:
                delattr(self._owner, name)


class _HeldTensor:
    """A tensor that is no weight, and its values at first."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._first = tensor.detach().clone()
        self._version = _version(tensor)

    def is_unchanged(self) -> bool:
        # Of those that were made in inference mode torch does not count changes.
        return self._version is not None and self._version == _version(self.tensor)

    def take_off(self) -> _Put:
        now = self.tensor.detach().clone()
        self._fill(self._first)
        self._version = _version(self.tensor)
        return lambda: self._fill(now)

    def _fill(self, values: torch.Tensor) -> None:
        with torch.inference_mode():  # which may change tensors of both modes
            self.tensor.copy_(values)


_HeldContainer: TypeAlias = _HeldEntries | _HeldItems | _HeldMembers
_Held: TypeAlias = _HeldContainer | _HeldNames | _HeldTensor


def _held_container(container: Any) -> _HeldContainer:
    if isinstance(container, dict):
        return _HeldEntries(container)
    if isinstance(container, (list, deque)):
        return _HeldItems(container)
    return _HeldMembers(container)


def _names_around(
    model: nn.Module, seen: set[int]
) -> tuple[list[_HeldNames], list[_HeldContainer]]:
    """Return the names of a model's own classes and of their files, and containers among them."""
    kinds: dict[type, None] = {}
    for module in model.modules():
        kinds |= dict.fromkeys(kind for kind in type(module).__mro__ if not _is_common(kind))
    files = {name: sys.modules.get(name) for name in (kind.__module__ for kind in kinds)}
    owners: list[Any] = [*kinds, *(file for file in files.values() if file is not None)]
    held: list[_HeldContainer] = []
    for owner in owners:
        for name, value in list(vars(owner).items()):
            is_container = type(value) in (dict, list, set, deque) and not name.startswith("__")
            if is_container and len(value) <= _MOST and id(value) not in seen:
                seen.add(id(value))
                held.append(_held_container(value))
    return [_HeldNames(owner) for owner in owners], held


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _reached(model: nn.Module) -> tuple[list[Any], list[torch.Tensor]]:
    """Return the containers and the tensors that a model's modules hold."""
    containers: list[Any] = []
    tensors: list[torch.Tensor] = []
    seen: dict[int, Any] = {}  # which keeps them, and so their ids, alive
    pending: list[Any] = [model]
    while pending:
        each = pending.pop()
        if type(each) in _ATOMS or id(each) in seen:
            continue
        seen[id(each)] = each
        if isinstance(each, torch.Tensor):
            if not isinstance(each, nn.Parameter) and each.layout is torch.strided:
                tensors.append(each)
        elif isinstance(each, nn.Module):
            attributes = vars(each)
            containers.append(attributes)
            pending.extend(each._modules.values())
            pending.extend(value for name, value in attributes.items() if name not in _INTERNAL)
        elif isinstance(each, (dict, list, set, deque, tuple)):
            if len(each) <= _MOST:
                if not isinstance(each, tuple):
                    containers.append(each)
                pending.extend(each.values() if isinstance(each, dict) else each)
        else:
            pending.append(_own_attributes(each))
    return containers, tensors


def _own_attributes(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object, if neither Python nor torch brings its class along."""
    kind = type(value)
    if _is_common(kind) and kind is not types.SimpleNamespace:
        return None
    attributes = getattr(value, "__dict__", None)
    return attributes if isinstance(attributes, dict) else None


def _is_common(kind: type) -> bool:
    """Whether Python or torch brings a class along."""
    home = kind.__module__.partition(".")[0]
    return home == "torch" or home in sys.stdlib_module_names
