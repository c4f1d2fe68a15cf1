"""The command line: thin, over the public functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from milpress._version import __version__
from milpress.cli import measuring, planning, root
from milpress.cli.planning import TargetBits, TargetSize
from milpress.cli.terminal import (
    Json,
    UpgradeTo,
    WeightThreshold,
    print_found,
    print_json,
    print_table,
    print_text,
    with_progress,
)
from milpress.errors import ConfigError, InputError

if TYPE_CHECKING:
    from milpress.compression.report import Report
    from milpress.kernels.device import DeviceName
    from milpress.recipe import ActivationStep, Recipe

app = typer.Typer(
    help="Make Core ML models smaller, and prove that they still work.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Source = Annotated[Path, typer.Argument(metavar="IN", help="The .mlpackage to read.")]
Destination = Annotated[Path, typer.Argument(metavar="OUT", help="The .mlpackage to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing package.")]
Threads = Annotated[
    int | None, typer.Option("--threads", help="Threads; by default one for each core.")
]
OnDevice = Annotated[
    str, typer.Option("--device", help="Where kernels run: cpu, metal (a Mac's GPU) or auto.")
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Read the result back and compare it.")
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"milpress {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The .mlpackage to look at.")],
    ops: Annotated[
        bool,
        typer.Option("--ops", help="List the ops, and whether `milpress run` covers them."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List functions, ops and weights of a package."""
    from milpress.inspection import inspect as inspect_package

    found = inspect_package(model)
    covered = None
    if ops:
        from milpress.interpreter import coverage  # loads torch, so only on demand

        covered = coverage(model)
    if as_json:
        extra = {} if covered is None else {"interpreter": covered.to_dict()}
        print_json(found.to_dict() | extra)
        return
    if covered is not None:
        print_text(found.summary)
        print_found(found.path, covered, covered.summary)
        return
    print_found(found.path, found, found.summary)
    counts = ", ".join(f"{kind} {n}" for kind, n in found.op_counts.items())
    print_text(f"ops: {counts}")


