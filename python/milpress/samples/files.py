"""Files of samples, or of the outputs for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from milpress.plain.arrays import Arrays, read_arrays, write_arrays


def write_samples(path: Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """Write samples, or the outputs for them, to a file."""
    write_arrays(
        path,
        {
            f"{i}/{name}": array
            for i, sample in enumerate(samples)
            for name, array in numbers(sample).items()
        },
    )


def read_samples(path: str | Path) -> list[Arrays]:
    """Return what `write_samples` wrote."""
    samples: dict[int, Arrays] = {}
    for key, array in read_arrays(Path(path)).items():
        i, _, name = key.partition("/")
        samples.setdefault(int(i), {})[name] = array
    return [samples[i] for i in sorted(samples)]


def numbers(outputs: Mapping[str, Any]) -> Arrays:
    """Return the outputs that are numbers; of probabilities by label, in the order of labels."""
    arrays: Arrays = {}
    for name, value in outputs.items():
        if isinstance(value, Mapping):
            arrays[name] = np.array([value[label] for label in sorted(value, key=str)])
            continue
        array = np.asarray(value)
        if array.dtype.kind in "fiub":
            arrays[name] = array
    return arrays
