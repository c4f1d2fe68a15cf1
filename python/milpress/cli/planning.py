"""`milpress plan`, `lint` and `rescale`, and what `milpress compress` takes from them."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from milpress.cli.terminal import (
    Json,
    UpgradeTo,
    WeightThreshold,
    print_found,
    print_json,
    print_text,
    with_progress,
)
from milpress.errors import ConfigError

if TYPE_CHECKING:
    from milpress.recipe import Recipe

TargetBits = Annotated[
    float | None,
    typer.Option("--target-bits", help="Choose treatments: at most so many effective bits."),
]
TargetSize = Annotated[
    str | None,
    typer.Option("--target-size", help="Choose treatments: a package of at most this, as 12MB."),
]
FactFiles = Annotated[
    list[Path] | None,
    typer.Option("--facts", help="A YAML file that adds to the facts, or changes them."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to a command line."""
    app.command(name="plan")(plan)
    app.command(name="lint")(lint)
    app.command(name="rescale")(rescale)


def plan(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The .mlpackage to plan for.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where the recipe goes.")
    ] = None,
    target_bits: TargetBits = None,
    target_size: TargetSize = None,
    min_snr: Annotated[
        float | None, typer.Option(help="Instead: the smallest with at least this score, in dB.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--formats", help="Choose from these, such as 'palette-*' or int8."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help="A weight that stays: name, glob:, re: or op:TYPE."),
    ] = None,
    prefer: Annotated[
        str | None, typer.Option(help="The unit the model is for: ane, gpu or cpu.")
    ] = None,
    max_formats: Annotated[
        int | None, typer.Option(help="At most so many different formats.")
    ] = None,
    upgrade_to: UpgradeTo = None,
    weight_threshold: WeightThreshold = None,
    calibration_data: Annotated[
        Path | None,
        typer.Option(help="Samples, as of evaluate: weigh weights by what they do to outputs."),
    ] = None,
    metric: Annotated[
        str, typer.Option(help="With samples, what is kept small: snr, cosine or kl.")
    ] = "snr",
    exact: Annotated[
        bool, typer.Option("--exact", help="Try everything on everything: no parts, no gradients.")
    ] = False,
    facts: FactFiles = None,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep scores in a file beside the package.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing recipe.")] = False,
    threads: Annotated[
        int | None, typer.Option(help="Threads; by default one for each core.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose a treatment for each weight: the least error within a budget."""
    from milpress.planner import plan as make_plan
    from milpress.recipe import DEFAULT_MIN_SIZE

    _check_output(output, force=force)
    made = with_progress(
        lambda progress: make_plan(
            model,
            target_bits=target_bits,
            target_size=None if target_size is None else n_bytes_of(target_size),
            min_snr=min_snr,
            formats=formats,
            keep=keep or (),
            prefer=cast("Any", prefer),
            max_formats=max_formats,
            target=upgrade_to,
            min_size=DEFAULT_MIN_SIZE if weight_threshold is None else weight_threshold + 1,
            sample_data=calibration_data,
            metric=cast("Any", metric),
            exact=exact,
            facts=facts or (),
            use_cache=cache,
            threads=threads,
            progress=progress,
        )
    )
    if output is not None:
        _write(output, made.to_yaml())
    if as_json:
        print_json(made.to_dict())
        return
    print_found(None, made, made.summary)
    print_found(None, made.curve_table(), "size against score:")
    for note in made.notes:
        print_text(note)
    if output is not None:
        print_text(f"written to {output}")


def lint(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The .mlpackage to look at.")],
    unit: Annotated[
        str | None, typer.Option(help="The unit it is for: ane, gpu or cpu; by default any.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="The hardware by its identifier, such as iPhone15,2.")
    ] = None,
    chip: Annotated[str | None, typer.Option(help="Or its chip, such as A17 or M4.")] = None,
    system: Annotated[
        str | None, typer.Option("--os", help="The system, such as iOS18 or macOS26.")
    ] = None,
    facts: FactFiles = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a weight is at risk.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say which weights are known to go wrong where, and what to write instead."""
    from milpress.planner import lint as lint_package

    found = lint_package(
        model, unit=cast("Any", unit), device=device, chip=chip, os=system, facts=facts or ()
    )
    if as_json:
        print_json(found.to_dict())
    else:
        print_text(found.path)
        print_text(found.summary)
        if found.findings:
            for line in found.details.splitlines():
                print_text(line)
    if strict and found.findings:
        raise typer.Exit(1)


def rescale(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The .mlpackage to read.")],
    destination: Annotated[Path, typer.Argument(metavar="OUT", help="The .mlpackage to write.")],
    name: Annotated[
        str | None, typer.Option(help="Only these weights: a name, glob: or re:.")
    ] = None,
    largest: Annotated[
        int, typer.Option(help="The most a channel may become larger by, a power of two.")
    ] = 64,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing package.")] = False,
    as_json: Json = False,
) -> None:
    """Move powers of two from channels of weights behind their layers, exactly.

    One table, or one scale, then suits all channels of a weight. Compress the result.
    """
    from milpress.compression.rescaling import rescale as rescale_package

    made = rescale_package(source, destination, name=name, largest=largest, force=force)
    if as_json:
        print_json(made.to_dict())
        return
    print_found(None, made, made.summary)
    print_text(f"verified and written to {made.destination} in {made.seconds:.2f} s")


def planned_recipe(
    model: Path,
    target_bits: float | None,
    target_size: str | None,
    upgrade_to: str | None,
    weight_threshold: int | None,
    calibration_data: Path | None,
    threads: int | None,
) -> Recipe:
    """Return the recipe of least error within a budget."""
    from milpress.errors import printable
    from milpress.planner import plan as make_plan
    from milpress.recipe import DEFAULT_MIN_SIZE

    made = with_progress(
        lambda progress: make_plan(
            model,
            target_bits=target_bits,
            target_size=None if target_size is None else n_bytes_of(target_size),
            target=upgrade_to,
            min_size=DEFAULT_MIN_SIZE if weight_threshold is None else weight_threshold + 1,
            sample_data=calibration_data,
            threads=threads,
            progress=progress,
        )
    )
    for note in made.notes:
        typer.echo(printable(note), err=True)
    return made.recipe


def warn_of_risks(package: Path) -> None:
    """Say in one line on the error stream that compressed weights are at risk, if any is."""
    from milpress.errors import printable
    from milpress.planner.linting import warning

    line = warning(package)
    if line:
        typer.echo(f"warning: {printable(line)}", err=True)


def n_bytes_of(text: str) -> int:
    """Return a size in bytes, such as ``12MB``, ``1.5 GB`` or ``48000``.

    Raises
    ------
    ConfigError
        If it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        msg = f"a size must be such as 12MB, 500kB or 48000, got {text!r}"
        raise ConfigError(msg)
    power: int = " kmg".index(found[2].lower() or " ")
    size = float(found[1]) * 1000.0**power
    if math.isinf(size):
        msg = f"a size must be one that a file can have, got {text[:20]}..."
        raise ConfigError(msg)
    return round(size)


def _check_output(path: Path | None, *, force: bool) -> None:
    from milpress.errors import DestinationError

    if path is not None and path.exists() and (path.is_dir() or not force):
        how = "a file" if path.is_dir() else "free, or --force given"
        msg = f"{path}: the recipe's place must be {how}, got something there"
        raise DestinationError(msg)


def _write(path: Path, text: str) -> None:
    from milpress.plain.files import system_errors, write_whole

    with system_errors(path):
        write_whole(path, text.encode())
