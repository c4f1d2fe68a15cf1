"""Decoders that read token by token, and remember."""

from __future__ import annotations

import coremltools as ct
import numpy as np
import pytest
import torch
import zoo

import milpress as cto
from milpress.errors import ConfigError, UnsupportedError
from milpress.interpreter import load
from milpress.torch.decoders import StatefulDecoder
from milpress.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig


def network(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    adapted, (tokens,) = zoo.build(name)
    return adapted.network, tokens


def at_4_bits(model: torch.nn.Module) -> torch.nn.Module:
    config = PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": 4}})
    return PostTrainingPalettizer(model, config).compress()


def read(decoder: StatefulDecoder, tokens: torch.Tensor, *lengths: int) -> torch.Tensor:
    parts, position = [], 0
    with torch.no_grad():
        for length in lengths:
            part = tokens[:, position : position + length]
            parts.append(decoder(part, torch.tensor([position])))
            position += length
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3_moe"])
def test_what_is_read_in_parts_is_what_is_read_at_once(name):
    model, tokens = network(name)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
    decoder = StatefulDecoder(model, 16)
    for lengths in ([1] * 12, (5, 1, 6), (12,)):
        # Some tens of sums of float32, in another order.
        torch.testing.assert_close(read(decoder, tokens, *lengths), expected, atol=1e-4, rtol=0)
        decoder.reset()
        assert not any(buffer.any() for buffer in decoder.buffers(recurse=False))


def test_windows_of_attention_are_the_model_s_own():
    config = zoo.transformers().MistralConfig(**zoo.DECODER, sliding_window=4)
    model = zoo.transformers().MistralForCausalLM(config).eval()
    tokens = zoo.ids(2, 12)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
    decoder = StatefulDecoder(model, 12, batch_size=2)
    torch.testing.assert_close(read(decoder, tokens, *[1] * 12), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name",
    ["llama", *(pytest.param(name, marks=pytest.mark.large) for name in ("gpt2", "mixtral"))],
)
def test_a_package_decodes_token_by_token_what_torch_gives_at_once(name, tmp_path):
    model, tokens = network(name)
    model = at_4_bits(model)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits.numpy()
    path = tmp_path / "model.mlpackage"
    made = cto.torch.convert(
        StatefulDecoder(model, 16),
        (tokens[:, :1], torch.tensor([0])),
        path,
        compute_precision=ct.precision.FLOAT32,
    )
    assert {weight.status for weight in made.compression_report.weights} == {"compressed"}
    program = load(path)
    state = program.make_state()
    for i in range(tokens.shape[1]):
        one = {
            "input_ids": tokens[:, i : i + 1].numpy().astype(np.int32),
            "position": np.int32([i]),
        }
        (found,) = program(state=state, **one).values()
        # States may be float16: a relative error of 2^-11 in keys and values.
        np.testing.assert_allclose(found[:, 0], expected[:, i], atol=0.02)


@pytest.mark.large
def test_a_prompt_of_any_length_is_read_at_once(tmp_path):
    model, tokens = network("llama")
    model = at_4_bits(model)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits.numpy()
    path = tmp_path / "model.mlpackage"
    cto.torch.convert(
        StatefulDecoder(model, 16),
        (tokens[:, :3], torch.tensor([0])),
        path,
        dynamic_shapes={"input_ids": {1: torch.export.Dim("n", min=1, max=16)}, "position": None},
        compute_precision=ct.precision.FLOAT32,
    )
    program = load(path)
    state, position = program.make_state(), 0
    for length in (7, 1, 4):
        part = tokens[:, position : position + length].numpy().astype(np.int32)
        (found,) = program(state=state, input_ids=part, position=np.int32([position])).values()
        np.testing.assert_allclose(found, expected[:, position : position + length], atol=0.02)
        position += length


def test_what_no_decoder_remembers_is_refused():
    model, _ = network("llama")
    with pytest.raises(ConfigError, match="context must be at most 64, the positions of the model"):
        StatefulDecoder(model, 65)
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        StatefulDecoder(model, 8, batch_size=0)
    with pytest.raises(
        UnsupportedError, match="layer 0 of the model keeps something else than keys"
    ):
        StatefulDecoder(network("mamba")[0], 8)
