"""Recurrent layers: each step takes the state that the one before left."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from milpress.interpreter.operator import Call, operator
from milpress.interpreter.ops.torch_types import check_choice

# Those that have parameters are used with their usual ones.
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = types.MappingProxyType(
    {
        "tanh": torch.tanh,
        "scaled_tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "hard_sigmoid": lambda x: torch.clamp(0.2 * x + 0.5, 0, 1),
        "sigmoid_hard": lambda x: torch.clamp(0.2 * x + 0.5, 0, 1),
        "relu": torch.relu,
        "linear": lambda x: x,
    }
)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name.lower() not in _ACTIVATIONS:
        msg = f"activation must be one of {', '.join(_ACTIVATIONS)}, got {name}"
        raise ValueError(msg)
    return _ACTIVATIONS[name.lower()]


def _in_direction(x: Tensor, direction: str) -> Tensor:
    """Return the sequence in the order in which it is read; the output stays in that order."""
    check_choice("direction", direction, "forward", "reverse")
    return x.flip(0) if direction == "reverse" else x


def _initial(state: Tensor, x: Tensor, name: str) -> Tensor:
    """Return a state with a row for each sequence.

    What coremltools converts of packed sequences has as many rows as the first one has steps, all
    of them alike.

    Raises
    ------
    ValueError
        If there are others, and they differ.
    """
    n_sequences = x.shape[1]
    if state.shape[0] == n_sequences:
        return state
    if not state.shape[0] or not bool((state == state[:1]).all()):
        msg = (
            f"{name} must have a row for each of {n_sequences} sequences, or rows that are all "
            f"alike, got {state.shape[0]}"
        )
        raise ValueError(msg)
    return state[:1].expand(n_sequences, -1)


def _seen(steps: list[Tensor], all_of_them: bool) -> Tensor:
    return torch.stack(steps if all_of_them else steps[-1:])


def _show(
    call: Call, x: Tensor, read: list[list[Tensor]], direction: str, suffix: str = ""
) -> None:
    """Show what the weights of a direction are multiplied by, each at the place of its input.

    ``read`` has, for each block of ``weight_hh``, what that is multiplied by in each step.
    """
    call.show(f"weight_ih{suffix}", lambda: x[None])
    call.show(
        f"weight_hh{suffix}",
        lambda: torch.stack([_in_direction(torch.stack(block), direction) for block in read]),
    )


@operator("lstm", operands=("weight_ih", "weight_hh", "weight_ih_back", "weight_hh_back"))
def lstm(
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: float | None = None,
    *,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    gate, cell = _activation(recurrent_activation), _activation(cell_activation)
    output = _activation(activation)
    initial_h, initial_c = _initial(initial_h, x, "initial_h"), _initial(initial_c, x, "initial_c")

    def run(
        h: Tensor,
        c: Tensor,
        weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        direction: str,
        suffix: str = "",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run one direction; weights are in the order input, forget, output, cell gate."""
        own_ih, own_hh, own_bias, own_peephole = weights
        looks = None if own_peephole is None else own_peephole.chunk(3)
        steps = [h]
        for projected in functional.linear(_in_direction(x, direction), own_ih, own_bias):
            gates = projected + functional.linear(h, own_hh)
            taken_in, forgotten, shown, proposed = gates.chunk(4, -1)
            if looks is not None:
                taken_in, forgotten = taken_in + c * looks[0], forgotten + c * looks[1]
            c = gate(forgotten) * c + gate(taken_in) * cell(proposed)
            if clip is not None:
                c = c.clamp(-clip, clip)
            if looks is not None:
                shown = shown + c * looks[2]
            h = gate(shown) * output(c)
            steps.append(h)
        _show(call, x, [steps[:-1]], direction, suffix)
        return _seen(steps[1:], output_sequence), h, c

    weights = (weight_ih, weight_hh, bias, peephole)
    if direction != "bidirectional":
        return run(initial_h, initial_c, weights, direction)
    if weight_ih_back is None or weight_hh_back is None:
        msg = "weight_ih_back and weight_hh_back must be given where direction is bidirectional"
        raise ValueError(msg)
    weights_back = (weight_ih_back, weight_hh_back, bias_back, peephole_back)
    (h, h_back), (c, c_back) = initial_h.chunk(2, -1), initial_c.chunk(2, -1)
    seen, h, c = run(h, c, weights, "forward")
    seen_back, h_back, c_back = run(h_back, c_back, weights_back, "reverse", "_back")
    pairs = ((seen, seen_back.flip(0)), (h, h_back), (c, c_back))
    sequence, last_h, last_c = (torch.cat(pair, -1) for pair in pairs)
    return sequence, last_h, last_c


@operator("gru", operands=("weight_ih", "weight_hh"), added={8: ("reset_after", "input_bias")})
def gru(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: bool = False,
    input_bias: Tensor | None = None,
    *,
    call: Call,
) -> tuple[Tensor, Tensor]:
    # Weights are in the order reset, output, update gate.
    gate, output = _activation(recurrent_activation), _activation(activation)
    h = _initial(initial_h, x, "initial_h")
    if bias is None:
        bias = torch.zeros(weight_hh.shape[0])
    weight_r, weight_o, weight_z = weight_hh.chunk(3)
    bias_r, bias_o, bias_z = bias.chunk(3)
    steps = []
    read: list[list[Tensor]] = [[], [], []]
    for projected in functional.linear(_in_direction(x, direction), weight_ih, input_bias):
        x_r, x_o, x_z = projected.chunk(3, -1)
        r = gate(x_r + functional.linear(h, weight_r, bias_r))
        z = gate(x_z + functional.linear(h, weight_z, bias_z))
        kept = h if reset_after else r * h
        proposed = functional.linear(kept, weight_o, bias_o)
        o = output(x_o + (r * proposed if reset_after else proposed))
        for block, operand in zip(read, (h, kept, h), strict=True):
            block.append(operand)
        h = (1 - z) * o + z * h
        steps.append(h)
    _show(call, x, read, direction)
    return _seen(steps, output_sequence), h


@operator("rnn", operands=("weight_ih", "weight_hh"))
def rnn(
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    activation: str = "tanh",
    *,
    call: Call,
) -> tuple[Tensor, Tensor]:
    output = _activation(activation)
    h = initial_h = _initial(initial_h, x, "initial_h")
    steps = []
    for projected in functional.linear(_in_direction(x, direction), weight_ih, bias):
        h = output(projected + functional.linear(h, weight_hh))
        steps.append(h)
    _show(call, x, [[initial_h, *steps[:-1]]], direction)
    return _seen(steps, output_sequence), h
