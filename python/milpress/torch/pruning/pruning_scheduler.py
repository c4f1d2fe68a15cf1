"""How the fraction of weights that are zero grows while a model is trained."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from attrs import define, field

from milpress.errors import ConfigError, ConfigTypeError
from milpress.plain import fields

__all__ = ["ConstantSparsityScheduler", "PolynomialDecayScheduler", "PruningScheduler"]

_RANGE = re.compile(r"range\(\s*(\d+)\s*(?:,\s*(\d+)\s*)?(?:,\s*(\d+)\s*)?\)")


@define
class PruningScheduler(ABC):
    """Says what fraction of a weight is to be zero at each step.

    Derive from it for a schedule of your own.
    """

    @abstractmethod
    def compute_sparsity(self, step_count: int, prev_sparsity: float, config: Any) -> float:
        """Return the fraction of weights that are to be zero.

        Parameters
        ----------
        step_count
            Number of calls of ``step``, this one among them.
        prev_sparsity
            The fraction so far.
        config
            Config of the module, which has ``initial_sparsity`` and ``target_sparsity``.
        """


def _to_steps(value: Any) -> Any:
    """Make a tensor of numbers of steps, or of text such as ``"range(0, 100, 10)"``."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, str):
        match = _RANGE.fullmatch(value.strip())
        if match is None:
            msg = f'update_steps must be numbers or "range(...)" of whole numbers, got {value!r}'
            raise ConfigError(msg)
        numbers = [int(number) for number in match.groups() if number is not None]
        if len(numbers) == 3 and numbers[2] == 0:
            msg = f"the last number of a range must not be 0, got {value!r}"
            raise ConfigError(msg)
        value = range(*numbers)
    try:
        return torch.tensor(list(value), dtype=torch.float32)
    except (TypeError, ValueError) as error:
        msg = f"update_steps must be a list of whole numbers, got {value!r}"
        raise ConfigTypeError(msg) from error


@define
class PolynomialDecayScheduler(PruningScheduler):
    """Lets the fraction grow from the initial to the target sparsity, fast at first.

    At the ``i``-th of ``n`` steps of the schedule, counted from 0, it is
    ``target + (initial - target) * (1 - i / (n - 1)) ** power`` (Zhu and Gupta 2017, arXiv
    1710.01878); between them it stays.

    Parameters
    ----------
    update_steps
        The steps, as numbers or as text such as ``"range(0, 100, 10)"``; kept as a tensor.
    power
        The exponent.

    Examples
    --------
    >>> PolynomialDecayScheduler(update_steps="range(2, 8, 2)").update_steps
    tensor([2., 4., 6.])
    """

    update_steps: Any = field(converter=_to_steps, eq=attrs.cmp_using(eq=torch.equal))
    power: int = fields.integer(3, fields.at_least(0))

    @update_steps.validator
    def _check_steps(self, _attribute: Any, steps: torch.Tensor) -> None:
        if steps.ndim != 1 or bool((steps != steps.floor()).any()) or bool((steps < 0).any()):
            msg = (
                f"update_steps must be a list of whole numbers, none negative, got {steps.tolist()}"
            )
            raise ConfigError(msg)

    def compute_sparsity(self, step_count: int, prev_sparsity: float, config: Any) -> float:
        """Return the fraction of weights that are to be zero; see `PruningScheduler`."""
        places = torch.nonzero(self.update_steps == step_count)
        if not len(places):
            return prev_sparsity
        n_steps = len(self.update_steps)
        progress = 1.0 if n_steps == 1 else int(places[0]) / (n_steps - 1)
        initial: float = getattr(config, "initial_sparsity", 0.0)
        target: float = config.target_sparsity
        return target + (initial - target) * float((1.0 - progress) ** self.power)


@define
class ConstantSparsityScheduler(PruningScheduler):
    """Prunes once.

    Parameters
    ----------
    begin_step
        The step from which on the target sparsity holds.
    """

    begin_step: int = field(
        converter=fields.whole, validator=[fields.is_integer, fields.at_least(0)]
    )

    def compute_sparsity(self, step_count: int, prev_sparsity: float, config: Any) -> float:
        """Return the fraction of weights that are to be zero; see `PruningScheduler`."""
        target: float = config.target_sparsity
        return target if step_count >= self.begin_step else prev_sparsity


def to_scheduler(value: Any) -> Any:
    """Make a schedule of a dictionary of its fields; others are left to the validator."""
    if not isinstance(value, Mapping):
        return value
    kind = ConstantSparsityScheduler if "begin_step" in value else PolynomialDecayScheduler
    known = [attribute.name for attribute in attrs.fields(kind)]
    if not set(value) <= set(known) or not {known[0]} <= set(value):
        msg = (
            "scheduler must have begin_step, or update_steps and perhaps power, "
            f"got {sorted(map(str, value))}"
        )
        raise ConfigError(msg)
    return kind(**value)


def is_scheduler(_config: Any, _attribute: Any, value: Any) -> None:
    """Raise `ConfigTypeError` if something is no schedule."""
    if not isinstance(value, PruningScheduler):
        msg = f"scheduler must be a PruningScheduler, got {value!r}"
        raise ConfigTypeError(msg)
