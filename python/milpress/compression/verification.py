"""Proof: the bytes of a compressed package against those of its source."""

from __future__ import annotations

import filecmp
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from milpress.compression.comparison import Comparison, WeightCheck, paired
from milpress.errors import fail_verification as fail
from milpress.mil import opset, proto, raising
from milpress.mil.activation_pairs import strip
from milpress.mil.package import Package, pipeline_models
from milpress.mil.records import (
    ACTIVATIONS,
    TREATMENTS,
    TUNED,
    ActivationRecord,
    TunedRecord,
    WeightRecords,
    forget,
)
from milpress.plain import json
from milpress.plain.files import system_errors
from milpress.progress import Progress, shown
from milpress.show import decibels, escaped, human_snr, named_table

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What `verify` found: every weight that is stored otherwise, and how much is unchanged.

    Parameters
    ----------
    weights
        The weights that are stored otherwise, in the order of the graph.
    n_unchanged
        Stored values that are the same, byte for byte.
    n_corrected
        Biases that were to be corrected, and are as recorded.
    n_quantized
        Quantized activations: pairs of ops that one package has beyond the other, as recorded.
    n_tuned
        Tuned arrays (tables, scales, biases), which are as recorded.
    """

    weights: tuple[WeightCheck, ...]
    n_unchanged: int
    n_corrected: int = 0
    n_quantized: int = 0
    n_tuned: int = 0

    @property
    def signal(self) -> float:
        """Sum of squares of the source's weights."""
        return sum(check.signal for check in self.weights)

    @property
    def noise(self) -> float:
        """Sum of squares of the errors."""
        return sum(check.noise for check in self.weights)

    @property
    def snr_db(self) -> float | None:
        """Signal-to-noise ratio of all weights together."""
        return decibels(self.signal, self.noise) if self.weights else None

    @property
    def summary(self) -> str:
        """One line."""
        snr = "" if self.snr_db is None else f", SNR {human_snr(self.snr_db)} dB"
        pairs = f"; {self.n_quantized} quantized activations" if self.n_quantized else ""
        biases = f"; {self.n_corrected} biases corrected" if self.n_corrected else ""
        tuned = f"; {self.n_tuned} arrays tuned" if self.n_tuned else ""
        return (
            f"verified: {len(self.weights)} weights decoded{snr}{pairs}{biases}{tuned}; "
            f"{self.n_unchanged} stored values and the graph unchanged"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON can hold them."""
        counts = json.record(self, "n_unchanged", "n_corrected", "n_quantized", "n_tuned")
        weights = [json.record(check, "name", "promise", "snr_db") for check in self.weights]
        return {"version": 1, **counts, "weights": weights}

    def __rich__(self) -> Table:
        """Return the weights as a table."""
        table = named_table("weight", "checked", right=["SNR dB"])
        for check in self.weights:
            table.add_row(escaped(check.name), check.promise, human_snr(check.snr_db))
        return table


def verify(
    original: str | os.PathLike[str],
    compressed: str | os.PathLike[str],
    *,
    progress: Progress | bool | None = None,
) -> Verification:
    """Compare a compressed package with its source, from the bytes of both.

    Parameters
    ----------
    original, compressed
        Paths of the two packages. Either may be the compressed one.
    progress
        ``True`` shows a bar; a function is called with stored values done, how many there are in
        the function at hand and the name of one.

    Returns
    -------
    Verification
        The weights that are stored otherwise, each with its signal-to-noise ratio.

    Raises
    ------
    VerificationError
        If the graph differs by more than compressed weights, something that was not treated
        changed, or a weight does not keep what its treatment promises.
    PackageError
        If one of them is damaged.
    """
    with shown(progress) as note:
        return compare_packages(Package(original), Package(compressed), note)


def compare_packages(
    original: Package, compressed: Package, note: Progress = lambda *_: None
) -> Verification:
    """Do what `verify` does. The original's programs are raised to the other's opset in memory."""
    _compare_files(original, compressed)
    records = WeightRecords.of(compressed.model)
    before = WeightRecords.of(original.model)
    tuned = TunedRecord.of(compressed.model)
    tuned_before = TunedRecord.of(original.model)
    _raise_like(original, compressed)
    n_pairs = _without_pairs(original, compressed)
    _compare_rest(original, compressed)
    checks: list[WeightCheck] = []
    n_unchanged = n_corrected = 0
    unseen = set(tuned.beyond(tuned_before))
    n_tuned = len(unseen)
    pairs = paired(list(original.graphs), list(compressed.graphs), "blocks of functions")
    for left, right in pairs:
        comparison = Comparison(left, right, records, before, tuned, tuned_before)
        checks.extend(comparison.run(note))
        n_unchanged += comparison.n_unchanged
        n_corrected += comparison.n_corrected
        unseen -= comparison.found_tuned
    for op, parameter in sorted(unseen):
        fail(f"{op}: the record says that its {parameter} was tuned, but the model has none")
    checked = {check.name for check in checks}
    for source, record in records.by_source.items():
        known = before.by_source.get(source)
        named = source if known is None else known.result
        if record != known and named not in checked:
            fail(f"{named}: unchanged, though the record says it was compressed")
    n_recorded = len(records.biases.items() - before.biases.items())
    if n_corrected != n_recorded:
        fail(f"{n_recorded} layers must have a corrected bias as recorded, got {n_corrected}")
    return Verification(
        weights=tuple(checks),
        n_unchanged=n_unchanged,
        n_corrected=n_corrected,
        n_quantized=n_pairs,
        n_tuned=n_tuned,
    )


def _without_pairs(original: Package, compressed: Package) -> int:
    """Take out of one model, in memory, the recorded pairs that the other does not have.

    Returns how many quantized activations these were.
    """
    records = [ActivationRecord.of(package.model).pairs for package in (original, compressed)]
    n_pairs = 0
    for package, mine, other in zip((original, compressed), records, records[::-1], strict=True):
        pairs = {name: codes for name, codes in mine.items() if name not in other}
        stripped = []
        if pairs:
            stripped = [name for graph in package.graphs for name, _ in strip(graph, pairs)]
        missing = sorted(pairs.keys() - set(stripped))
        if missing:
            fail(f"{missing[0]}: the record names this dequantize, which the model does not have")
        n_pairs += len(stripped)
    return n_pairs


def _compare_files(original: Package, compressed: Package) -> None:
    """Check that all but the model and the weight files is the same, byte for byte."""
    listed = []
    for package in (original, compressed):
        replaced = {package.weight_path(name) for name in package.weight_files}
        replaced.add(package.model_path)
        with system_errors(package.path):
            paths = sorted(package.path.rglob("*"))
            for path in paths:
                if path.is_symlink():
                    where = path.relative_to(package.path)
                    fail(f"{where}: a symbolic link, which a package must not hold")
            files = {
                path.relative_to(package.path)
                for path in paths
                if not path.is_dir() and path not in replaced
            }
        listed.append(files)
    weight_paths = {
        original.weight_path(name).relative_to(original.path) for name in original.weight_files
    }
    for path in sorted(listed[0] ^ listed[1]):
        if path not in weight_paths:
            fail(f"{path}: only one of the packages has this file")
    for path in sorted(listed[0] & listed[1]):
        with system_errors(original.path / path):
            if not filecmp.cmp(original.path / path, compressed.path / path, shallow=False):
                fail(f"{path}: the file differs from that of the source")


def _raise_like(original: Package, compressed: Package) -> None:
    for left, right in paired(list(original.programs), list(compressed.programs), "ML programs"):
        if left.place != right.place or list(left.functions) != list(right.functions):
            fail("the packages differ in their models or functions")
        for name, function in left.functions.items():
            target = opset.by_name(right.functions[name].opset)
            if target > opset.by_name(function.opset):
                raising.raise_to(left.model, function, target, original)
    root = compressed.model.specificationVersion
    if original.model.specificationVersion < root:
        original.model.specificationVersion = min(
            root,
            max(program.model.specificationVersion for program in original.programs),
        )


def _compare_rest(original: Package, compressed: Package) -> None:
    """Check that models and functions agree in all but their blocks."""
    stripped = []
    for package in (original, compressed):
        model = type(package.model)()
        model.CopyFrom(package.model)
        forget(model, TREATMENTS)
        forget(model, ACTIVATIONS)
        forget(model, TUNED)
        _strip(model)
        stripped.append(model.SerializeToString(deterministic=True))
    if stripped[0] != stripped[1]:
        fail("the description of the model changed")


def _strip(model: proto.Model) -> None:
    kind = model.WhichOneof("choice")
    if kind == "mlProgram":
        for function in model.mlProgram.functions.values():
            for block in function.block_specializations.values():
                del block.operations[:]
                del block.outputs[:]
    elif kind is not None:
        for _, part in pipeline_models(model):
            _strip(part)
