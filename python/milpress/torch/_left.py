"""What a preparation for training makes of the weights of a model, and which it leaves, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import nn

from milpress.compression.report import WeightReport
from milpress.torch._compression import left
from milpress.torch._lifecycle import Fake
from milpress.torch._module_weights import ModuleWeight, parameters_of, why_other

_COMPUTED = ".parametrizations."


def prepared(weight: ModuleWeight, treatment: str, n_bytes: int) -> WeightReport:
    """Return the report of a weight that takes some bytes once it is finalized."""
    _, report = left(weight, "")
    return replace(report, status="compressed", treatment=treatment, bytes_after=n_bytes)


def trained(weight: ModuleWeight) -> nn.Parameter | None:
    """Return the parameter that is trained, which goes by another name where it is pruned."""
    parameters = weight.module._parameters
    return parameters.get(weight.parameter_name, parameters.get(f"{weight.parameter_name}_orig"))


def left_weights(
    model: nn.Module,
    treated: set[int],
    is_asked: Callable[[ModuleWeight], bool],
    reasons: Mapping[str, str],
) -> Iterator[WeightReport]:
    """Yield the reports of weights that are left: parameters of floats with two axes or more.

    Parameters
    ----------
    model
        The model.
    treated
        The identities of the parameters that are.
    is_asked
        Whether a config asks for a weight.
    reasons
        Why some of them are left.
    """
    seen = set(treated)
    for weight in parameters_of(model):
        is_known = id(weight.tensor) in seen or isinstance(weight.module, Fake)
        if is_known or not is_asked(_as_asked_for(weight, model)):
            continue
        seen.add(id(weight.tensor))
        yield left(weight, reasons.get(weight.name) or _reason(weight))[1]


def _as_asked_for(weight: ModuleWeight, model: nn.Module) -> ModuleWeight:
    """Return the weight of a layer that a parametrization computes of a parameter, or itself."""
    holder, is_computed, name = f".{weight.module_name}".partition(_COMPUTED)
    if not is_computed:
        return weight
    holder = holder.removeprefix(".")
    return ModuleWeight(holder, model.get_submodule(holder), name.partition(".")[0])


def _reason(weight: ModuleWeight) -> str:
    if not weight.has_shape:
        return "the parameter has no shape yet, run the model once"
    return why_other(weight)