@app.command()
def compress(
    source: Source,
    destination: Destination,
    palettize: Annotated[
        int | None, typer.Option(help="Lookup tables with indices of so many bits: 1 2 3 4 6 8.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="With --palettize: output channels that share a table.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Integer codes: int8, uint8, int4 or uint4.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="With --quantize: input channels that share a scale.")
    ] = None,
    per_channel: Annotated[
        bool, typer.Option("--per-channel", help="With --quantize: a scale per output channel.")
    ] = False,
    per_tensor: Annotated[
        bool, typer.Option("--per-tensor", help="With --quantize: one scale per weight.")
    ] = False,
    offset: Annotated[
        bool, typer.Option("--offset", help="With --quantize: a range that is not symmetric.")
    ] = False,
    prune: Annotated[
        float | None, typer.Option(help="Set this fraction of each weight to zero.")
    ] = None,
    quantize_activations: Annotated[
        str | None,
        typer.Option(help="8-bit codes for what ops take and make: int8 or uint8. From iOS17."),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            help="With --quantize-activations: how ranges are found: minmax, percentile, mse or "
            "entropy."
        ),
    ] = "minmax",
    calibration_engine: Annotated[
        str,
        typer.Option(
            help="With --quantize-activations: what runs the model: interpreter or, on a Mac, "
            "coreml."
        ),
    ] = "interpreter",
    recipe: Annotated[Path | None, typer.Option(help="A YAML file that says it all.")] = None,
    target_bits: TargetBits = None,
    target_size: TargetSize = None,
    upgrade_to: UpgradeTo = None,
    weight_threshold: WeightThreshold = None,
    calibration_data: Annotated[
        Path | None,
        typer.Option(
            help="Samples (as of evaluate) that say which errors count. With --quantize, clips too."
        ),
    ] = None,
    calibration_cache: Annotated[
        Path | None, typer.Option(help="Keep what the samples said in this .npz file.")
    ] = None,
    calibration_mask: Annotated[
        str | None, typer.Option(help="The input that is 0 at padding [attention_mask].")
    ] = None,
    bias_correction: Annotated[
        bool,
        typer.Option("--bias-correction", help="Take the layers' mean errors off their biases."),
    ] = False,
    feedback: Annotated[
        bool,
        typer.Option("--feedback", help="Let weights make up for the errors of others: GPTQ."),
    ] = False,
    feedback_memory: Annotated[
        str | None,
        typer.Option(help="With --feedback: memory that it may take, as 8GB [4GB]."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Keep finished weights here; a run that was interrupted goes on."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail if a weight does not suit its treatment.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done; write nothing.")
    ] = False,
    force: Force = False,
    verify: Verify = True,
    threads: Threads = None,
    device: OnDevice = "cpu",
    as_json: Json = False,
) -> None:
    """Compress the weights of a package into another package."""
    from milpress.compression.packages import compress as compress_package

    asked = _recipe(
        {"--target-bits": target_bits, "--target-size": target_size},
        lambda: planning.planned_recipe(
            source,
            target_bits,
            target_size,
            upgrade_to,
            weight_threshold,
            calibration_data,
            threads,
        ),
        recipe,
        {"bits": palettize, "group_size": group_size},
        {
            "dtype": quantize,
            "block_size": block_size,
            "per_channel": per_channel,
            "per_tensor": per_tensor,
            "offset": offset,
            "clip": calibration_data is not None,
        },
        prune,
        {
            "dtype": quantize_activations,
            "calibration": calibration,
            "engine": calibration_engine,
        },
        upgrade_to,
        weight_threshold,
    )
    report = with_progress(
        lambda progress: compress_package(
            source,
            destination,
            asked,
            on_unsupported="error" if strict else "leave",
            verify=verify,
            progress=progress,
            threads=threads,
            device=cast("DeviceName", device),
            force=force,
            dry_run=dry_run,
            sample_data=calibration_data,
            calibration_cache=calibration_cache,
            calibration_mask=calibration_mask,
            bias_correction=bias_correction,
            feedback=feedback,
            feedback_memory=None
            if feedback_memory is None
            else planning.n_bytes_of(feedback_memory),
            checkpoint=checkpoint,
        )
    )
    _print_report(report, as_json=as_json, wrote=not dry_run)
    if not dry_run:
        planning.warn_of_risks(destination)


