"""Calibration: passes over samples that add up the inputs of layers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from milpress.calibration.input_statistics import Calibration, InputStatistics
from milpress.engines.programs import suited_programs
from milpress.errors import ConfigError
from milpress.mil.digest import content_digest
from milpress.mil.package import Package
from milpress.progress import Progress, shown
from milpress.samples.data import Data

if TYPE_CHECKING:
    from milpress.interpreter import Program

DEFAULT_MASK = "attention_mask"


def calibrate(
    source: str | os.PathLike[str] | Package,
    data: Data | Calibration,
    *,
    mask: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> Calibration:
    """Run a model on samples, and add up the inputs of its layers.

    Of each weight of a ``linear``, ``matmul``, ``conv``, ``conv_transpose``, ``lstm``, ``gru`` or
    ``rnn``, the first and second moments of each input channel, and of each place of a kernel. One
    pass over the samples for each function that they suit; the memory does not grow with their
    number.

    Parameters
    ----------
    source
        Path of an ``.mlpackage``, or one that is open.
    data
        Samples, as `milpress.evaluate` takes them; or a calibration of this very package, which is
        returned.
    mask
        The input, of shape ``(batch, length)``, that is zero where a sample is padding: such
        positions don't count in layers that see them apart. By default ``attention_mask``, if there
        is such an input.
    cache
        An ``.npz`` file to keep the result in. If it holds that of the same package and samples,
        nothing is run.
    progress
        ``True`` shows a bar; a function is called with samples done, samples in all and what is at
        hand.

    Returns
    -------
    Calibration
        To be given as ``sample_data`` to what compresses the package.

    Raises
    ------
    InputError
        If a sample is not what the model takes, or the cache is another file.
    ConfigError
        If the model has no such mask.
    UnsupportedOpError
        If the interpreter does not cover an op.
    DependencyError
        If torch is not installed.
    """
    package = source if isinstance(source, Package) else Package(source)
    if isinstance(data, Calibration):
        if data.package != content_digest(package):
            msg = f"the calibration is of another package than {package.path}; calibrate it anew"
            raise ConfigError(msg)
        return data
    programs = list(suited_programs(package, data))
    names = {feature.name for each in programs for feature in each.program.inputs}
    if mask is not None and mask not in names:
        msg = f"mask must be one of the inputs {', '.join(sorted(names))}, got {mask!r}"
        raise ConfigError(msg)
    if mask is None and DEFAULT_MASK in names:
        mask = DEFAULT_MASK
    identity = hashlib.sha256(repr(mask).encode())
    for each in programs:
        identity.update(each.samples.digest().encode())
    key = (content_digest(package), identity.hexdigest())
    if cache is not None and Path(cache).exists():
        calibration = Calibration.load(cache)
        if (calibration.package, calibration.data) == key:
            return calibration
    total = sum(len(each.samples) for each in programs)
    n_samples = 0
    layers: list[InputStatistics] = []
    with shown(progress) as note:
        for program, samples, prefixes in programs:
            sums = _LayerSums(program, mask)
            for sample in samples:
                note(n_samples, total, "calibrating")
                sums.add(sample)
                n_samples += 1
            layers.extend(sums.statistics(prefixes))
        note(total, total, "")
    calibration = Calibration(
        package=key[0],
        data=key[1],
        n_samples=total,
        layers=tuple(layers),
        notes=tuple(dict.fromkeys(note for each in programs for note in each.notes)),
    )
    if cache is not None:
        calibration.save(cache)
    return calibration


class _LayerSums:
    """Sums of the inputs of all layers of a program."""

    def __init__(self, program: Program, mask: str | None) -> None:
        self._program = program
        self._mask = mask
        self._by_input: dict[str, dict[Any, Any]] = {}
        self._layers = program.layers
        self._totals: dict[tuple[str, Any], Any] = {}
        for layer in self._layers:
            self._by_input.setdefault(layer.input, {})[layer.key] = layer

    def add(self, sample: dict[str, Any]) -> None:
        """Run one sample."""

        def observe(name: str, value: Any, mask: Any) -> None:
            for key, layer in self._by_input[name].items():
                new = layer.sums(value, mask)
                old = self._totals.get((name, key))
                if old is not None:
                    # Infinite inputs of both signs have no mean: their layer is left as it is.
                    with np.errstate(invalid="ignore"):
                        new = type(new)(*(one + other for one, other in zip(old, new, strict=True)))
                self._totals[name, key] = new

        observe_inputs(self._program, sample, self._mask, self._by_input, observe)

    def statistics(self, prefixes: dict[str, str]) -> Iterator[InputStatistics]:
        """Yield the statistics of each layer that was run."""
        for layer in self._layers:
            total = self._totals.get((layer.input, layer.key))
            if total is not None:
                prefix = prefixes[layer.prefix]
                yield InputStatistics(
                    layer=prefix + layer.name,
                    weight=prefix + layer.weight,
                    kind=layer.kind,
                    groups=layer.groups,
                    first=total.first,
                    second=total.second,
                    count=total.n,
                )


def observe_inputs(
    program: Program,
    sample: dict[str, Any],
    mask_name: str | None,
    inputs: Iterable[str],
    observe: Callable[[str, Any, Any], None],
) -> None:
    """Run one sample, and call ``observe`` with name, value and mask of inputs of layers.

    The mask is what the input of its name tells: which positions count; ``None`` if all do.
    """
    import torch

    from milpress.interpreter.program import run_once

    mask = None
    if mask_name is not None and sample.get(mask_name) is not None:
        mask = torch.from_numpy(np.asarray(sample[mask_name]) != 0)
    run_once(program, sample, taps=inputs, observe=lambda name, value: observe(name, value, mask))
