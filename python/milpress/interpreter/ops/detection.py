"""Non-maximum suppression within an ML program."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from milpress.interpreter.operator import operator


def _overlap(box: Tensor, boxes: Tensor) -> Tensor:
    """Return intersection over union of a box with others, as center and size."""
    low = torch.maximum(box[:2] - box[2:] / 2, boxes[:, :2] - boxes[:, 2:] / 2)
    high = torch.minimum(box[:2] + box[2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2)
    shared = (high - low).clamp(min=0).prod(-1)
    return shared / (box[2:].prod() + boxes[:, 2:].prod(-1) - shared)


def _kept(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    score_threshold: float,
    max_boxes: int,
    per_class: bool,
) -> Tensor:
    """Return which boxes (B, 4) remain by their scores (B, K), best first: one at least."""
    best, classes = scores.max(-1)
    order = torch.argsort(best, descending=True, stable=True)
    open_ = best[order] >= score_threshold
    kept: list[int] = []
    while len(kept) < max_boxes and bool(open_.any()):
        place = int(open_.to(torch.int8).argmax())
        chosen = int(order[place])
        kept.append(chosen)
        hidden = _overlap(boxes[chosen], boxes[order]) > iou_threshold
        if per_class:
            hidden &= classes[order] == classes[chosen]
        open_ &= ~hidden
        open_[place] = False
    return torch.tensor(kept) if kept else order[:1]


@operator("non_maximum_suppression")
def non_maximum_suppression(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    score_threshold: float,
    max_boxes: int,
    per_class_suppression: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, _, n_classes = scores.shape
    kept_boxes = torch.zeros(n, max_boxes, 4)
    kept_scores = torch.zeros(n, max_boxes, n_classes)
    indices = torch.full((n, max_boxes), -1, dtype=torch.int32)
    counts = torch.zeros(n, dtype=torch.int32)
    for i in range(n):
        kept = _kept(
            boxes[i], scores[i], iou_threshold, score_threshold, max_boxes, per_class_suppression
        )
        count = len(kept)
        kept_boxes[i, :count] = boxes[i, kept]
        kept_scores[i, :count] = scores[i, kept]
        indices[i, :count] = kept
        counts[i] = count
    return kept_boxes, kept_scores, indices, counts


@operator("non_maximum_suppression", since=7)
def non_maximum_suppression_of_columns(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_boxes: int,
    per_class_suppression: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    kept_boxes, kept_scores, indices, _ = non_maximum_suppression.function(
        boxes.mT, scores.mT, iou_threshold, -math.inf, max_boxes, per_class_suppression
    )
    return kept_boxes.mT, kept_scores.mT, indices
