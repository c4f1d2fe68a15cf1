"""milpress.coreml beside coremltools.optimize.coreml, setting by setting: ops, names and values.

Each setting is compared on every kind of layer. By default it is for one opset and element type,
which take turns; with ``-m large`` for all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize as theirs
import numpy as np
import pytest
from oracles import (
    assert_coremltools_agrees,
    decoded,
    decompressed_by_coremltools,
    forms,
    stored,
)

import milpress as ours
from milpress import formats as f


@dataclass(frozen=True, kw_only=True)
class Made:
    """A weight, what ours and coremltools made of it, and as what ours is stored."""

    source: np.ndarray
    mine: np.ndarray
    reference: np.ndarray
    value: f.Compressed
    settings: dict[str, Any]

    @property
    def eps(self) -> float:
        """Distance from 1 to the next number of the weight's type."""
        return float(np.finfo(self.source.dtype).eps)

    def groups(self, array: np.ndarray) -> np.ndarray:
        """Return the elements that share a table or a scale along the last axis, in float64."""
        value = self.value.value if isinstance(self.value, f.Masked) else self.value
        grid = value.scale.shape if isinstance(value, f.Quantized) else value.lut.shape
        n_groups = grid[: array.ndim]
        parts = [(n, size // n) for n, size in zip(n_groups, array.shape, strict=True)]
        blocks = array.astype(np.float64).reshape([n for part in parts for n in part])
        between = range(0, 2 * array.ndim, 2)
        return np.moveaxis(blocks, between, range(array.ndim)).reshape(math.prod(n_groups), -1)

    def errors(self, made: np.ndarray) -> np.ndarray:
        """Return the magnitudes of errors, group by group."""
        return np.abs(self.groups(made) - self.groups(self.source))


def equal(made: Made) -> None:
    np.testing.assert_array_equal(made.mine, made.reference)


def equal_where_sound(made: Made) -> None:
    """Only where coremltools' rounded zero point clips a weight by more than half a step."""
    differs = (made.groups(made.mine) != made.groups(made.reference)).any(axis=1)
    source = made.groups(made.source)
    width = source.max(axis=1).clip(min=0) - source.min(axis=1).clip(max=0)
    half_step = width / (255 if "8" in made.settings["dtype"] else 15) / 2
    error, expected = (made.errors(array).max(axis=1) for array in (made.mine, made.reference))
    assert (expected[differs] > half_step[differs]).all()
    assert (error[differs] <= expected[differs]).all()


def lossless(made: Made) -> None:
    np.testing.assert_array_equal(made.mine, made.source)
    np.testing.assert_array_equal(made.reference, made.source)


def no_worse(made: Made, moved: np.ndarray | float = 0.0) -> None:
    """No table's error is greater: the root of its sum of squares, rounding of sums aside.

    Entries may have ``moved`` by so much, and with each the error of what it stands for.
    """
    error, expected = (
        np.linalg.norm(made.errors(array), axis=1) for array in (made.mine, made.reference)
    )
    allowed = np.sqrt(made.groups(made.source).shape[1]) * moved
    assert (error <= expected * (1 + 1e-12) + allowed).all(), (error / expected).max()


def hardly_worse(made: Made) -> None:
    """Of vectors both find local minima; 1.02 is a target, not a law of the method."""
    error, expected = ((made.errors(array) ** 2).sum() for array in (made.mine, made.reference))
    assert error <= expected * 1.02


def no_worse_in_codes(made: Made) -> None:
    """The codes that tables of codes stand for have no greater squared error, together."""
    value = made.value
    assert isinstance(value, f.Palette)
    assert isinstance(value.lut, f.Quantized)
    # A restored weight is off by less than an eighth of a step of its scale.
    scale = value.lut.scale.astype(np.float64).reshape(-1, 1)
    error, expected = (np.rint(made.errors(array) / scale) for array in (made.mine, made.reference))
    assert (error**2).sum() <= (expected**2).sum()


def evenly_spaced(made: Made) -> None:
    """Entries are rounded once, in coremltools' table the width, its multiples and their sums."""
    source = made.groups(made.source)
    no_worse(made, made.eps * (np.ptp(source, axis=1) + np.abs(source).max(axis=1)))


def least_are_zero(made: Made) -> None:
    """Exactly as many as asked for are zero, all among coremltools', where all ties are.

    It finds no percentile of float16 weights of more elements than float16 can count.
    """
    asked = int(made.source.size * made.settings["target_sparsity"])
    zeros = made.mine == 0
    assert zeros.sum() == max(asked, (made.source == 0).sum())
    np.testing.assert_array_equal(made.mine[~zeros], made.source[~zeros])
    if made.source.size <= float(np.finfo(made.source.dtype).max):
        assert (made.reference[zeros] == 0).all()


def runs(array: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Return runs of channels along the last axis, padded with zeros."""
    last = np.moveaxis(array, axis, -1).astype(np.float64)
    padding = [(0, 0)] * (last.ndim - 1) + [(0, -last.shape[-1] % size)]
    return np.pad(last, padding).reshape(-1, size)


def least_blocks_are_zero(made: Made) -> None:
    """Blocks of least norm are zero, as many as hold no more weights than asked for.

    Their norms are at most those of coremltools' zeros, which are rounded to the weight's type once
    for each element and thrice in all.
    """
    size, axis = made.settings["block_size"], made.settings["dim"]
    norms = np.linalg.norm(runs(made.source, size, axis), axis=1)
    mine, reference = (
        (runs(array, size, axis) == 0).all(axis=1) for array in (made.mine, made.reference)
    )
    kept = made.mine != 0
    np.testing.assert_array_equal(made.mine[kept], made.source[kept])
    assert norms[mine].max() <= norms[~mine].min()
    rounding = (size + 3) * made.eps
    assert norms[mine & ~reference].max(initial=0) <= norms[reference].max() * (1 + rounding)
    n_zeros = runs(np.ones(made.source.shape), size, axis)[mine].sum()
    assert 0 <= made.source.size * made.settings["target_sparsity"] - n_zeros < size


def least_of_each_run_are_zero(made: Made) -> None:
    """Each run of channels keeps the same magnitudes; of equal ones, either may go."""
    size, axis = made.settings["n_m_ratio"][1], made.settings.get("dim", 1)
    kept, expected = (
        np.sort(np.abs(runs(array, size, axis))) for array in (made.mine, made.reference)
    )
    np.testing.assert_array_equal(kept, expected)
    left = made.mine != 0
    np.testing.assert_array_equal(made.mine[left], made.source[left])


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A config of one of the functions, from which target on it is for, and what must be true."""

    function: str
    config: str
    settings: dict[str, Any]
    law: Callable[[Made], None]
    since: str = "iOS16"
    op_types: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        words = [f"{value}" for value in self.settings.values() if not callable(value)]
        return " ".join([self.law.__name__, *words])

    def apply(self, library: Any, model: Any, **more: Any) -> Any:
        """Return what a library makes of a model."""
        config = getattr(library.coreml, self.config)(**self.settings, weight_threshold=100)
        asked = library.coreml.OptimizationConfig(
            global_config=None if self.op_types else config,
            op_type_configs=dict.fromkeys(self.op_types, config),
        )
        # coremltools looks for a percentile in the weights' type, which float16 overflows.
        found = "ignore" if library is theirs else "warn"
        with np.errstate(over=found, invalid=found):
            return getattr(library.coreml, self.function)(model, asked, **more)


def quantize(since: str, op_types: tuple[str, ...] = (), **settings: Any) -> Setting:
    return Setting(
        function="linear_quantize_weights",
        config="OpLinearQuantizerConfig",
        settings=settings,
        law=equal_where_sound if settings.get("mode") == "linear" else equal,
        since=since,
        op_types=op_types,
    )


def palettize(since: str, law: Callable[[Made], None], **settings: Any) -> Setting:
    return Setting(
        function="palettize_weights",
        config="OpPalettizerConfig",
        settings=settings,
        law=law,
        since=since,
    )


def prune(law: Callable[[Made], None], **settings: Any) -> Setting:
    kind = "Threshold" if "threshold" in settings else "Magnitude"
    return Setting(
        function="prune_weights", config=f"Op{kind}PrunerConfig", settings=settings, law=law
    )


def quantiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A table of 8 quantiles, as a user may write it."""
    lut = np.quantile(values.astype(np.float64), np.linspace(0, 1, 8)).astype(values.dtype)
    nearest = np.abs(values.reshape(-1, 1).astype(np.float64) - lut).argmin(axis=1)
    return lut, nearest.astype(np.uint8)


GROUPS = {"granularity": "per_grouped_channel"}
BLOCKS = {"granularity": "per_block"}


def quantizations() -> Iterator[Setting]:
    for mode, dtype in itertools.product(
        ("linear_symmetric", "linear"), ("int8", "uint8", "int4", "uint4")
    ):
        kind = {"mode": mode, "dtype": dtype}
        for granularity in ("per_tensor", "per_channel"):
            yield quantize("iOS16" if "8" in dtype else "iOS18", **kind, granularity=granularity)
        yield quantize("iOS18", **kind, **BLOCKS, block_size=8)
        yield quantize("iOS18", ("conv",), **kind, **BLOCKS, block_size=(2, 4, 0, 3))
    yield quantize("iOS18", **BLOCKS, block_size=0)


def palettizations() -> Iterator[Setting]:
    for nbits in (1, 2, 3, 4, 6, 8):
        since = "iOS18" if nbits == 3 else "iOS16"
        yield palettize(since, no_worse, nbits=nbits)
        yield palettize(since, evenly_spaced, nbits=nbits, mode="uniform")
        yield palettize("iOS18", no_worse, nbits=nbits, **GROUPS, group_size=8)
    for axis, size in ((0, 4), (1, 8), (0, 0)):
        groups = {**GROUPS, "group_size": size, "channel_axis": axis}
        yield palettize("iOS18", no_worse, nbits=2, **groups)
        yield palettize("iOS18", evenly_spaced, nbits=4, mode="uniform", **groups)
    for nbits, size, groups in ((2, 2, {}), (4, 4, {}), (3, 2, {**GROUPS, "group_size": 8})):
        yield palettize("iOS18", hardly_worse, nbits=nbits, cluster_dim=size, **groups)
    yield palettize("iOS16", lossless, mode="unique")
    yield palettize("iOS18", lossless, mode="unique", **GROUPS, group_size=1)
    yield palettize("iOS18", equal, mode="custom", lut_function=quantiles)
    yield palettize("iOS18", equal, mode="custom", lut_function=quantiles, **GROUPS, group_size=4)


def prunings() -> Iterator[Setting]:
    for threshold, least in ((0.05, 0.1), (0.0, 0.0), (0.1, 0.68)):
        yield prune(equal, threshold=threshold, minimum_sparsity_percentile=least)
    for sparsity in (0.0, 0.3, 0.5, 0.75):
        yield prune(least_are_zero, target_sparsity=sparsity)
    for size, dim in ((2, 0), (4, 0), (3, 1), (8, 1)):
        yield prune(least_blocks_are_zero, target_sparsity=0.5, block_size=size, dim=dim)
    for ratio, dim in (((1, 2), 1), ((2, 4), 1), ((3, 5), 1), ((2, 4), 0), ((1, 3), 0)):
        yield prune(least_of_each_run_are_zero, n_m_ratio=ratio, dim=dim)


def matrix() -> Iterator[Any]:
    """Yield every setting with every opset and type; all but one of each are large."""
    for i, setting in enumerate((*quantizations(), *palettizations(), *prunings())):
        variants = [
            (target, dtype)
            for target in ("iOS16", "iOS17", "iOS18", "iOS26")
            for dtype in ("fp16", "fp32")
            if target >= setting.since
        ]
        for j, (target, dtype) in enumerate(variants):
            marks = () if j == i % len(variants) else pytest.mark.large
            yield pytest.param(
                setting, target, dtype, marks=marks, id=f"{setting} {target} {dtype}"
            )


def opened(path: Path) -> Any:
    return ct.models.MLModel(str(path), skip_model_load=True)


def comparable(form: Any, law: Callable[[Made], None]) -> Any:
    """Return a form without what is not held to coremltools.

    Of pruned weights that are the numbers of values left, which ties decide, and whether a mask is
    stored or an op's output that equals it; of pruned or palettized codes the names of inner ops.
    """
    *name, kind, parameters, outputs = form
    if law in (least_are_zero, least_blocks_are_zero):
        parameters = {
            key: given if len(given) > 2 else given[0]
            for key, given in parameters.items()
            if key != "mask"
        }
        outputs = [output[0] for output in outputs] if name else outputs
        name = []
    elif law is no_worse_in_codes:
        name = []
    inner = {
        key: comparable(given, law) if len(given) > 2 and not isinstance(given, str) else given
        for key, given in parameters.items()
    }
    return *name, kind, inner, outputs


def assert_same_or_better(setting: Setting, source: Path, mine: Path, reference: Path) -> None:
    """Hold what two libraries wrote to the law of a setting, decoded by coremltools."""
    assert_coremltools_agrees(mine, decompressed_by_coremltools)
    written, expected = (
        {name: comparable(form, setting.law) for name, form in forms(path).items()}
        for path in (mine, reference)
    )
    before, after, after_theirs = (decoded(path) for path in (source, mine, reference))
    for name in written.keys() - expected.keys():
        # coremltools' passes keep one of equal constants.
        assert any(np.array_equal(after[name], after[other]) for other in expected)
        del written[name]
    assert written == expected
    assert written
    values = stored(mine)
    for name in written:
        made = Made(
            source=before[name] if name in before else before[name.rpartition("_")[0]],
            mine=after[name],
            reference=after_theirs[name],
            value=values[name],
            settings=setting.settings,
        )
        setting.law(made)


@pytest.mark.parametrize(("setting", "target", "dtype"), list(matrix()))
def test_every_layer_is_compressed_as_by_coremltools_or_better(
    build, tmp_path, setting, target, dtype
):
    source = build("every_layer", target, dtype)
    mine, reference = tmp_path / "mine.mlpackage", tmp_path / "reference.mlpackage"
    setting.apply(ours, opened(source)).save(str(mine))
    setting.apply(theirs, opened(source)).save(str(reference))
    assert_same_or_better(setting, source, mine, reference)


def palettized(nbits: int, law: Callable[[Made], None] = no_worse, **settings: Any) -> Setting:
    return palettize("iOS18", law, nbits=nbits, **settings)


PRUNED = prune(least_are_zero, target_sparsity=0.5)
INT8 = quantize("iOS18")
TABLE = {"granularity": "per_tensor"}

# What was done to the model by coremltools, and what both then do.
JOINT: dict[str, tuple[tuple[Setting, ...], Setting]] = {
    "palettize a pruned weight": ((PRUNED,), palettized(4)),
    "palettize groups of a pruned weight": ((PRUNED,), palettized(3, **GROUPS, group_size=8)),
    "quantize a pruned weight": ((PRUNED,), INT8),
    "quantize a pruned weight with zero points": (
        (PRUNED,),
        quantize("iOS18", dtype="uint8", mode="linear"),
    ),
    "quantize blocks of a pruned weight": (
        (PRUNED,),
        quantize("iOS18", dtype="int4", **BLOCKS, block_size=8),
    ),
    "quantize a table": ((palettized(4),), quantize("iOS18", **TABLE)),
    "quantize tables of groups": (
        (palettized(2, **GROUPS, group_size=4),),
        quantize("iOS18", **TABLE, dtype="uint8", mode="linear"),
    ),
    "quantize tables of vectors": ((palettized(4, cluster_dim=2),), quantize("iOS18", **TABLE)),
    "quantize the table of a pruned weight": (
        (PRUNED, palettized(4)),
        quantize("iOS18", **TABLE),
    ),
    "palettize codes": ((INT8,), palettized(4, no_worse_in_codes)),
    "palettize codes with zero points": (
        (quantize("iOS18", dtype="uint8", mode="linear"),),
        palettized(6, no_worse_in_codes),
    ),
    "palettize codes of a tensor": (
        (quantize("iOS18", **TABLE),),
        palettized(2, no_worse_in_codes),
    ),
    "prune codes": ((INT8,), PRUNED),
    "prune a palette": ((palettized(4),), PRUNED),
    "prune a palette of groups": ((palettized(4, **GROUPS, group_size=4),), PRUNED),
}


def joint_matrix() -> Iterator[Any]:
    """Yield every stage with every opset and type; all but one of each are large."""
    for stage in JOINT:
        # coremltools crashes on tables of codes in iOS26, or leaves the scales out of tables.
        has_codes = stage.startswith(("quantize t", "quantize a table", "palettize codes"))
        for target in ("iOS18",) if has_codes else ("iOS18", "iOS26"):
            for dtype in ("fp16", "fp32"):
                marks = () if (target, dtype) == ("iOS18", "fp16") else pytest.mark.large
                yield pytest.param(stage, target, dtype, marks=marks)


@pytest.mark.parametrize(("stage", "target", "dtype"), list(joint_matrix()))
def test_what_coremltools_compressed_is_compressed_further_as_by_it_or_better(
    build, tmp_path, stage, target, dtype
):
    before, setting = JOINT[stage]
    source, mine, reference = (
        tmp_path / f"{name}.mlpackage" for name in ("s", "mine", "reference")
    )
    model = opened(build("every_layer", target, dtype))
    for i, done in enumerate(before):
        model = done.apply(theirs, model, joint_compression=i > 0)
    model.save(str(source))
    setting.apply(ours, model, joint_compression=True).save(str(mine))
    setting.apply(theirs, model, joint_compression=True).save(str(reference))
    assert_same_or_better(setting, source, mine, reference)


REAL = {
    "int8": quantize("iOS16"),
    "int8 per tensor": quantize("iOS16", granularity="per_tensor"),
    "uint8": quantize("iOS16", dtype="uint8"),
    "uint8 with zero points": quantize("iOS16", dtype="uint8", mode="linear"),
    "kmeans 2": palettize("iOS16", no_worse, nbits=2),
    "kmeans 4": palettize("iOS16", no_worse, nbits=4),
    "uniform 6": palettize("iOS16", evenly_spaced, nbits=6, mode="uniform"),
    "threshold": prune(equal, threshold=0.03, minimum_sparsity_percentile=0.0),
    "magnitude": prune(least_are_zero, target_sparsity=0.5),
    "n:m": prune(least_of_each_run_are_zero, n_m_ratio=(2, 4)),
}


QUICK = {
    "crepe_tiny": tuple(REAL),
    "basic_pitch": ("uint8 with zero points", "kmeans 4", "threshold", "magnitude"),
    "crepe_full": ("int8",),
}


def real_matrix() -> Iterator[Any]:
    """Yield every real model with every setting; many are large."""
    for model, name in itertools.product(QUICK, REAL):
        marks = () if name in QUICK[model] else pytest.mark.large
        yield pytest.param(model, name, marks=marks)


@pytest.mark.parametrize(("model", "setting"), list(real_matrix()))
def test_real_models_are_compressed_as_by_coremltools_or_better(request, tmp_path, model, setting):
    source = request.getfixturevalue(model)
    mine, reference = tmp_path / "mine.mlpackage", tmp_path / "reference.mlpackage"
    REAL[setting].apply(ours, opened(source)).save(str(mine))
    REAL[setting].apply(theirs, opened(source)).save(str(reference))
    assert_same_or_better(REAL[setting], source, mine, reference)
