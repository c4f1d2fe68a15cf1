"""Non-maximum suppression: the stage behind a detector that keeps one of several alike boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from milpress.errors import InputError, PackageError
from milpress.interpreter import features as io
from milpress.mil import features, proto
from milpress.mil.features import Feature


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How boxes are chosen.

    Parameters
    ----------
    iou
        A box is suppressed if its intersection over union with one that is kept is above.
    confidence
        A box is left out from the beginning if its greatest confidence is below.
    per_class
        Whether only boxes of the same class (that of the greatest confidence) suppress each other.
    """

    iou: float
    confidence: float
    per_class: bool


def kept_boxes(
    confidence: Tensor, coordinates: Tensor, settings: Settings, most: int | None = None
) -> Tensor:
    """Return which boxes are kept, most confident first; of equally confident ones the first.

    Parameters
    ----------
    confidence
        Of shape ``(boxes, classes)``.
    coordinates
        Of shape ``(boxes, 4)``: center along x and y, width, height.
    settings
        How they are chosen.
    most
        How many are kept at most.
    """
    best, classes = confidence.max(1)
    order = torch.sort(best, descending=True, stable=True).indices
    left = order[best[order] >= settings.confidence]
    center, size = coordinates[:, :2], coordinates[:, 2:]
    low, high, area = center - size / 2, center + size / 2, size.prod(1)
    kept: list[Tensor] = []
    while len(left) and (most is None or len(kept) < most):
        top, left = left[0], left[1:]
        kept.append(top)
        sides = torch.minimum(high[top], high[left]) - torch.maximum(low[top], low[left])
        shared = sides.clamp_min(0).prod(1)
        is_near = shared / (area[top] + area[left] - shared) > settings.iou
        if settings.per_class:
            is_near &= classes[left] == classes[top]
        left = left[~is_near]
    return torch.stack(kept) if kept else left[:0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Suppression:
    """A stage of a pipeline that keeps one of several alike boxes.

    ``place`` is its name, behind those of the pipelines it is in. Confidence and coordinates are
    the first two of its ``inputs`` and what it gives. ``overrides`` are names of the inputs that
    replace a threshold of the settings, by its name there. At least and at most ``n_boxes`` come
    out; fewer are filled up with zeros.
    """

    place: str
    settings: Settings
    overrides: dict[str, str]
    inputs: tuple[Feature, ...]
    outputs: tuple[Feature, ...]
    n_boxes: tuple[int, int | None]

    @property
    def kept_name(self) -> str:
        """Name of the value that tells which boxes are kept."""
        return f"{self.place}: kept"

    def without_suppression(self) -> None:
        """Return nothing, as nothing of it is left."""

    def run(self, given: Mapping[str, Any], run: Any) -> dict[str, Any]:
        """Return confidence and coordinates of the boxes that are kept."""
        confidence, coordinates = (_rows(feature, given) for feature in self.inputs[:2])
        if len(confidence) != len(coordinates):
            msg = (
                f"{self.place}: there must be confidences for each of the {len(coordinates)} "
                f"boxes, got {len(confidence)}"
            )
            raise InputError(msg)
        # Positions alone decide; float64 keeps small boxes far from the origin apart.
        settings, most = self._settings(given), self.n_boxes[1]
        kept = kept_boxes(confidence, coordinates.double(), settings, most)
        if self.kept_name in run.names:
            run.observe(self.kept_name, kept)
            kept = kept if run.replace is None else run.replace(self.kept_name, kept)
            if len(kept) and int(kept.max()) >= len(confidence):
                msg = (
                    f"{self.place}: the boxes to keep must be among {len(confidence)}, got number "
                    f"{int(kept.max())}"
                )
                raise InputError(msg)
        missing = max(self.n_boxes[0] - len(kept), 0)
        return {
            feature.name: torch.cat([rows[kept], rows.new_zeros(missing, rows.shape[1])])
            for feature, rows in zip(self.outputs, (confidence, coordinates), strict=True)
        }

    def _settings(self, given: Mapping[str, Any]) -> Settings:
        numbers: dict[str, Any] = {
            name: _number(feature, given[feature])
            for name, feature in self.overrides.items()
            if given.get(feature) is not None
        }
        return replace(self.settings, **numbers)


def _rows(feature: Feature, given: Mapping[str, Any]) -> Tensor:
    value = given[feature.name]
    shape = np.shape(value)
    if len(shape) > 2 and set(shape[:-2]) == {1}:
        value = value.reshape(shape[-2:])
    return io.taken(feature, value)


def _number(name: str, value: Any) -> float:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "fiu":
        msg = f"input {name!r} must be one number, got {array.dtype} of shape {array.shape}"
        raise InputError(msg)
    return float(array.reshape(()))


def suppression_of(model: proto.Model, place: str) -> Suppression:
    """Return the stage that a model of a pipeline describes.

    Raises
    ------
    PackageError
        If it lacks the name of a feature, or its labels or features contradict each other.
    """
    stage = model.nonMaximumSuppression
    given = {item.name: item for item in (*model.description.input, *model.description.output)}
    names = {
        field: str(getattr(stage, f"{field}FeatureName"))
        for field in (
            "confidenceInput",
            "coordinatesInput",
            "confidenceOutput",
            "coordinatesOutput",
        )
    }
    for field, name in names.items():
        if not name:
            msg = f"{place}: the non-maximum suppression has no {field}FeatureName"
            raise PackageError(msg)
    overrides = {
        threshold: name
        for threshold, name in (
            ("iou", stage.iouThresholdInputFeatureName),
            ("confidence", stage.confidenceThresholdInputFeatureName),
        )
        if name
    }
    settings = Settings(
        iou=stage.iouThreshold,
        confidence=stage.confidenceThreshold,
        per_class=stage.pickTop.perClass,
    )
    n_classes = len(stage.stringClassLabels.vector or stage.int64ClassLabels.vector)
    outputs = _features(names["confidenceOutput"], names["coordinatesOutput"], n_classes)
    arrays = [given[each.name].type.multiArrayType for each in outputs if each.name in given]
    return Suppression(
        place=place,
        settings=settings,
        overrides=overrides,
        inputs=(
            *_features(names["confidenceInput"], names["coordinatesInput"], n_classes),
            *(
                Feature(name=name, kind="number", dtype="float32", default=getattr(settings, key))
                for key, name in overrides.items()
            ),
        ),
        outputs=outputs,
        n_boxes=_n_boxes(place, arrays),
    )


def _features(confidence: str, coordinates: str, n_classes: int) -> tuple[Feature, Feature]:
    return (
        Feature(name=confidence, kind="array", dtype="float32", shape=(None, n_classes or None)),
        Feature(name=coordinates, kind="array", dtype="float32", shape=(None, 4)),
    )


def _n_boxes(place: str, outputs: list[proto.ArrayType]) -> tuple[int, int | None]:
    """Return how many boxes come out at least and at most, as either output may say."""
    low, high = 0, None
    for array in outputs:
        shapes = array.enumeratedShapes.shapes
        if array.shapeRange.sizeRanges:
            least, most = features.size_range(array.shapeRange.sizeRanges[0])
        elif shapes:
            sizes = [shape.shape[0] for shape in shapes if len(shape.shape) == 2]
            least, most = min(sizes, default=0), max(sizes, default=None)
        elif len(array.shape) == 2 and array.shape[0] > 0:
            least, most = array.shape[0], array.shape[0]
        else:
            continue
        low = max(low, least)
        high = most if high is None or (most is not None and most < high) else high
    if high is not None and low > high:
        msg = f"{place}: the two outputs have room for different numbers of boxes"
        raise PackageError(msg)
    return low, high
