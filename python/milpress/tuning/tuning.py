"""Tuning: a compressed package in, one with the same codes and better tables out."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from milpress._version import __version__
from milpress.calibration.calibrating import observe_inputs
from milpress.compression.run import Run
from milpress.compression.verification import compare_packages
from milpress.compression.writer import rewriting
from milpress.errors import (
    CompressionError,
    ConfigError,
    InputError,
    UnsupportedError,
    VerificationError,
)
from milpress.mil.digest import content_digest
from milpress.mil.graph import Node
from milpress.mil.package import Package
from milpress.mil.records import (
    TUNE,
    ActivationRecord,
    TunedRecord,
    WeightRecords,
    array_digest,
)
from milpress.mil.staging import check_destination, save_copy
from milpress.progress import Progress, shown
from milpress.samples.data import Data
from milpress.tuning.arrays import Found, TunedArray, TunedWeight, find_arrays
from milpress.tuning.config import TuneConfig
from milpress.tuning.lessons import Lesson, WorkFolder
from milpress.tuning.report import ArrayReport, OutputReport, TuneReport
from milpress.tuning.subjects import chosen_outputs, distance_of, find_subjects, mask_of, split
from milpress.tuning.training import Moving, Place, Trainer, Validated

if TYPE_CHECKING:
    from milpress.interpreter.distillation import Distance, Student

# By so many samples the size of a layer's outputs is known well enough.
_N_SIZED = 4


def tune(
    original: str | os.PathLike[str],
    compressed: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    data: Data,
    *,
    config: TuneConfig | None = None,
    validation: Data | None = None,
    resume: bool = False,
    verify: bool = True,
    force: bool = False,
    progress: Progress | bool | None = None,
) -> TuneReport:
    """Move the tables, scales, biases and norms of a compressed package towards the original.

    Samples are run through both models, and the numbers that a compressed weight is decoded from,
    but for its codes, move so that the outputs come closer to the original's (distillation). Codes,
    masks and the graph stay as they are, and so does the size. Of all states that were met, the one
    is written whose outputs are closest on samples that were set aside; if none is better than the
    compressed package, that is copied.

    A stateful model begins every sample with states of zero, and gradients don't go through what it
    keeps from one call to the next.

    Parameters
    ----------
    original, compressed
        Paths of the two packages.
    destination
        Path of the package to write. What a run needs to go on after an interruption is kept beside
        it, in ``destination.milpress-tune``, and deleted at the end.
    data
        Samples, as `milpress.evaluate` takes them. Each is one call of the model.
    config
        The settings; by default those of `TuneConfig`.
    validation
        Samples to choose the best state by; by default a share of ``data`` is set aside.
    resume
        Whether to go on from where an interrupted run was.
    verify
        Whether to read the result back and compare it with both packages.
    force
        Whether an existing package at the destination is replaced, and what an interrupted run has
        left is dropped.
    progress
        ``True`` shows a bar; a function is called with samples or steps done, how many there are
        and what is at hand.

    Returns
    -------
    TuneReport
        What moved, and how far the outputs are from the original's before and after.

    Raises
    ------
    ConfigError
        If a setting is wrong, or the packages are not the same model.
    InputError
        If a sample is not what the model takes, or the original makes something of it that is not
        finite.
    UnsupportedError
        If nothing can be tuned: no compressed weight, quantized activations, no output of floats.
    UnsupportedOpError
        If the interpreter does not cover an op.
    DependencyError
        If torch is not installed.
    DestinationError
        If the destination is taken.
    VerificationError
        If the result is not what was to be written; nothing is left of it.
    """
    started = time.perf_counter()
    config = config or TuneConfig()
    source, target = Package(compressed), Path(destination)
    teacher = Package(original)
    for package in (teacher, source):
        check_destination(package.path, target, force=force)
    _check_alike(teacher, source)
    found = find_arrays(source, config.train)
    _check_tunable(source, found, config)
    job = _Job(teacher, source, target, config, found, data, validation)
    with shown(progress) as note:
        job.prepare(note, resume=resume, force=force)
        start, best = job.trainer.run(note)
    is_better = best.step > 0
    if is_better:
        _write(teacher, source, target, job.changed(best), verify=verify, force=force)
    else:
        save_copy(source, target, force=force)
    job.folder.clear()
    return job.report(start, best, verified=verify and is_better, started=started)


def _check_alike(original: Package, compressed: Package) -> None:
    try:
        compare_packages(original.reopened(), compressed.reopened())
    except VerificationError as error:
        msg = f"{compressed.path} is not {original.path} compressed: {error}"
        raise ConfigError(msg) from error


def _check_tunable(package: Package, found: Found, config: TuneConfig) -> None:
    if not found.n_compressed:
        msg = f"{package.path}: no weight is compressed, so there is nothing to tune; compress it"
        raise UnsupportedError(msg)
    if ActivationRecord.of(package.model).pairs:
        msg = (
            f"{package.path}: its activations are quantized, and gradients end there; tune the "
            "package first, then quantize activations"
        )
        raise UnsupportedError(msg)
    if not found.arrays:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(found.left.items())[:3])
        msg = f"{package.path}: nothing of {', '.join(config.train)} can be tuned" + (
            f" ({reasons})" if reasons else "; name other parts to train"
        )
        raise UnsupportedError(msg)


class _Job:
    """A run of `tune`: from packages and samples to a trainer and a report."""

    trainer: Trainer
    folder: WorkFolder

    def __init__(
        self,
        teacher: Package,
        source: Package,
        target: Path,
        config: TuneConfig,
        found: Found,
        data: Data,
        validation: Data | None,
    ) -> None:
        from milpress.interpreter.distillation import check_device

        check_device(config.device)
        self._teacher = teacher
        self._source = source
        self._target = target
        self._config = config
        self._found = found
        subjects = find_subjects(teacher, source, data, validation)
        self._mask = mask_of(subjects, config.mask)
        pairs = zip(subjects, chosen_outputs(subjects, config.outputs), strict=True)
        chosen = [(subject, outputs) for subject, outputs in pairs if outputs]
        self._subjects = [subject for subject, _ in chosen]
        self._outputs = [outputs for _, outputs in chosen]
        self._split = split(self._subjects, config)
        self._distances: dict[str, Distance] = {}
        self._left: dict[int, str] = {}

    def prepare(self, note: Progress, *, resume: bool, force: bool) -> None:
        """Run the original on all samples, and make the trainer."""
        from milpress.interpreter.distillation import Student

        self.folder = WorkFolder(self._target, self._identity(), resume=resume, force=force)
        try:
            kinds = self._teach(note)
        except CompressionError:
            self.folder.clear()
            raise
        students = [
            Student(subject.compressed, device=self._config.device, mask=self._mask)
            for subject in self._subjects
        ]
        arrays = []
        for array in self._found.arrays:
            places = self._places(array, students)
            if any(own for _, own in places):
                arrays.append(Moving(array, array.unit(self._found.grain), places))
            else:
                self._left[id(array)] = "no sample runs what uses it"
        self._size_biases(arrays)
        for subject in self._subjects:
            # The students have weights of their own.
            subject.compressed.release()
        self.trainer = Trainer(
            config=self._config,
            students=students,
            arrays=arrays,
            kinds=kinds,
            names=[subject.name for subject in self._subjects],
            learned=self._split.learned,
            aside=self._split.aside,
            lesson=self._lesson,
            keep=self.folder.keep_state,
        )
        state = self.folder.state() if resume else None
        if state is not None:
            self.trainer.resume(state, list(self._distances))

    def changed(self, best: Validated) -> list[tuple[TunedArray, NDArray[Any]]]:
        """Return the arrays that are other ones in a state."""
        return [
            (each.array, array)
            for each, array in zip(self.trainer.arrays, best.arrays, strict=True)
            if array.tobytes() != each.array.stored.tobytes()
        ]

    def report(
        self, start: Validated, best: Validated, *, verified: bool, started: float
    ) -> TuneReport:
        """Return what was done."""
        return TuneReport(
            original=str(self._teacher.path),
            compressed=str(self._source.path),
            destination=str(self._target),
            arrays=tuple(self._array_reports(best)),
            left=self._found.left,
            outputs=tuple(
                OutputReport(
                    name=name,
                    loss=kind,
                    before=start.distances[name],
                    after=best.distances[name],
                )
                for name, kind in self._distances.items()
            ),
            before=start.loss,
            after=best.loss,
            n_steps=self.trainer.n_done,
            best_step=best.step,
            n_samples=len(self._split.learned),
            n_validation=len(self._split.aside),
            notes=tuple(dict.fromkeys(self._notes())),
            verified=verified,
            seconds=time.perf_counter() - started,
        )

    def _identity(self) -> str:
        """Return what tells this run from others."""
        from milpress.interpreter.distillation import TORCH_VERSION

        digest = hashlib.sha256(repr((__version__, TORCH_VERSION)).encode())
        digest.update(repr(replace(self._config, time=None)).encode())
        for package in (self._teacher, self._source):
            digest.update(content_digest(package).encode())
        for subject in self._subjects:
            for samples in (subject.samples, subject.validation):
                digest.update(b"" if samples is None else samples.digest().encode())
        return digest.hexdigest()

    def _teach(self, note: Progress) -> list[dict[str, tuple[Distance, float]]]:
        """Keep what the original makes of each sample; return how each output is compared."""
        from milpress.interpreter.distillation import OutputScale, Student

        learned = {at for _, at in self._split.learned}
        at, kinds = 0, []
        for subject, outputs in zip(self._subjects, self._outputs, strict=True):
            teacher = Student(subject.original, device=self._config.device)
            scales = {name: OutputScale() for name in outputs}
            for samples in (subject.samples, subject.validation):
                for sample in samples or ():
                    note(at, self._split.n, "running the original")
                    lesson = self.folder.lesson(at)
                    if lesson is None:
                        made = teacher.outputs(sample)
                        expected = {name: made[name] for name in outputs}
                        self._check_known(expected, at)
                        self.folder.keep_lesson(at, sample, expected)
                        lesson = Lesson(sample, expected)
                    if at in learned:
                        for name, scale in scales.items():
                            scale.add(lesson.expected[name], lesson.sample, self._mask)
                    at += 1
            del teacher
            subject.original.release()
            own: dict[str, tuple[Distance, float]] = {}
            for name, scale in scales.items():
                distance = distance_of(subject, self._teacher, name, self._config.loss, scale)
                own[name] = distance, 1 / scale.of(distance)
                self._distances[subject.name + name] = distance
            kinds.append(own)
        note(self._split.n, self._split.n, "")
        return kinds

    def _check_known(self, expected: Mapping[str, NDArray[np.float32]], at: int) -> None:
        for name, output in expected.items():
            if np.isnan(output).any():
                msg = (
                    f"sample {at}: the original's output {name!r} holds no numbers (NaN); leave "
                    "the sample out"
                )
                raise InputError(msg)

    def _lesson(self, at: int) -> Lesson:
        lesson = self.folder.lesson(at)
        if lesson is None:
            msg = f"{self.folder.path}: sample {at} is gone; begin anew"
            raise ConfigError(msg)
        return lesson

    def _places(
        self, array: TunedArray, students: Sequence[Student]
    ) -> list[tuple[TunedWeight, list[Place]]]:
        places = []
        for weight in array.weights:
            own = []
            for i, (subject, student) in enumerate(zip(self._subjects, students, strict=True)):
                path = subject.path(weight.graph, weight.name)
                if path is not None and student.has(path):
                    own.append(Place(i, path))
            places.append((weight, own))
        return places

    def _size_biases(self, arrays: Sequence[Moving]) -> None:
        """Have biases and betas move relative to what the ops that add them compute."""
        from milpress.interpreter.distillation import sum_of_squares

        shifts = [
            each
            for each in arrays
            if each.array.uses and all(name != "gamma" for _, _, name in each.array.uses)
        ]
        sums: dict[tuple[int, str], list[float]] = {}
        for i, subject in enumerate(self._subjects):
            program = subject.compressed
            paths = {
                path
                for each in shifts
                for graph, node, _ in each.array.uses
                if (path := subject.path(graph, node.name)) in program.values
            }

            def observe(name: str, value: Any, mask: Any, i: int = i) -> None:
                both = sums.setdefault((i, name), [0.0, 0.0])
                total, n = sum_of_squares(value, mask)
                both[0] += total
                both[1] += n

            own = [at for k, at in self._split.learned if k == i][:_N_SIZED]
            for at in own if paths else ():
                observe_inputs(program, self._lesson(at).sample, self._mask, paths, observe)
        for each in shifts:
            known = [
                sums[i, path]
                for i, subject in enumerate(self._subjects)
                for graph, node, _ in each.array.uses
                if (path := subject.path(graph, node.name) or "") and (i, path) in sums
            ]
            if known:
                size = (sum(total for total, _ in known) / sum(n for _, n in known)) ** 0.5
                size *= self._found.grain
                each.unit = np.full(each.unit.shape, size, np.float32)

    def _array_reports(self, best: Validated) -> Iterator[ArrayReport]:
        moved = {
            id(each.array): (each, array)
            for each, array in zip(self.trainer.arrays, best.arrays, strict=True)
        }
        for array in self._found.arrays:
            note, change = self._left.get(id(array), ""), 0.0
            if id(array) in moved:
                moving, after = moved[id(array)]
                before = array.stored.astype(np.float64)
                length = float(np.linalg.norm(before))
                change = float(np.linalg.norm(after - before)) / (length or 1.0)
                if id(moving) in self.trainer.unreached:
                    note = "no gradient reaches it"
            yield ArrayReport(
                name=array.name,
                parameter=array.parameter,
                kind=array.kind,
                n_elements=array.stored.size,
                change=change,
                note=note,
            )

    def _notes(self) -> Iterator[str]:
        for subject in self._subjects:
            yield from subject.compressed.notes
            yield from subject.samples.notes
            if subject.compressed.is_stateful:
                yield "states begin as zeros in each sample, and no gradient goes through them"
        yield from self.trainer.notes


def _write(
    teacher: Package,
    package: Package,
    destination: Path,
    changed: Sequence[tuple[TunedArray, NDArray[Any]]],
    *,
    verify: bool,
    force: bool,
) -> None:
    """Write the package with other arrays, and record what they are."""

    def check(before: Package, after: Package) -> None:
        compare_packages(before, after.reopened())
        compare_packages(teacher.reopened(), after.reopened())

    replaced: dict[Node, dict[str, NDArray[Any]]] = {}
    for array, numbers in changed:
        for holder in array.holders:
            replaced.setdefault(holder.node, {})[holder.parameter] = numbers
    with rewriting(package, destination, Run(force=force)) as writer:
        for graph in package.graphs:
            for node in graph.nodes:
                if node in replaced:
                    writer.replace(node, replaced[node])
                else:
                    writer.copy(node)
        _record(package, changed)
        writer.commit(check if verify else None)


def _record(package: Package, changed: Sequence[tuple[TunedArray, NDArray[Any]]]) -> None:
    """Record the digests of arrays, and which weights were tuned."""
    tuned = TunedRecord.of(package.model)
    records = WeightRecords.of(package.model)
    for array, numbers in changed:
        digest = array_digest(numbers)
        for holder in array.holders:
            layers = [f"{holder.graph.prefix}{use.node.name}" for use in holder.node.uses]
            corrected = [layer for layer in layers if layer in records.biases]
            if array.uses and corrected:
                records.biases |= dict.fromkeys(corrected, digest)
            else:
                tuned.arrays.setdefault(holder.op, {})[holder.parameter] = digest
        for weight in array.weights:
            name = f"{weight.graph.prefix}{weight.name}"
            known = records.find(name)
            is_noted = known is not None and TUNE in known[1].steps[-1]
            if weight.value is not None and records.by_source and not is_noted:
                records.add(name, name, [{TUNE: {}}])
    tuned.write(package.model)
    if records.by_source:
        records.write(package.model)
