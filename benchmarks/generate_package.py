"""Writes an ``.mlpackage`` with the weights of a decoder, of any size, one weight in memory.

    python -m benchmarks.generate_package big.mlpackage --megabytes 2000

The model targets iOS18 and computes in float16: an embedding, then layers of four square and two
wide linear ops. The weights are normal, each tensor from a seed of its own.
"""

from __future__ import annotations

import argparse
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from coremltools.proto import FeatureTypes_pb2, MIL_pb2, Model_pb2
from numpy.typing import NDArray

import milpress._core as _core

_WEIGHT_FILE = "@model_path/weights/weight.bin"
_FLOAT16_BLOB = 1
_OPSET = "CoreML8"
_SPECIFICATION = 9
_N_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The shape of a decoder.

    Parameters
    ----------
    width
        Channels between layers; the wide ops have four times as many.
    n_layers
        Layers.
    vocabulary
        Rows of the embedding.
    """

    width: int = 768
    n_layers: int = 12
    vocabulary: int = 19_968

    @property
    def n_layer_weights(self) -> int:
        """Weights of a layer."""
        return 12 * self.width**2

    @property
    def n_weights(self) -> int:
        """Weights in all."""
        return self.vocabulary * self.width + self.n_layers * self.n_layer_weights

    @property
    def largest(self) -> int:
        """Bytes of the largest weight."""
        return 2 * self.width * max(self.vocabulary, 4 * self.width if self.n_layers else 0)

    @classmethod
    def of_megabytes(cls, megabytes: float, *, width: int, vocabulary: int) -> Decoder:
        """Return the decoder whose size comes nearest, by the number of its layers."""
        one = cls(width=width, n_layers=1, vocabulary=vocabulary)
        rest = megabytes * 1e6 / 2 - vocabulary * width
        n_layers = max(1, round(rest / one.n_layer_weights))
        return cls(width=width, n_layers=n_layers, vocabulary=vocabulary)


def write_package(decoder: Decoder, path: Path) -> Path:
    """Write the package of a decoder; nothing may be there yet."""
    folder = path / "Data/com.apple.CoreML"
    (folder / "weights").mkdir(parents=True)
    model = Model_pb2.Model(specificationVersion=_SPECIFICATION)
    _describe(model, decoder)
    function = model.mlProgram.functions["main"]
    model.mlProgram.version = 1
    function.opset = _OPSET
    function.inputs.add(name="ids").type.CopyFrom(_tensor(MIL_pb2.INT32, (_N_TOKENS,)))
    writer = _core.BlobWriter(folder / "weights/weight.bin")
    block = function.block_specializations[_OPSET]
    block.outputs.append(_write_ops(decoder, block, writer))
    writer.close()
    (folder / "model.mlmodel").write_bytes(model.SerializeToString(deterministic=True))
    (path / "Manifest.json").write_text(json.dumps(_manifest(), indent=4))
    return path


def _write_ops(decoder: Decoder, block: Any, writer: _core.BlobWriter) -> str:
    """Write the weights, add the ops that use them, and return the name of the result."""
    width = decoder.width
    table = _add_weight(block, writer, "embedding", (decoder.vocabulary, width), 0)
    here = _add_op(
        block,
        "gather",
        "embedded",
        (_N_TOKENS, width),
        {"x": table, "indices": "ids"},
        {"axis": 0, "batch_dims": 0, "validate_indices": False},
    )
    for i, (name, shape) in enumerate(_linears(decoder)):
        weight = _add_weight(block, writer, f"{name}_weight", shape, i + 1)
        here = _add_op(block, "linear", name, (_N_TOKENS, shape[0]), {"x": here, "weight": weight})
    return here


def _linears(decoder: Decoder) -> Iterator[tuple[str, tuple[int, int]]]:
    width = decoder.width
    for i in range(decoder.n_layers):
        for name in ("query", "key", "value", "output"):
            yield f"layer{i}_{name}", (width, width)
        yield f"layer{i}_up", (4 * width, width)
        yield f"layer{i}_down", (width, 4 * width)


def _values(shape: tuple[int, int], seed: int) -> NDArray[np.float16]:
    rng = np.random.default_rng(seed)
    weight = np.empty(shape, np.float16)
    # In parts, so that float32 values take little memory beside the weight.
    for part in np.array_split(weight, max(1, weight.size >> 20)):
        part[:] = rng.standard_normal(part.shape, np.float32) * np.float32(0.03)
    return weight


def _add_weight(
    block: Any, writer: _core.BlobWriter, name: str, shape: tuple[int, int], seed: int
) -> str:
    data = _values(shape, seed).reshape(-1).view(np.uint8)
    op = block.operations.add(type="const")
    op.attributes["name"].CopyFrom(_text(name))
    value = op.attributes["val"]
    value.type.CopyFrom(_tensor(MIL_pb2.FLOAT16, shape))
    value.blobFileValue.fileName = _WEIGHT_FILE
    value.blobFileValue.offset = writer.write(_FLOAT16_BLOB, data, 0)
    op.outputs.add(name=name).type.CopyFrom(value.type)
    return name


def _add_op(
    block: Any,
    kind: str,
    name: str,
    shape: tuple[int, int],
    inputs: dict[str, str],
    settings: dict[str, int | bool] | None = None,
) -> str:
    op = block.operations.add(type=kind)
    op.attributes["name"].CopyFrom(_text(name))
    for parameter, source in inputs.items():
        op.inputs[parameter].arguments.add(name=source)
    for parameter, value in (settings or {}).items():
        op.inputs[parameter].arguments.add().value.CopyFrom(_scalar(value))
    op.outputs.add(name=name).type.CopyFrom(_tensor(MIL_pb2.FLOAT16, shape))
    return name


def _tensor(dtype: int, shape: tuple[int, ...]) -> Any:
    kind = MIL_pb2.ValueType()
    kind.tensorType.dataType = dtype
    kind.tensorType.rank = len(shape)
    for size in shape:
        kind.tensorType.dimensions.add().constant.size = size
    return kind


def _text(text: str) -> Any:
    value = MIL_pb2.Value(type=_tensor(MIL_pb2.STRING, ()))
    value.immediateValue.tensor.strings.values.append(text)
    return value


def _scalar(number: int | bool) -> Any:
    is_flag = isinstance(number, bool)
    value = MIL_pb2.Value(type=_tensor(MIL_pb2.BOOL if is_flag else MIL_pb2.INT32, ()))
    tensor = value.immediateValue.tensor
    (tensor.bools if is_flag else tensor.ints).values.append(number)
    return value


def _describe(model: Any, decoder: Decoder) -> None:
    array = FeatureTypes_pb2.ArrayFeatureType
    ids = model.description.input.add(name="ids").type.multiArrayType
    ids.shape.append(_N_TOKENS)
    ids.dataType = array.INT32
    last = list(_linears(decoder))[-1][0] if decoder.n_layers else "embedded"
    out = model.description.output.add(name=last).type.multiArrayType
    out.shape.extend((_N_TOKENS, decoder.width))
    out.dataType = array.FLOAT16


def _manifest() -> dict[str, Any]:
    def entry(path: str, what: str) -> dict[str, str]:
        return {
            "author": "com.apple.CoreML",
            "description": f"CoreML Model {what}",
            "name": Path(path).name,
            "path": f"com.apple.CoreML/{path}",
        }

    # The same package each time, its identifiers included.
    model, weights = (str(uuid.uuid5(uuid.NAMESPACE_URL, name)) for name in ("model", "weights"))
    return {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            model: entry("model.mlmodel", "Specification"),
            weights: entry("weights", "Weights"),
        },
        "rootModelIdentifier": model,
    }


def main() -> None:
    """Write a package from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path, help="the .mlpackage to write")
    parser.add_argument("--megabytes", type=float, default=2000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    options = parser.parse_args()
    if options.path.exists():
        parser.error(f"{options.path} must be free, got an existing file")
    decoder = Decoder.of_megabytes(
        options.megabytes, width=options.width, vocabulary=options.vocabulary
    )
    write_package(decoder, options.path)
    print(
        f"{options.path}: {decoder.n_weights / 1e6:.0f} million weights, {decoder.n_layers} layers,"
        f" {2 * decoder.n_weights / 1e6:.0f} MB, largest weight {decoder.largest / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
