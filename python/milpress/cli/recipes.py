"""The recipe that options of `milpress compress` stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from milpress.errors import ConfigError

if TYPE_CHECKING:
    from milpress.formats import QuantizeConfig
    from milpress.recipe import ActivationStep, Recipe

_BUDGETS = ("--target-bits", "--target-size")
_CHOICES = ("--palettize", "--quantize", "--prune", "--recipe", *_BUDGETS)
_ACTIVATIONS = "--quantize-activations"
# What says nothing without another option.
_OWNERS = {
    "--group-size": "--palettize",
    "--block-size": "--quantize",
    "--per-channel": "--quantize",
    "--per-tensor": "--quantize",
    "--offset": "--quantize",
}
_GRANULARITIES = ("--block-size", "--per-channel", "--per-tensor")


def recipe_from(options: dict[str, Any], *, planned: Callable[[], Recipe]) -> Recipe:
    """Return the recipe that options stand for.

    Parameters
    ----------
    options
        The value of each option by its name.
    planned
        Makes the recipe where a budget is given.

    Raises
    ------
    ConfigError
        If options are missing, contradict each other or have no effect.
    """
    from milpress.formats import PalettizeConfig, PruneConfig
    from milpress.recipe import DEFAULT_MIN_SIZE, Recipe

    chosen = [option for option in _CHOICES if options[option] is not None]
    activations = _activation_step(options)
    if not chosen and activations is None:
        msg = f"nothing to do: give one of {', '.join(_CHOICES)}, or {_ACTIVATIONS}"
        raise ConfigError(msg)
    if len(chosen) > 1:
        msg = f"{' and '.join(chosen)} can't be combined: give one of them, or write a --recipe"
        raise ConfigError(msg)
    (choice,) = chosen or [_ACTIVATIONS]
    for option, owner in _OWNERS.items():
        if options[option] not in (None, False) and choice != owner:
            msg = f"{option} has no effect without {owner}"
            raise ConfigError(msg)
    target, threshold = options["--upgrade-to"], options["--weight-threshold"]
    if choice == "--recipe":
        if threshold is not None:
            msg = "--weight-threshold has no effect with --recipe: set select: min_size in it"
            raise ConfigError(msg)
        if activations is not None:
            msg = f"{_ACTIVATIONS} has no effect with --recipe: add a step quantize_activations"
            raise ConfigError(msg)
        recipe = Recipe.from_yaml(options[choice])
        return recipe if target is None else replace(recipe, target=target)
    if choice == _ACTIVATIONS:
        return Recipe(steps=(), target=target, activations=activations)
    if choice in _BUDGETS:
        return replace(planned(), activations=activations)
    treatment: Any = None
    if choice == "--palettize":
        treatment = PalettizeConfig(bits=options[choice], group_size=options["--group-size"])
    elif choice == "--prune":
        treatment = PruneConfig(sparsity=options[choice])
    else:
        treatment = _quantize_config(options)
    min_size = DEFAULT_MIN_SIZE if threshold is None else threshold + 1
    return replace(Recipe.of(treatment, target=target, min_size=min_size), activations=activations)


def _activation_step(options: dict[str, Any]) -> ActivationStep | None:
    from milpress.formats import PerTensor, QuantizeConfig
    from milpress.formats.ranges import CalibrationConfig
    from milpress.recipe import ActivationStep

    calibration, engine = options["--calibration"], options["--calibration-engine"]
    if options[_ACTIVATIONS] is None:
        if calibration != "minmax":
            msg = f"--calibration has no effect without {_ACTIVATIONS}"
            raise ConfigError(msg)
        if engine != "interpreter":
            msg = f"--calibration-engine has no effect without {_ACTIVATIONS}"
            raise ConfigError(msg)
        return None
    return ActivationStep(
        codes=QuantizeConfig(dtype=options[_ACTIVATIONS], granularity=PerTensor()),
        calibration=CalibrationConfig(calibration=calibration, engine=engine),
    )


def _quantize_config(options: dict[str, Any]) -> QuantizeConfig:
    from milpress.formats import PerBlock, PerChannel, PerTensor, QuantizeConfig

    dtype = options["--quantize"]
    granularities = [option for option in _GRANULARITIES if options[option] not in (None, False)]
    if len(granularities) > 1:
        msg = f"{' and '.join(granularities)} can't be combined: give one of them"
        raise ConfigError(msg)
    if dtype in ("int4", "uint4") and not granularities:
        msg = (
            f"--quantize {dtype} needs a granularity: --block-size N, which suits the GPU (32 is "
            "usual), or --per-channel, which the Neural Engine can run but which loses more; for "
            "the Neural Engine, --palettize 4 is better than both"
        )
        raise ConfigError(msg)
    granularity: PerBlock | PerChannel | PerTensor = PerChannel()
    if options["--block-size"] is not None:
        granularity = PerBlock(options["--block-size"])
    elif options["--per-tensor"]:
        granularity = PerTensor()
    return QuantizeConfig(
        dtype=dtype,
        granularity=granularity,
        offset=options["--offset"],
        range="minmax" if options["--calibration-data"] is None else "mse",
    )
