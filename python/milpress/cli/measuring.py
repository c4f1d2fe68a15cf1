"""The part of the command line about measuring: ``milpress bench`` and ``milpress report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from milpress.cli.terminal import Json, print_found, print_json, print_text, with_progress
from milpress.errors import ConfigError, DestinationError, PackageNotFoundError

if TYPE_CHECKING:
    from milpress.device import Plan, Result

_bench = typer.Typer(
    name="bench",
    help="Measure packages on Apple silicon, or run them anywhere as a reference.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]
DriverName = Annotated[
    str, typer.Option("--driver", help="coreml (a Mac), iphone (at its cable) or interpreter.")
]
Units = Annotated[
    list[str] | None,
    typer.Option("--units", help="CPU_ONLY, CPU_AND_GPU, CPU_AND_NE or ALL; by default each."),
]
Samples = Annotated[
    Path | None, typer.Option("--data", help="Samples: an .npz file or a folder; else random.")
]
Seed = Annotated[int, typer.Option("--seed", help="Where random samples start from.")]
Function = Annotated[
    str | None, typer.Option("--function", help="Which function of packages with several.")
]
Team = Annotated[
    str | None, typer.Option("--team", help="With iphone: the development team that signs.")
]
Bundle = Annotated[
    str | None, typer.Option("--bundle", help="With iphone: what the signed app is called.")
]
Warmup = Annotated[int, typer.Option("--warmup", help="Predictions that are discarded first.")]
Round = Annotated[int, typer.Option("--round", help="Predictions before the next one's turn.")]
MinRounds = Annotated[int, typer.Option("--min-rounds", help="Turns of each, at least.")]
MaxRounds = Annotated[int, typer.Option("--max-rounds", help="Turns of each, at most.")]
Precision = Annotated[
    float, typer.Option("--precision", help="Share of the median at which rounds end early.")
]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds that an answer may take.")]
AtOnce = Annotated[int, typer.Option("--at-once", help="Configurations that take turns.")]
Energy = Annotated[
    float, typer.Option("--energy", help="Seconds for which power is sampled (wants root).")
]


def register(app: typer.Typer) -> None:
    """Add the commands to a command line."""
    app.add_typer(_bench)
    app.command(name="report")(report)


@_bench.command("run")
def run_packages(
    packages: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MODEL...", help="Packages; the first is the baseline."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The result to write, as JSON.")
    ] = Path("results.json"),
    driver: DriverName = "coreml",
    units: Units = None,
    data: Samples = None,
    seed: Seed = 0,
    function: Function = None,
    recorded: Annotated[
        Path | None, typer.Option("--recorded", help="With replay: the result to play again.")
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
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Run packages in every configuration, and write what was found."""
    from milpress import device

    _check_output(output, force=force)
    if driver == "replay":
        if recorded is None or packages:
            msg = "the driver replay must get --recorded RESULT and no packages, got otherwise"
            raise ConfigError(msg)
        result = device.replay(recorded)
    else:
        if recorded is not None:
            msg = f"--recorded must go with --driver replay, got {driver}"
            raise ConfigError(msg)
        plan = _plan(warmup, per_round, min_rounds, max_rounds, precision, timeout, at_once, energy)
        result = with_progress(
            lambda progress: device.run(
                packages or [],
                driver=driver,
                units=units or (),
                data=data,
                seed=seed,
                plan=plan,
                options=_options(driver, function, team, bundle),
                progress=progress,
            )
        )
    device.save(result, output)
    _print_result(result, output, as_json=as_json)


@_bench.command("suite")
def run_suite(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The .mlpackage.")],
    folder: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write; must be empty.")
    ] = Path("bench"),
    grid: Annotated[
        Path | None, typer.Option("--suite", help="A YAML file with another grid.")
    ] = None,
    driver: DriverName = "coreml",
    units: Units = None,
    data: Samples = None,
    seed: Seed = 0,
    function: Function = None,
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
    as_json: Json = False,
) -> None:
    """Compress a model in every way, run all, and write result, reports and an HTML page."""
    from milpress.device import suite
    from milpress.page import build

    result = with_progress(
        lambda progress: suite.run(
            model,
            folder,
            suite=suite.Suite.from_yaml(grid),
            driver=driver,
            units=units or (),
            data=data,
            seed=seed,
            plan=_plan(
                warmup, per_round, min_rounds, max_rounds, precision, timeout, at_once, energy
            ),
            options=_options(driver, function, team, bundle),
            progress=progress,
        )
    )
    sources = [
        folder / suite.RESULTS,
        *sorted((folder / "reports").glob("*.json")),
        build.LITERATURE,
    ]
    build.write(sources, folder / "report.html", title=model.stem)
    _print_result(result, folder / "report.html", as_json=as_json)


@_bench.command("compare")
def compare_results(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT...", help="Results.")],
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="The model that others are compared with.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Put the configurations of results of one kind beside each other."""
    from milpress import device

    found = device.compare([device.load(path) for path in results], baseline=baseline)
    if as_json:
        print_json(found.to_dict())
    else:
        print_found(None, found, found.summary)


@_bench.command("validate")
def validate_results(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT...", help="Results.")],
    origin: Annotated[
        Path | None, typer.Option("--origin", help="What a replay must be of.")
    ] = None,
) -> None:
    """Check form and provenance of results."""
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
            help="JSON of `compress`, `evaluate` and `bench`, or of published tables.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The page: .html, or .md for Markdown.")
    ] = Path("report.html"),
    title: Annotated[str | None, typer.Option("--title", help="Of the page.")] = None,
    force: Force = False,
) -> None:
    """Make one page of results, which opens offline."""
    from milpress.page import build

    _check_output(output, force=force)
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
        msg = f"--team and --bundle must go with --driver iphone, got {driver}"
        raise ConfigError(msg)
    return {key: value for key, value in given.items() if value is not None}


def _check_output(path: Path, *, force: bool) -> None:
    if not path.absolute().parent.is_dir():
        msg = f"{path}: the folder of the destination must exist, got none"
        raise PackageNotFoundError(msg)
    if path.is_dir():
        msg = f"{path}: the destination must be a file, got a folder"
        raise DestinationError(msg)
    if path.exists() and not force:
        msg = f"{path}: the destination must be free, got an existing one; use --force"
        raise DestinationError(msg)


def _print_result(result: Result, written: Path, *, as_json: bool) -> None:
    from milpress import device

    if as_json:
        print_json(result.to_dict())
        return
    found = device.compare([result])
    print_found(None, found, found.summary)
    for warning in result.warnings:
        print_text(warning)
    print_text(f"written to {written}")
