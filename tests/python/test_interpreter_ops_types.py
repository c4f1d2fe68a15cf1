"""Ops on every combination of types that MIL admits: the same numbers give the same result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from mil_ops import DEFINITIONS, IOS17, TARGETS, computed, definition, types

from milpress.interpreter.ops import OPERATORS

NUMPY = {"fp16": np.float16, "fp32": np.float32, "bool": np.bool_} | {
    name: getattr(np, name)
    for name in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "uint64")
}
HELD = {"fp16": torch.float32, "uint16": torch.int32, "uint32": torch.int64}


def whole(*shape: int, most: int = 1) -> np.ndarray:
    """Return numbers that every type has; those up to 1 are the same as booleans."""
    return np.random.default_rng(shape).integers(0, most + 1, shape).astype(np.float32)


def scalar(value: float) -> np.ndarray:
    return np.float32(value)


IMAGE, LINE, CHANNELS = whole(1, 4, 4, 4), whole(1, 4, 6), whole(4) + 1
PLACES = {"begin": np.float32([0, 1, 2]), "end": np.float32([1, 3, 6])}
SAMPLED = {
    "sampling_mode": "bilinear",
    "padding_mode": "constant",
    "padding_value": scalar(1),
    "coordinates_mode": "unnormalized",
    "align_corners": True,
}

# What the ops are given, as numbers: arrays take on each type.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "affine": {"x": IMAGE, "transform_matrix": whole(1, 6), **SAMPLED}
    | {"output_height": 2, "output_width": 3},
    "band_part": {"x": LINE, "lower": 1, "upper": 1},
    "batch_norm": {"x": IMAGE, **dict.fromkeys(("mean", "variance", "gamma", "beta"), CHANNELS)},
    "batch_to_space": {"x": whole(4, 1, 2, 2), "block_shape": [2, 2], "crops": [0, 0, 0, 0]},
    "clip": {"x": LINE, "alpha": scalar(0), "beta": scalar(1)},
    "concat": {"values": [LINE, LINE], "axis": 1},
    "conv": {"x": IMAGE, "weight": whole(2, 4, 3, 3), "bias": whole(2)},
    "conv_transpose": {"x": IMAGE, "weight": whole(4, 2, 3, 3), "bias": whole(2)},
    "crop_resize": {"x": IMAGE, "boxes": np.float32([[0, 0, 2, 2]]), "box_indices": np.float32([0])}
    | {"target_height": 2, "target_width": 2, "pad_value": scalar(1)},
    "dequantize": {"input": LINE, "scale": scalar(1), "zero_point": scalar(1)},
    "einsum": {"values": [whole(2, 4), whole(4, 3)], "equation": "ab,bc->ac"},
    "expand_dims": {"x": LINE, "axes": [0]},
    "fill": {"shape": [2, 3], "value": scalar(1)},
    "fill_like": {"ref_tensor": LINE, "value": scalar(1)},
    "gather": {"x": LINE, "indices": whole(3, most=3), "axis": 1},
    "gather_along_axis": {"x": LINE, "indices": whole(1, 4, 6, most=3), "axis": 1},
    "gather_nd": {"x": LINE, "indices": np.float32([[0, 3], [0, 1]])},
    "instance_norm": {"x": IMAGE, "gamma": CHANNELS, "beta": CHANNELS},
    "l2_norm": {"x": LINE},
    "layer_norm": {"x": LINE, "axes": [1], "gamma": CHANNELS, "beta": CHANNELS},
    "linear": {"x": whole(2, 4), "weight": whole(3, 4), "bias": whole(3)},
    "local_response_norm": {"x": IMAGE, "size": 3, "alpha": scalar(1), "k": scalar(1)},
    "matmul": {"x": whole(2, 4), "y": whole(4, 3)},
    "one_hot": {"indices": whole(3, most=3), "one_hot_vector_size": 4, "on_value": scalar(1)}
    | {"off_value": scalar(0)},
    "pad": {"x": LINE, "pad": [1, 2], "constant_val": scalar(1)},
    "prelu": {"x": LINE, "alpha": CHANNELS},
    "quantize": {"input": LINE, "scale": scalar(1), "zero_point": scalar(1)}
    | {"output_dtype": "int8"},
    "range_1d": {"end": scalar(4), "start": scalar(0), "step": scalar(1)},
    "resample": {"x": IMAGE, "coordinates": whole(1, 2, 2, 2, most=3), **SAMPLED},
    "reshape": {"x": LINE, "shape": np.float32([4, 6])},
    "resize": {"x": IMAGE, "shape": np.float32([2, 3]), "resized_dims": 2},
    "resize_bilinear": {"x": IMAGE, "target_size_height": 2, "target_size_width": 3},
    "resize_nearest_neighbor": {"x": IMAGE, "target_size_height": 2, "target_size_width": 3},
    "reverse": {"x": LINE, "axes": [1]},
    "reverse_sequence": {"x": whole(2, 4, 3), "lengths": np.float32([2, 3]), "seq_axis": 1},
    "scaled_dot_product_attention": {
        **dict.fromkeys(("query", "key", "value"), LINE),
        "attn_mask": whole(1, 4, 4),
    },
    "scatter": {"data": LINE, "indices": np.float32([2, 0]), "updates": whole(1, 2, 6), "axis": 1},
    "scatter_along_axis": {"data": LINE, "indices": whole(1, 2, 6, most=3), "axis": 1}
    | {"updates": whole(1, 2, 6)},
    "scatter_nd": {"data": whole(3, 4), "indices": np.float32([[2], [0]]), "updates": whole(2, 4)},
    "select": {"cond": np.bool_([True, False, True]), "a": whole(3), "b": whole(3) + 1},
    "slice_by_index": {"x": LINE, **PLACES, "stride": np.float32([1, 1, 2])},
    "slice_by_size": {"x": LINE, "begin": PLACES["begin"], "size": np.float32([1, 2, 3])},
    "slice_update": {"x": LINE, **PLACES, "update": whole(1, 2, 2)}
    | {"stride": np.float32([1, 1, 2])},
    "sliding_windows": {"x": LINE, "axis": 2, "size": 2},
    "softplus_parametric": {"x": LINE, "alpha": CHANNELS, "beta": CHANNELS},
    "space_to_batch": {"x": IMAGE, "block_shape": [2, 2], "paddings": [0, 0, 0, 0]},
    "split": {"x": LINE, "num_splits": 2, "axis": 1},
    "squeeze": {"x": LINE, "axes": [0]},
    "stack": {"values": [LINE, LINE], "axis": 1},
    "tile": {"x": LINE, "reps": [1, 2, 1]},
    "topk": {"x": LINE, "k": scalar(2)},
    "transpose": {"x": LINE, "perm": [0, 2, 1]},
    **{name: {"x": IMAGE, "block_size": 2} for name in ("depth_to_space", "space_to_depth")},
    **{
        name: {"x": IMAGE, "kernel_sizes": [2, 2], "pad_type": "valid"}
        for name in ("avg_pool", "l2_pool", "max_pool")
    },
    **{
        name: {"x": IMAGE, "scale_factor_height": scalar(2), "scale_factor_width": scalar(2)}
        for name in ("upsample_bilinear", "upsample_nearest_neighbor")
    },
    **{
        name: {"x": whole(2, 1, 3), "weight_ih": whole(gates, 3), "weight_hh": whole(gates, 1)}
        | dict.fromkeys(states, whole(1, 1))
        for name, gates, states in (
            ("gru", 3, ["initial_h"]),
            ("lstm", 4, ["initial_h", "initial_c"]),
            ("rnn", 1, ["initial_h"]),
        )
    },
}
ARGUMENTS |= {
    name: {key: scalar(1) if key in ("alpha", "beta") else whole(2, 3) + 1 for key in required}
    for name, versions in DEFINITIONS.items()
    for kinds in [versions.get(TARGETS[IOS17])]
    if name not in ARGUMENTS and name != "cast" and kinds is not None
    for spec in [kinds.input_spec.input_types]
    for required in [{key for key, kind in spec.items() if not kind.optional}]
    if "x" in required and required <= {"x", "y", "alpha", "beta"}
}


def domains(kind: Any, arguments: dict[str, Any]) -> dict[str, tuple[list[str], list[str]]]:
    """Return the arguments that share a type, and the types that they may have."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for name, value in arguments.items():
        parameter = kind.input_spec.input_types[name]
        shared = getattr(parameter, "type_domain_id", None)
        admitted = kind.type_domains[shared] if shared else getattr(parameter, "type_domain", ())
        names = [types.builtin_to_string(each) for each in admitted]
        sample = value[0] if isinstance(value, list) else value
        if isinstance(sample, np.ndarray | np.generic) and names:
            found.setdefault(shared or name, ([], names))[0].append(name)
    return found


