"""`milpress run` and `evaluate`: what a package computes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, cast

from milpress.cli import options as opt
from milpress.cli.options import option
from milpress.cli.terminal import print_result, print_table, print_text
from milpress.errors import ConfigError, InputError


def run(
    model: opt.Model,
    inputs: Annotated[
        list[str] | None,
        option(
            "Samples",
            "Input: NAME=FILE.npy, NAME=PICTURE, or a FILE.npz with arrays by name.",
            "--input",
        ),
    ] = None,
    seed: opt.Seed = 0,
    function: opt.Function = None,
    precision: opt.Rounding = "float32",
    output: Annotated[
        Path | None, option("Output", "Write the outputs to this .npz file or folder.")
    ] = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
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
    print_result(report, *report.notes, as_json=as_json, heading=report.source)


def evaluate(
    original: opt.Original,
    compressed: opt.Compressed,
    data: Annotated[
        Path | None,
        option("Samples", "Samples: .npz of the inputs, or a folder (also pictures)."),
    ] = None,
    random: Annotated[
        int | None,
        option(
            "Samples", "Use N random inputs; shows that the model runs, not how accurate it is."
        ),
    ] = None,
    seed: opt.Seed = 0,
    function: opt.Function = None,
    precision: opt.Rounding = "float32",
    metrics: Annotated[
        list[str] | None, option("Output", "snr, cosine, top1, kl or max_error [all].", "--metric")
    ] = None,
    per_op: Annotated[
        bool, option("Output", "List the error that each op adds.", "--per-op")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Run two packages on samples and compare their outputs."""
    from milpress.evaluation.evaluating import evaluate as evaluate_packages
    from milpress.evaluation.results import METRICS
    from milpress.samples.data import RandomSamples

    samples = data if random is None else RandomSamples(random, seed)
    if samples is None:
        msg = "samples are missing: give --data FILE or FOLDER, or --random N"
        raise ConfigError(msg)
    if data is not None and random is not None:
        msg = "--data and --random can't be combined: give one of them"
        raise ConfigError(msg)
    evaluation = evaluate_packages(
        original,
        compressed,
        samples,
        metrics=cast("Any", metrics or METRICS),
        per_op=per_op,
        function=function,
        precision=cast("Any", precision),
        seed=seed,
        progress=True,
    )
    print_result(evaluation, *evaluation.notes, as_json=as_json, heading=str(compressed))
    if per_op and not as_json:
        n_exact = sum(op.own_snr_db == math.inf for op in evaluation.ops)
        print_table(evaluation.ops_table(most=len(evaluation.ops) - n_exact))
        print_text(f"{n_exact} other values have no error of their own")
        if evaluation.n_uncompared:
            print_text(f"{evaluation.n_uncompared} values could not be compared")


def _arrays(options: list[str]) -> dict[str, Any]:
    """Return the arrays that ``--input`` options name."""
    from milpress.plain.arrays import read_arrays
    from milpress.samples.pictures import is_picture

    arrays: dict[str, Any] = {}
    for option_text in options:
        name, equals, path = option_text.partition("=")
        file = Path(path if equals else option_text)
        named: dict[str, Any] = {"": file} if is_picture(file) else read_arrays(file)
        if equals and named.keys() == {""}:
            named = {name: named[""]}
        elif equals or "" in named:
            msg = f"--input must be NAME=FILE.npy, NAME=PICTURE or FILE.npz, got {option_text!r}"
            raise InputError(msg)
        twice = named.keys() & arrays.keys()
        if twice:
            msg = f"--input gives {', '.join(sorted(twice))} twice"
            raise InputError(msg)
        arrays |= named
    return arrays
