"""Classes of milpress.torch beside coremltools' own: CPU time, extra memory and error of a weight.

Each measurement has a process of its own; imports and the model are left out. The fastest of
several runs counts, and the largest peak. The error is that of the weights relative to their
power; of SKM, with sensitivities as weights.

    python benchmarks/torch_modules.py [--size 1024] [--runs 3]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

CASES = {
    "PostTrainingPalettizer, 4 bits": ("palettization", "PostTrainingPalettizer", {}),
    "PostTrainingPalettizer, 4 bits, group 16": (
        "palettization",
        "PostTrainingPalettizer",
        {"granularity": "per_grouped_channel", "group_size": 16},
    ),
    "PostTrainingPalettizer, 4 bits, not rounded": (
        "palettization",
        "PostTrainingPalettizer",
        {"enable_fast_kmeans_mode": False},
    ),
    "SKMPalettizer, 4 bits, sensitivities given": ("palettization", "SKMPalettizer", {}),
    "PostTrainingQuantizer, int8": ("quantization", "PostTrainingQuantizer", {}),
    "PostTrainingQuantizer, int4, block 32": (
        "quantization",
        "PostTrainingQuantizer",
        {"weight_dtype": "int4", "granularity": "per_block", "block_size": 32},
    ),
}


def peak() -> float:
    """Return the greatest resident size of this process since it was reset, in MB."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(library: str, case: str, size: int) -> dict[str, float]:
    """Compress a weight in this process."""
    if library == "milpress":
        import milpress.torch as home
    else:
        import coremltools.optimize.torch as home
    module_name, name, settings = CASES[case]
    module = getattr(home, module_name)
    config = getattr(module, f"{name}Config").from_dict({"global_config": settings})
    optimizer = getattr(module, name)
    arguments = {"inplace": True}
    torch.manual_seed(0)
    model = nn.Linear(size, size, bias=False)
    before = model.weight.detach().clone()
    share = torch.ones(size, size)
    path = Path(tempfile.gettempdir(), f"sensitivity-{os.getpid()}.pt")
    if name == "SKMPalettizer":
        share = torch.rand(size, size) ** 4 + 1e-6
        torch.save({"weight": share}, path)
        arguments["sensitivity_path"] = str(path)
    small_config = getattr(module, f"{name}Config")
    if name != "SKMPalettizer":
        optimizer(nn.Linear(64, 64), small_config()).compress()  # what is loaded on first use
    Path("/proc/self/clear_refs").write_text("5")
    resident, started = peak(), time.process_time()
    optimizer(model, config).compress(**arguments)
    seconds, extra = time.process_time() - started, peak() - resident
    path.unlink(missing_ok=True)
    noise = (share * (model.weight.detach() - before).square()).sum().double()
    return {
        "seconds": seconds,
        "extra_mb": extra,
        "error": float(noise / (share * before.square()).sum().double()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.size)))
        return
    print(f"a weight of {options.size} x {options.size}; CPU seconds, extra MB, relative error")
    for case in CASES:
        found = {}
        for library in ("milpress", "coremltools"):
            runs = []
            for _ in range(options.runs):
                command = [sys.executable, __file__, "--size", str(options.size)]
                done = subprocess.run(
                    [*command, "--one", library, case],
                    check=True,
                    capture_output=True,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "MILPRESS_NUM_THREADS": "1"},
                )
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            found[library] = (
                min(run["seconds"] for run in runs),
                max(run["extra_mb"] for run in runs),
                runs[0]["error"],
            )
        ours, theirs = found["milpress"], found["coremltools"]
        print(
            f"{case:44} {ours[0]:8.3f} {ours[1]:6.0f} {ours[2]:.4e}   "
            f"{theirs[0]:8.3f} {theirs[1]:6.0f} {theirs[2]:.4e}   {theirs[0] / ours[0]:6.1f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
