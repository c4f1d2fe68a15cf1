"""Small models that tests share, built by coremltools for a purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types

TARGETS = {
    "iOS15": ct.target.iOS15,
    "iOS16": ct.target.iOS16,
    "iOS17": ct.target.iOS17,
    "iOS18": ct.target.iOS18,
    "iOS26": ct.target.iOS26,
}


def weight(*shape: int, dtype: type = np.float16, seed: int = 0) -> np.ndarray:
    """Return normal weights with a few ties and zeros planted."""
    rng = np.random.default_rng([seed, *shape])
    array = (rng.standard_normal(shape) * 0.1).astype(dtype)
    flat = array.reshape(-1)
    flat[:: max(7, flat.size // 50)] = 0
    flat[1 :: max(11, flat.size // 40)] = dtype(0.125)
    return array


def converted(program: Any, target: str, **settings: Any) -> Any:
    """Convert a MIL program without changing its graph."""
    return ct.convert(
        program,
        minimum_deployment_target=TARGETS[target],
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=settings.pop("pass_pipeline", ct.PassPipeline.EMPTY),
        skip_model_load=True,
        **settings,
    )


def save(program: Any, path: Path, target: str, **settings: Any) -> Path:
    """Convert a MIL program without changing its graph, and save it."""
    converted(program, target, **settings).save(str(path))
    return path


def linear(values: np.ndarray, target: str = "iOS18") -> Any:
    """Return a model of one linear layer."""
    element = types.fp16 if values.dtype == np.float16 else types.fp32

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, values.shape[1]), dtype=element)],
        opset_version=TARGETS[target],
    )
    def prog(x: Any) -> Any:
        return mb.linear(x=x, weight=values, name="y")

    return converted(prog, target)


def _program(target: str, dtype: type, **shapes: tuple[int, ...]) -> Callable[..., Any]:
    element = types.fp16 if dtype is np.float16 else types.fp32
    specs = [mb.TensorSpec(shape=shape, dtype=element) for shape in shapes.values()]
    return mb.program(input_specs=specs, opset_version=TARGETS[target])


def layers(target: str, dtype: type) -> Any:
    """Every kind of layer that holds weights, channels along different axes."""

    @_program(target, dtype, x=(1, 48, 8, 8))
    def prog(x: Any) -> Any:
        x = mb.conv(x=x, weight=weight(64, 48, 3, 3, dtype=dtype), pad_type="same", name="conv")
        x = mb.conv(
            x=x,
            weight=weight(64, 1, 7, 7, dtype=dtype),
            groups=64,
            pad_type="same",
            name="depthwise",
        )
        x = mb.conv_transpose(x=x, weight=weight(64, 40, 2, 2, dtype=dtype), name="transposed")
        x = mb.reduce_mean(x=x, axes=[2, 3], name="pooled")
        x = mb.linear(
            x=x, weight=weight(96, 40, dtype=dtype), bias=weight(96, dtype=dtype), name="linear"
        )
        x = mb.matmul(x=x, y=weight(96, 80, dtype=dtype), name="matmul")
        x = mb.matmul(x=x, y=weight(56, 80, dtype=dtype), transpose_y=True, name="matmul_t")
        return mb.add(x=x, y=weight(56, 56, dtype=dtype), name="sum")

    return prog


def shared(target: str, dtype: type) -> Any:
    """One constant used by two ops alike, and one by two that disagree on its channels."""

    @_program(target, dtype, x=(2, 64))
    def prog(x: Any) -> Any:
        both = mb.const(val=weight(64, 64, dtype=dtype), name="both")
        torn = mb.const(val=weight(64, 64, dtype=dtype, seed=1), name="torn")
        y = mb.linear(x=x, weight=both, name="first")
        y = mb.linear(x=y, weight=both, name="second")
        y = mb.linear(x=y, weight=torn, name="third")
        return mb.matmul(x=y, y=torn, name="fourth")

    return prog


def lookup(target: str, dtype: type) -> Any:
    """An embedding whose indices are an input."""

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(5,), dtype=types.int32)], opset_version=TARGETS[target]
    )
    def prog(ids: Any) -> Any:
        settings = {} if target in ("iOS15", "iOS16") else {"validate_indices": False}
        table = mb.gather(x=weight(120, 48, dtype=dtype), indices=ids, axis=0, **settings)
        return mb.linear(x=table, weight=weight(64, 48, dtype=dtype), name="projected")

    return prog


def nested(target: str, dtype: type) -> Any:
    """Weights inside the branches of a condition, and one outside that a branch uses."""

    @mb.program(
        input_specs=[
            mb.TensorSpec(shape=(1, 64), dtype=types.fp16 if dtype is np.float16 else types.fp32),
            mb.TensorSpec(shape=(1,), dtype=types.bool),
        ],
        opset_version=TARGETS[target],
    )
    def prog(x: Any, flag: Any) -> Any:
        outer = mb.const(val=weight(64, 64, dtype=dtype), name="outer")
        x = mb.linear(x=x, weight=outer, name="before")
        return mb.cond(
            pred=mb.squeeze(x=flag),
            _true_fn=lambda: mb.linear(x=x, weight=outer, name="again"),
            _false_fn=lambda: mb.linear(
                x=x, weight=mb.const(val=weight(64, 64, dtype=dtype, seed=2), name="inner")
            ),
        )

    return prog


def casts(target: str, dtype: type) -> Any:
    """Weights stored as float16 and cast, one of them in a branch, and one of float32."""

    @mb.program(
        input_specs=[
            mb.TensorSpec(shape=(1, 64), dtype=types.fp32),
            mb.TensorSpec(shape=(1,), dtype=types.bool),
        ],
        opset_version=TARGETS[target],
    )
    def prog(x: Any, flag: Any) -> Any:
        def cast(seed: int, name: str) -> Any:
            return mb.constexpr_cast(
                source_val=weight(64, 64, seed=seed), output_dtype="fp32", name=name
            )

        x = mb.linear(x=x, weight=cast(0, "halves"), name="first")
        x = mb.linear(x=x, weight=weight(64, 64, dtype=np.float32, seed=1), name="second")
        outer = cast(2, "outer")
        return mb.cond(
            pred=mb.squeeze(x=flag),
            _true_fn=lambda: mb.linear(x=x, weight=outer, name="again"),
            _false_fn=lambda: mb.linear(x=x, weight=cast(3, "inner"), name="otherwise"),
        )

    return prog


def recurrent(target: str, dtype: type) -> Any:
    """An LSTM."""

    @_program(target, dtype, x=(3, 1, 40))
    def prog(x: Any) -> Any:
        state = np.zeros((1, 32), dtype)
        y, _, _ = mb.lstm(
            x=x,
            initial_h=state,
            initial_c=state,
            weight_ih=weight(128, 40, dtype=dtype),
            weight_hh=weight(128, 32, dtype=dtype),
            name="lstm",
        )
        return y

    return prog


def awkward(target: str, dtype: type) -> Any:
    """Weights that don't suit: prime channels, an infinity, constant, tiny and huge values."""

    @_program(target, dtype, x=(1, 61))
    def prog(x: Any) -> Any:
        infinite = weight(61, 61, dtype=dtype, seed=3)
        infinite[4, 5] = np.inf
        x = mb.linear(x=x, weight=weight(61, 61, dtype=dtype), name="prime")
        x = mb.linear(x=x, weight=infinite, name="infinite")
        x = mb.linear(x=x, weight=np.full((64, 61), dtype(0.5)), name="constant")
        tiny = (weight(64, 64, dtype=np.float32, seed=4) * 1e-5).astype(dtype)
        x = mb.linear(x=x, weight=tiny, name="tiny")
        huge = (weight(64, 64, dtype=np.float32, seed=5) * 1e5).astype(dtype)
        return mb.linear(x=x, weight=huge, name="huge")

    return prog


