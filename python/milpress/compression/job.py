"""The work on the weights of one package."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from milpress.calibration.second_moments import Inputs, SecondMoments
from milpress.calibration.uses import Statistics
from milpress.compression.checkpoint import Checkpoint
from milpress.compression.decisions import Plan
from milpress.compression.report import WeightReport
from milpress.compression.treating import Order, Treated
from milpress.compression.writer import Rewriter, is_own
from milpress.errors import UnsupportedError, weight_errors
from milpress.formats import Custom, PalettizeConfig
from milpress.kernels.threads import in_order
from milpress.mil import opset, treatments, values
from milpress.mil.constexpr import Decoder, is_constexpr
from milpress.mil.graph import Node
from milpress.mil.package import Package
from milpress.mil.staging import Sink
from milpress.mil.weights import Site, Weight
from milpress.progress import Progress
from milpress.recipe import describe, treatment_dict


class _Job:
    """Writes all weights of a package, compressed or as they are, one after the other."""

    def __init__(
        self,
        package: Package,
        planned: list[tuple[Site, dict[Node, Plan]]],
        strict: bool,
        may_grow: bool,
        may_be_idle: bool,
        progress: Progress | None,
        rewriter: type[Rewriter],
    ) -> None:
        self._package = package
        self._planned = planned
        self._strict = strict
        self._may_grow = may_grow
        self._may_be_idle = may_be_idle
        self._progress = progress or (lambda *_: None)
        self._rewriter = rewriter
        self._records = treatments.read(package.model)
        self._statistics: Statistics | None = None
        self._corrects = False
        self._moments: SecondMoments | None = None
        self._files: Checkpoint | None = None
        self._layers: list[tuple[Weight, Node, NDArray[np.float64]]] = []
        # What else was left, and why.
        self.left: list[str] = []

    def calibrate(self, statistics: Statistics, *, bias_correction: bool) -> None:
        """Let errors count as statistics say, and correct biases."""
        self._statistics = statistics
        self._corrects = bias_correction

    def layers_in_order(self) -> Iterator[tuple[str, ...]]:
        """Yield, for each weight that is treated, the layers by whose inputs its errors count."""
        for _, plans in self._planned:
            for plan in plans.values():
                if plan.treatments:
                    yield self._layers_of(plan.weight)

    def feed_back(self, moments: SecondMoments) -> None:
        """Let errors of each column be made up for by those after it."""
        self._moments = moments

    def keep(self, files: Checkpoint) -> None:
        """Keep each weight in files as soon as it is treated, and take from them what is kept."""
        self._files = files

    def run(self, sink: Sink) -> list[WeightReport]:
        """Write to a sink, and record in the model what was done and is promised of it."""
        rewriter = self._rewriter(self._package, sink)
        reports: list[WeightReport] = []
        sizes = {
            node: weight_bytes(plan.weight, self._package)
            for _, plans in self._planned
            for node, plan in plans.items()
        }
        total = sum(sizes.values())
        done = 0
        orders = self._orders(rewriter)
        with contextlib.closing(
            in_order(self._maker(rewriter), orders.values(), _n_threads(orders.values()))
        ) as made:
            for site, plans in self._planned:
                parts = self._parts_to_replace(plans.values())
                unwritten = set(parts)
                biases = self._biases_to_correct(plans, rewriter)
                for node in site.graph.nodes:
                    plan = plans.get(node)
                    if plan is not None:
                        self._progress(done, total, plan.weight.name)
                        order = orders.get(node)
                        written = self._write(
                            plan, sizes[node], rewriter, unwritten, biases, order, made
                        )
                        reports.append(written)
                        done += reports[-1].bytes_before
                    elif node not in parts and node not in biases:
                        rewriter.copy(node)
                needed = site.graph.needed(unwritten)
                for part in parts:
                    if part in needed:
                        rewriter.copy(part)
                self._correct_biases(biases, rewriter)
                site.graph.apply()
        if not any(report.status == "compressed" for report in reports):
            self._check_idle(reports)
        else:
            treatments.record(self._package.model, self._records)
        self._progress(total, total, "")
        return reports

    def _maker(self, rewriter: Rewriter) -> Callable[[Order], Treated | UnsupportedError | None]:
        """Return what makes a weight, or takes it from files."""
        files = self._files
        if files is None:
            return rewriter.treated

        def make(order: Order) -> Treated | UnsupportedError | None:
            made = None if order.is_repeated else files.load(order)
            if made is None:
                found = rewriter.treated(order)
                if isinstance(found, Treated):
                    files.save(order, found)
                return found
            return made

        return make

    def _orders(self, rewriter: Rewriter) -> dict[Node, Order]:
        """Return what is to be done to each weight that is treated, in the order of writing."""
        orders = {}
        for site, plans in self._planned:
            early = not opset.by_name(site.function.opset).has_blocks
            for node in site.graph.nodes:
                plan = plans.get(node)
                if plan is not None and plan.treatments:
                    orders[node] = rewriter.order(
                        plan.weight, plan.treatments, early=early, **self._advice(plan.weight)
                    )
        return orders

    def _parts_to_replace(self, plans: Iterable[Plan]) -> dict[Node, None]:
        """Return the ops from which weights that are treated are decoded."""
        return {
            part: None
            for plan in plans
            if plan.treatments and is_constexpr(plan.weight.node)
            for part in Decoder(plan.weight.graph, self._package).parts(plan.weight.node)
        }

    def _biases_to_correct(
        self, plans: Mapping[Node, Plan], rewriter: Rewriter
    ) -> dict[Node, None]:
        """Return the constants that are written once all weights of a graph are."""
        if not self._corrects:
            return {}
        found = (
            rewriter.bias_of(plan.weight, use.node)
            for plan in plans.values()
            if plan.treatments
            for use in plan.weight.node.uses
            if use.parameter == "weight"
        )
        return {
            bias: None
            for bias in found
            if bias is not None and not (bias in plans and plans[bias].treatments)
        }

    def _correct_biases(self, biases: dict[Node, None], rewriter: Rewriter) -> None:
        for weight, layer, correction in self._layers:
            bias = rewriter.bias_of(weight, layer)
            digest = rewriter.correct(weight, layer, correction)
            if digest:
                self._records.biases[f"{weight.prefix}{layer.name}"] = digest
                if bias is not None and is_own(bias):
                    biases.pop(bias, None)
        for bias in biases:
            rewriter.copy(bias)
        self._layers.clear()

    def _write(
        self,
        plan: Plan,
        before: int,
        rewriter: Rewriter,
        unwritten: set[Node],
        later: Collection[Node],
        order: Order | None,
        made: Iterator[Treated | UnsupportedError | None],
    ) -> WeightReport:
        weight = plan.weight
        name = weight.name  # that of the source; compressing changes it
        after = before
        if order is not None:
            notes, layers = self._note(weight), self._layers_of(weight)
            try:
                treated = next(made)
                with weight_errors(name):
                    done = rewriter.compress(order, treated, may_grow=self._may_grow)
                if done.notes and self._strict:
                    raise UnsupportedError("; ".join(done.notes))
                notes = (*done.notes, *notes)
                if self._moments is not None:
                    fed_back = all(done.fed_back)
                    note = self._moments.note(layers, plan.treatments, is_fed_back=fed_back)
                    notes = (*notes, *([note] if note else []))
                plan, after = plan.carried_out(done.treatments, notes), done.n_bytes
                self._layers.extend(
                    (weight, use.node, done.corrections[f"{weight.prefix}{use.node.name}"])
                    for use in weight.node.uses
                    if f"{weight.prefix}{use.node.name}" in done.corrections
                )
                steps = [treatment_dict(treatment) for treatment in plan.treatments]
                for step, is_fed_back in zip(steps, done.fed_back, strict=True):
                    if is_fed_back:
                        next(iter(step.values()))["feedback"] = True
                self._records.add(name, weight.name, steps)
            except UnsupportedError as error:
                if self._strict:
                    msg = f"{name}: {error}"
                    raise UnsupportedError(msg) from error
                plan = plan.left(str(error))
                for part in Decoder(weight.graph, self._package).parts(weight.node):
                    if part in unwritten:
                        unwritten.remove(part)
                        rewriter.copy(part)
        if not plan.treatments and weight.node not in later:
            rewriter.copy(weight.node)
        return _weight_report(plan, name, before, after)

    def _advice(self, weight: Weight) -> dict[str, Any]:
        """Return what samples say of a weight, for its order."""
        statistics = self._statistics
        if statistics is None:
            return {}
        advice: dict[str, Any] = {"importance": functools.partial(statistics.importance, weight)}
        if self._corrects:
            advice["correct"] = functools.partial(statistics.correct, weight)
        if self._moments is not None:
            evenly = functools.partial(statistics.evenly, weight)
            layers = self._layers_of(weight)
            advice["inputs"] = Inputs(self._moments, layers, weight.shape, evenly)
        return advice

    def _note(self, weight: Weight) -> tuple[str, ...]:
        if self._statistics is None:
            return ()
        note = self._statistics.note(weight, feedback=self._moments is not None)
        return (note,) if note else ()

    def _layers_of(self, weight: Weight) -> tuple[str, ...]:
        return () if self._statistics is None else tuple(self._statistics.layers_of(weight))

    def _check_idle(self, reports: list[WeightReport]) -> None:
        if self._may_be_idle:
            return
        left = [f"{each.name}: {each.note}" for each in reports if each.status == "left"]
        reasons = [*left, *self.left][:3] or ["none was selected"]
        what = "weight or activation" if self.left else "weight"
        msg = (
            f"{self._package.path}: some {what} must be compressed, got none ({'; '.join(reasons)})"
        )
        raise UnsupportedError(msg)


def _n_threads(orders: Iterable[Order]) -> int | None:
    """Return 1 if a user's function makes tables, which may not be ready for several threads."""
    is_custom = any(
        isinstance(treatment, PalettizeConfig) and isinstance(treatment.table, Custom)
        for order in orders
        for treatment in order.treatments
    )
    return 1 if is_custom else None


def weight_bytes(weight: Weight, package: Package) -> int:
    """Return the size of what is stored for a weight."""
    stored = Decoder(weight.graph, package).stored_values(weight.node)
    return sum(values.n_stored_bytes(value) for value in stored)


def _weight_report(plan: Plan, name: str, before: int, after: int) -> WeightReport:
    return WeightReport(
        name=name,
        op_types=plan.weight.op_types,
        shape=plan.weight.shape,
        status=plan.status,
        treatment=", then ".join(describe(treatment) for treatment in plan.treatments),
        note=plan.note,
        bytes_before=before,
        bytes_after=after,
    )
