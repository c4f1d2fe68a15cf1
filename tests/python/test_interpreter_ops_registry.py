from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
from mil_ops import DEFINITIONS, TARGETS, definition, types

from milpress.interpreter.ops import OPERATORS, find

# Constants, which are decoded as a program is loaded.
STORED = {"const", *(name for name in DEFINITIONS if name.startswith("constexpr_"))}
# Ops on blocks, lists and states, whose inputs coremltools keeps in forms of its own.
CONTROL = {
    "classify",
    "cond",
    "list_gather",
    "list_length",
    "list_read",
    "list_scatter",
    "list_write",
    "make_list",
    "read_state",
    "while_loop",
}
# Ops of files that coremltools defines elsewhere than the others, or not at all.
BEYOND = {"coreml_update_state", "write_state"}
NOT_COVERED = {
    "_const_symbolic": "stands for a size while coremltools converts; no file holds it",
    "conv_quantized": "experimental: how its table lies in quant_bias is written nowhere",
}
NAMES = sorted(set(OPERATORS) - CONTROL - BEYOND)


def test_every_op_of_coremltools_is_covered_or_listed_with_a_reason():
    assert set(OPERATORS) - BEYOND == set(DEFINITIONS) - STORED - set(NOT_COVERED)
    assert set(OPERATORS) >= CONTROL | BEYOND


def _versions(name: str):
    """Yield the operator and coremltools' class of each opset that has the op."""
    for opset in TARGETS:
        ours, theirs = find(name, opset), definition(name, opset)
        assert (ours is None) == (theirs is None), opset
        if ours is not None:
            yield ours, theirs


@pytest.mark.parametrize("name", NAMES)
def test_an_operator_has_the_inputs_that_mil_defines_in_each_opset(name):
    for ours, theirs in _versions(name):
        inputs = {key: kind.optional for key, kind in theirs.input_spec.input_types.items()}
        parameters = inspect.signature(ours.function).parameters
        required = inspect.Parameter.empty
        optional = {key: parameters[key].default is not required for key in ours.forms}
        assert optional == inputs


def _defaults(op: type) -> dict:
    """Return the defaults that MIL's class gives to an op of three axes."""
    value = SimpleNamespace(rank=3, shape=(2, 3, 4), dtype=types.fp32, val=True)
    instance = object.__new__(op)
    for key in op.input_spec.input_types:
        object.__setattr__(instance, key, value)
    return dict(instance.default_inputs().items())


# Those that stand for a value that depends on the other inputs.
STANDING_FOR = {
    "strides": [1],
    "dilations": [1],
    "pad": [0, 0],
    "axes": range(3),
    "bias": [0.0, 0.0],
    "box_indices": [0, 1],
}


@pytest.mark.parametrize("name", NAMES)
def test_an_operator_has_the_defaults_that_mil_defines(name):
    for ours, theirs in _versions(name):
        parameters = inspect.signature(ours.function).parameters
        for key, value in _defaults(theirs).items():
            default = parameters[key].default
            if default is None and value is not None:
                assert list(value) == list(STANDING_FOR[key]), key
            elif isinstance(value, np.floating):
                assert value == type(value)(default), key
            else:
                assert default == value, key
