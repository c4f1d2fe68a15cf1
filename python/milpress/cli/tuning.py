"""`milpress tune`: better tables for the codes that a package has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from milpress.cli import options as opt
from milpress.cli.options import option
from milpress.cli.terminal import print_result
from milpress.errors import ConfigError, printable

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def tune(
    original: opt.Original,
    compressed: opt.Compressed,
    destination: opt.Destination,
    data: Annotated[
        Path | None,
        option("Samples", "Samples to learn from: .npz of the inputs, or a folder.", "--data"),
    ] = None,
    validation: Annotated[
        Path | None,
        option("Samples", "Samples to choose the best state by [a share of --data]."),
    ] = None,
    validation_share: Annotated[
        float, option("Samples", "Share of the samples that is set aside, without --validation.")
    ] = 0.1,
    mask: Annotated[
        str | None, option("Samples", "Input that is 0 at padding [attention_mask].")
    ] = None,
    seed: opt.Seed = 0,
    train: Annotated[
        str | None,
        option("Training", "What moves: tables, scales, values, biases, norms [all]."),
    ] = None,
    loss: Annotated[str, option("Training", "auto, mse or kl.")] = "auto",
    outputs: Annotated[
        str | None, option("Training", "Outputs to compare: NAME,NAME [all of floats].")
    ] = None,
    steps: Annotated[int, option("Training", "Steps to take.")] = 400,
    batch: Annotated[int, option("Training", "Samples for each step.")] = 8,
    lr: Annotated[float, option("Training", "Size of a step, relative to that of codes.")] = 1e-2,
    time: Annotated[
        str | None, option("Run", "End after this time: 90s, 30m or 2h.", "--time")
    ] = None,
    device: Annotated[
        str, option("Run", "Where models run: cpu, mps (a Mac's GPU) or cuda.", "--device")
    ] = "cpu",
    resume: Annotated[
        bool, option("Run", "Go on from where an interrupted run was.", "--resume")
    ] = False,
    verify: opt.Verify = True,
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """Move tables, scales and biases so that outputs come closer.

    Codes and size stay. Samples are run through both packages; the best state on samples that were
    set aside is written, or a copy of COMPRESSED if none is better.
    """
    from milpress.tuning.config import KINDS, TuneConfig
    from milpress.tuning.tuning import tune as tune_package

    if data is None:
        msg = "samples are missing: give --data FILE or FOLDER"
        raise ConfigError(msg)
    report = tune_package(
        original,
        compressed,
        destination,
        data,
        config=TuneConfig(
            steps=steps,
            batch=batch,
            loss=cast("Any", loss),
            train=KINDS if train is None else cast("Any", _names(train)),
            outputs=() if outputs is None else _names(outputs),
            validation_share=validation_share,
            lr=lr,
            seed=seed,
            time=None if time is None else _seconds_of(time),
            device=cast("Any", device),
            mask=mask,
        ),
        validation=validation,
        resume=resume,
        verify=verify,
        force=force,
        progress=True,
    )
    left = [f"{name}: {reason}" for name, reason in report.left.items()]
    left += [f"{each.name}: {each.note}" for each in report.arrays if each.note]
    checked = "verified and " if report.verified else ""
    written = f"{checked}written to {report.destination} in {report.seconds:.1f} s"
    print_result(report, *left, *report.notes, written, as_json=as_json)
    if not report.is_better:
        typer.echo(f"warning: {printable(report.summary)}", err=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for each in text.split(",") if (name := each.strip()))


def _seconds_of(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if match is None:
        msg = f"--time must be a number of seconds, minutes or hours, such as 30m, got {text!r}"
        raise ConfigError(msg)
    return float(match[1]) * _SECONDS[match[2]]
