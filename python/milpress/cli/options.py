"""Options that several commands share, and the headings that `--help` groups options under."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from milpress.errors import ConfigError


def option(group: str, text: str, *names: str, **settings: Any) -> Any:
    """Return an option that `--help` lists under the heading ``group``."""
    return typer.Option(*names, help=text, rich_help_panel=group, **settings)


Source = Annotated[Path, typer.Argument(metavar="IN", help="Package to read (.mlpackage).")]
Destination = Annotated[Path, typer.Argument(metavar="OUT", help="Package to write.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Package to read (.mlpackage).")]
Original = Annotated[Path, typer.Argument(metavar="ORIGINAL", help="Package before compression.")]
Compressed = Annotated[
    Path, typer.Argument(metavar="COMPRESSED", help="Package after compression.")
]

Json = Annotated[bool, option("Output", "Print JSON.", "--json")]
Force = Annotated[bool, option("Output", "Replace what exists.", "--force")]
Verify = Annotated[
    bool, option("Output", "Read the result back and compare it.", "--verify/--no-verify")
]
Threads = Annotated[int | None, option("Run", "Number of threads [one per core].", "--threads")]
TargetBits = Annotated[
    float | None,
    option("Budget", "Plan for at most this many bits per weight.", "--target-bits"),
]
TargetSize = Annotated[
    str | None,
    option("Budget", "Plan for a package of at most this size: 12MB.", "--target-size"),
]
UpgradeTo = Annotated[
    str | None,
    option("Selection", "Raise the model to iOS16, iOS17, iOS18 or iOS26 first.", "--upgrade-to"),
]
WeightThreshold = Annotated[
    int | None,
    option("Selection", "Skip weights of N elements or fewer [2048].", "--weight-threshold"),
]
FactFiles = Annotated[
    list[Path] | None,
    option("Device", "YAML file that adds to the facts or changes them.", "--facts"),
]
Function = Annotated[
    str | None, option("Model", "Function to run, if there are several.", "--function")
]
Rounding = Annotated[
    str, option("Model", "float32, or float16 to round as the program does.", "--precision")
]
Seed = Annotated[int, option("Samples", "Seed of random numbers.", "--seed")]


def n_bytes_of(text: str) -> int:
    """Return a size in bytes, such as ``12MB``, ``1.5 GB`` or ``48000``.

    Raises
    ------
    ConfigError
        If it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        msg = f"a size must be a number of bytes, such as 12MB, 500kB or 48000, got {text!r}"
        raise ConfigError(msg)
    power: int = " kmg".index(match[2].lower() or " ")
    size = float(match[1]) * 1000.0**power
    if math.isinf(size):
        msg = f"a size must be one that a file can have, got {text[:20]}..."
        raise ConfigError(msg)
    return round(size)
