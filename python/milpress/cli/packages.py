"""`milpress inspect`, `compress`, `decompress` and `verify`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from milpress.cli import options as opt
from milpress.cli.options import option
from milpress.cli.recipes import recipe_from
from milpress.cli.terminal import print_found, print_json, print_result, print_text

if TYPE_CHECKING:
    from milpress.compression.report import Report
    from milpress.kernels.device import DeviceName


def inspect(
    model: opt.Model,
    ops: Annotated[
        bool, option("Model", "List the ops, and whether `milpress run` covers them.", "--ops")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """List functions, ops and weights of a package."""
    from milpress.inspection import inspect as inspect_package

    inspection = inspect_package(model)
    covered = None
    if ops:
        from milpress.interpreter import coverage  # loads torch, so only on demand

        covered = coverage(model)
    if as_json:
        extra = {} if covered is None else {"interpreter": covered.to_dict()}
        print_json(inspection.to_dict() | extra)
        return
    if covered is not None:
        print_text(inspection.summary)
        print_found(inspection.path, covered, covered.summary)
        return
    print_found(inspection.path, inspection, inspection.summary)
    counts = ", ".join(f"{kind} {n}" for kind, n in inspection.op_counts.items())
    print_text(f"ops: {counts}")


def compress(
    source: opt.Source,
    destination: opt.Destination,
    palettize: Annotated[
        int | None,
        option(
            "Palettization", "Palettize: tables of 2^N values, N-bit indices [1, 2, 3, 4, 6, 8]."
        ),
    ] = None,
    group_size: Annotated[
        int | None, option("Palettization", "Output channels that share a table.")
    ] = None,
    quantize: Annotated[
        str | None, option("Quantization", "Quantize to int8, uint8, int4 or uint4.")
    ] = None,
    block_size: Annotated[
        int | None, option("Quantization", "Input channels that share a scale.")
    ] = None,
    per_channel: Annotated[
        bool, option("Quantization", "One scale per output channel.", "--per-channel")
    ] = False,
    per_tensor: Annotated[
        bool, option("Quantization", "One scale per weight.", "--per-tensor")
    ] = False,
    offset: Annotated[
        bool, option("Quantization", "Asymmetric ranges, with a zero point.", "--offset")
    ] = False,
    prune: Annotated[
        float | None, option("Pruning", "Set this fraction of each weight to zero.")
    ] = None,
    recipe: Annotated[
        Path | None, option("Recipe", "Recipe (YAML): which weights get what.")
    ] = None,
    target_bits: opt.TargetBits = None,
    target_size: opt.TargetSize = None,
    weight_threshold: opt.WeightThreshold = None,
    upgrade_to: opt.UpgradeTo = None,
    strict: Annotated[
        bool, option("Selection", "Fail where a treatment does not fit a weight.", "--strict")
    ] = False,
    calibration_data: Annotated[
        Path | None,
        option(
            "Calibration",
            "Calibration samples (.npz or folder). Errors are weighted by the layer's inputs; "
            "with --quantize, ranges may be clipped.",
        ),
    ] = None,
    calibration_cache: Annotated[
        Path | None, option("Calibration", "Cache calibration statistics in this .npz file.")
    ] = None,
    calibration_mask: Annotated[
        str | None, option("Calibration", "Input that is 0 at padding [attention_mask].")
    ] = None,
    feedback: Annotated[
        bool,
        option(
            "Calibration",
            "GPTQ: compensate each column's rounding error in later columns.",
            "--feedback",
        ),
    ] = False,
    feedback_memory: Annotated[
        str | None, option("Calibration", "Memory that --feedback may use [4GB].")
    ] = None,
    bias_correction: Annotated[
        bool,
        option(
            "Calibration", "Correct biases by each layer's mean output error.", "--bias-correction"
        ),
    ] = False,
    quantize_activations: Annotated[
        str | None,
        option(
            "Activations",
            "Quantize activations (inputs and outputs of ops) to int8 or uint8. From iOS17.",
        ),
    ] = None,
    calibration: Annotated[
        str, option("Activations", "Ranges: minmax, percentile, mse or entropy.")
    ] = "minmax",
    calibration_engine: Annotated[
        str, option("Activations", "interpreter, or coreml on a Mac.")
    ] = "interpreter",
    dry_run: Annotated[
        bool, option("Output", "Print what would be done; write nothing.", "--dry-run")
    ] = False,
    force: opt.Force = False,
    verify: opt.Verify = True,
    as_json: opt.Json = False,
    threads: opt.Threads = None,
    device: Annotated[
        str, option("Run", "Where kernels run: cpu, metal (a Mac's GPU) or auto.", "--device")
    ] = "cpu",
    checkpoint: Annotated[
        Path | None, option("Run", "Folder of finished weights, to resume an interrupted run.")
    ] = None,
) -> None:
    """Palettize, quantize or prune the weights of a package.

    Give one of --palettize, --quantize, --prune, --recipe, --target-bits and --target-size.
    --quantize-activations works alone, and with all of them but --recipe.
    """
    from milpress.cli.planning import planned_recipe, warn_of_risks
    from milpress.compression.packages import compress as compress_package

    chosen = recipe_from(
        {
            "--palettize": palettize,
            "--group-size": group_size,
            "--quantize": quantize,
            "--block-size": block_size,
            "--per-channel": per_channel,
            "--per-tensor": per_tensor,
            "--offset": offset,
            "--prune": prune,
            "--recipe": recipe,
            "--target-bits": target_bits,
            "--target-size": target_size,
            "--weight-threshold": weight_threshold,
            "--upgrade-to": upgrade_to,
            "--calibration-data": calibration_data,
            "--quantize-activations": quantize_activations,
            "--calibration": calibration,
            "--calibration-engine": calibration_engine,
        },
        planned=lambda: planned_recipe(
            source,
            target_bits=target_bits,
            target_size=target_size,
            target=upgrade_to,
            weight_threshold=weight_threshold,
            sample_data=calibration_data,
            threads=threads,
        ),
    )
    report = compress_package(
        source,
        destination,
        chosen,
        on_unsupported="error" if strict else "leave",
        verify=verify,
        progress=True,
        threads=threads,
        device=cast("DeviceName", device),
        force=force,
        dry_run=dry_run,
        sample_data=calibration_data,
        calibration_cache=calibration_cache,
        calibration_mask=calibration_mask,
        bias_correction=bias_correction,
        feedback=feedback,
        feedback_memory=None if feedback_memory is None else opt.n_bytes_of(feedback_memory),
        checkpoint=checkpoint,
    )
    hint = "" if recipe is not None else "; see --weight-threshold"
    _print_report(report, as_json=as_json, is_dry=dry_run, hint=hint)
    if not dry_run:
        warn_of_risks(destination)


def decompress(
    source: opt.Source,
    destination: opt.Destination,
    force: opt.Force = False,
    verify: opt.Verify = True,
    as_json: opt.Json = False,
    threads: opt.Threads = None,
) -> None:
    """Store all weights of a package uncompressed."""
    from milpress.compression.packages import decompress as decompress_package

    report = decompress_package(
        source, destination, verify=verify, progress=True, threads=threads, force=force
    )
    _print_report(report, as_json=as_json)


def verify(original: opt.Original, compressed: opt.Compressed, as_json: opt.Json = False) -> None:
    """Compare a compressed package with its source.

    Both are read from disk; no model is run.
    """
    from milpress.compression.verification import verify as verify_packages

    verification = verify_packages(original, compressed, progress=True)
    print_result(verification, as_json=as_json, heading=str(compressed))


def _print_report(report: Report, *, as_json: bool, is_dry: bool = False, hint: str = "") -> None:
    if as_json:
        print_json(report.to_dict())
        return
    print_found(None, report, report.summary)
    if report.activations is not None:
        print_found(None, report.activations, report.activations.summary)
    for note in report.notes:
        print_text(note)
    reasons = Counter(weight.note for weight in report.with_status("not asked"))
    if reasons:
        shown = [f"{reason}: {n}" for reason, n in reasons.most_common()]
        why = shown if len(reasons) > 1 else list(reasons)
        see = hint if any("elements" in reason for reason in reasons) else ""
        print_text(f"{reasons.total()} other tensors left as they are ({'; '.join(why)}{see})")
    if is_dry:
        print_text("dry run: nothing was written")
    else:
        checked = "verified and" if report.verified else "not verified;"
        print_text(f"{checked} written to {report.destination} in {report.seconds:.2f} s")
