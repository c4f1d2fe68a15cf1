"""Control flow, and the last op of a classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from milpress.interpreter.operator import Call, operator
from milpress.mil.features import Probabilities


@operator("cond")
def cond(pred: bool, *, call: Call) -> tuple[Any, ...]:
    chosen = call.blocks[0] if pred else call.blocks[1]
    return chosen()


@operator("while_loop")
def while_loop(loop_vars: list[object], *, call: Call) -> tuple[Any, ...]:
    condition, body = call.blocks
    variables = tuple(loop_vars)
    del loop_vars
    while bool(condition(*variables)[0]):
        variables = body(*variables)
    return variables


@operator("classify")
def classify(probabilities: Tensor, classes: list[str]) -> tuple[Any, Probabilities]:
    flat = probabilities.reshape(-1)
    if not len(flat) or len(flat) != len(classes):
        msg = f"probabilities must be as many as classes, {len(classes)}, got {len(flat)}"
        raise ValueError(msg)
    best: Any = classes[int(flat.argmax())]
    label = torch.tensor(best) if isinstance(best, int) else best
    return label, Probabilities(classes, flat)
