"""Kinds of ops: classes of modules, functions, and names of methods of tensors."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from milpress.torch.registration import CONVOLUTIONS, KINDS, TRANSPOSED, Kinds, axes_of_weights

EMBEDDINGS: Kinds = (nn.Embedding, nn.EmbeddingBag)
WEIGHTED: Kinds = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, *EMBEDDINGS)


def is_layer(module: nn.Module) -> bool:
    """Whether a module with weights is one op, whatever it computes inside.

    A registered module that holds other layers is none: its own weights are all that is its own.
    """
    if isinstance(module, KINDS):
        return True
    return bool(axes_of_weights(module)) and not any(map(is_layer, module.children()))


NORMS = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.ConvTranspose1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.ConvTranspose2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# Their output is never negative, so an offset leaves all integers to it.
NONNEGATIVE = {nn.ReLU, nn.ReLU6, functional.relu, functional.relu6, torch.relu, "relu", "relu_"}
NONNEGATIVE |= {functional.relu_, torch.relu_}

# Scale and offset of what has a range of its own: from 0 to 1, and from -1 to 1.
_UNIT, _SIGNED_UNIT = (1 / 256, 0), (2 / 256, 128)
FIXED: dict[Any, tuple[float, int]] = {
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, functional.sigmoid, "sigmoid"), _UNIT),
    **dict.fromkeys(("sigmoid_", "hardsigmoid", "hardsigmoid_"), _UNIT),
    **dict.fromkeys((nn.Hardsigmoid, functional.hardsigmoid), _UNIT),
    **dict.fromkeys((nn.Softmax, functional.softmax, torch.softmax, "softmax"), _UNIT),
    **dict.fromkeys((nn.Tanh, torch.tanh, functional.tanh, "tanh", "tanh_"), _SIGNED_UNIT),
}

ACTIVATIONS: set[Any] = {
    *NONNEGATIVE,
    *FIXED,
    *(nn.PReLU, nn.RReLU, nn.LeakyReLU, nn.LogSigmoid, nn.SiLU, nn.ELU, nn.CELU, nn.SELU, nn.GLU),
    *(nn.Mish, nn.GELU, nn.Hardtanh, nn.LogSoftmax, nn.Hardswish),
    *(functional.prelu, functional.rrelu, functional.leaky_relu, functional.logsigmoid),
    *(functional.silu, functional.elu, functional.celu, functional.selu, functional.glu),
    *(functional.mish, functional.gelu, functional.hardtanh, functional.log_softmax),
    *(functional.hardswish, torch.log_softmax, torch.selu, torch.celu, torch.exp2),
    *(functional.rrelu_, functional.leaky_relu_, functional.elu_, functional.celu_),
    *(functional.selu_, functional.hardtanh_, "exp2"),
}

BINARY: set[Any] = {
    *(operator.add, operator.sub, operator.mul, operator.matmul, operator.iadd, operator.imul),
    *(torch.add, torch.sub, torch.mul, torch.matmul, torch.bmm, torch.einsum),
    *("add", "add_", "sub", "mul", "mul_", "matmul", "bmm"),
}

CONCATENATIONS: set[Any] = {torch.cat, torch.concat, torch.concatenate, torch.stack}

# Dropout does nothing to a model that runs, and scales what it trains on.
DROPOUTS: set[Any] = {
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, functional.dropout, nn.Identity),
}
PASSING: set[Any] = {
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Flatten),
    *(functional.max_pool1d, functional.max_pool2d, functional.max_pool3d),
    *(functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d),
    *(functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d),
    *(functional.adaptive_avg_pool3d, torch.mean, torch.flatten, torch.reshape, torch.squeeze),
    *(torch.unsqueeze, torch.transpose, torch.permute, operator.getitem),
    *("mean", "flatten", "reshape", "view", "squeeze", "unsqueeze", "transpose", "permute"),
    "contiguous",
}

# Where values keep their range, whichever way they are laid out; names of functions and methods.
MOVING: set[str] = {
    *(
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "movedim",
        "swapaxes",
        "t",
    ),
    *(
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
        "view_as",
        "reshape_as",
        "contiguous",
        "clone",
    ),
    *("detach", "to", "type_as", "float", "half", "bfloat16", "chunk", "split", "unbind"),
    *("__getitem__", "__get__", "narrow", "select", "roll", "flip", "repeat", "repeat_interleave"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "unfold", "max_pool1d", "max_pool2d"),
    *("max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
}
MOVING_MODULES: set[Any] = {
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Flatten, nn.Unflatten),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    *(nn.AdaptiveMaxPool3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
}

# Which argument of a layer a keyword names.
POSITIONS = {"input": 0, "query": 0, "key": 1, "value": 2}
