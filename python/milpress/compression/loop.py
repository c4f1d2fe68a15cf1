"""All weights of a package, one after the other: compressed, written, recorded, reported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from milpress.compression.advice import Advice
from milpress.compression.decisions import Decision
from milpress.compression.report import WeightReport
from milpress.compression.treating import Job, Make, Outcome
from milpress.compression.writer import WeightWriter, Written, bias_of, is_own
from milpress.errors import UnsupportedError, weight_errors
from milpress.formats import Custom, PalettizeConfig
from milpress.kernels.threads import in_order
from milpress.mil import values
from milpress.mil.decode import is_constexpr
from milpress.mil.graph import Node
from milpress.mil.package import Package
from milpress.mil.program import ProgramGraph, Weight
from milpress.mil.records import TunedRecord, WeightRecords
from milpress.progress import Progress, shown
from milpress.recipe import describe, treatment_dict

# What came of a job, or why nothing did; nothing for one that shares the result of another.
_Result: TypeAlias = Outcome | UnsupportedError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """The work on a package's weights, as it was decided.

    Parameters
    ----------
    package
        The package.
    decisions
        What is to happen to each weight, by the op that holds it, in order.
    make
        Compresses a weight, on any thread.
    progress
        ``True`` shows a bar; a function is called with bytes done, bytes in all and the name of the
        weight at hand.
    advice
        What samples say.
    strict
        Whether a weight that does not suit its treatment is an error.
    may_grow
        Whether a weight is compressed even if that makes it larger.
    """

    package: Package
    decisions: Mapping[Node, Decision]
    make: Make
    progress: Progress | bool | None = None
    advice: Advice | None = None
    strict: bool = False
    may_grow: bool = False

    def run(self, writer: WeightWriter) -> list[WeightReport]:
        """Write all weights, and record in the model what was done and is promised of it."""
        sizes = {node: decision.weight.n_bytes for node, decision in self.decisions.items()}
        jobs = self._jobs(sizes)
        records = WeightRecords.of(self.package.model)
        reports: list[WeightReport] = []
        n_done, n_bytes = 0, sum(sizes.values())
        results = in_order(self._result, jobs.items(), _n_threads(jobs.values()))
        with contextlib.closing(results), shown(self.progress) as note:
            for graph in self.package.graphs:
                graph_pass = _GraphPass(self, graph, writer, records, jobs, results)
                for node in graph.nodes:
                    decision = self.decisions.get(node)
                    if decision is None:
                        graph_pass.copy(node)
                        continue
                    note(n_done, n_bytes, decision.weight.name)
                    reports.append(graph_pass.write(decision, sizes[node]))
                    n_done += sizes[node]
                graph_pass.end()
            note(n_bytes, n_bytes, "")
        if any(report.status == "compressed" for report in reports):
            records.write(self.package.model)
            self._forget_tuned(records)
        return reports

    def _forget_tuned(self, records: WeightRecords) -> None:
        """Take out of the record of tuning what is stored otherwise now."""
        tuned = TunedRecord.of(self.package.model)
        if not tuned.arrays:
            return
        held = {
            (f"{graph.prefix}{node.name}", parameter)
            for graph in self.package.graphs
            for node in graph.nodes
            if f"{graph.prefix}{node.name}" in tuned.arrays
            and not _is_corrected(node, graph, records)
            for parameter in tuned.arrays[f"{graph.prefix}{node.name}"]
            if values.held(node.op, parameter) is not None
        }
        tuned.arrays = {
            op: kept
            for op, parameters in tuned.arrays.items()
            if (kept := {name: each for name, each in parameters.items() if (op, name) in held})
        }
        tuned.write(self.package.model)

    def _jobs(self, sizes: Mapping[Node, int]) -> dict[Node, Job]:
        """Return what is to be done to each weight that is treated, in the order of writing."""
        jobs: dict[Node, Job] = {}
        keys = set()
        for node, decision in self.decisions.items():
            if not decision.treatments:
                continue
            weight, places = decision.weight, decision.weight.places
            kind = (node.op.type, weight.shape, weight.channel_axes)
            alike = (kind, decision.treatments, weight.graph.opset.has_blocks)
            key = (places, *alike) if places else None
            jobs[node] = Job(
                weight,
                decision.treatments,
                key,
                sizes[node],
                is_repeated=key is not None and key in keys,
                **({} if self.advice is None else self.advice.of_weight(weight)),
            )
            keys.add(key)
        return jobs

    def _result(self, item: tuple[Node, Job]) -> tuple[Node, _Result]:
        node, job = item
        if job.is_repeated:
            return node, None
        try:
            with weight_errors(job.weight.name):
                return node, self.make(job)
        except UnsupportedError as error:
            return node, error


@dataclass(slots=True)
class _GraphPass:
    """What one graph stores, written in order; corrected biases and parts come last."""

    loop: Loop
    graph: ProgramGraph
    writer: WeightWriter
    records: WeightRecords
    jobs: Mapping[Node, Job]
    # What came of each job; made ahead, in their order.
    results: Iterator[tuple[Node, _Result]]
    # The ops from which compressed weights that are treated are decoded.
    parts: dict[Node, None] = field(init=False)
    unwritten: set[Node] = field(init=False)
    # The constants that are written once all weights are.
    biases: dict[Node, None] = field(init=False)
    corrections: list[tuple[Weight, Node, NDArray[np.float64]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        treated = [self.jobs[node].weight for node in self.graph.nodes if node in self.jobs]
        self.parts = {
            part: None for weight in treated if is_constexpr(weight.node) for part in weight.parts
        }
        self.unwritten = set(self.parts)
        corrects = self.loop.advice is not None and self.loop.advice.corrects
        biases = (
            bias_of(weight, use.node)
            for weight in (treated if corrects else [])
            for use in weight.node.uses
            if use.parameter == "weight"
        )
        self.biases = {bias: None for bias in biases if bias is not None and bias not in self.jobs}

    def copy(self, node: Node) -> None:
        """Write what is no weight as it is, unless it comes last."""
        if node not in self.parts and node not in self.biases:
            self.writer.copy(node)

    def write(self, decision: Decision, n_bytes: int) -> WeightReport:
        """Write a weight as it was decided, or as it is; return what happened to it."""
        weight = decision.weight
        name = weight.name  # that of the source; compressing changes it
        n_bytes_after = n_bytes
        if decision.treatments:
            try:
                job = self.jobs[weight.node]
                written = self._compressed(job, name)
                outcome, n_bytes_after = written.outcome, written.n_bytes
                more = () if self.loop.advice is None else self.loop.advice.notes(job, outcome)
                notes = (*decision.notes, *outcome.notes, *more)
                decision = replace(decision, treatments=outcome.treatments, notes=notes)
                self._record(weight, name, outcome)
            except UnsupportedError as error:
                if self.loop.strict:
                    msg = f"{name}: {error}"
                    raise UnsupportedError(msg) from error
                decision = decision.left(str(error))
                for part in weight.parts:
                    if part in self.unwritten:
                        self.unwritten.remove(part)
                        self.writer.copy(part)
        if not decision.treatments and weight.node not in self.biases:
            self.writer.copy(weight.node)
        return WeightReport(
            name=name,
            op_types=weight.op_types,
            shape=weight.shape,
            status=decision.status,
            treatment=", then ".join(describe(treatment) for treatment in decision.treatments),
            note=decision.note,
            bytes_before=n_bytes,
            bytes_after=n_bytes_after,
        )

    def end(self) -> None:
        """Write what comes last, and carry out the edits of the graph."""
        needed = self.graph.needed(self.unwritten)
        for part in self.parts:
            if part in needed:
                self.writer.copy(part)
        for weight, layer, correction in self.corrections:
            bias = bias_of(weight, layer)
            digest = self.writer.correct(weight, layer, correction)
            if digest:
                self.records.biases[f"{weight.prefix}{layer.name}"] = digest
                if bias is not None and is_own(bias):
                    self.biases.pop(bias, None)
        for bias in self.biases:
            self.writer.copy(bias)
        self.graph.apply()

    def _compressed(self, job: Job, name: str) -> Written:
        with weight_errors(name):
            written = self.writer.repeat(job)
            if written is None:
                # Nothing is made of a repeated weight; here the one before it was left as it was.
                outcome = self.loop.make(job) if job.is_repeated else self._outcome(job)
                written = self.writer.compress(job, outcome, may_grow=self.loop.may_grow)
        if written.outcome.notes and self.loop.strict:
            raise UnsupportedError("; ".join(written.outcome.notes))
        return written

    def _outcome(self, job: Job) -> Outcome:
        node = job.weight.node
        result = next(result for key, result in self.results if key is node)
        if not isinstance(result, Outcome):
            raise result or KeyError(node)
        return result

    def _record(self, weight: Weight, name: str, outcome: Outcome) -> None:
        for use in weight.node.uses:
            correction = outcome.corrections.get(f"{weight.prefix}{use.node.name}")
            if correction is not None:
                self.corrections.append((weight, use.node, correction))
        steps: list[dict[str, Any]] = [treatment_dict(each) for each in outcome.treatments]
        for step, is_fed_back in zip(steps, outcome.fed_back, strict=True):
            if is_fed_back:
                next(iter(step.values()))["feedback"] = True
        self.records.add(name, weight.name, steps)


def _is_corrected(node: Node, graph: ProgramGraph, records: WeightRecords) -> bool:
    """Whether a constant is a bias whose digest is in the record of corrected ones."""
    return any(
        use.parameter == "bias" and f"{graph.prefix}{use.node.name}" in records.biases
        for use in node.uses
    )


def _n_threads(jobs: Iterable[Job]) -> int | None:
    """Return 1 if a user's function makes tables, which may not be ready for several threads."""
    is_custom = any(
        isinstance(treatment, PalettizeConfig) and isinstance(treatment.table, Custom)
        for job in jobs
        for treatment in job.treatments
    )
    return 1 if is_custom else None