def typed(value: Any, dtype: str) -> Any:
    if isinstance(value, list):
        return [typed(item, dtype) for item in value]
    return np.asarray(value).astype(NUMPY[dtype])


def results(name: str) -> Iterator[tuple[Any, tuple[str, ...], Any]]:
    """Yield what each version of an op makes of the arguments in each combination of types."""
    seen = set()
    for opset in TARGETS:
        kind = definition(name, opset)
        if kind is None or kind in seen:
            continue
        seen.add(kind)
        if not ARGUMENTS[name].keys() <= kind.input_spec.input_types.keys():
            continue
        shared = domains(kind, ARGUMENTS[name])
        for combination in itertools.product(*(admitted for _, admitted in shared.values())):
            arguments = dict(ARGUMENTS[name])
            for dtype, (members, _) in zip(combination, shared.values(), strict=True):
                arguments |= {each: typed(arguments[each], dtype) for each in members}
            held_in = HELD.get(combination[0]) if combination else torch.float32
            held_in = held_in or getattr(torch, combination[0].replace("fp", "float"))
            made = computed(name, opset=opset, held_in=held_in, **arguments)
            yield kind, combination, made if isinstance(made, tuple) else (made,)


@pytest.mark.parametrize("name", sorted(ARGUMENTS.keys() & OPERATORS.keys()))
def test_an_op_gives_the_same_for_the_same_numbers_of_any_type(name):
    first: dict[Any, Any] = {}
    for kind, combination, made in results(name):
        if name == "scaled_dot_product_attention" and "bool" in combination:
            continue  # a mask of booleans hides, one of floats is added
        for one, other in zip(made, first.setdefault(kind, made), strict=True):
            # Those of floats are in float32, and in fewer bits where the result is an integer.
            wanted = other.astype(one.dtype).astype(np.float64)
            np.testing.assert_allclose(
                one.astype(np.float64), wanted, rtol=4 * np.finfo(np.float32).eps, atol=0
            )
