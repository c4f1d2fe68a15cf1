"""Pipelines with stages that are no ML programs, built by coremltools' messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from small_models import TARGETS, converted, weight

N_BOXES, N_CLASSES = 64, 5
_DOUBLE = ct.proto.FeatureTypes_pb2.ArrayFeatureType.DOUBLE


def head() -> Any:
    """Confidences and boxes of 8 x 8 places of a picture of 16 x 16."""

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(1, 3, 16, 16), dtype=types.fp32)],
        opset_version=TARGETS["iOS18"],
    )
    def prog(x: Any) -> Any:
        w = weight(32, 3, 3, 3, dtype=np.float32) * 5
        y = mb.relu(x=mb.conv(x=x, weight=w, strides=[2, 2], pad_type="same", name="seen"))
        y = mb.conv(x=y, weight=weight(9, 32, 1, 1, dtype=np.float32) * 4, name="found")
        y = mb.transpose(x=mb.reshape(x=mb.sigmoid(x=y), shape=[9, 64]), perm=[1, 0])
        scores = mb.slice_by_index(x=y, begin=[0, 0], end=[64, 5], name="scores")
        return scores, mb.slice_by_index(x=y, begin=[0, 5], end=[64, 9], name="boxes")

    return converted(prog, "iOS18")


def suppression(*, n_rows: tuple[int, int] = (0, -1), **settings: Any) -> Any:
    """Return a stage that takes ``scores`` and ``boxes``, as a message."""
    model = ct.proto.Model_pb2.Model(specificationVersion=9)
    for name in ("scores", "boxes"):
        model.description.input.add(name=name).type.multiArrayType.dataType = _DOUBLE
    for name, width in (("confidence", N_CLASSES), ("coordinates", 4)):
        array = model.description.output.add(name=name).type.multiArrayType
        array.dataType = _DOUBLE
        for low, high in (n_rows, (width, width)):
            array.shapeRange.sizeRanges.add(lowerBound=low, upperBound=high)
    stage = model.nonMaximumSuppression
    stage.confidenceInputFeatureName, stage.coordinatesInputFeatureName = "scores", "boxes"
    stage.confidenceOutputFeatureName = "confidence"
    stage.coordinatesOutputFeatureName = "coordinates"
    stage.iouThreshold = settings.pop("iou", 0.3)
    stage.confidenceThreshold = settings.pop("threshold", 0.5)
    stage.pickTop.perClass = settings.pop("per_class", False)
    stage.stringClassLabels.vector.extend(f"c{i}" for i in range(settings.pop("n_labels", 5)))
    for name, value in settings.items():
        setattr(stage, name, value)
    return model


def other(fill: Callable[[Any], Any], inputs: dict[str, int], outputs: dict[str, int]) -> Any:
    """Return a stage of another kind, with arrays of some sizes as features, as a message."""
    model = ct.proto.Model_pb2.Model(specificationVersion=9)
    for items, features in (
        (model.description.input, inputs),
        (model.description.output, outputs),
    ):
        for name, size in features.items():
            array = items.add(name=name).type.multiArrayType
            array.dataType = _DOUBLE
            array.shape.append(size)
    fill(model)
    return model


def piped(path: Path, stages: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> Path:
    """Save a pipeline of models and messages, with descriptions of what it takes and gives."""
    weights_dir = next(
        stage.weights_dir for stage in stages if isinstance(stage, ct.models.MLModel)
    )
    model = ct.proto.Model_pb2.Model(specificationVersion=9)
    for i, stage in enumerate(stages):
        spec = stage.get_spec() if isinstance(stage, ct.models.MLModel) else stage
        model.pipeline.models.add().CopyFrom(spec)
        model.pipeline.names.append(f"stage{i}")
    model.description.input.extend(inputs)
    model.description.output.extend(outputs)
    ct.models.MLModel(model, weights_dir=weights_dir, skip_model_load=True).save(str(path))
    return path


def detector(path: Path, **settings: Any) -> Path:
    """Save a detector with a stage that chooses boxes."""
    first, second = head(), suppression(**settings)
    description = first.get_spec().description
    inputs = [*description.input]
    for name in (
        second.nonMaximumSuppression.iouThresholdInputFeatureName,
        second.nonMaximumSuppression.confidenceThresholdInputFeatureName,
    ):
        if name:
            number = ct.proto.Model_pb2.FeatureDescription(name=name)
            number.type.doubleType.SetInParent()
            inputs.append(number)
    return piped(path, [first, second], inputs, second.description.output)
