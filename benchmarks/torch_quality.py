"""What a model loses by each class of milpress.torch, beside coremltools' class of that name.

Two models: all-MiniLM-L6-v2, a sentence encoder with its real weights, and a small language model
of bytes that is trained here on Python's standard library. The linear layers of their blocks are
compressed, and the outputs for texts that were no samples compared with those of the float model:
the power of the error relative to that of the output, in dB, and a metric, the mean cosine of
sentence embeddings or the loss in bits per byte. All in float32 on the CPU; nothing runs in Core
ML.

    python -m benchmarks.torch_quality [--model minilm|decoder] [--steps 600] [--case TEXT]
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import os
import sysconfig
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks import minilm, minilm_ranges

os.environ.setdefault("TQDM_DISABLE", "1")
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

BLOCKS = r"blocks\.\d+"
GROUP_16 = {"n_bits": 4, "granularity": "per_grouped_channel", "group_size": 16}
BLOCK_32 = {
    "algorithm": "gptq",
    "weight_dtype": "uint4",
    "granularity": "per_block",
    "block_size": 32,
}
# Name, class, settings, and whether coremltools has it.
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "no samples, 4-bit palettes, group 16": ("PostTrainingPalettizer", GROUP_16, True),
    "SKM, 64 samples, 4-bit palettes, group 16": ("SKMPalettizer", GROUP_16, True),
    "GPTQ, int4, block 32": ("LayerwiseCompressor", BLOCK_32, True),
    "GPTQ, int4, block 32, activation order": (
        "LayerwiseCompressor",
        {**BLOCK_32, "use_activation_order_heuristic": True},
        True,
    ),
    "GPTQ, int4, block 32, clipped": (
        "LayerwiseCompressor",
        {**BLOCK_32, "range": "mse"},
        False,
    ),
    "GPTQ, normal floats of 4 bits": (
        "LayerwiseCompressor",
        {"algorithm": "gptq", "weight_dtype": "uint4", "enable_normal_float": True},
        True,
    ),
    "GPTQ, 4-bit palettes, group 16": (
        "LayerwiseCompressor",
        {"algorithm": "gptq_palette", **GROUP_16},
        False,
    ),
    "GPTQ, 3-bit palettes, group 16": (
        "LayerwiseCompressor",
        {"algorithm": "gptq_palette", **GROUP_16, "n_bits": 3},
        False,
    ),
    "SparseGPT, half of the weights": (
        "LayerwiseCompressor",
        {"algorithm": "sparse_gpt", "weight_dtype": "float32"},
        True,
    ),
    "SparseGPT, 2 of 4": (
        "LayerwiseCompressor",
        {"algorithm": "sparse_gpt", "weight_dtype": "float32", "n_m_ratio": (2, 4)},
        True,
    ),
}


class Block(nn.Module):
    """A block of a transformer, normalised before its layers or after them."""

    def __init__(self, width: int, n_heads: int, *, causal: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=1e-12) for _ in range(2)])
        self._n_heads = n_heads
        self._causal = causal

    def forward(self, x: Tensor) -> Tensor:
        """Return the vectors of the tokens."""
        if self._causal:
            x = x + self._attend(self.norms[0](x))
            return x + self._feed(self.norms[1](x))
        x = self.norms[0](x + self._attend(x))
        return self.norms[1](x + self._feed(x))

    def _attend(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(2, (self._n_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        found = F.scaled_dot_product_attention(query, key, value, is_causal=self._causal)
        return self.out(found.transpose(1, 2).flatten(2))

    def _feed(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.wide(x)))


class MiniLM(nn.Module):
    """The sentence encoder, for one sentence without padding."""

    def __init__(self) -> None:
        super().__init__()
        weights = minilm.read_weights()
        self.words, self.places = (
            nn.Embedding.from_pretrained(weights[f"embeddings.{name}_embeddings.weight"])
            for name in ("word", "position")
        )
        kinds = weights["embeddings.token_type_embeddings.weight"]
        self.kind = nn.Parameter(kinds[0], requires_grad=False)
        width = kinds.shape[1]
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList([Block(width, 12, causal=False) for _ in range(6)])
        self._load("embeddings.LayerNorm", self.norm, weights)
        for i, block in enumerate(self.blocks):
            parts = {
                "attention.self.query": block.query,
                "attention.self.key": block.key,
                "attention.self.value": block.value,
                "attention.output.dense": block.out,
                "attention.output.LayerNorm": block.norms[0],
                "intermediate.dense": block.wide,
                "output.dense": block.narrow,
                "output.LayerNorm": block.norms[1],
            }
            for name, module in parts.items():
                self._load(f"encoder.layer.{i}.{name}", module, weights)

    def _load(self, name: str, module: nn.Module, weights: dict[str, Tensor]) -> None:
        module.load_state_dict({key: weights[f"{name}.{key}"] for key in ("weight", "bias")})

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embedding of sentences of the same length."""
        x = self.norm(self.words(ids) + self.places.weight[: ids.shape[1]] + self.kind)
        for block in self.blocks:
            x = block(x)
        return F.normalize(x.mean(1), dim=1)


