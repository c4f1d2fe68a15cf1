"""Packages whose models are changed in memory, and what verification says of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from milpress.compression.verification import compare_packages
from milpress.errors import VerificationError
from milpress.mil.package import Package
from milpress.mil.records import TREATMENTS


class Edited:
    """The model of a package, to be changed in memory."""

    def __init__(self, path: Path) -> None:
        self.package = Package(path)
        self.model = self.package.model

    @property
    def block(self) -> Any:
        (function,) = self.model.mlProgram.functions.values()
        (block,) = function.block_specializations.values()
        return block

    def ops(self, block: Any = None) -> Iterator[Any]:
        for op in (self.block if block is None else block).operations:
            yield op
            for inner in op.blocks:
                yield from self.ops(inner)

    def op(self, name: str) -> Any:
        """Return the op that makes a value of this name."""
        return next(op for op in self.ops() if name in [output.name for output in op.outputs])

    def record(self, change: Callable[[Any], Any], key: str = TREATMENTS) -> None:
        """Change the record that is kept in the package."""
        metadata = self.model.description.metadata.userDefined
        data = json.loads(metadata[key])
        change(data)
        metadata[key] = json.dumps(data)

    def reopened(self) -> Package:
        data = self.model.SerializeToString(deterministic=True)
        return Package(self.package.path, model_bytes=data)


def refused(original: Path | Package, compressed: Package, message: str) -> None:
    original = original if isinstance(original, Package) else Package(original)
    with pytest.raises(VerificationError, match=message):
        compare_packages(original, compressed)


def use(op: Any, parameter: str) -> Any:
    return op.inputs[parameter].arguments[0]
