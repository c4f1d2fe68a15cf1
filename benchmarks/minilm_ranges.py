"""What `range="mse"` gains over `range="minmax"`: int4 weights of a sentence encoder, no data.

Quantizes every matrix of all-MiniLM-L6-v2 that has more than 2,048 weights, embeddings included, as
float16, and compares the sentence embeddings of a float32 forward with those of the model as it
came. The sentences are the first ones of docstrings in Python's standard library. Nothing runs in
Core ML.

    python -m benchmarks.minilm_ranges [--sentences 512]
"""

from __future__ import annotations

import argparse
import ast
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from benchmarks import minilm
from milpress import formats as f

N_TOKENS = 128
N_AT_ONCE = 32
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


def embed(weights: Weights, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the embeddings of sentences, a few at a time."""
    encoder = minilm.Encoder(weights, N_TOKENS)
    batches = zip(ids.split(N_AT_ONCE), mask.split(N_AT_ONCE), strict=True)
    return torch.cat([encoder(*batch) for batch in batches])


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
    weights = minilm.read_weights()
    tokenizer = Tokenizer(minilm.model_file("vocab.txt"))
    tokens = [tokenizer(text) for text in sentences(n_sentences)]
    ids = torch.stack([functional.pad(known, (0, N_TOKENS - len(known))) for known in tokens])
    mask = torch.stack([(torch.arange(N_TOKENS) < len(known)).int() for known in tokens])
    expected = embed(weights, ids, mask)
    n_tokens = sum(len(ids) for ids in tokens)
    print(f"{len(tokens)} sentences of {n_tokens / len(tokens):.0f} tokens on average")
    print(f"{'':37} bits  SNR dB  cosine")
    for name, config in SETTINGS.items():
        made, bits, snr = quantized(weights, config)
        embeddings = embed(made, ids, mask)
        cosine = (embeddings * expected).sum(dim=1).mean().item()
        print(f"{name:37} {bits:4.2f}  {snr:6.2f}  {cosine:.4f}")


if __name__ == "__main__":
    main()
