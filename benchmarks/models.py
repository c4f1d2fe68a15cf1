"""Whole models, from path to path, beside coremltools and beside what the machine can do at all."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np

import milpress
from benchmarks import minilm
from benchmarks.generate_package import Decoder, write_package
from benchmarks.machine import run_milpress
from benchmarks.measure import (
    CLOCKS,
    Case,
    Contender,
    Effort,
    Figure,
    Line,
    alternate,
    speed_beside,
    time_ratio,
    two_threads,
)
from milpress import formats as f

_WEIGHT_FILE = "Data/com.apple.CoreML/weights/weight.bin"
_READ_BYTES = 1 << 20
_UNVERIFIED = "milpress, unverified"


@dataclass(frozen=True, slots=True)
class Setting:
    """The same treatment for milpress, its command line and coremltools."""

    treatment: f.QuantizeConfig | f.PalettizeConfig | f.PruneConfig
    arguments: tuple[str, ...]
    function: Callable[..., Any]
    config: Any
    target: float


SETTINGS = {
    "int8 per channel": Setting(
        f.QuantizeConfig(),
        ("--quantize", "int8"),
        cto.linear_quantize_weights,
        cto.OpLinearQuantizerConfig(),
        60,
    ),
    "int4, blocks of 32": Setting(
        f.QuantizeConfig(dtype="int4", granularity=f.PerBlock(32)),
        ("--quantize", "int4", "--block-size", "32"),
        cto.linear_quantize_weights,
        cto.OpLinearQuantizerConfig(dtype="int4", granularity="per_block", block_size=32),
        60,
    ),
    "prune 50 %": Setting(
        f.PruneConfig(sparsity=0.5),
        ("--prune", "0.5"),
        cto.prune_weights,
        cto.OpMagnitudePrunerConfig(target_sparsity=0.5),
        60,
    ),
    "palette, 4 bits": Setting(
        f.PalettizeConfig(bits=4),
        ("--palettize", "4"),
        cto.palettize_weights,
        cto.OpPalettizerConfig(nbits=4),
        90,
    ),
    "palette, 4 bits, group 16": Setting(
        f.PalettizeConfig(bits=4, group_size=16),
        ("--palettize", "4", "--group-size", "16"),
        cto.palettize_weights,
        cto.OpPalettizerConfig(nbits=4, granularity="per_grouped_channel", group_size=16),
        30,
    ),
}
_INT4 = "int4, blocks of 32"
_GROUPED = "palette, 4 bits, group 16"


@dataclass(frozen=True, slots=True)
class Model:
    """A package to compress."""

    name: str
    path: Path
    n_weights: int
    largest: int


@dataclass(frozen=True, kw_only=True)
class Models:
    """The packages of a run, each made when it is first used.

    Parameters
    ----------
    folder
        Where they go.
    decoder
        The model of most lines.
    """

    folder: Path
    decoder: Decoder

    @cached_property
    def whole(self) -> Model:
        """The decoder."""
        return self._made(self.decoder)

    @cached_property
    def small(self) -> Model:
        """One layer of it and a small embedding, for what takes coremltools minutes."""
        return self._made(Decoder(n_layers=1, vocabulary=1_408))

    @cached_property
    def large(self) -> Model:
        """A decoder of 500 million weights."""
        return self._made(Decoder.of_megabytes(1_000, width=1_024, vocabulary=32_000))

    @cached_property
    def huge(self) -> Model:
        """A decoder of 2 GB."""
        return self._made(Decoder.of_megabytes(2_000, width=2_048, vocabulary=32_000))

    @cached_property
    def minilm(self) -> Model:
        """The real one."""
        path = minilm.write_package(self.folder / "minilm.mlpackage")
        sizes = [math.prod(weight.shape) for weight in milpress.inspect(path).weights]
        return Model("MiniLM", path, sum(sizes), 2 * max(sizes))

    def warm_up(self) -> None:
        """Let both sides import what they need, which no line is to measure."""
        tiny = self._made(Decoder(width=64, n_layers=1, vocabulary=64))
        for name in SETTINGS:
            compress(tiny, name, verify=True, threads=1)
            compress_by_coremltools(tiny, name)

    def _made(self, decoder: Decoder) -> Model:
        millions = f"{decoder.n_weights / 1e6:.0f}M"
        path = write_package(decoder, self.folder / f"decoder-{millions}.mlpackage")
        return Model(f"decoder {millions}", path, decoder.n_weights, decoder.largest)


def cases(models: Models, effort: Effort, *, quick: bool) -> dict[str, Case]:
    """Return what measures each line, by its name."""
    found: dict[str, Case] = {}
    for name in SETTINGS:
        if name != _GROUPED:
            found[f"decoder: {name}"] = lambda name=name: _beside(models.whole, name, effort)
    found[f"small decoder: {_GROUPED}"] = lambda: _beside(models.small, _GROUPED, effort)
    if not quick:
        for name in ("palette, 4 bits", _GROUPED):
            found[f"MiniLM: {name}"] = lambda name=name: _beside(models.minilm, name, effort)
    for name in (_INT4, "prune 50 %", "palette, 4 bits"):
        found[f"two threads: decoder, {name}"] = lambda name=name: _threads(
            models.whole, name, effort
        )
    found[f"two threads: small decoder, {_GROUPED}"] = lambda: _threads(
        models.small, _GROUPED, effort
    )
    for name in (_INT4, "prune 50 %", "palette, 4 bits"):
        for n_threads in (1, 2):
            found[f"peak memory: decoder, {name}, {_threads_of(n_threads)}"] = (
                lambda name=name, n=n_threads: _memory(models.whole, name, n)
            )
    found[f"physical limit: decoder, {_INT4}"] = lambda: _limit(models.whole, effort, None)
    return found


def large_cases(models: Models, effort: Effort) -> dict[str, Case]:
    """Return what measures each line of models that take minutes and gigabytes."""
    found: dict[str, Case] = {
        f"500M decoder: {_INT4}": lambda: _beside(models.large, _INT4, effort),
        f"two threads: 500M decoder, {_INT4}": lambda: _threads(models.large, _INT4, effort),
        f"physical limit: 500M decoder, {_INT4}": lambda: _limit(models.large, effort, 3.0),
    }
    for n in (1, 2):
        threads = _threads_of(n)
        found[f"peak memory: 500M decoder, {_INT4}, {threads}"] = lambda n=n: _memory(
            models.large, _INT4, n, 400.0
        )
        found[f"peak memory: 2 GB, {_INT4}, {threads}"] = lambda n=n: _memory(models.huge, _INT4, n)
    found[f"physical limit: 2 GB, {_INT4}"] = lambda: _limit(models.huge, effort, None)
    return found


def _threads_of(n_threads: int) -> str:
    return "1 thread" if n_threads == 1 else f"{n_threads} threads"


def compress(model: Model, name: str, *, verify: bool, threads: int) -> None:
    """Compress a model as milpress does, beside it."""
    milpress.compress(
        model.path,
        model.path.with_name("milpress.mlpackage"),
        milpress.Recipe.of(SETTINGS[name].treatment),
        verify=verify,
        threads=threads,
        force=True,
    )


def compress_by_coremltools(model: Model, name: str) -> None:
    """Compress a model as coremltools does."""
    setting = SETTINGS[name]
    source = ct.models.MLModel(str(model.path), skip_model_load=True)
    smaller = setting.function(source, cto.OptimizationConfig(setting.config))
    smaller.save(str(model.path.with_name("coremltools.mlpackage")))


def _beside(model: Model, name: str, effort: Effort) -> Line:
    contenders = [
        Contender(
            "milpress", partial(compress, model, name, verify=True, threads=1), model.n_weights
        ),
        Contender(
            _UNVERIFIED, partial(compress, model, name, verify=False, threads=1), model.n_weights
        ),
        Contender("coremltools", partial(compress_by_coremltools, model, name), model.n_weights),
    ]
    times = alternate(contenders, effort, CLOCKS["cpu"])
    target = SETTINGS[name].target
    return Line(
        times=times,
        figures=(
            speed_beside(times, "coremltools", target),
            time_ratio(
                times,
                "coremltools",
                _UNVERIFIED,
                label="speed beside coremltools, unverified",
                target=target,
            ),
        ),
        note=_sizes(model),
    )


def _threads(model: Model, name: str, effort: Effort) -> Line:
    def work(n_threads: int) -> None:
        compress(model, name, verify=True, threads=n_threads)

    return two_threads(work, model.n_weights, effort)


def _memory(model: Model, name: str, n_threads: int, target: float | None = None) -> Line:
    """Return the peak memory of the command line; its bound grows with the largest weight."""
    out = model.path.with_name("memory.mlpackage")
    process = run_milpress(
        [
            *("compress", str(model.path), str(out), "--force"),
            *(*SETTINGS[name].arguments, "--threads", str(n_threads)),
        ]
    )
    bound = 100 + 4 * model.largest / 1e6 * n_threads
    return Line(
        figures=(
            Figure(
                label="peak memory",
                unit="MB",
                measured=process.peak_mb,
                target=bound if target is None else target,
                sense="at most",
            ),
        ),
        note=(
            f"{_sizes(model)}; the process took {process.wall_seconds:.2f} s, "
            f"{process.cpu_seconds:.2f} s of CPU time."
        ),
    )


def _limit(model: Model, effort: Effort, target: float | None) -> Line:
    """Return the line of what nothing can beat: the bytes have to be read and written once."""
    source = model.path / _WEIGHT_FILE
    copied = model.path.with_name("copy.bin")
    buffer = bytearray(_READ_BYTES)
    # Read: 2 bytes a weight. Written: half a byte, and 2 bytes a block of 32. A copy moves each of
    # its bytes twice, and a part of the whole is enough to know its speed.
    n_moved = 2 + 0.5 + 2 / 32
    n_part = min(model.n_weights, 50_000_000)
    moved = np.ones(round(n_part * n_moved / 2), np.uint8)
    target_memory = np.ones_like(moved)

    def copy_and_read() -> None:
        shutil.copyfile(source, copied)
        with source.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def milpress_on(n_threads: int, *, verify: bool) -> Callable[[], None]:
        return partial(compress, model, _INT4, verify=verify, threads=n_threads)

    contenders = [
        Contender("milpress", milpress_on(2, verify=True), model.n_weights),
        Contender(_UNVERIFIED, milpress_on(2, verify=False), model.n_weights),
        Contender("copy and read the file", copy_and_read, model.n_weights),
        Contender("move the bytes in memory", lambda: np.copyto(target_memory, moved), n_part),
    ]
    times = alternate(contenders, effort, CLOCKS["wall"])
    copied.unlink()
    beside_file = partial(time_ratio, times, to="copy and read the file", sense="at most")
    beside_memory = partial(time_ratio, times, to="move the bytes in memory", sense="at most")
    return Line(
        clock="wall",
        times=times,
        figures=(
            beside_file(
                of="milpress", label="time beside copying and reading the file", target=target
            ),
            beside_file(
                of=_UNVERIFIED, label="time beside copying and reading the file, unverified"
            ),
            beside_memory(of="milpress", label="time beside moving the bytes in memory"),
            beside_memory(
                of=_UNVERIFIED, label="time beside moving the bytes in memory, unverified"
            ),
        ),
        note=f"{_sizes(model)}; milpress on two threads.",
    )


def _sizes(model: Model) -> str:
    return (
        f"{model.name}: {model.n_weights / 1e6:.1f} million weights, "
        f"the largest of {model.largest / 1e6:.1f} MB"
    )
