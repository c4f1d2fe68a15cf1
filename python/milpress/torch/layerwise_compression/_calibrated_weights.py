"""Parameters that are compressed with samples, whole or in the parts in which they are used."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from milpress.compression.report import WeightReport
from milpress.errors import UnsupportedError
from milpress.formats.rows import as_float
from milpress.show import decibels
from milpress.torch import _metadata
from milpress.torch._compression import Task, asking, left
from milpress.torch._metadata import Stored
from milpress.torch._module_weights import ModuleWeight
from milpress.torch._module_weights import whole as on_cpu
from milpress.torch.layerwise_compression._layer_moments import LAYERS
from milpress.torch.layerwise_compression._layers import CalibratedLayer
from milpress.torch.layerwise_compression._parts import (
    Part,
    assembled,
    missing,
    part_of,
    storage_of,
    whole,
)
from milpress.torch.layerwise_compression._products import Product, layer_with
from milpress.torch.layerwise_compression.algorithms import OBSCompressionAlgorithm
from milpress.torch.registration import RECURRENT, TRANSPOSED, products_of

_logger = logging.getLogger(__name__)

_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)


class CalibratedWeight:
    """A parameter, the modules that hold it, and its layers: itself, or parts of it.

    Parameters
    ----------
    number
        Its place in the model.
    tasks
        What is asked for it, for each module that holds it.
    """

    def __init__(self, number: int, tasks: list[Task]) -> None:
        self.number = number
        self.tasks = [replace(task, reason="") for task in tasks]
        self.layers: dict[Part, CalibratedLayer] = {}
        self.has_other_products = False  # than those of its layers
        self.rows: dict[str, dict[str, Any]] = {}
        self.report: WeightReport | None = None
        self._reason = asking(tasks).reason
        reason = self._why_left()
        if reason:
            self.leave(reason)

    @property
    def weight(self) -> ModuleWeight:
        """The parameter, as the task names it whose config holds."""
        return asking(self.tasks).weight

    @property
    def tensor(self) -> Tensor:
        """The parameter."""
        return cast("Tensor", self.weight.tensor)

    @property
    def is_looked_up(self) -> bool:
        """Whether all modules that hold it look it up."""
        return all(isinstance(task.weight.module, _LOOKUPS) for task in self.tasks)

    @property
    def is_told(self) -> bool:
        """Whether `register_module` was told how to find what it is multiplied by."""
        weights = (task.weight for task in self.tasks)
        return any(weight.parameter_name in products_of(weight.module) for weight in weights)

    @property
    def n_done(self) -> int:
        """Elements that are compressed, or left for good."""
        if self.report is not None:
            return self.weight.size
        return sum(layer.weight.size for layer in self.layers.values() if layer.is_done)

    def _why_left(self) -> str:
        weight, tensor, module = self.weight, self.weight.tensor, self.weight.module
        if tensor is None or nn.parameter.is_lazy(tensor):
            return "the parameter has no shape yet, run the model once"
        if tensor.is_meta:
            return "its values are not in memory but on the device meta: load them before"
        if isinstance(module, (*TRANSPOSED, *RECURRENT)):
            kind = type(module).__name__
            return f"errors are not fed back to {kind}, compress it without samples afterwards"
        if any(_metadata.is_coded(task.weight) for task in self.tasks):
            return "compressed already"
        if isinstance(module, LAYERS) and weight.parameter_name == "weight":
            # Of these it is known before any sample comes whether they can be compressed so.
            try:
                CalibratedLayer(name="", key="", place=0, tasks=self.tasks, module=module).begin()
            except ValueError as error:
                return str(error)
        return ""

    def leave(self, reason: str) -> None:
        """Leave it as it is."""
        _logger.warning("%s: %s. Left as it is.", self.weight.name, reason)
        row, self.report = left(self.weight, reason)
        self.rows = {task.weight.name: dict(row) for task in self.tasks}

    def finish(self) -> None:
        """Note what became of it, and say so in the buffers of its modules."""
        layers = [layer for layer in self.layers.values() if layer.is_done]
        if self.report is not None:
            return
        if not layers:
            is_computed = "computed from it" in self._reason
            self.leave(self._reason if is_computed else "no sample came to a product of it")
            return
        row, self.report = layers[0].row or {}, layers[0].report
        if layers[0].tasks is not self.tasks:
            row, self.report = self._finish_parts()
        self.rows = {task.weight.name: dict(row) for task in self.tasks}

    def _finish_parts(self) -> tuple[dict[str, Any], WeightReport]:
        name = self.weight.name
        reasons = {
            layer.name.removeprefix(name): layer.report.note
            for layer in self.layers.values()
            if layer.report is not None and layer.report.status == "left"
        }
        if len(reasons) == len(self.layers):
            return left(self.weight, next(iter(reasons.values())))
        if not reasons:
            try:
                self._register()
            except UnsupportedError as error:
                reasons = {"": str(error)}
        if reasons:
            reason = "; ".join(f"{part} {why}".strip() for part, why in reasons.items())
            return left(self.weight, f"its parts are rounded, but not stored as codes: {reason}")
        return self._reports()

    def _register(self) -> None:
        if any(not _metadata.compressed_parameters(each.module) for each in self.layers.values()):
            return  # an algorithm of the user's own, which says nothing of codes
        values = {
            part: _metadata.read(layer.weight).folded() for part, layer in self.layers.items()
        }
        stored = Stored(assembled(values, self.weight.shape))
        for task in self.tasks:
            _metadata.register(task.weight, stored)

    def _reports(self) -> tuple[dict[str, Any], WeightReport]:
        """Return what became of all parts together."""
        reports = [layer.report for layer in self.layers.values() if layer.report is not None]
        powers = [_powers(layer) for layer in self.layers.values()]
        signal, noise = (sum(power) for power in zip(*powers, strict=True))
        others = [task.weight.name for task in self.tasks if task.weight.name != self.weight.name]
        n_without = sum(bool(layer.note) for layer in self.layers.values())
        notes = [
            *dict.fromkeys(report.note for report in reports if report.note and not n_without),
            *([f"tied to {', '.join(others)}"] if others else []),
            *([f"{n_without} of {len(reports)} parts without feedback"] if n_without else []),
        ]
        first = reports[0]
        report = replace(
            left(self.weight, "; ".join(notes))[1],
            status="compressed",
            treatment=first.treatment + (f", {len(reports)} parts" if len(reports) > 1 else ""),
            bytes_after=sum(each.bytes_after for each in reports),
            snr_db=decibels(signal, noise),
        )
        row = {
            **(next(iter(self.layers.values())).row or {}),
            "error": math.sqrt(noise / report.size),
            "#params": report.size,
        }
        row.pop("note", None)
        return {**row, **({"note": report.note} if notes else {})}, report


def _powers(layer: CalibratedLayer) -> tuple[float, float]:
    """Return the sums of squares of a weight and of its error."""
    row, report = layer.row or {}, layer.report
    noise = float(row["error"]) ** 2 * int(row["#params"])
    snr = None if report is None else report.snr_db
    if noise == 0 or snr is None:
        tensor: Any = layer.weight.tensor
        return float((as_float(on_cpu(tensor)).astype("float64") ** 2).sum()), noise
    return noise * 10 ** (snr / 10), noise


class CalibratedWeights:
    """The parameters that something is asked for, and the layers that samples come to.

    Parameters
    ----------
    weights
        The parameters.
    """

    def __init__(self, weights: Sequence[CalibratedWeight]) -> None:
        self.weights = [weight for weight in weights if weight.report is None]
        self.layers: list[CalibratedLayer] = []
        self._by_id = {id(weight.tensor): weight for weight in self.weights}
        self._by_storage: dict[int | None, list[CalibratedWeight]] = {}
        for weight in self.weights:
            self._by_storage.setdefault(storage_of(weight.tensor), []).append(weight)
        self._by_storage.pop(None, None)
        self._told = [weight for weight in self.weights if weight.is_told]

    def watch_for(self, value: Any) -> bool:
        """Whether something is one of them, or a view of one, whose products are to be found."""
        return isinstance(value, Tensor) and any(
            weight not in self._told for weight in self._holding(value)
        )

    def told(self, module: nn.Module) -> list[str]:
        """Return the parameters of a module whose products it says itself."""
        tensors = [weight.tensor for weight in self._told]
        return [
            name
            for name in products_of(module)
            if any(module._parameters.get(name) is tensor for tensor in tensors)
        ]

    def _holding(self, value: Tensor) -> list[CalibratedWeight]:
        known = self._by_id.get(id(value))
        return self._by_storage.get(storage_of(value), []) if known is None else [known]

    def layer_of(self, product: Product) -> CalibratedLayer | None:
        """Return the layer that makes a product; ``None`` if it counts for none."""
        candidates = self._holding(product.weight)
        for weight in candidates:
            part = part_of(weight.tensor, product.weight)
            if part is not None:
                return self._layer(weight, part, product.kernel)
        for weight in candidates:
            weight.has_other_products = True
        return None

    def lookups(self) -> Iterator[CalibratedLayer]:
        """Yield what is looked up, and so far not multiplied by, ready to be rounded."""
        for weight in self.weights:
            if weight.is_looked_up and not weight.layers:
                yield from self._without_samples(weight, [whole(weight.tensor)])

    def rest(self) -> Iterator[CalibratedLayer]:
        """Yield parts that no sample came to, of weights of which others are done."""
        for weight in self.weights:
            done = [part for part, layer in weight.layers.items() if layer.is_done]
            if done:
                yield from self._without_samples(weight, missing(done, weight.weight.shape))

    def notes(self) -> list[str]:
        """Return what of the weights is to be known."""
        others = [weight.weight.name for weight in self.weights if weight.has_other_products]
        unseen = [
            layer.name
            for weight in self.weights
            for layer in weight.layers.values()
            if layer.note and not weight.is_looked_up
        ]
        notes = []
        if unseen:
            notes.append(
                "Parts of weights that no sample came to, so that no errors are fed back in them: "
                f"{', '.join(unseen)}."
            )
        if others:
            notes.append(
                "Weights that are also multiplied in other parts, or along another axis, which did "
                f"not count: {', '.join(others)}."
            )
        return notes

    def _without_samples(
        self, weight: CalibratedWeight, parts: Iterable[Part]
    ) -> Iterator[CalibratedLayer]:
        for part in parts:
            layer = self._layer(weight, part, {})
            if layer is None or layer.is_done:
                continue
            algorithm = layer.begin()
            if not isinstance(algorithm, OBSCompressionAlgorithm):
                layer.leave(f"{layer.config.algorithm} needs samples, and none comes to it")
                continue
            algorithm.do_without_samples()
            layer.note = "without feedback, as " + (
                "a lookup multiplies nothing" if weight.is_looked_up else "no sample came to it"
            )
            yield layer

    def _layer(
        self, weight: CalibratedWeight, part: Part, kernel: Mapping[str, Any]
    ) -> CalibratedLayer | None:
        if part in weight.layers or weight.report is not None:
            return weight.layers.get(part)
        if any(part.meets(other) for other in weight.layers):
            weight.has_other_products = True
            return None
        layer = self._new_layer(weight, part, kernel)
        try:
            layer.begin()
        except ValueError as error:
            if not weight.layers:
                weight.leave(str(error))
                return None
            layer.leave(str(error))
        layer.algorithm = None
        weight.layers[part] = layer
        self.layers.append(layer)
        return layer

    def _new_layer(
        self, weight: CalibratedWeight, part: Part, kernel: Mapping[str, Any]
    ) -> CalibratedLayer:
        tensor, tasks, place = weight.tensor, weight.tasks, len(self.layers)
        name, key = weight.weight.name, f"{weight.number:05}"
        if part.is_whole(tensor):
            modules = [task.weight.module for task in tasks if _is_layer(task.weight, kernel)]
            module = modules[0] if modules else layer_with(tensor.detach(), kernel)
            return CalibratedLayer(name=name, key=key, place=place, tasks=tasks, module=module)
        module = layer_with(part.of(tensor), kernel)
        own = ModuleWeight("", module, "weight")
        if any(_metadata.is_pruned(task.weight) for task in tasks):
            _metadata.register_pruning(own)
        return CalibratedLayer(
            name=name + part.name(tensor),
            key="-".join(map(str, (key, *part.index, part.begin, part.end))),
            place=place,
            tasks=[Task(own, asking(tasks).config)],
            module=module,
        )


def _is_layer(weight: ModuleWeight, kernel: Mapping[str, Any]) -> bool:
    """Whether a module makes just the products that are made with its weight."""
    module: Any = weight.module
    if weight.parameter_name != "weight" or not isinstance(module, LAYERS):
        return False
    if not kernel:
        return isinstance(module, nn.Linear)
    return getattr(module, "padding_mode", "") == "zeros" and all(
        getattr(module, name, None) == value for name, value in kernel.items()
    )
