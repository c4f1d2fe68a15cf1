"""`milpress plan`, `lint` and `rescale`; the plan and the warning of `milpress compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from milpress.cli import options as opt
from milpress.cli.options import option
from milpress.cli.terminal import print_found, print_json, print_result, print_text
from milpress.errors import printable
from milpress.plain.files import check_free, write_whole

if TYPE_CHECKING:
    from milpress.planner import Plan
    from milpress.recipe import Recipe


def plan(
    model: opt.Model,
    target_bits: opt.TargetBits = None,
    target_size: opt.TargetSize = None,
    min_snr: Annotated[
        float | None, option("Budget", "Plan for at least this SNR, in dB, instead.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        option("Selection", "Formats to choose from, such as 'palette-*' or int8.", "--formats"),
    ] = None,
    max_formats: Annotated[
        int | None, option("Selection", "Use at most N different formats.")
    ] = None,
    keep: Annotated[
        list[str] | None,
        option("Selection", "Weight to leave: name, glob:, re: or op:TYPE.", "--keep"),
    ] = None,
    weight_threshold: opt.WeightThreshold = None,
    upgrade_to: opt.UpgradeTo = None,
    calibration_data: Annotated[
        Path | None,
        option("Calibration", "Samples (.npz or folder): score weights by the model's outputs."),
    ] = None,
    metric: Annotated[
        str, option("Calibration", "Error of the outputs: auto, snr, cosine or kl.")
    ] = "auto",
    random: Annotated[
        int,
        option("Calibration", "Without samples, run the model on N random inputs; 0 for none."),
    ] = 16,
    exact: Annotated[
        bool,
        option(
            "Calibration",
            "Score every format on whole weights, and by running the model; slow.",
            "--exact",
        ),
    ] = False,
    prefer: Annotated[
        str | None, option("Device", "Compute unit that the model is for: ane, gpu or cpu.")
    ] = None,
    vectors: Annotated[
        bool,
        option("Device", "With --prefer ane: tables of vectors too (newer chips).", "--vectors"),
    ] = False,
    facts: opt.FactFiles = None,
    output: Annotated[
        Path | None, option("Output", "Recipe to write (YAML).", "-o", "--output")
    ] = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
    cache: Annotated[
        bool, option("Run", "Cache scores in a file beside the package.", "--cache/--no-cache")
    ] = True,
    threads: opt.Threads = None,
) -> None:
    """Find the best recipe for a size budget."""
    if output is not None:
        check_free(output, force=force)
    result = _plan(
        model,
        target_bits=target_bits,
        target_size=target_size,
        min_snr=min_snr,
        formats=formats,
        keep=keep or (),
        prefer=prefer,
        vectors=vectors,
        max_formats=max_formats,
        target=upgrade_to,
        weight_threshold=weight_threshold,
        sample_data=calibration_data,
        metric=metric,
        random_samples=random,
        exact=exact,
        facts=facts or (),
        use_cache=cache,
        threads=threads,
    )
    if output is not None:
        write_whole(output, result.to_yaml().encode())
    if as_json:
        print_json(result.to_dict())
        return
    print_found(None, result, result.summary)
    print_found(None, result.curve_table(), "size against score:")
    for note in result.notes:
        print_text(note)
    if output is not None:
        print_text(f"written to {output}")


def lint(
    model: opt.Model,
    unit: Annotated[str | None, option("Device", "Compute unit: ane, gpu or cpu [any].")] = None,
    device: Annotated[
        str | None, option("Device", "Hardware identifier, such as iPhone15,2.")
    ] = None,
    chip: Annotated[str | None, option("Device", "Chip, such as A17 or M4.")] = None,
    system: Annotated[
        str | None, option("Device", "System, such as iOS18 or macOS26.", "--os")
    ] = None,
    facts: opt.FactFiles = None,
    strict: Annotated[
        bool, option("Output", "Exit with 1 if a weight is at risk.", "--strict")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """List weights with known problems on a device, and what to use."""
    from milpress.planner import lint as lint_package

    result = lint_package(
        model, unit=cast("Any", unit), device=device, chip=chip, os=system, facts=facts or ()
    )
    if as_json:
        print_json(result.to_dict())
    else:
        print_text(result.path)
        print_text(result.summary)
        if result.findings:
            for line in result.details.splitlines():
                print_text(line)
    if strict and result.findings:
        raise typer.Exit(1)


def rescale(
    source: opt.Source,
    destination: opt.Destination,
    name: Annotated[
        str | None, option("Selection", "Only these weights: a name, glob: or re:.")
    ] = None,
    largest: Annotated[
        int, option("Selection", "Largest factor by which a channel is scaled up, a power of two.")
    ] = 64,
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """Scale channels of weights by powers of two, without any error.

    The layer's output is scaled back. One table or one scale then suits all channels of a weight:
    compress the result.
    """
    from milpress.compression.rescaling import rescale as rescale_package

    report = rescale_package(source, destination, name=name, largest=largest, force=force)
    written = f"verified and written to {report.destination} in {report.seconds:.2f} s"
    print_result(report, written, as_json=as_json)


def planned_recipe(model: Path, **settings: Any) -> Recipe:
    """Return the recipe of least error within a budget; what there is to note goes to stderr."""
    result = _plan(model, **settings)
    for note in result.notes:
        typer.echo(printable(note), err=True)
    return result.recipe


def _plan(
    model: Path, *, target_size: str | None, weight_threshold: int | None, **settings: Any
) -> Plan:
    from milpress.planner import plan as make_plan
    from milpress.recipe import DEFAULT_MIN_SIZE

    return make_plan(
        model,
        target_size=None if target_size is None else opt.n_bytes_of(target_size),
        min_size=DEFAULT_MIN_SIZE if weight_threshold is None else weight_threshold + 1,
        progress=True,
        **settings,
    )


def warn_of_risks(package: Path) -> None:
    """Say in one line on the error stream that compressed weights are at risk, if any is."""
    from milpress.planner.linting import warning

    line = warning(package)
    if line:
        typer.echo(f"warning: {printable(line)}", err=True)
