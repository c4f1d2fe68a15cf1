"""Small torch models that tests share."""

from __future__ import annotations

import torch
from torch import nn


class Attention(nn.MultiheadAttention):
    """Attention of a tensor to itself."""

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class First(nn.Module):
    """The first of the outputs of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Layers(nn.Module):
    """Every kind of module that holds a weight, in a row, from token ids to numbers.

    Recurrent layers take ``torch.jit.trace`` to be converted.
    """

    def __init__(self, *, recurrent: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 32)
        self.attention = Attention(32, 4, batch_first=True)
        self.conv1d = nn.Conv1d(32, 48, 3, padding=1)
        self.up1d = nn.ConvTranspose1d(48, 32, 3, padding=1)
        self.recurrent = nn.ModuleList(
            [First(nn.LSTM(32, 16, bidirectional=True)), First(nn.GRU(32, 32))] if recurrent else []
        )
        self.conv2d = nn.Conv2d(32, 64, (1, 3), padding=(0, 1), groups=2)
        self.up2d = nn.ConvTranspose2d(64, 32, (1, 3), padding=(0, 1))
        self.conv3d = nn.Conv3d(32, 48, (1, 1, 3), padding=(0, 0, 1))
        self.up3d = nn.ConvTranspose3d(48, 32, (1, 1, 3), padding=(0, 0, 1))
        self.head = nn.Linear(32, 40)

    def forward(self, ids):
        x = self.attention(self.words(ids)).transpose(1, 2)
        x = self.up1d(torch.relu(self.conv1d(x)))
        for layer in self.recurrent:
            x = layer(x.permute(2, 0, 1)).permute(1, 2, 0)
        x = self.up2d(torch.relu(self.conv2d(x[:, :, None])))
        x = self.up3d(torch.relu(self.conv3d(x[:, :, None])))[:, :, 0, 0]
        return self.head(x.transpose(1, 2))


IDS = torch.arange(12).reshape(1, 12) * 5 % 64


def layers(*, recurrent: bool = True, seed: int = 0) -> Layers:
    """Return a model with every kind of module."""
    torch.manual_seed(seed)
    return Layers(recurrent=recurrent).eval()
