"""Operators: functions on torch tensors that compute the ops of MIL."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What an op may ask of the program that calls it; a parameter named ``call`` receives it.

    Parameters
    ----------
    dtype
        Type that holds the first output here, if it is a tensor.
    generator
        Source of random numbers, seeded with the program's run.
    blocks
        The op's nested blocks, which take and return values as ops do.
    show
        Shows what a weight is multiplied by, if somebody looks at it: it is made only then. It is
        one of the operator's ``operands``, of the shape ``(blocks, *positions, n)``: equal parts of
        the weight's rows, one after the other, are multiplied by a block each.
    """

    dtype: torch.dtype | None
    generator: torch.Generator
    blocks: Sequence[Callable[..., tuple[Any, ...]]]
    show: Callable[[str, Callable[[], Tensor]], None]


# Hints of a function that are of no parameter of the op.
_OWN = ("call", "return")


@dataclass(frozen=True, slots=True)
class Operator:
    """A function that computes an op, and how its arguments are handed to it.

    Its parameters carry MIL's names and defaults, and their annotations say in which form each is
    wanted: ``Tensor``, ``int``, ``float``, ``bool``, ``str``, ``list[int]``, ``list[bool]``,
    ``list[str]``, ``list[Tensor]`` (for inputs that take several values), a class of values that
    are no tensors, ``list[object]`` (for several values as they are), or one of these ``| None``.
    Integers, booleans and floats are read from constants when the program is loaded, and from
    tensors when it runs.

    Tensors arrive in the type of their MIL type: every float as float32, integers as themselves
    (``uint16`` as int32), ``bool`` as bool. The program rounds and casts what is returned to the
    type that the op's output declares, so a function may compute in a wider one. Several outputs
    are a tuple.

    ``operands`` are the parameters of which the function shows what they are multiplied by,
    ``earlier`` the operators of opsets that have only some of the parameters.
    """

    function: Callable[..., Any]
    name: str
    since: int
    forms: Mapping[str, tuple[str, bool]]
    takes_call: bool
    operands: tuple[str, ...] = ()
    earlier: tuple[Operator, ...] = ()

    def bound(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments in the form that the function wants.

        Raises
        ------
        TypeError
            If one has no such form.
        """
        bound = {}
        for name, value in arguments.items():
            form, optional = self.forms[name]
            if value is None and not optional:
                continue
            bound[name] = None if value is None else _in_form(form, value)
        return bound


def operator(
    name: str,
    *,
    since: int = 5,
    operands: tuple[str, ...] = (),
    added: Mapping[int, tuple[str, ...]] = types.MappingProxyType({}),
    before: Mapping[str, Any] = types.MappingProxyType({}),
) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function the operator of the op of a name.

    Parameters
    ----------
    name, since, operands
        As of `Operator`.
    added
        Parameters, with defaults, that an op has only from a later opset's version on.
    before
        What the function is given for such parameters before that, if not their defaults.
    """

    def wrap(function: Callable[..., Any]) -> Operator:
        hints = typing.get_type_hints(function)
        forms = {key: _form_of(hint) for key, hint in hints.items() if key not in _OWN}
        takes_call = "call" in hints
        versions: list[Operator] = []
        for version in (since, *sorted(added)):
            later = {key for each, some in added.items() if each > version for key in some}
            known = {key: form for key, form in forms.items() if key not in later}
            proxy = types.MappingProxyType(known)
            fixed = {key: value for key, value in before.items() if key in later}
            bound = functools.partial(function, **fixed) if fixed else function
            versions.append(Operator(bound, name, version, proxy, takes_call, operands))
        return dataclasses.replace(versions[-1], earlier=tuple(versions[:-1]))

    return wrap


def of_one(name: str, function: Callable[[Tensor], Tensor]) -> Operator:
    """Return the operator of an op that takes ``x`` and nothing else."""

    @operator(name)
    def apply(x: Tensor) -> Tensor:
        return function(x)

    return apply


def _form_of(hint: Any) -> tuple[str, bool]:
    choices = [choice for choice in typing.get_args(hint) if choice is not type(None)]
    is_optional = type(None) in typing.get_args(hint)
    kind = choices[0] if is_optional else hint
    item = typing.get_args(kind)
    if item:
        return f"list[{item[0].__name__}]", is_optional
    return kind.__name__, is_optional


def _in_form(form: str, value: Any) -> Any:
    if form.startswith("list"):
        items = value if isinstance(value, list | tuple) else [value]
        if form == "list[Tensor]":
            return [_tensor(item) for item in items]
        if form == "list[object]":
            return list(items)
        parts = (
            each.reshape(-1).tolist() if isinstance(each, Tensor) else [each] for each in items
        )
        return [number for part in parts for number in part]
    if form == "Tensor":
        return _tensor(value)
    if isinstance(value, Tensor) and form in ("int", "float", "bool"):
        return value.item()
    return value


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float32)
    if isinstance(value, bool):
        return torch.tensor(value)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32)
    msg = f"a tensor must be given, got {type(value).__name__}"
    raise TypeError(msg)
