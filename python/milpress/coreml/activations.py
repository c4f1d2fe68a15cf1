"""Quantizing activations of Core ML models under coremltools' names, on any machine."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

from milpress.calibration.activation_quantization import quantize_activations
from milpress.compression.packages import save_package
from milpress.coreml.op_config import OpLinearQuantizerConfig
from milpress.coreml.optimization_config import adopted
from milpress.engines.mlmodel import opened, written
from milpress.formats import PerTensor, QuantizeConfig
from milpress.formats.ranges import CalibrationConfig, CalibrationKind, Engine
from milpress.progress import Progress
from milpress.recipe import check_codes

if TYPE_CHECKING:
    import os

    from milpress.formats.quantized import IntDType

_logger = logging.getLogger(__name__)


def linear_quantize_activations(
    mlmodel: Any,
    config: Any,
    sample_data: Any,
    calibration_op_group_size: int = -1,
    *,
    calibration: CalibrationKind = "minmax",
    percentile: float = 99.99,
    engine: Engine = "interpreter",
    function: str | None = None,
    destination: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> Any:
    """Quantize what the model computes to 8 bits, by pairs of ``quantize`` and ``dequantize``.

    The model is run on samples to find the range of each value: by the interpreter on any machine,
    or by Core ML on a Mac.
    `linear_quantize_weights` on the result gives a model with weights and activations of 8 bits.

    Parameters
    ----------
    mlmodel
        A coremltools ``MLModel``, or the path of an ``.mlpackage``. It is not changed.
    config
        An `OptimizationConfig` of `OpLinearQuantizerConfig` entries, milpress' or coremltools' own,
        for ops by name, by type, or all; ``mode`` and ``dtype`` count.
    sample_data
        Inputs by name, one dictionary for each sample; the name may be ``None`` for a model with
        one input. Any iterable will do; it is gone through once. Or a path, as of `milpress.run`:
        an ``.npz`` file, or a folder of ``.npz`` or ``.npy`` files.
    calibration_op_group_size
        How many values are looked at in a run; -1 for all. The results are the same.
    calibration
        How ranges are found: ``"minmax"`` holds all that was seen; ``"percentile"`` leaves out the
        outermost on both sides; ``"mse"`` has the least squared error; ``"entropy"`` the least
        divergence of the distribution.
    percentile
        With ``calibration="percentile"``: how many values in a hundred the range holds.
    engine
        What runs the model: ``"interpreter"``, on any machine; or, on a Mac, ``"coreml"``, which
        has no view of values in nested blocks.
    function
        The function of a package with several; by default the one that Core ML would take. Others
        stay as they are.
    destination
        Where to write the package; ``None`` for a temporary one that lives with the result.
    progress
        ``True`` shows a bar; a function is called with samples done, samples in all (0 if that is
        not known) and what is at hand.

    Returns
    -------
    MLModel
        The model. Its ``activation_report`` says what became of each value.

    Raises
    ------
    ConfigError
        If the config is of another class, or a setting is not what it must be.
    InputError
        If there is no sample, or the model can't take one.
    UnsupportedOpError
        If the interpreter does not cover an op of the model.
    UnsupportedError
        If Core ML can't give out a value.
    DriverError
        If Core ML is to run the model, and this is no Mac, or it fails.
    PackageError
        If the model is damaged, or not made of ML programs.
    """
    ours = adopted(config)
    ours.check_types(OpLinearQuantizerConfig, function="linear_quantize_activations")
    settings = CalibrationConfig(calibration=calibration, percentile=percentile, engine=engine)
    package = opened(mlmodel)
    for op_config in ours.op_configs():
        check_codes(_codes(op_config))

    def codes_of(name: str, op_type: str) -> QuantizeConfig | None:
        op_config = ours.config_of_op(name, op_type)
        return None if op_config is None else _codes(op_config)

    report = quantize_activations(
        package,
        codes_of,
        sample_data,
        calibration=settings,
        function=function,
        values_at_once=calibration_op_group_size,
        progress=progress,
    )
    model, _ = written(mlmodel, destination, lambda path: save_package(package, path))
    for each in report.activations:
        if each.note:
            _logger.warning("%s: %s; it is not quantized", each.name, each.note)
    model.activation_report = report
    return model


def _codes(config: Any) -> QuantizeConfig:
    return QuantizeConfig(
        dtype=cast("IntDType", config.dtype),
        granularity=PerTensor(),
        offset=config.mode == "LINEAR",
    )
