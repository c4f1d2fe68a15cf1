"""`PostTrainingPalettizer` beside both modes of coremltools' own: CPU time and error.

``python -m benchmarks.torch_palettes --sizes 1024 2048 4096``

coremltools' fast mode, its default, rounds weights to float16 and to four decimals before its
k-means; its exact mode (``enable_fast_kmeans_mode=False``) does not. That is run up to the size
which ``--exact`` names and up to 4 bits, as 8 take minutes. Contenders take turns, and the fastest
of several runs counts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import time
import warnings
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MILPRESS_NUM_THREADS="1")

import torch
from torch import nn

import milpress as cto


def normal(size: int) -> torch.Tensor:
    return 0.02 * torch.randn(size, size)


def heavy(size: int) -> torch.Tensor:
    """Return weights whose greatest is a hundred times their median."""
    return normal(size) / (torch.rand(size, size) + 1e-3).sqrt()


VALUES = {"normal": normal, "heavy tails": heavy}
GROUPED = {"granularity": "per_grouped_channel", "group_size": 16}


def palettized(home: Any, weight: torch.Tensor, settings: dict[str, Any]) -> tuple[float, float]:
    """Return the CPU seconds that a weight takes, and the power of the error beside its own."""
    model = nn.Linear(*weight.shape, bias=False, dtype=weight.dtype)
    model.weight.data = weight.clone()
    module = home.palettization
    config = module.PostTrainingPalettizerConfig.from_dict({"global_config": settings})
    optimizer = module.PostTrainingPalettizer(model, config)
    started = time.process_time()
    with contextlib.redirect_stderr(io.StringIO()):
        model = optimizer.compress(inplace=True)
    seconds = time.process_time() - started
    noise = (model.weight.detach().double() - weight).square().sum()
    return seconds, float(noise / weight.double().square().sum())


def compared(weight: torch.Tensor, settings: dict[str, Any], runs: int, exact: bool) -> str:
    """Return the columns of a row: nanoseconds a weight, ratios, and errors beside ours."""
    from coremltools.optimize import torch as reference

    contenders = {"milpress": (cto.torch, settings), "fast": (reference, settings)}
    if exact:
        contenders["exact"] = (reference, {**settings, "enable_fast_kmeans_mode": False})
    seconds = dict.fromkeys(contenders, float("inf"))
    errors = dict.fromkeys(contenders, 0.0)
    for turn in range(runs):
        for name, (home, options) in contenders.items():
            if name == "milpress" or turn < 2 - (name == "exact"):
                taken, errors[name] = palettized(home, weight, options)
                seconds[name] = min(seconds[name], taken)
    columns = [f"{1e9 * seconds['milpress'] / weight.numel():.1f}"]
    for name in ("fast", "exact"):
        if name in contenders:
            ratio = seconds[name] / seconds["milpress"]
            excess = errors[name] / errors["milpress"] - 1
            columns += [
                f"{1e9 * seconds[name] / weight.numel():.0f}",
                f"{ratio:.1f} x" if ratio < 10 else f"{ratio:.0f} x",
                f"{excess:+.3%}" if abs(excess) > 5e-6 else "same",
            ]
        else:
            columns += ["", "", ""]
    return " | ".join(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--exact", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    palettized(cto.torch, normal(64), {"n_bits": 4})  # what is loaded on first use
    print(
        "| weight | bits | milpress, ns | fast mode, ns | ratio | error | exact mode, ns | ratio "
        "| error |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    cases: list[tuple[str, torch.dtype, int, dict[str, Any]]] = [
        *((name, torch.float32, bits, {}) for name in VALUES for bits in (2, 3, 4, 6, 8)),
        ("normal", torch.float32, 4, GROUPED),
        ("normal", torch.float16, 4, {}),
        ("normal", torch.float16, 8, {}),
    ]
    for size in options.sizes:
        for name, dtype, bits, more in cases:
            weight = VALUES[name](size).to(dtype)
            settings = {"n_bits": bits, **more}
            exact = size <= options.exact and bits <= 4
            columns = compared(weight, settings, options.runs, exact)
            label = f"{size} x {size}, {name}" + ", groups of 16" * bool(more)
            label += ", float16" * (dtype == torch.float16)
            print(f"| {label} | {bits} | {columns} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
