"""The treatments that a plan chooses from, by short names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

from milpress.errors import ConfigError
from milpress.formats import (
    PalettizeConfig,
    PerBlock,
    PerChannel,
    PerTensor,
    QuantizeConfig,
    Treatment,
)

KEEP = "keep"
# Groups of fewer channels cost more time on a device than they save; at 2 bits they gain nothing.
_DEFAULT = (
    *(f"palette-{bits}" for bits in (2, 3, 4, 6, 8)),
    *(f"palette-{bits}-group-16" for bits in (2, 3, 4, 6)),
    *(f"palette-{bits}-group-4" for bits in (3, 4, 6)),
    *(f"palette-{bits}-scale" for bits in (3, 4, 6)),
    "int8",
    "uint8",
    "int4-block-32",
    # Larger tables of vectors leave the Neural Engine everywhere, and gain less.
    *(f"palette-{bits}-vector-2" for bits in (4, 6)),
    KEEP,
)
# Sizes between those, for models of few weights, whose budget could not be met otherwise.
_FINE = (
    *(f"palette-{bits}-group-{size}" for bits in (3, 4, 6) for size in (32, 8)),
    "palette-8-group-16",
    "int4-block-64",
    "int4-block-16",
    "int4-channel",
    "int8-block-32",
)
_PALETTE = re.compile(
    r"palette-(?P<bits>\d)(-vector-(?P<vector>\d+))?(-group-(?P<group>\d+))?(?P<scale>-scale)?"
)
_INTEGER = re.compile(
    r"(?P<dtype>u?int[48])(-block-(?P<block>\d+)|-(?P<per>channel|tensor))?(?P<offset>-offset)?"
)


def menu(names: Sequence[str] | None = None) -> dict[str, Treatment | None]:
    """Return treatments by name; ``None`` stands for a weight that is kept.

    Parameters
    ----------
    names
        ``palette-BITS``, with ``-vector-SIZE``, ``-group-SIZE`` or ``-scale`` behind if wanted, in
        this order; ``int8``, ``uint8``,
        ``int4`` or ``uint4``, with ``-channel``, ``-tensor`` or ``-block-SIZE``, then ``-offset``;
        ``keep``; or patterns such as ``palette-*`` for those of the default menu. By default that.

    Raises
    ------
    ConfigError
        If a name is none of these.

    Examples
    --------
    >>> menu(["palette-4-group-16"])["palette-4-group-16"].group_size
    16
    """
    if names is None:
        return {name: _treatment(name) for name in _DEFAULT}
    if not names:
        msg = "formats is empty: name at least one"
        raise ConfigError(msg)
    matching = [fnmatch.filter(_DEFAULT, name) or [name] for name in names]
    return {name: _treatment(name) for some in matching for name in some}


def fine_menu() -> dict[str, Treatment | None]:
    """Return the default menu, and treatments whose sizes lie between those."""
    return menu() | {name: _treatment(name) for name in _FINE}


def _treatment(name: str) -> Treatment | None:
    if name == KEEP:
        return None
    parts = _PALETTE.fullmatch(name)
    if parts is not None:
        bits: Any = int(parts["bits"])
        group = None if parts["group"] is None else int(parts["group"])
        return PalettizeConfig(
            bits=bits,
            vector_size=int(parts["vector"] or 1),
            group_size=group,
            channel_scale=bool(parts["scale"]),
        )
    parts = _INTEGER.fullmatch(name)
    if parts is not None:
        dtype: Any = parts["dtype"]
        granularity = PerTensor() if parts["per"] == "tensor" else PerChannel()
        return QuantizeConfig(
            dtype=dtype,
            granularity=granularity if parts["block"] is None else PerBlock(int(parts["block"])),
            offset=bool(parts["offset"]),
            # Clipping gains 2 dB at 4 bits and nothing at 8.
            range="mse" if dtype.endswith("4") else "minmax",
        )
    msg = (
        "a format must be such as palette-4, palette-4-group-16, palette-8-vector-2, "
        f"palette-4-scale, int8, int4-block-32 or keep, got {name!r}"
    )
    raise ConfigError(msg)
