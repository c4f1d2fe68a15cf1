"""What samples say of a model's weights: moments of what each is multiplied by."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from milpress.engines.jobs import jobs_of
from milpress.errors import CompressionError, ConfigError, InputError
from milpress.mil.package import Package
from milpress.plain import json
from milpress.plain.files import system_errors, write_whole
from milpress.progress import Progress
from milpress.samples.data import Data

if TYPE_CHECKING:
    from milpress.interpreter import Program


DEFAULT_MASK = "attention_mask"
_VERSION = 2
# Of the mean: what a channel counts that the samples never excite.
_LEAST_IMPORTANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerMoments:
    """What goes into one layer, added up over all samples and positions.

    Parameters
    ----------
    layer
        The value that the layer computes, with the name of its function or model as weights have;
        of a recurrent layer, followed by the parameter that the weight is.
    weight
        Name of its weight.
    kind
        Type of the op.
    groups
        Equal parts of the weight's output channels that have inputs of their own: groups of a
        convolution, gates of a recurrent layer.
    first, second
        Sums of the values that elements of the weight are multiplied by, and of their squares: of
        the weight's rank, each element for a block of the weight that has the same input.
    count
        How many outputs each output channel had.
    """

    layer: str
    weight: str
    kind: str
    groups: int
    first: NDArray[np.float64]
    second: NDArray[np.float64]
    count: int

    def second_for(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Return the sum of squares for each element of the weight."""
        return _expanded(self.second, shape)

    def mean_error(self, error: NDArray[Any]) -> NDArray[np.float64] | None:
        """Return what an error of the weight adds to each output channel on average.

        ``None`` for a layer that can have no bias.
        """
        if self.kind not in ("linear", "conv", "conv_transpose") or self.count == 0:
            return None
        # Where a weight is infinite the mean is no number, and the bias stays as it is.
        with np.errstate(invalid="ignore"):
            terms = error * (_expanded(self.first, error.shape) / self.count)
            if self.kind == "conv_transpose":
                n_inputs, n_outputs = error.shape[:2]
                grouped = terms.reshape(self.groups, n_inputs // self.groups, n_outputs, -1)
                return np.asarray(grouped.sum((1, 3)).reshape(-1))
            return np.asarray(terms.reshape(len(error), -1).sum(1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """Moments of every layer of a package, from `calibrate`.

    Parameters
    ----------
    package
        Digest of the package: model and weights.
    data
        Digest of the samples and of how they were used.
    n_samples
        How many.
    layers
        In the order of the graph.
    notes
        What there is to know of how the samples were run.
    """

    package: str
    data: str
    n_samples: int
    layers: tuple[LayerMoments, ...]
    notes: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to an ``.npz`` file, which `load` reads.

        Raises
        ------
        StorageError
            If the system refuses to.
        """
        path = Path(path)
        head = {
            "milpress_calibration": _VERSION,
            "package": self.package,
            "data": self.data,
            "n_samples": self.n_samples,
            "notes": list(self.notes),
            "layers": [
                {
                    "layer": each.layer,
                    "weight": each.weight,
                    "kind": each.kind,
                    "groups": each.groups,
                    "count": each.count,
                }
                for each in self.layers
            ],
        }
        arrays: dict[str, Any] = {"head": np.array(json.text(head))}
        for i, each in enumerate(self.layers):
            arrays |= {f"first_{i}": each.first, f"second_{i}": each.second}
        data = io.BytesIO()
        np.savez(data, **arrays)
        with system_errors(path):
            write_whole(path, data.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises
        ------
        InputError
            If the file is another.
        """
        try:
            with system_errors(Path(path)), np.load(path, allow_pickle=False) as file:
                head = json.read(str(file["head"]))
                if head["milpress_calibration"] != _VERSION:
                    msg = f"version {head['milpress_calibration']!r}"
                    raise ValueError(msg)
                layers = tuple(
                    LayerMoments(
                        first=np.float64(file[f"first_{i}"]),
                        second=np.float64(file[f"second_{i}"]),
                        **each,
                    )
                    for i, each in enumerate(head["layers"])
                )
                return cls(
                    package=str(head["package"]),
                    data=str(head["data"]),
                    n_samples=int(head["n_samples"]),
                    layers=layers,
                    notes=tuple(map(str, head.get("notes", ()))),
                )
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, CompressionError):
                raise
            msg = f"{path}: must be a calibration that milpress saved, got another file: {error}"
            raise InputError(msg) from error


def calibrate(
    source: str | os.PathLike[str] | Package,
    data: Data | Calibration,
    *,
    mask: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Run a model on samples, and add up what its weights are multiplied by.

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
        Called with samples done, samples in all and what is at hand.

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
        return _checked(data, package)
    jobs = list(jobs_of(package, data))
    names = {feature.name for program, _, _ in jobs for feature in program.inputs}
    if mask is not None and mask not in names:
        msg = f"mask must be one of the inputs {', '.join(sorted(names))}, got {mask!r}"
        raise ConfigError(msg)
    if mask is None and DEFAULT_MASK in names:
        mask = DEFAULT_MASK
    identity = hashlib.sha256(repr(mask).encode())
    for _, samples, _ in jobs:
        identity.update(samples.digest().encode())
    key = (package_digest(package), identity.hexdigest())
    if cache is not None and Path(cache).exists():
        known = Calibration.load(cache)
        if (known.package, known.data) == key:
            return known
    total = sum(len(samples) for _, samples, _ in jobs)
    done = 0
    found: list[LayerMoments] = []
    for program, samples, prefixes in jobs:
        sums = _Sums(program, mask)
        for sample in samples:
            if progress is not None:
                progress(done, total, "calibrating")
            sums.add(sample)
            done += 1
        found.extend(sums.found(prefixes))
    if progress is not None:
        progress(total, total, "")
    made = Calibration(
        package=key[0],
        data=key[1],
        n_samples=total,
        layers=tuple(found),
        notes=tuple(dict.fromkeys(note for job in jobs for note in job.notes)),
    )
    if cache is not None:
        made.save(cache)
    return made


def _checked(calibration: Calibration, package: Package) -> Calibration:
    if calibration.package != package_digest(package):
        msg = f"a calibration must be of the package {package.path} itself, got that of another"
        raise ConfigError(msg)
    return calibration


def package_digest(package: Package) -> str:
    """Return a hash of a package's model and weights."""
    digest = hashlib.sha256(package.model_bytes)
    for name in package.weight_files:
        path = package.weight_path(name)
        with system_errors(path), path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


class _Sums:
    """Adds up the moments of all layers of a program."""

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
        import torch

        mask = None
        if self._mask is not None and sample.get(self._mask) is not None:
            mask = torch.from_numpy(np.asarray(sample[self._mask]) != 0)

        def observe(name: str, value: Any) -> None:
            for key, layer in self._by_input[name].items():
                new = layer.sums(value, mask)
                old = self._totals.get((name, key))
                if old is not None:
                    new = type(new)(*(one + other for one, other in zip(old, new, strict=True)))
                self._totals[name, key] = new

        program = self._program
        state = program.make_state() if program.is_stateful else None
        program.run(sample, taps=self._by_input, observe=observe, state=state)

    def found(self, prefixes: dict[str, str]) -> Iterator[LayerMoments]:
        """Yield what was added up of each layer that was run."""
        for layer in self._layers:
            total = self._totals.get((layer.input, layer.key))
            if total is not None:
                prefix = prefixes[layer.prefix]
                yield LayerMoments(
                    layer=prefix + layer.name,
                    weight=prefix + layer.weight,
                    kind=layer.kind,
                    groups=layer.groups,
                    first=total.first,
                    second=total.second,
                    count=total.n,
                )


def importance(
    moments: Iterable[LayerMoments], shape: tuple[int, ...], *, evenly: float = 0.0
) -> NDArray[np.float32] | None:
    """Return what the squared error of each element of a weight counts, 1 on average.

    It is the sum of the second moments over all layers that use the weight: to first order, what
    the error of the element adds to the squared error of their outputs; and of ``evenly``, what an
    error adds wherever it is. A channel that the samples never excite keeps a thousandth. ``None``
    if no layer is known.
    """
    total = np.full(shape, evenly, np.float64)
    n = 0
    for each in moments:
        total += each.second_for(shape)
        n += 1
    mean = total.mean() if n else 0.0
    if not n or not np.isfinite(mean) or mean == 0:
        return None
    total /= mean
    return np.asarray(np.maximum(total, _LEAST_IMPORTANCE, out=total), np.float32)


def _expanded(blocks: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    for axis, (n, size) in enumerate(zip(blocks.shape, shape, strict=True)):
        if 1 < n < size:
            blocks = np.repeat(blocks, size // n, axis)
    return np.broadcast_to(blocks, shape)
