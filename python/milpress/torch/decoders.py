"""Decoders of transformers with their keys and values in buffers, which become Core ML's states."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from milpress.errors import ConfigError, UnsupportedError
from milpress.torch._modes import evaluating

__all__ = ["StatefulDecoder"]


class StatefulDecoder(nn.Module):
    """A decoder that remembers what it has read, token by token.

    It calls a language model of transformers with a cache that keeps keys and values in buffers
    of this module. `milpress.torch.convert` makes states of them, as it does of all buffers that
    a module writes to. The model makes the mask itself, so that windows of attention are its own.

    Parameters
    ----------
    model
        A model of transformers 5 whose ``forward`` takes token ids and gives logits, such as
        ``LlamaForCausalLM``, compressed or not. It is part of this module, not copied.
    context
        The number of tokens that it remembers. What is read beyond it is not remembered.
    batch_size
        How many texts it reads side by side.

    Raises
    ------
    ConfigError
        If the context is longer than the model's positions, or a number is less than 1.
    UnsupportedError
        If the model keeps something else than keys and values, such as the state of a scan.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, head_dim=4,
    ...                      num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    >>> decoder = StatefulDecoder(LlamaForCausalLM(config), context=16)
    >>> [(name, tuple(buffer.shape)) for name, buffer in decoder.named_buffers(recurse=False)]
    [('keys_0', (1, 1, 16, 4)), ('values_0', (1, 1, 16, 4))]
    """

    def __init__(self, model: nn.Module, context: int, *, batch_size: int = 1) -> None:
        super().__init__()
        for name, number in (("context", context), ("batch_size", batch_size)):
            if number < 1:
                msg = f"{name} must be at least 1, got {number}"
                raise ConfigError(msg)
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and context > longest:
            msg = f"context must be at most {longest}, the positions of the model, got {context}"
            raise ConfigError(msg)
        self.model = model
        self.context = context
        self.n_layers = 0
        for i, layer in enumerate(_layers_of_a_call(model, batch_size)):
            for kind, example in (("keys", layer.keys), ("values", layer.values)):
                n_heads, size = example.shape[1], example.shape[3]
                memory = example.new_zeros(batch_size, n_heads, context, size)
                self.register_buffer(f"{kind}_{i}", memory)
            self.n_layers += 1

    def forward(self, input_ids: Tensor, position: Tensor) -> Tensor:
        """Read tokens behind those that were read before, and say what may come next.

        Parameters
        ----------
        input_ids
            Tokens, of shape (batch size, tokens).
        position
            How many tokens were read before, of shape (1,), an integer.

        Returns
        -------
        Tensor
            Logits, of shape (batch size, tokens, vocabulary).
        """
        from transformers import Cache

        layer_class = _layer_class()
        cache = Cache(layers=[layer_class(self, i, position) for i in range(self.n_layers)])
        places = position + torch.arange(input_ids.shape[1], device=input_ids.device)
        settings: dict[str, Any] = {_cache_name(self.model): cache, "use_cache": True}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            settings["position_ids"] = places[None]
        logits: Tensor = self.model(input_ids=input_ids, **settings).logits
        return logits

    def reset(self) -> None:
        """Forget what was read."""
        for buffer in self.buffers(recurse=False):
            buffer.zero_()


def _cache_name(model: nn.Module) -> str:
    """Return what a model's ``forward`` calls its cache."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _layers_of_a_call(model: nn.Module, batch_size: int) -> list[Any]:
    """Return what each layer of a model has kept after a token."""
    token = torch.zeros(batch_size, 1, dtype=torch.int64, device=next(model.parameters()).device)
    with evaluating(model), torch.no_grad():
        result = model(input_ids=token, use_cache=True)
    layers = list(getattr(result, _cache_name(model)).layers)
    for i, layer in enumerate(layers):
        if not isinstance(getattr(layer, "keys", None), Tensor) or hasattr(layer, "conv_states"):
            msg = (
                f"layer {i} of the model keeps something else than keys and values "
                f"({type(layer).__name__}); convert it without a memory, or write its state to "
                "buffers yourself"
            )
            raise UnsupportedError(msg)
    return layers


@functools.cache
def _layer_class() -> type[Any]:
    from transformers.cache_utils import CacheLayerMixin

    class BufferedLayer(CacheLayerMixin):  # type: ignore[misc]
        """Keys and values of a layer, in buffers of a decoder."""

        is_compileable = True  # or no mask hides what is not read yet
        is_sliding = False

        def __init__(self, decoder: StatefulDecoder, i: int, position: Tensor) -> None:
            super().__init__()
            self.decoder = decoder
            self.i = i
            self.position = position

        def lazy_initialization(self, *_: Any) -> None:
            pass

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            device = key_states.device
            places = self.position + torch.arange(key_states.shape[2], device=device)
            is_at = torch.arange(self.decoder.context, device=device)[:, None] == places
            kept = []
            for kind, new in (("keys", key_states), ("values", value_states)):
                memory = getattr(self.decoder, f"{kind}_{self.i}")
                # A product instead of a scatter, which not every unit of a device runs.
                spread = torch.matmul(is_at.to(new.dtype), new)
                kept.append(memory.copy_(torch.where(is_at.any(1, keepdim=True), spread, memory)))
            return kept[0], kept[1]

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
            return self.decoder.context, 0

        def get_seq_length(self) -> Any:
            return self.position[0]

        def get_max_length(self) -> int:
            return self.decoder.context

    return BufferedLayer