@app.command()
def decompress(
    source: Source,
    destination: Destination,
    force: Force = False,
    verify: Verify = True,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Store every compressed weight of a package densely."""
    from milpress.compression.packages import decompress as decompress_package

    report = decompress_package(source, destination, force=force, verify=verify, threads=threads)
    _print_report(report, as_json=as_json, wrote=True)


@app.command()
def verify(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The source package.")],
    compressed: Annotated[
        Path, typer.Argument(metavar="COMPRESSED", help="The package made from it.")
    ],
    as_json: Json = False,
) -> None:
    """Compare a compressed package with its source, from the bytes of both."""
    from milpress.compression.verification import verify as verify_packages

    found = verify_packages(original, compressed)
    if as_json:
        print_json(found.to_dict())
    else:
        print_found(str(compressed), found, found.summary)


@app.command()
def run(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The .mlpackage to run.")],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="NAME=FILE.npy",
            help="An input's array, or its picture; or a FILE.npz that holds them by name.",
        ),
    ] = None,
    function: Annotated[
        str | None, typer.Option(help="Which function of a package with several.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the outputs: an .npz file, or a folder for it.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="float32, or float16: round where the program says so.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Where random numbers start from.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Run a package on this machine's CPU, without Core ML."""
    from milpress.engines.running import run as run_package

    report = run_package(
        model,
        _arrays(inputs or []),
        function=function,
        precision=cast("Any", precision),
        seed=seed,
        output=output,
        force=force,
    )
    if as_json:
        print_json(report.to_dict())
    else:
        print_found(report.source, report, report.summary)
        for note in report.notes:
            print_text(note)


@app.command()
def evaluate(
    original: Annotated[Path, typer.Argument(metavar="ORIGINAL", help="The source package.")],
    compressed: Annotated[
        Path, typer.Argument(metavar="COMPRESSED", help="The package made from it.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Samples: an .npz file of the inputs' arrays, or a folder, also of pictures."
        ),
    ] = None,
    random: Annotated[
        int | None, typer.Option(help="So many random samples instead. They say little.")
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", help="snr, cosine, top1, kl or max_error; by default all."),
    ] = None,
    per_op: Annotated[
        bool, typer.Option("--per-op", help="Say where in the graph the error arises.")
    ] = False,
    function: Annotated[
        str | None, typer.Option(help="Which function of packages with several.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="float32, or float16: round where the program says so.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Where random numbers start from.")] = 0,
    as_json: Json = False,
) -> None:
    """Run two packages on samples, and say how far their outputs are apart."""
    from milpress.evaluation.evaluating import METRICS
    from milpress.evaluation.evaluating import evaluate as evaluate_packages
    from milpress.samples.data import RandomSamples

    samples = data if random is None else RandomSamples(random, seed)
    if samples is None or (data is not None and random is not None):
        msg = f"one of --data and --random must be given, got {'both' if data else 'none'}"
        raise ConfigError(msg)
    found = with_progress(
        lambda progress: evaluate_packages(
            original,
            compressed,
            samples,
            metrics=cast("Any", metrics or METRICS),
            per_op=per_op,
            function=function,
            precision=cast("Any", precision),
            seed=seed,
            progress=progress,
        )
    )
    if as_json:
        print_json(found.to_dict())
        return
    print_found(str(compressed), found, found.summary)
    for note in found.notes:
        print_text(note)
    if per_op:
        n_exact = sum(op.own_snr_db == math.inf for op in found.ops)
        print_table(found.ops_table(most=len(found.ops) - n_exact))
        print_text(f"{n_exact} other values have no error of their own")
        if found.n_uncompared:
            print_text(f"{found.n_uncompared} values could not be compared")


def _arrays(options: list[str]) -> dict[str, Any]:
    """Return the arrays that ``--input`` options name."""
    from milpress.engines.running import read_arrays
    from milpress.samples.pictures import is_picture

    arrays: dict[str, Any] = {}
    for option in options:
        name, equals, path = option.partition("=")
        file = Path(path if equals else option)
        found: dict[str, Any] = {"": file} if is_picture(file) else read_arrays(file)
        if equals and found.keys() == {""}:
            found = {name: found[""]}
        elif equals or "" in found:
            msg = f"--input must be NAME=FILE.npy, NAME=PICTURE or FILE.npz, got {option!r}"
            raise InputError(msg)
        twice = found.keys() & arrays.keys()
        if twice:
            msg = f"an input must be given once, got {', '.join(sorted(twice))} again"
            raise InputError(msg)
        arrays |= found
    return arrays


def _recipe(
    budget: dict[str, Any],
    planned: Callable[[], Recipe],
    path: Path | None,
    palettize: dict[str, Any],
    quantize: dict[str, Any],
    prune: float | None,
    activations: dict[str, Any],
    target: str | None,
    weight_threshold: int | None,
) -> Recipe:
    """Return the recipe that the options stand for; one under a budget is planned."""
    from dataclasses import replace

    from milpress.formats import PalettizeConfig, PruneConfig
    from milpress.recipe import DEFAULT_MIN_SIZE, Recipe

    chosen = {
        "--palettize": palettize["bits"],
        "--quantize": quantize["dtype"],
        "--prune": prune,
        "--recipe": path,
        **budget,
    }
    given = [option for option, value in chosen.items() if value is not None]
    step = _activation_step(**activations)
    if len(given) > 1 or not (given or step):
        msg = (
            f"one of {', '.join(chosen)} must be given, got {' and '.join(given) or 'none'}; "
            "--quantize-activations goes with one or alone"
        )
        raise ConfigError(msg)
    _check_companions(given[0] if given else "--quantize-activations", palettize, quantize)
    if path is not None:
        if weight_threshold is not None:
            msg = "--weight-threshold must be said in the recipe (select: min_size), got both"
            raise ConfigError(msg)
        if step is not None:
            msg = "--quantize-activations must be said in the recipe, got both"
            raise ConfigError(msg)
        recipe = Recipe.from_yaml(path)
        return recipe if target is None else replace(recipe, target=target)
    if not given:
        return Recipe(steps=(), target=target, activations=step)
    if given[0] in budget:
        return replace(planned(), activations=step)
    treatment: Any = None
    if given == ["--palettize"]:
        treatment = PalettizeConfig(**palettize)
    elif given == ["--prune"]:
        treatment = PruneConfig(sparsity=prune)
    else:
        treatment = _quantize_config(**quantize)
    min_size = DEFAULT_MIN_SIZE if weight_threshold is None else weight_threshold + 1
    return replace(Recipe.of(treatment, target=target, min_size=min_size), activations=step)


def _activation_step(dtype: Any, calibration: Any, engine: Any) -> ActivationStep | None:
    from milpress.formats import PerTensor, QuantizeConfig
    from milpress.formats.ranges import CalibrationConfig
    from milpress.recipe import ActivationStep

    if dtype is None:
        given = {"--calibration": (calibration, "minmax")}
        given["--calibration-engine"] = engine, "interpreter"
        for option, (value, default) in given.items():
            if value != default:
                msg = f"{option} must go with --quantize-activations, got {value} without"
                raise ConfigError(msg)
        return None
    return ActivationStep(
        codes=QuantizeConfig(dtype=dtype, granularity=PerTensor()),
        calibration=CalibrationConfig(calibration=calibration, engine=engine),
    )


def _check_companions(chosen: str, palettize: dict[str, Any], quantize: dict[str, Any]) -> None:
    companions = {
        "--palettize": {"--group-size": palettize["group_size"]},
        "--quantize": {
            "--block-size": quantize["block_size"],
            "--per-channel": quantize["per_channel"],
            "--per-tensor": quantize["per_tensor"],
            "--offset": quantize["offset"],
        },
    }
    for owner, options in companions.items():
        for option, value in options.items():
            if value not in (None, False) and chosen != owner:
                msg = f"{option} must go with {owner}, got {chosen}"
                raise ConfigError(msg)


def _quantize_config(
    dtype: Any,
    block_size: int | None,
    per_channel: bool,
    per_tensor: bool,
    offset: bool,
    clip: bool,
) -> Any:
    from milpress.formats import PerBlock, PerChannel, PerTensor, QuantizeConfig

    if (block_size is not None) + per_channel + per_tensor > 1:
        msg = "only one of --block-size, --per-channel and --per-tensor must be given, got several"
        raise ConfigError(msg)
    if dtype in ("int4", "uint4") and block_size is None and not per_channel and not per_tensor:
        msg = (
            f"--quantize {dtype} must come with --block-size N, which suits the GPU (32 is usual), "
            "or with --per-channel, which the Neural Engine can run but which loses more; for the "
            "Neural Engine, --palettize 4 is better than both"
        )
        raise ConfigError(msg)
    granularity = (
        PerBlock(block_size)
        if block_size is not None
        else PerTensor()
        if per_tensor
        else PerChannel()
    )
    return QuantizeConfig(
        dtype=dtype, granularity=granularity, offset=offset, range="mse" if clip else "minmax"
    )


def _print_report(report: Report, *, as_json: bool, wrote: bool) -> None:
    if as_json:
        print_json(report.to_dict())
        return
    print_found(None, report, report.summary)
    if report.activations is not None:
        print_found(None, report.activations, report.activations.summary)
    for note in report.notes:
        print_text(note)
    n_other = len(report.weights) - len(report.asked)
    if n_other:
        print_text(f"{n_other} smaller or other stored tensors were not asked for")
    if not wrote:
        print_text("dry run: nothing was written")
    elif report.verified:
        print_text(f"verified and written to {report.destination} in {report.seconds:.2f} s")
    else:
        print_text(f"not verified; written to {report.destination} in {report.seconds:.2f} s")


measuring.register(app)
planning.register(app)


def call() -> int:
    """Call the command that this process was given; what goes wrong is raised.

    Returns
    -------
    int
        The exit code that a command asks for.
    """
    code = typer.main.get_command(app).main(standalone_mode=False)
    return code if isinstance(code, int) else 0


def main() -> NoReturn:
    """Run the command line and exit with its code; signals are then handled as before."""
    raise SystemExit(root.run())
