"""Measure, print, save, draw: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from threadpoolctl import threadpool_limits

from benchmarks import machine, results
from benchmarks.measure import Case, Effort, Line

# Before coremltools is imported, or it draws progress bars and warns of what is not at stake.
os.environ.setdefault("TQDM_DISABLE", "1")
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


def main() -> None:
    """Run from the command line."""
    options = _options()
    console = Console(stderr=True, highlight=False)
    described = machine.describe()
    warning = machine.idleness_warning(described)
    if warning:
        console.print(f"warning: {warning}", style="yellow")
    started = time.perf_counter()
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, threadpool_limits(1):
        for group, name, case, context in _cases(Path(folder), options):
            if options.only and not any(text in f"{group}: {name}" for text in options.only):
                continue
            if options.list:
                console.print(f"{group}: {name}")
                continue
            begun = time.perf_counter()
            console.print(f"{group}: {name} ...", end=" ")
            with context:
                lines.append(replace(case(), group=group, name=name))
            console.print(f"{time.perf_counter() - begun:.1f} s")
    if not lines:
        return
    found = results.Results(
        machine=described, lines=tuple(lines), quick=options.quick, warning=warning
    )
    results.show(found, Console(width=None if console.is_terminal else 150))
    console.print(f"took {time.perf_counter() - started:.0f} s")
    if options.only and options.name is None:
        return
    _publish(found, options.name or ("quick" if options.quick else results.PUBLISHED))


def _cases(
    folder: Path, options: argparse.Namespace
) -> Iterator[tuple[str, str, Case, AbstractContextManager[None]]]:
    """Yield group, name and case of each line, and what surrounds its measurement."""
    from benchmarks import kernels, models
    from benchmarks.generate_package import Decoder

    quick = options.quick
    data = kernels.Data(n_slow=(2 if quick else 4) << 20, n_vectors=16_384 if quick else 147_456)
    effort = Effort(rounds=5, budget=0.5) if quick else Effort(rounds=21, budget=3.0)
    for name, case in kernels.cases(data, effort).items():
        yield "kernels", name, case, machine.warm_memory()
    decoder = Decoder(n_layers=2, vocabulary=4_992) if quick else Decoder()
    packages = models.Models(folder=folder, decoder=decoder)
    effort = Effort(rounds=3, budget=1.0) if quick else Effort(rounds=7, budget=8.0)
    found = models.cases(packages, effort, quick=quick)
    if options.large:
        found |= models.large_cases(packages, effort)
    if not options.list:
        packages.warm_up()
    for name, case in found.items():
        yield "models", name, case, nullcontext()


def _publish(found: results.Results, name: str) -> None:
    from benchmarks import plot

    path = results.save(found, name)
    plot.draw(found, path.with_suffix(".png"))
    if name == results.PUBLISHED:
        results.PAGE.write_text(results.set_into(results.PAGE.read_text(), found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller models")
    parser.add_argument("--large", action="store_true", help="also 500 million weights and 2 GB")
    parser.add_argument("--list", action="store_true", help="name the lines and stop")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="lines whose name holds this; saves nothing"
    )
    parser.add_argument(
        "--name", help="of the files in benchmarks/results; 'performance' also renews the page"
    )
    parser.add_argument("--folder", type=Path, help="where models are written for a while")
    return parser.parse_args()


if __name__ == "__main__":
    main()
