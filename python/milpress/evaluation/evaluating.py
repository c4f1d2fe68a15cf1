"""Evaluation of a compressed model: its outputs and intermediate values beside the original's."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from milpress.errors import ConfigError
from milpress.evaluation.boxes import Boxes
from milpress.evaluation.inside import IntermediateValues
from milpress.evaluation.metrics import OutputErrors
from milpress.evaluation.results import METRICS, Evaluation, Metric
from milpress.progress import Progress, shown
from milpress.samples.data import Data, Samples

if TYPE_CHECKING:
    from milpress.interpreter import Program


def evaluate(
    original: str | os.PathLike[str],
    compressed: str | os.PathLike[str],
    data: Data,
    *,
    metrics: Collection[Metric] = METRICS,
    per_op: bool = False,
    function: str | None = None,
    precision: Literal["float32", "float16"] = "float32",
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> Evaluation:
    """Run a model and its compressed version on samples, and compare.

    Both are run by the interpreter, one sample after the other; the memory that takes does not grow
    with their number.

    Parameters
    ----------
    original, compressed
        Paths of the two packages.
    data
        The samples: an ``.npz`` file, an ``.npy`` file, a folder of them; a dictionary of arrays or
        several of them; or `RandomSamples`. See `Samples`. A stateful model begins
        every sample with states of zero.
    metrics
        Which of ``"snr"``, ``"cosine"``, ``"top1"``, ``"kl"`` and ``"max_error"`` are computed.
    per_op
        Whether every intermediate value that both models have is compared too: as it is, and when
        its op is given the original's values, which shows the error of that op alone. Takes a
        further run of the compressed model for each sample.
    function
        Which function of packages with several.
    precision
        Whether values that the program declares as float16 are rounded to it.
    seed
        Where random numbers start from in each run.
    progress
        ``True`` shows a bar; a function is called with samples done, samples in all and what is at
        hand.

    Returns
    -------
    Evaluation
        The metrics of each output, and the errors of each intermediate value.

    Raises
    ------
    ConfigError
        If the packages don't take and give the same, or a metric is unknown.
    InputError
        If a sample is not what the model takes.
    UnsupportedOpError
        If the interpreter does not cover an op.
    DependencyError
        If torch is not installed.
    PackageError
        If one is no package of ML programs.
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        msg = f"a metric must be one of {', '.join(METRICS)}, got {', '.join(unknown) or 'none'}"
        raise ConfigError(msg)
    from milpress.interpreter import load

    one, other = (
        load(path, function, precision=precision, seed=seed) for path in (original, compressed)
    )
    _check_alike(one, other)
    samples = Samples(data, one.inputs)
    outputs = {feature.name: OutputErrors() for feature in one.outputs}
    boxes = Boxes(one, other)
    inside = IntermediateValues(one, other, boxes) if per_op else None
    with shown(progress) as note:
        for i, sample in enumerate(samples):
            note(i, len(samples), "comparing")
            if inside is None:
                expected, given = boxes.original(sample).outputs, boxes.compressed(sample).outputs
            else:
                expected, given = inside.run(sample)
            for name, output in outputs.items():
                output.add(expected[name], given[name])
        note(len(samples), len(samples), "")
    return Evaluation(
        original=str(original),
        compressed=str(compressed),
        n_samples=len(samples),
        is_random=samples.is_random,
        precision=precision,
        outputs=tuple(output.evaluation(name, metrics) for name, output in outputs.items()),
        ops=() if inside is None else inside.evaluations(),
        n_uncompared=0 if inside is None else inside.n_uncompared,
        notes=(*one.notes, *samples.notes, *boxes.notes),
    )


def _check_alike(original: Program, compressed: Program) -> None:
    for what in ("inputs", "outputs"):
        names = [[feature.name for feature in getattr(p, what)] for p in (original, compressed)]
        if sorted(names[0]) != sorted(names[1]):
            msg = (
                f"both models must have the same {what}, got {', '.join(names[0])} and "
                f"{', '.join(names[1])}"
            )
            raise ConfigError(msg)
