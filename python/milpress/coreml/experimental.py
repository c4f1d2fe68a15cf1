"""Names that coremltools still has for what is no experiment any more."""

from __future__ import annotations

import warnings
from typing import Any

from attrs import define

from milpress.coreml import activations
from milpress.coreml.op_config import OpLinearQuantizerConfig

__all__ = ["OpActivationLinearQuantizerConfig", "linear_quantize_activations"]


@define
class OpActivationLinearQuantizerConfig(OpLinearQuantizerConfig):
    """`milpress.coreml.OpLinearQuantizerConfig` under its old name."""


def linear_quantize_activations(
    mlmodel: Any, config: Any, sample_data: Any, calibration_op_group_size: int = -1
) -> Any:
    """Do what `milpress.coreml.linear_quantize_activations` does; deprecated.

    Parameters
    ----------
    mlmodel, config, sample_data, calibration_op_group_size
        As there.
    """
    msg = "use milpress.coreml.linear_quantize_activations, experimental is its old place"
    warnings.warn(msg, FutureWarning, stacklevel=2)
    return activations.linear_quantize_activations(
        mlmodel, config, sample_data, calibration_op_group_size
    )
