"""Ops that read and write states."""

from __future__ import annotations

from torch import Tensor

from milpress.interpreter.operator import operator
from milpress.interpreter.states import StateTensor


@operator("read_state")
def read_state(input: StateTensor) -> Tensor:  # noqa: A002  (MIL's name)
    return input.read()


@operator("write_state")
def write_state(input: StateTensor, data: Tensor) -> None:  # noqa: A002
    input.write(data)


@operator("coreml_update_state")
def coreml_update_state(state: StateTensor, value: Tensor) -> Tensor:
    state.write(value)
    return state.read()
