"""`milpress bench` and `milpress report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milpress.cli import options as opt
from milpress.cli.options import option
from milpress.cli.terminal import print_json, print_result, print_text
from milpress.errors import ConfigError
from milpress.plain.files import check_free

if TYPE_CHECKING:
    from milpress.device import Plan, Result

DriverName = Annotated[
    str,
    option("Device", "coreml (this Mac), iphone (connected by cable) or interpreter.", "--driver"),
]
Units = Annotated[
    list[str] | None,
    option("Device", "CPU_ONLY, CPU_AND_GPU, CPU_AND_NE or ALL [each].", "--units"),
]
Team = Annotated[str | None, option("Device", "Development team; with iphone.", "--team")]
Bundle = Annotated[str | None, option("Device", "Name of the signed app; with iphone.", "--bundle")]
Samples = Annotated[Path | None, option("Samples", "Samples (.npz or folder) [random].", "--data")]
Warmup = Annotated[int, option("Timing", "Predictions to discard first.", "--warmup")]
Round = Annotated[
    int, option("Timing", "Predictions per round; configurations alternate.", "--round")
]
MinRounds = Annotated[int, option("Timing", "Rounds per configuration, at least.", "--min-rounds")]
MaxRounds = Annotated[int, option("Timing", "Rounds per configuration, at most.", "--max-rounds")]
Precision = Annotated[
    float,
    option(
        "Timing", "Stop when the 95 % interval is within this share of the median.", "--precision"
    ),
]
Timeout = Annotated[float, option("Timing", "Seconds until a driver fails.", "--timeout")]
AtOnce = Annotated[int, option("Timing", "Configurations that alternate.", "--at-once")]
Energy = Annotated[float, option("Timing", "Seconds to sample power for; needs root.", "--energy")]
Results = Annotated[list[Path], typer.Argument(metavar="RESULT...", help="Results (JSON).")]


def run_packages(
    packages: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MODEL...", help="Packages. The first is the baseline."),
    ] = None,
    output: Annotated[Path, option("Output", "Result to write (JSON).", "--output", "-o")] = Path(
        "results.json"
    ),
    driver: DriverName = "coreml",
    units: Units = None,
    data: Samples = None,
    seed: opt.Seed = 0,
    function: opt.Function = None,
    recorded: Annotated[
        Path | None, option("Device", "Result to replay; with --driver replay.", "--recorded")
    ] = None,
    team: Team = None,
    bundle: Bundle = None,
    warmup: Warmup = 10,
    per_round: Round = 20,
    min_rounds: MinRounds = 5,
    max_rounds: MaxRounds = 20,
    precision: Precision = 0.01,
    timeout: Timeout = 900.0,
    at_once: AtOnce = 16,
    energy: Energy = 0.0,
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """Measure packages with every choice of compute units."""
    from milpress import device

    check_free(output, force=force)
    if driver == "replay":
        if recorded is None or packages:
            msg = "--driver replay takes --recorded RESULT and no packages"
            raise ConfigError(msg)
        result = device.replay(recorded)
    else:
        if recorded is not None:
            msg = "--recorded has no effect without --driver replay"
            raise ConfigError(msg)
        plan = _plan(warmup, per_round, min_rounds, max_rounds, precision, timeout, at_once, energy)
        result = device.run(
            packages or [],
            driver=driver,
            units=units or (),
            data=data,
            seed=seed,
            plan=plan,
            options=_options(driver, function, team, bundle),
            progress=True,
        )
    device.save(result, output)
    _print_run(result, output, as_json=as_json)


def run_suite(
    model: opt.Model,
    folder: Annotated[
        Path, option("Output", "Folder to write; new or empty.", "--output", "-o")
    ] = Path("bench"),
    grid: Annotated[
        Path | None, option("Model", "Suite (YAML) instead of the built-in one.", "--suite")
    ] = None,
    driver: DriverName = "coreml",
    units: Units = None,
    data: Samples = None,
    seed: opt.Seed = 0,
    function: opt.Function = None,
    team: Team = None,
    bundle: Bundle = None,
    warmup: Warmup = 10,
    per_round: Round = 20,
    min_rounds: MinRounds = 5,
    max_rounds: MaxRounds = 20,
    precision: Precision = 0.01,
    timeout: Timeout = 900.0,
    at_once: AtOnce = 16,
    energy: Energy = 0.0,
    as_json: opt.Json = False,
) -> None:
    """Compress a model in many ways, measure all and make a page."""
    from milpress.device import suite
    from milpress.page import build

    result = suite.run(
        model,
        folder,
        suite=suite.Suite.from_yaml(grid),
        driver=driver,
        units=units or (),
        data=data,
        seed=seed,
        plan=_plan(warmup, per_round, min_rounds, max_rounds, precision, timeout, at_once, energy),
        options=_options(driver, function, team, bundle),
        progress=True,
    )
    sources = [
        folder / suite.RESULTS,
        *sorted((folder / "reports").glob("*.json")),
        build.LITERATURE,
    ]
    build.write(sources, folder / "report.html", title=model.stem)
    _print_run(result, folder / "report.html", as_json=as_json)


def compare_results(
    results: Results,
    baseline: Annotated[
        str | None, option("Model", "Model to compare the others with.", "--baseline")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Compare the configurations of results of one kind."""
    from milpress import device

    comparison = device.compare([device.load(path) for path in results], baseline=baseline)
    print_result(comparison, as_json=as_json)


