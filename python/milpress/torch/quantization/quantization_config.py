"""Settings that all quantizers share."""

from __future__ import annotations

from enum import Enum, unique

__all__ = ["QuantizationScheme"]


@unique
class QuantizationScheme(Enum):
    """Whether a range is symmetric about zero or has an offset."""

    symmetric = "symmetric"
    affine = "affine"
