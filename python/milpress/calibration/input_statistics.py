"""Statistics of the inputs of layers, by which errors of their weights count."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from milpress.errors import InputError, PackageNotFoundError
from milpress.plain import json
from milpress.plain.arrays import read_arrays, write_arrays

_VERSION = 2
# Of the mean: what a channel counts that the samples never excite.
_LEAST_IMPORTANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class InputStatistics:
    """Sums of the inputs of one layer over all samples and positions.

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
    """Statistics of the inputs of every layer of a package, from `calibrate`.

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
        Remarks on how the samples were run.
    """

    package: str
    data: str
    n_samples: int
    layers: tuple[InputStatistics, ...]
    notes: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to an ``.npz`` file, which `load` reads.

        Raises
        ------
        StorageError
            If the system refuses to.
        """
        head = {
            "milpress_calibration": _VERSION,
            **json.record(self, "package", "data", "n_samples", "notes"),
            "layers": [
                json.record(each, "layer", "weight", "kind", "groups", "count")
                for each in self.layers
            ],
        }
        arrays: dict[str, Any] = {"head": np.array(json.text(head))}
        for i, each in enumerate(self.layers):
            arrays |= {f"first_{i}": each.first, f"second_{i}": each.second}
        write_arrays(Path(path), arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises
        ------
        InputError
            If the file is another.
        PackageNotFoundError
            If there is no file.
        """
        try:
            arrays = read_arrays(Path(path))
            head = json.read(str(arrays["head"]))
            if head["milpress_calibration"] != _VERSION:
                msg = f"version {head['milpress_calibration']!r}"
                raise ValueError(msg)
            layers = tuple(
                InputStatistics(
                    first=np.float64(arrays[f"first_{i}"]),
                    second=np.float64(arrays[f"second_{i}"]),
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
        except PackageNotFoundError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            msg = f"{path}: not a calibration that milpress saved: {error}"
            raise InputError(msg) from error


def importance(
    statistics: Collection[InputStatistics], shape: tuple[int, ...], *, evenly: float = 0.0
) -> NDArray[np.float32] | None:
    """Return what the squared error of each element of a weight counts, 1 on average.

    It is the sum of the second moments over all layers that use the weight: to first order, what
    the error of the element adds to the squared error of their outputs; and of ``evenly``, what an
    error adds wherever it is. A channel that the samples never excite keeps a thousandth. ``None``
    if no layer is known.
    """
    if not statistics:
        return None
    total = np.full(shape, evenly, np.float64)
    for each in statistics:
        total += each.second_for(shape)
    mean = total.mean()
    if not np.isfinite(mean) or mean == 0:
        return None
    total /= mean
    return np.asarray(np.maximum(total, _LEAST_IMPORTANCE, out=total), np.float32)


def _expanded(blocks: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    for axis, (n, size) in enumerate(zip(blocks.shape, shape, strict=True)):
        if 1 < n < size:
            blocks = np.repeat(blocks, size // n, axis)
    return np.broadcast_to(blocks, shape)
