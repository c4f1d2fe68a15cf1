"""Settings of tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from milpress.errors import ConfigError

Loss: TypeAlias = Literal["auto", "mse", "kl"]
DeviceName: TypeAlias = Literal["cpu", "mps", "cuda"]
Kind: TypeAlias = Literal["tables", "scales", "values", "biases", "norms"]

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """How to tune a compressed package.

    Parameters
    ----------
    steps
        How many times all arrays move.
    batch
        Samples whose gradients are added up for one step. They are run one after the other, so that
        memory does not depend on it.
    loss
        ``"mse"`` compares outputs by their squared error, ``"kl"`` by the divergence of rows along
        the last axis, as they are if they are probabilities and through softmax if not. ``"auto"``
        takes ``"kl"`` for probabilities, and for more than 32 logits: what a matrix product by a
        weight gives.
    train
        What moves: ``"tables"`` of palettes (of a table of 8 bits, its scale), ``"scales"`` of
        quantized weights, ``"values"`` that pruning kept, ``"biases"`` of ``linear``, ``conv`` and
        ``conv_transpose``, and ``"norms"``: gamma and beta.
    outputs
        Names of the outputs to compare; all that hold floats if empty.
    validation_share
        Share of the samples that is set aside to choose the best state by, unless samples are given
        for that.
    lr
        How far one step moves a number at most, relative to the distance of neighbours in its
        weight: ``2 ** -bits`` of the size of a table's entries or of a scale. Of a bias, it is that
        share of the outputs of its layer, with the bits of all weights together.
    seed
        Where the order of samples, and what is set aside, start from.
    time
        Seconds after which to end, whatever the number of steps; ``None`` for no limit. What comes
        out then depends on the machine.
    device
        Where models are run: ``"cpu"``, ``"mps"`` (a Mac's GPU) or ``"cuda"``.
    mask
        The input, of shape ``(batch, length)``, that is zero where a sample is padding: rows of
        outputs at such positions don't count. By default ``attention_mask``, if there is such an
        input.

    Raises
    ------
    ConfigError
        If a setting is wrong by itself.
    """

    steps: int = 400
    batch: int = 8
    loss: Loss = "auto"
    train: tuple[Kind, ...] = KINDS
    outputs: tuple[str, ...] = ()
    validation_share: float = 0.1
    lr: float = 1e-2
    seed: int = 0
    time: float | None = None
    device: DeviceName = "cpu"
    mask: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                msg = f"{name} must be a whole number from 1 on, got {value!r}"
                raise ConfigError(msg)
        _check_choice("loss", self.loss, get_args(Loss))
        _check_choice("device", self.device, get_args(DeviceName))
        if not self.train:
            msg = f"train must name at least one of {', '.join(KINDS)}"
            raise ConfigError(msg)
        for kind in self.train:
            _check_choice("train", kind, KINDS)
        if not 0 < self.validation_share < 1:
            msg = f"validation_share must be between 0 and 1, got {self.validation_share}"
            raise ConfigError(msg)
        if not 0 < self.lr < math.inf:
            msg = f"lr must be above 0 and finite, got {self.lr}"
            raise ConfigError(msg)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            msg = f"seed must be a whole number from 0 on, got {self.seed!r}"
            raise ConfigError(msg)
        if self.time is not None and not self.time > 0:
            msg = f"time must be a number of seconds above 0, got {self.time}"
            raise ConfigError(msg)


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        msg = f"{name} must be one of {', '.join(choices)}, got {value!r}"
        raise ConfigError(msg)