class Decoder(nn.Module):
    """A small language model of bytes."""

    def __init__(self, width: int, n_blocks: int, n_tokens: int, n_kinds: int = 256) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(n_kinds, width), nn.Embedding(n_tokens, width)
        heads = max(1, width // 64)
        self.blocks = nn.ModuleList([Block(width, heads, causal=True) for _ in range(n_blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, n_kinds)

    def forward(self, ids: Tensor) -> Tensor:
        """Return what is to come after each byte."""
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Task:
    """A model, samples, texts to test on, and a metric."""

    model: nn.Module
    sensitivity_batches: list[Tensor]
    loss_fn: Callable[[nn.Module, Tensor], Tensor]
    batches: list[Tensor]
    test: list[Tensor]
    metric: str
    measure: Callable[[list[Tensor], list[Tensor], list[Tensor]], float]


def sentence_task(_steps: int) -> Task:
    """Return MiniLM; 512 sentences are samples, 64 of them for sensitivities."""
    tokenizer = minilm_ranges.Tokenizer(minilm.model_file("vocab.txt"))
    tokens = [tokenizer(text)[None] for text in minilm_ranges.sentences(1024)]
    directions = torch.randn(len(tokens), 384, generator=torch.Generator().manual_seed(0))
    numbers = {id(ids): i for i, ids in enumerate(tokens)}

    def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
        # A random direction: squares of gradients are those of the embedding on average.
        number = numbers.get(id(ids), int(ids.sum()) % len(directions))
        return (model(ids) * directions[number]).sum()

    def cosine(found: list[Tensor], expected: list[Tensor], _test: list[Tensor]) -> float:
        return float((torch.cat(found) * torch.cat(expected)).sum(1).mean())

    samples = tokens[::2]
    return Task(MiniLM().eval(), samples[::8], loss_fn, samples, tokens[1::4], "cosine", cosine)


def byte_task(steps: int) -> Task:
    """Return a decoder trained on the standard library; every tenth file is left for the test."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = [b"".join(f.read_bytes() for i, f in enumerate(files) if (i % 10 == 0) == test)
            for test in (False, True)]  # fmt: skip
    train, held = (torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in text)
    random = torch.Generator().manual_seed(0)
    n_tokens = 128

    def batches(of: Tensor, n: int, size: int) -> list[Tensor]:
        begins = torch.randint(len(of) - n_tokens - 1, (n, size), generator=random)
        return [torch.stack([of[b : b + n_tokens] for b in row]) for row in begins.tolist()]

    def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    torch.manual_seed(0)
    model = Decoder(192, 4, n_tokens)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for ids in batches(train, steps, 16):
        optimizer.zero_grad()
        loss_fn(model, ids).backward()
        optimizer.step()
        schedule.step()

    def bits(found: list[Tensor], _expected: list[Tensor], test: list[Tensor]) -> float:
        losses = [
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            for logits, ids in zip(found, test, strict=True)
        ]
        return float(torch.stack(losses).mean()) / math.log(2)

    samples = batches(train, 128, 4)
    return Task(
        model.eval().requires_grad_(True),
        batches(train, 8, 8),
        loss_fn,
        samples,
        batches(held, 16, 8),
        "bits per byte",
        bits,
    )


def compress(library: Any, task: Task, case: str) -> tuple[nn.Module, Any]:
    """Compress a copy of the model by a library's class; return it with the report."""
    name, settings, _ = CASES[case]
    home = {
        "PostTrainingPalettizer": library.palettization,
        "SKMPalettizer": library.palettization,
        "LayerwiseCompressor": library.layerwise_compression,
    }[name]
    config: dict[str, Any] = {"module_name_configs": {rf"{BLOCKS}\..*": settings}}
    model = copy.deepcopy(task.model)
    if name == "LayerwiseCompressor":
        config |= {"layers": [BLOCKS], "input_cacher": "gpt"}
        config["calibration_nsamples"] = len(task.batches)
    if name == "SKMPalettizer":
        n_batches = len(task.sensitivity_batches)
        ours = library.__name__.startswith("milpress")
        config["calibration_nsamples"] = 64 if ours else n_batches
        # coremltools can't have frozen parameters.
        model.requires_grad_(True)
    optimizer = getattr(home, name)(model, getattr(home, f"{name}Config").from_dict(config))
    if name == "PostTrainingPalettizer":
        made = optimizer.compress()
    elif name == "SKMPalettizer":
        made = optimizer.compress(task.sensitivity_batches, task.loss_fn)
    else:
        made = optimizer.compress(task.batches, device="cpu")
    return made.eval(), optimizer.report()


@torch.no_grad()
def outputs(model: nn.Module, test: list[Tensor]) -> list[Tensor]:
    """Return what a model makes of each batch."""
    return [model(ids) for ids in test]


def decibels(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the power of the error relative to that of the output."""
    pairs = list(zip(found, expected, strict=True))
    noise = sum(float((one - other).double().square().sum()) for one, other in pairs)
    signal = sum(float(other.double().square().sum()) for _, other in pairs)
    return 10 * math.log10(noise / signal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("minilm", "decoder"))
    parser.add_argument("--steps", type=int, default=600, help="of training the decoder")
    parser.add_argument("--case", default="", help="part of the names of the cases to run")
    options = parser.parse_args()

    import coremltools.optimize.torch as theirs

    import milpress.torch as ours

    makers = {"minilm": sentence_task, "decoder": byte_task}
    for name, make in makers.items():
        if options.model not in (None, name):
            continue
        task = make(options.steps)
        expected = outputs(task.model, task.test)
        at_best = task.measure(expected, expected, task.test)
        print(f"\n{name}: {task.metric} of the float model {at_best:.4f}\n")
        print(f"| | bits | error, dB | {task.metric} | CPU s | coremltools: error, dB | "
              f"{task.metric} | CPU s |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|")
        for case, (_, _, shared) in CASES.items():
            if options.case not in case:
                continue
            cells = []
            for library in (ours, theirs) if shared else (ours,):
                begun = time.process_time()
                made, report = compress(library, task, case)
                seconds = time.process_time() - begun
                found = outputs(made, task.test)
                if library is ours:
                    cells.append(f"{report.bits_per_weight:.2f}")
                metric = task.measure(found, expected, task.test)
                cells += [f"{decibels(found, expected):.2f}", f"{metric:.4f}", f"{seconds:.1f}"]
            cells += ["-"] * (7 - len(cells))
            print(f"| {case} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