def every_layer(target: str, dtype: type) -> Any:
    """Small weights of every op that holds some, its channels along every pair of axes."""
    element = types.fp16 if dtype is np.float16 else types.fp32

    def w(*shape: int, seed: int = 0) -> np.ndarray:
        return weight(*shape, dtype=dtype, seed=seed)

    @mb.program(
        input_specs=[
            mb.TensorSpec(shape=(1, 16, 8, 8), dtype=element),
            mb.TensorSpec(shape=(3,), dtype=types.int32),
        ],
        opset_version=TARGETS[target],
    )
    def prog(x: Any, ids: Any) -> Any:
        x = mb.conv(x=x, weight=w(32, 16, 3, 3), pad_type="same", name="conv")
        x = mb.conv(x=x, weight=w(32, 8, 3, 3), groups=4, pad_type="same", name="grouped")
        x = mb.conv(x=x, weight=w(32, 1, 5, 5), groups=32, pad_type="same", name="depthwise")
        x = mb.conv_transpose(x=x, weight=w(32, 24, 2, 2), name="transposed")
        x = mb.conv_transpose(x=x, weight=w(24, 8, 2, 2), groups=2, name="grouped_transposed")
        x = mb.reduce_mean(x=x, axes=[2, 3], name="pooled")
        # Few distinct values, so that one table can hold them all.
        few = np.round(w(64, 16) * dtype(64)) / dtype(64)
        x = mb.linear(x=x, weight=few.astype(dtype), name="linear")
        x = mb.matmul(x=x, y=w(64, 48), name="matmul")
        x = mb.matmul(x=x, y=w(32, 48), transpose_y=True, name="matmul_t")
        x = mb.matmul(x=w(40, 32), y=x, transpose_y=True, name="left")
        x = mb.matmul(x=w(40, 48), y=x, transpose_x=True, name="left_t")
        x = mb.matmul(x=mb.transpose(x=x, perm=[1, 0]), y=w(2, 48, 24), name="batched")
        x = mb.reshape(x=x, shape=[2, 1, 24], name="sequence")
        settings = {} if target in ("iOS15", "iOS16") else {"validate_indices": False}
        rows = mb.gather(x=w(40, 24, seed=2), indices=ids, axis=0, name="rows", **settings)
        x = mb.concat(values=[x, mb.expand_dims(x=rows, axes=[1])], axis=0, name="joined")
        if dtype is np.float16 and target in ("iOS15", "iOS16"):
            return x  # recurrent layers take float16 from iOS17 on
        x, _, _ = mb.lstm(
            x=x,
            initial_h=np.zeros((1, 32), dtype),
            initial_c=np.zeros((1, 32), dtype),
            weight_ih=w(64, 24),
            weight_hh=w(64, 16),
            weight_ih_back=w(64, 24, seed=1),
            weight_hh_back=w(64, 16, seed=1),
            direction="bidirectional",
            output_sequence=True,
            name="lstm",
        )
        for i, direction in enumerate(("forward", "reverse")):
            x, _ = mb.gru(
                x=x,
                initial_h=np.zeros((1, 32), dtype),
                weight_ih=w(96, 32, seed=i + 3),
                weight_hh=w(96, 32, seed=i + 5),
                direction=direction,
                output_sequence=True,
                name=f"gru_{direction}",
            )
        return x

    return prog


PROGRAMS = {
    "layers": layers,
    "every_layer": every_layer,
    "shared": shared,
    "lookup": lookup,
    "nested": nested,
    "recurrent": recurrent,
    "awkward": awkward,
    "casts": casts,
}