def validate_results(
    results: Results,
    origin: Annotated[
        Path | None, option("Model", "Result that a replay must be of.", "--origin")
    ] = None,
) -> None:
    """Check the form and provenance of results."""
    from milpress.device import files
    from milpress.errors import ResultError, VerificationError

    failed = []
    for path in results:
        try:
            result = files.load(path)
            if origin is not None:
                files.check_origin(result, origin, str(path))
        except ResultError as error:
            failed.append(str(error))
            continue
        kind = result.provenance.kind
        print_text(f"{path}: valid, {kind}, {len(result.entries)} configurations")
    if failed:
        raise VerificationError("; ".join(failed))


def report(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT...",
            help="JSON of `compress`, `evaluate` or `bench`, or of published tables.",
        ),
    ],
    output: Annotated[
        Path, option("Output", "Page to write: .html, or .md for Markdown.", "--output", "-o")
    ] = Path("report.html"),
    title: Annotated[str | None, option("Output", "Title of the page.", "--title")] = None,
    force: opt.Force = False,
) -> None:
    """Make one HTML or Markdown page of results."""
    from milpress.page import build

    check_free(output, force=force)
    page = build.write(sources, output, title=title)
    print_text(f"{page.summary}; written to {output}")


def _plan(
    warmup: int,
    per_round: int,
    min_rounds: int,
    max_rounds: int,
    precision: float,
    timeout: float,
    at_once: int,
    energy: float,
) -> Plan:
    from milpress.device import Plan

    return Plan(
        warmup=warmup,
        samples_per_round=per_round,
        min_rounds=min_rounds,
        max_rounds=max_rounds,
        precision=precision,
        timeout=timeout,
        at_once=at_once,
        energy_seconds=energy,
    )


def _options(
    driver: str, function: str | None, team: str | None, bundle: str | None
) -> dict[str, Any]:
    given = {"function": function, "team": team, "bundle": bundle}
    if driver != "iphone" and (team or bundle):
        msg = "--team and --bundle have no effect without --driver iphone"
        raise ConfigError(msg)
    return {key: value for key, value in given.items() if value is not None}


def _print_run(result: Result, written: Path, *, as_json: bool) -> None:
    from milpress import device

    if as_json:
        print_json(result.to_dict())
    else:
        lines = (*result.warnings, f"written to {written}")
        print_result(device.compare([result]), *lines, as_json=False)
