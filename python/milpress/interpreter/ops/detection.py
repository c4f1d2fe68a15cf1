"""Non-maximum suppression within an ML program."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from milpress.interpreter.operator import operator
from milpress.interpreter.suppression import Settings, kept_boxes


@operator("non_maximum_suppression")
def non_maximum_suppression(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    score_threshold: float,
    max_boxes: int,
    per_class_suppression: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = Settings(
        iou=iou_threshold, confidence=score_threshold, per_class=per_class_suppression
    )
    n, _, n_classes = scores.shape
    best_boxes = torch.zeros(n, max_boxes, 4)
    best_scores = torch.zeros(n, max_boxes, n_classes)
    indices = torch.full((n, max_boxes), -1, dtype=torch.int32)
    counts = torch.zeros(n, dtype=torch.int32)
    for i in range(n):
        kept = kept_boxes(scores[i], boxes[i], settings, max_boxes)
        if not len(kept):  # one at least is kept
            kept = torch.argsort(scores[i].amax(-1), descending=True, stable=True)[:1]
        count = len(kept)
        best_boxes[i, :count] = boxes[i, kept]
        best_scores[i, :count] = scores[i, kept]
        indices[i, :count] = kept
        counts[i] = count
    return best_boxes, best_scores, indices, counts


@operator("non_maximum_suppression", since=7)
def non_maximum_suppression_of_columns(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_boxes: int,
    per_class_suppression: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    best_boxes, best_scores, indices, _ = non_maximum_suppression.function(
        boxes.mT, scores.mT, iou_threshold, -math.inf, max_boxes, per_class_suppression
    )
    return best_boxes.mT, best_scores.mT, indices
