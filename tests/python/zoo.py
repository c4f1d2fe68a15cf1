"""Networks that people have, tiny and of random weights: those of transformers, timm and diffusers.

A network is built from its configuration, in well under a second and with less than a million
weights, and takes tensors in order and gives one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

Inputs = tuple[torch.Tensor, ...]
Network = tuple[nn.Module, Inputs]

ZOO: dict[str, Callable[[], Network]] = {}


def build(name: str) -> Network:
    """Return a network of the zoo in evaluation mode, and inputs; always the same weights."""
    torch.manual_seed(0)
    network, inputs = ZOO[name]()
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.2)  # zeros would hide what is behind them
        if norms:
            for norm in norms:
                norm.momentum = None  # the mean of all batches, of which there is one
            network.train()(*inputs)
    return network.eval(), inputs


class Adapted(nn.Module):
    """A network that takes keywords and gives fields, as a module of tensors in and one out.

    Parameters
    ----------
    network
        The network itself.
    names
        Names of what it takes, in order.
    output
        The field that is given.
    settings
        Further keywords of its ``forward``.
    """

    def __init__(self, network: nn.Module, *names: str, output: str, **settings: Any) -> None:
        super().__init__()
        self.network = network
        self.names = names
        self.output = output
        self.settings = settings

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        keywords = dict(zip(self.names, inputs, strict=True))
        return getattr(self.network(**keywords, **self.settings), self.output)


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 120, shape)


def image(*shape: int) -> torch.Tensor:
    return torch.randn(1, 3, *shape)


def _library(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed: make environment does it")


def transformers() -> Any:
    return _library("transformers")


def of_the_zoo(builder: Callable[[], Network]) -> Callable[[], Network]:
    ZOO[builder.__name__] = builder
    return builder


# ---------------------------------------------------------------------------------------------
# transformers: language

# So large that the softmax of attention is far from even, and each layer is heard behind the next.
RANGE = {"initializer_range": 0.2}

# What most decoders call the same.
DECODER = {
    **RANGE,
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def decoder(network: nn.Module) -> Network:
    return Adapted(network, "input_ids", output="logits", use_cache=False), (ids(1, 12),)


@of_the_zoo
def llama() -> Network:
    t = transformers()
    return decoder(t.LlamaForCausalLM(t.LlamaConfig(**DECODER)))


@of_the_zoo
def llama_tied() -> Network:
    t = transformers()
    return decoder(t.LlamaForCausalLM(t.LlamaConfig(**DECODER, tie_word_embeddings=True)))


@of_the_zoo
def gpt2() -> Network:
    t = transformers()
    config = t.GPT2Config(
        **RANGE,
        vocab_size=128,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return decoder(t.GPT2LMHeadModel(config))


@of_the_zoo
def mixtral() -> Network:
    t = transformers()
    config = t.MixtralConfig(**DECODER, num_local_experts=4)
    return decoder(t.MixtralForCausalLM(config))


@of_the_zoo
def qwen3_moe() -> Network:
    t = transformers()
    config = t.Qwen3MoeConfig(
        **DECODER, moe_intermediate_size=32, head_dim=16, num_experts=4, num_experts_per_tok=2
    )
    return decoder(t.Qwen3MoeForCausalLM(config))


@of_the_zoo
def mamba() -> Network:
    t = transformers()
    config = t.MambaConfig(
        **RANGE,
        vocab_size=128,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return decoder(t.MambaForCausalLM(config))


@of_the_zoo
def bamba() -> Network:
    t = transformers()
    config = t.BambaConfig(
        **DECODER,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=4,
    )
    return decoder(t.BambaForCausalLM(config))


@of_the_zoo
def bert() -> Network:
    t = transformers()
    config = t.BertConfig(
        **RANGE,
        vocab_size=128,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    network = t.BertForSequenceClassification(config)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 9:] = 0
    return Adapted(network, "input_ids", "attention_mask", output="logits"), (ids(2, 12), mask)


@of_the_zoo
def t5() -> Network:
    t = transformers()
    config = t.T5Config(
        vocab_size=128,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    names = ("input_ids", "decoder_input_ids")
    network = t.T5ForConditionalGeneration(config)
    return Adapted(network, *names, output="logits", use_cache=False), (ids(1, 12), ids(1, 6))


# ---------------------------------------------------------------------------------------------
# transformers: pictures and sound

VISION = {
    **RANGE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


@of_the_zoo
def vit() -> Network:
    t = transformers()
    network = t.ViTForImageClassification(t.ViTConfig(**VISION, num_labels=10))
    return Adapted(network, "pixel_values", output="logits"), (image(32, 32),)


@of_the_zoo
def clip() -> Network:
    t = transformers()
    text = {
        **RANGE,
        "vocab_size": 128,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    network = t.CLIPModel(
        t.CLIPConfig(
            text_config=text, vision_config=VISION, projection_dim=16, initializer_factor=5.0
        )
    )
    words = ids(2, 12)
    words[:, -1] = 2
    inputs = (words, image(32, 32))
    return Adapted(network, "input_ids", "pixel_values", output="logits_per_image"), inputs


@of_the_zoo
def convnext_v2() -> Network:
    t = transformers()
    config = t.ConvNextV2Config(
        **RANGE, hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 1, 1], num_labels=10
    )
    network = t.ConvNextV2ForImageClassification(config)
    return Adapted(network, "pixel_values", output="logits"), (image(64, 64),)


@of_the_zoo
def mobilenet_v2() -> Network:
    t = transformers()
    config = t.MobileNetV2Config(depth_multiplier=0.25, image_size=64, num_labels=10)
    network = t.MobileNetV2ForImageClassification(config)
    return Adapted(network, "pixel_values", output="logits"), (image(64, 64),)


@of_the_zoo
def whisper() -> Network:
    t = transformers()
    config = t.WhisperConfig(
        init_std=0.2,
        vocab_size=128,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=20,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    network = t.WhisperForConditionalGeneration(config)
    adapted = Adapted(
        network, "input_features", "decoder_input_ids", output="logits", use_cache=False
    )
    return adapted, (torch.randn(1, 16, 40), ids(1, 6))


@of_the_zoo
def wav2vec2() -> Network:
    t = transformers()
    config = t.Wav2Vec2Config(
        **RANGE,
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        conv_dim=[32, 32, 32],
        conv_stride=[5, 2, 2],
        conv_kernel=[10, 3, 2],
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    network = t.Wav2Vec2ForCTC(config)
    return Adapted(network, "input_values", output="logits"), (torch.randn(1, 800),)


# ---------------------------------------------------------------------------------------------
# timm

TORCHVISION = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


class _Named(type):
    """A class whose attributes are their names, as an enumeration's."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})


