"""Quantize weights and activations of a network while it is trained on, and export it."""

from __future__ import annotations

import torch
from digits import BATCH, FINE_TUNING_EPOCHS, data, table, train, trained
from torch import nn

from milpress.torch.quantization import LinearQuantizer, LinearQuantizerConfig


def quantized(model: nn.Module, weight_dtype: str, epochs: int, seed: int = 0) -> nn.Module:
    """Return a model with integer weights and activations of 8 bits."""
    observers = dict.fromkeys(("weight_observer", "activation_observer"), "ema_min_max")
    settings = {"weight_dtype": weight_dtype, **observers}
    config = LinearQuantizerConfig.from_dict({"global_config": settings})
    quantizer = LinearQuantizer(model, config)
    images, *_ = data()
    prepared = quantizer.prepare((images[:1],))
    if epochs:
        train(prepared, epochs, 1e-3, [quantizer], seed)
    else:
        # Ranges follow in training mode; nothing else is to move, so normalization has to stay.
        for norm in (m for m in prepared.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.eval()
        with torch.no_grad():
            for batch in images.split(BATCH):
                prepared(batch)
    return quantizer.finalize()


def main() -> None:
    """Print accuracy and size of the float, the calibrated and the fine-tuned model."""
    model = trained()
    for title, dtype in (("W8A8", "qint8"), ("W4A8", "qint4")):
        models = {
            "float": model,
            "calibrated, not trained": quantized(model, dtype, 0),
            "fine-tuned": quantized(model, dtype, FINE_TUNING_EPOCHS),
        }
        table(title, models)


if __name__ == "__main__":
    main()
