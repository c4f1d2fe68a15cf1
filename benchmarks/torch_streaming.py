"""Compression of a checkpoint from files to files, of a model that is on meta: time and memory.

The decoder has random weights in bfloat16, four blocks a shard, written one tensor at a time. The
peak is that of a process of its own, imports included.

    python -m benchmarks.torch_streaming [--blocks 19] [--width 2048] [--vocabulary 32000]
        [--bits 4] [--group 16] [--samples 0] [--threads 2] [--folder DIR]

With samples, of 128 tokens each, palettes are made with feedback of errors (``gptq_palette``).
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
from pathlib import Path

import torch
from torch import nn

from benchmarks.torch_modules import peak

logging.disable(logging.WARNING)

_BLOCKS_A_SHARD = 4
_TOKENS = 128


class Block(nn.Module):
    """A block of attention with one head, and a gated layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width * 11 // 4
        sizes = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
        sizes |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
        for name, (n_inputs, n_outputs) in sizes.items():
            setattr(self, name, nn.Linear(n_inputs, n_outputs, bias=False))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norms[0](x)
        attended = nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        x = x + self.o(attended)
        y = self.norms[1](x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A decoder whose output layer is its embedding."""

    def __init__(self, width: int, n_blocks: int, vocabulary: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(n_blocks))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def on_meta(options: argparse.Namespace) -> Decoder:
    with torch.device("meta"):
        return Decoder(options.width, options.blocks, options.vocabulary).to(torch.bfloat16)


def write(options: argparse.Namespace, folder: Path) -> None:
    """Write a checkpoint of random weights."""
    from milpress.torch._safetensors import ShardWriter

    torch.manual_seed(0)
    files: dict[str, str] = {}
    shapes = {name: parameter.shape for name, parameter in on_meta(options).named_parameters()}
    for name in shapes:
        number = int(name.split(".")[1]) // _BLOCKS_A_SHARD + 1 if name.startswith("blocks") else 0
        files[name] = f"model-{number:05}.safetensors"
    folder.mkdir()
    for file in sorted(set(files.values())):
        with ShardWriter(folder / file, {}) as writer:
            for name in [name for name, each in files.items() if each == file]:
                writer.add(name, (torch.randn(shapes[name]) * 0.02).to(torch.bfloat16))
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Compress in this process."""
    from milpress.torch.layerwise_compression import LayerwiseCompressor, LayerwiseCompressorConfig
    from milpress.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

    torch.set_num_threads(options.threads)
    settings = {
        "n_bits": options.bits,
        "granularity": "per_grouped_channel",
        "group_size": options.group,
    }
    model = on_meta(options)
    folder = Path(options.folder)
    paths = (folder / "source", folder / "out")
    before = peak()
    started = time.perf_counter()
    if options.samples:
        settings |= {"algorithm": "gptq_palette"}
        config = LayerwiseCompressorConfig.from_dict(
            {"global_config": settings, "calibration_nsamples": options.samples}
        )
        samples = list(torch.randint(options.vocabulary, (options.samples, 1, _TOKENS)))
        compressor = LayerwiseCompressor(model, config)
        report = compressor.compress_checkpoint(*paths, samples, progress=True)
    else:
        plain = PostTrainingPalettizerConfig.from_dict({"global_config": settings})
        palettizer = PostTrainingPalettizer(model, plain)
        report = palettizer.compress_checkpoint(*paths, progress=True)
    return {
        "seconds": time.perf_counter() - started,
        "peak_mb": peak(),
        "extra_mb": peak() - before,
        "n_weights": sum(parameter.numel() for parameter in model.parameters()),
        "n_left": len(report.left),
        "bits": report.bits_per_weight,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (
        ("blocks", 19), ("width", 2048), ("vocabulary", 32_000), ("bits", 4), ("group", 16),
        ("samples", 0), ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--folder", help="where to have the checkpoints; by default, and then gone, TMPDIR"
    )
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write(options, Path(folder) / "source")
        command = [sys.executable, "-m", "benchmarks.torch_streaming", *sys.argv[1:]]
        done = subprocess.run(
            [*command, "--folder", folder, "--measure"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(options.threads),
                "MILPRESS_NUM_THREADS": str(options.threads),
            },
        )
    line = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{line['n_weights'] / 1e6:,.0f} million weights, {line['bits']:.2f} bits each, "
        f"{line['n_left']} left: {line['seconds']:.0f} s, peak {line['peak_mb']:,.0f} MB, "
        f"{line['extra_mb']:,.0f} MB more than imports and the model on meta"
    )


if __name__ == "__main__":
    main()