@contextmanager
def stub_of_torchvision() -> Iterator[None]:
    """Let torchvision be imported inside the block where it is not installed.

    timm takes a class of a layer from it, and readers of pictures that no network needs.
    """
    if "torchvision" in sys.modules:
        yield
        return
    stubs = {name: _Stub(name) for name in TORCHVISION}
    for name, stub in stubs.items():
        package, _, own_name = name.rpartition(".")
        if package:
            setattr(stubs[package], own_name, stub)
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]


def timm() -> Any:
    with stub_of_torchvision():
        return _library("timm")


@of_the_zoo
def resnet() -> Network:
    t = timm()
    block = t.models.resnet.Bottleneck
    network = t.models.ResNet(
        block, [1, 1, 1, 1], channels=(8, 8, 16, 16), num_classes=10, stem_width=8
    )
    return network, (image(64, 64),)


@of_the_zoo
def swin() -> Network:
    t = timm()
    network = t.models.SwinTransformer(
        img_size=32,
        patch_size=2,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
        num_classes=10,
    )
    for parameter in network.parameters():
        if parameter.ndim == 2:
            parameter.data *= 10
    return network, (image(32, 32),)


# ---------------------------------------------------------------------------------------------
# diffusers


def diffusers() -> Any:
    return _library("diffusers")


@of_the_zoo
def unet() -> Network:
    network = diffusers().UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    names = ("sample", "timestep", "encoder_hidden_states")
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 6, 16))
    return Adapted(network, *names, output="sample"), inputs


@of_the_zoo
def autoencoder() -> Network:
    network = diffusers().AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    return Adapted(network, "sample", output="sample"), (image(16, 16),)


@of_the_zoo
def dit() -> Network:
    network = diffusers().DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
    )
    names = ("hidden_states", "timestep", "class_labels")
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.tensor([3]))
    return Adapted(network, *names, output="sample"), inputs
