"""Layers that are compressed already, kept in files in case that a run is interrupted."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from milpress.errors import ConfigError, StorageError
from milpress.plain.files import draft_in_place_of
from milpress.torch._module_weights import whole
from milpress.torch.layerwise_compression._layers import CalibratedLayer


class LayerFiles:
    """Files of compressed layers in a folder; ``None`` keeps nothing."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._paths: list[Path] = []

    def load(self, layer: CalibratedLayer) -> dict[str, Any] | None:
        """Return what was kept of a layer; ``None`` if there is nothing.

        Raises
        ------
        ConfigError
            If it is of another weight or config, or no such file.
        """
        path = self._path(layer)
        if path is None or not path.exists():
            return None
        try:
            kept = torch.load(path, weights_only=True, map_location="cpu")
            matches = kept["identity"] == _identity(layer)
        except Exception as error:
            msg = f"{path}: not a layer of an interrupted run: {error}"
            raise ConfigError(msg) from error
        if not matches:
            msg = (
                f"{path}: holds a layer of other weights or settings; delete the folder to begin "
                "anew"
            )
            raise ConfigError(msg)
        self._paths.append(path)
        state: dict[str, Any] = kept["state"]
        return state

    def identity(self, layer: CalibratedLayer) -> str:
        """Return what tells a layer, as it is now, and its config from others."""
        return "" if self._folder is None else _identity(layer)

    def save(self, layer: CalibratedLayer, identity: str) -> None:
        """Keep a layer, with what told it from others before it was compressed.

        Raises
        ------
        StorageError
            If the system refuses to.
        """
        path = self._path(layer)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft_in_place_of(path) as draft:
                torch.save({"identity": identity, "state": layer.state()}, draft)
        except (OSError, RuntimeError) as error:
            msg = f"{path}: can't be written: {error}"
            raise StorageError(msg) from error
        self._paths.append(path)

    def clear(self) -> None:
        """Delete what was kept, and the folder if nothing else is in it."""
        for path in self._paths:
            path.unlink(missing_ok=True)
        if self._folder is not None and self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _path(self, layer: CalibratedLayer) -> Path | None:
        return None if self._folder is None else self._folder / f"layer-{layer.key}.pt"


def _identity(layer: CalibratedLayer) -> str:
    weight = layer.weight
    digest = hashlib.blake2b(f"{layer.name} {weight.shape} {layer.config!r}".encode())
    if weight.tensor is not None:
        tensor = whole(weight.tensor).contiguous()
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
