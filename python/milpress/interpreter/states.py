"""States of a stateful model, which last from one run to the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from milpress.errors import InputError


class Cell:
    """A state that holds its value."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def read(self) -> Tensor:
        """Return the value, which a later `write` does not change."""
        return self._value

    def write(self, value: Tensor) -> None:
        """Replace the value by one of the same shape."""
        if value.shape != self._value.shape:
            msg = f"a state must keep its shape {list(self._value.shape)}, got {list(value.shape)}"
            raise ValueError(msg)
        self._value = value.to(self._value.dtype)


class State(Mapping[str, NDArray[Any]]):
    """The states of one conversation with a model, by name: zeros at first, changed by each run.

    Made by `milpress.interpreter.Program.make_state`. Reading gives a copy; assigning to a name
    replaces a state by one of the same shape.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._cells = {name: Cell(value) for name, value in values.items()}

    def cell(self, name: str) -> Cell:
        """Return the state that ops read and write.

        Raises
        ------
        InputError
            If there is none of that name.
        """
        if name not in self._cells:
            known = ", ".join(map(repr, self._cells)) or "none"
            msg = f"state must have {name!r} as this model wants, got {known}"
            raise InputError(msg)
        return self._cells[name]

    def __getitem__(self, name: str) -> NDArray[Any]:
        return np.array(self._cells[name].read().numpy())

    def __setitem__(self, name: str, value: Any) -> None:
        current = self.cell(name).read()
        given = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        if given.shape != current.shape:
            msg = (
                f"state {name!r} must have the shape {list(current.shape)}, got {list(given.shape)}"
            )
            raise InputError(msg)
        # A copy without history, as the state is kept and changed by itself.
        self._cells[name].write(given.detach().clone())

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)
