"""GPTQ of a decoder by milpress.torch and by coremltools: time, memory and error.

The decoder has random weights and samples of random tokens: their content makes no difference to
time and memory. Each library has a process of its own; time and added memory leave out imports and
the model, the peak is of all. The error is that of the logits for one sample, relative to their
power.

    python -m benchmarks.torch_layerwise [--blocks 12] [--width 768] [--samples 128]
        [--tokens 512] [--threads 2] [--block-size 32] [--activation-memory MB] [--only milpress]

A block of width 2048 in bounded memory:

    python -m benchmarks.torch_layerwise --blocks 1 --width 2048 --only milpress
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from benchmarks.torch_modules import peak
from benchmarks.torch_quality import BLOCKS, Decoder, decibels, outputs

LIBRARIES = ("milpress", "coremltools")

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


def measure(library: str, options: argparse.Namespace) -> dict[str, float]:
    """Compress in this process."""
    torch.set_num_threads(options.threads)
    if library == "milpress":
        from milpress.torch import layerwise_compression as home
    else:
        from coremltools.optimize.torch import layerwise_compression as home
    torch.manual_seed(0)
    model = Decoder(options.width, options.blocks, options.tokens).eval().requires_grad_(False)
    batches = list(torch.randint(256, (options.samples, 1, options.tokens)))
    before = outputs(model, batches[:1])
    settings = {"algorithm": "gptq", "weight_dtype": "uint4"}
    if options.block_size:
        settings |= {"granularity": "per_block", "block_size": options.block_size}
    config = home.LayerwiseCompressorConfig.from_dict(
        {
            "module_name_configs": {rf"{BLOCKS}\..*": settings},
            "layers": [BLOCKS],
            "input_cacher": "gpt",
            "calibration_nsamples": options.samples,
        }
    )
    compressor = home.LayerwiseCompressor(model, config)
    Path("/proc/self/clear_refs").write_text("5")
    resident = peak()
    started, cpu = time.perf_counter(), time.process_time()
    memory = {} if library != "milpress" else {"activation_memory": options.activation_memory << 20}
    made = compressor.compress(batches, device="cpu", inplace=True, **memory)
    return {
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - cpu,
        "extra_mb": peak() - resident,
        "peak_mb": peak(),
        "error_db": decibels(outputs(made, batches[:1]), before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (
        ("blocks", 12), ("width", 768), ("samples", 128), ("tokens", 512), ("threads", 2),
        ("block-size", 32), ("activation-memory", 1024),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=LIBRARIES, help="measure one library")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    print(
        f"{options.blocks} blocks of width {options.width}, {options.samples} samples of "
        f"{options.tokens} tokens, {options.threads} threads"
    )
    found = {}
    for library in (options.only,) if options.only else LIBRARIES:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.torch_layerwise", *sys.argv[1:], "--one", library],
            check=True,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(options.threads),
                "MILPRESS_NUM_THREADS": str(options.threads),
            },
        )
        found[library] = json.loads(done.stdout.splitlines()[-1])
        line = found[library]
        print(
            f"{library:12} {line['seconds']:8.1f} s {line['cpu']:8.1f} CPU s "
            f"{line['extra_mb']:8.0f} MB, {line['peak_mb']:.0f} MB in all "
            f"{line['error_db']:8.2f} dB",
            flush=True,
        )
    if options.only:
        return
    ratios = [found["coremltools"][key] / found["milpress"][key] for key in ("seconds", "cpu")]
    print(f"{ratios[0]:.2f} times faster, {ratios[1]:.2f} times less CPU time")


if __name__ == "__main__":
    main()
