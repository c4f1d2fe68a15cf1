"""Tensors of a MIL program: where they are stored, and how to read and write them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

import milpress._core as _core
from milpress.errors import PackageError
from milpress.mil import dtypes, proto
from milpress.mil.dtypes import DType
from milpress.mil.opset import Opset

# coremltools stores arrays of fewer elements in the model itself, and so do we.
_MIN_BLOB_ELEMENTS = 10
_STRING = 2
# Below CoreML8, which has blocks, a weight file holds these types only.
_EARLY_BLOB_TYPES = frozenset({"float16", "float32", "int8", "uint8"})


class TensorType(NamedTuple):
    """Element type and shape; a dimension that is not fixed is ``None``."""

    dtype: DType
    shape: tuple[int | None, ...]

    @property
    def fixed_shape(self) -> tuple[int, ...]:
        """The shape, if every dimension is fixed.

        Raises
        ------
        PackageError
            If one is not.
        """
        if None in self.shape:
            msg = f"a stored tensor must have a fixed shape, got {self.shape}"
            raise PackageError(msg)
        return tuple(size for size in self.shape if size is not None)

    @property
    def n_elements(self) -> int:
        """Number of elements, if every dimension is fixed."""
        return math.prod(self.fixed_shape)


class Tensor(NamedTuple):
    """A tensor in memory: one element of ``dtype.storage`` for each element, packed or not."""

    dtype: DType
    values: NDArray[Any]


def of_array(array: Any) -> Tensor:
    """Return an array, or a number of a NumPy type, as a tensor."""
    array = np.asarray(array)
    return Tensor(dtypes.of_array(array), array)


class Blob(NamedTuple):
    """What a weight file holds at some place."""

    reader: _core.BlobReader
    info: _core.BlobInfo


class WeightSource(Protocol):
    """Gives the reader of the weight file that a model names.

    ``retyped`` holds the types in the file of blobs that raising an opset gave another one.
    """

    retyped: dict[tuple[str, int], DType]

    def reader(self, file_name: str) -> _core.BlobReader: ...  # noqa: D102


class WeightSink(Protocol):
    """Takes what is to be stored outside the model and returns its offset."""

    def write(  # noqa: D102
        self, file_name: str, dtype: int, data: NDArray[np.uint8], padding_bits: int
    ) -> int: ...


def type_of(value_type: proto.ValueType) -> TensorType | None:
    """Return element type and shape of a ``ValueType``, or ``None`` if it is no numeric tensor."""
    tensor = value_type.tensorType
    if not value_type.HasField("tensorType") or tensor.dataType == _STRING:
        return None
    shape = tuple(d.constant.size if d.HasField("constant") else None for d in tensor.dimensions)
    return TensorType(dtypes.by_mil(tensor.dataType), shape)


def set_type(value_type: proto.ValueType, dtype: DType, shape: tuple[int, ...]) -> None:
    """Make a ``ValueType`` a tensor of that type and shape."""
    tensor = value_type.tensorType
    tensor.dataType = dtype.mil
    tensor.rank = len(shape)
    del tensor.dimensions[:]
    for size in shape:
        tensor.dimensions.add().constant.size = size


def stored_type(value: proto.Value | proto.NamedValueType) -> TensorType:
    """Return element type and fixed shape of a stored tensor.

    Raises
    ------
    PackageError
        If the value is no tensor, or its shape is not fixed.
    """
    tensor_type = type_of(value.type)
    if tensor_type is None:
        msg = "a stored value is not a tensor"
        raise PackageError(msg)
    return TensorType(tensor_type.dtype, tensor_type.fixed_shape)


def is_blob(value: proto.Value) -> bool:
    """Whether a value is stored in a weight file."""
    return value.HasField("blobFileValue")


def n_stored_bytes(value: proto.Value) -> int:
    """Bytes that the payload of a value takes, wherever it is stored."""
    kind = stored_type(value)
    return kind.dtype.n_bytes(kind.n_elements)


def locate_blob(value: proto.Value, source: WeightSource) -> Blob:
    """Find the blob of a value and check that it is of the type and size that the model declares.

    Raises
    ------
    PackageError
        If the weight file is damaged or disagrees with the model.
    """
    dtype, shape = stored_type(value)
    where = value.blobFileValue
    reader = source.reader(where.fileName)
    try:
        info = reader.info(where.offset)
    except (_core.BlobError, ValueError) as error:
        raise PackageError(str(error)) from error
    n_bytes = n_stored_bytes(value)
    in_file = source.retyped.get((where.fileName, where.offset), dtype)
    if (info.dtype, info.n_bytes) != (in_file.blob, n_bytes):
        msg = (
            f"{where.fileName}, offset {where.offset}: the model declares {dtype.name}{list(shape)}"
            f" (type {dtype.blob}, {n_bytes} bytes), got type {info.dtype}, {info.n_bytes} bytes"
        )
        raise PackageError(msg)
    return Blob(reader, info)


def read_payload(value: proto.Value, source: WeightSource) -> NDArray[np.uint8]:
    """Return the bytes of a blob, as stored.

    Raises
    ------
    PackageError
        If the weight file is damaged, disagrees with the model or shrinks meanwhile.
    """
    reader, info = locate_blob(value, source)
    try:
        return reader.read(info)
    except _core.BlobError as error:
        raise PackageError(str(error)) from error


def read(value: proto.Value, source: WeightSource) -> Tensor:
    """Return a stored tensor, sub-byte elements unpacked.

    Raises
    ------
    PackageError
        If payload and declared type don't agree, or the weight file is damaged.
    """
    kind = stored_type(value)
    dtype, shape, n_elements = kind.dtype, kind.fixed_shape, kind.n_elements
    if is_blob(value):
        return Tensor(dtype, _unpacked(read_payload(value, source), dtype, shape))
    if not value.HasField("immediateValue") or not value.immediateValue.HasField("tensor"):
        msg = "a stored tensor has neither an immediate value nor a place in a weight file"
        raise PackageError(msg)
    tensor = value.immediateValue.tensor
    field = tensor.WhichOneof("choice")
    if field == "bytes":
        data = np.frombuffer(tensor.bytes.values, np.uint8)
        if data.size != dtype.n_bytes(n_elements):
            msg = (
                f"an immediate {dtype.name}{list(shape)} must have {dtype.n_bytes(n_elements)} "
                f"bytes, got {data.size}"
            )
            raise PackageError(msg)
        return Tensor(dtype, _unpacked(data, dtype, shape))
    if field in (None, "strings"):
        msg = f"an immediate {dtype.name} must have numbers, got {field or 'nothing'}"
        raise PackageError(msg)
    numbers = getattr(tensor, field).values
    if len(numbers) != n_elements:
        msg = (
            f"an immediate of shape {list(shape)} must have {n_elements} elements, "
            f"got {len(numbers)}"
        )
        raise PackageError(msg)
    try:
        return Tensor(dtype, np.array(numbers, dtype.storage).reshape(shape))
    except OverflowError as error:
        msg = f"an immediate {dtype.name} holds numbers that its type can't hold"
        raise PackageError(msg) from error


def _unpacked(data: NDArray[np.uint8], dtype: DType, shape: tuple[int, ...]) -> NDArray[Any]:
    if dtype.bits >= 8:
        return data.view(dtype.storage).reshape(shape)
    unpack = _core.unpack_signed if dtype.storage.kind == "i" else _core.unpack
    return unpack(data, dtype.bits, math.prod(shape)).reshape(shape)


def packed(tensor: Tensor) -> tuple[NDArray[np.uint8], int]:
    """Return the bytes of a tensor as they are stored, and how many bits at the end are none's."""
    dtype, array = tensor
    flat = np.ascontiguousarray(array).reshape(-1)
    payload = (
        flat.view(np.uint8) if dtype.bits >= 8 else _core.pack(flat.view(np.uint8), dtype.bits)
    )
    return payload, payload.size * 8 - flat.size * dtype.bits


def write(
    value: proto.Value,
    tensor: Tensor,
    *,
    file_name: str | None = None,
    sink: WeightSink | None = None,
    opset: Opset | None = None,
) -> None:
    """Make ``value`` hold a tensor, in the weight file or in the model as coremltools decides.

    Without a ``file_name`` and a ``sink``, all is stored in the model; so are types that weight
    files of the opset don't hold.
    """
    dtype, array = tensor
    payload, padding = packed(tensor)
    value.Clear()
    set_type(value.type, dtype, array.shape)
    suits = dtype.blob is not None and (
        opset is None or opset.has_blocks or dtype.name in _EARLY_BLOB_TYPES
    )
    if suits and file_name is not None and sink is not None and array.size >= _MIN_BLOB_ELEMENTS:
        value.blobFileValue.fileName = file_name
        value.blobFileValue.offset = sink.write(file_name, dtype.blob or 0, payload, padding)
    elif dtype.immediate == "bytes":
        value.immediateValue.tensor.bytes.values = payload.tobytes()
    else:
        getattr(value.immediateValue.tensor, dtype.immediate).values.extend(
            array.reshape(-1).tolist()
        )


def immediate(array: Any) -> proto.Value:
    """Return a value that holds an array, or a number of a NumPy type, in the model itself."""
    value = proto.Value()
    write(value, of_array(array))
    return value


def string(text: str) -> proto.Value:
    """Return a value that is a string, such as an op's name."""
    value = proto.Value()
    value.type.tensorType.dataType = _STRING
    value.immediateValue.tensor.strings.values.append(text)
    return value


def read_string(value: proto.Value) -> str:
    """Return the text of a value that is a string; empty if it is none."""
    strings = value.immediateValue.tensor.strings.values
    return strings[0] if len(strings) == 1 else ""


def read_scalar(value: proto.Value) -> float | bool | None:
    """Return the one number of a small immediate value, or ``None`` if it has not just one."""
    tensor = value.immediateValue.tensor
    field = tensor.WhichOneof("choice")
    if field == "bytes":
        data, declared = tensor.bytes.values, type_of(value.type)
        dtype = None if declared is None else declared.dtype
        # Other types of floats are held as their bits.
        if dtype is None or not (dtype.is_float or dtype.name.startswith(("int", "uint"))):
            return None
        return np.frombuffer(data, dtype.storage).item() if len(data) * 8 == dtype.bits else None
    if field in (None, "strings"):
        return None
    numbers = getattr(tensor, field).values
    return numbers[0] if len(numbers) == 1 else None


def held(op: proto.Operation, parameter: str) -> proto.Value | None:
    """Return what an op itself holds for a parameter; ``None`` if it is named, or there is none."""
    if parameter in op.attributes:
        return op.attributes[parameter]
    if parameter not in op.inputs or len(op.inputs[parameter].arguments) != 1:
        return None
    binding = op.inputs[parameter].arguments[0]
    return binding.value if binding.WhichOneof("choice") == "value" else None


def blob_values(op: proto.Operation) -> Iterator[proto.Value]:
    """Yield every value of an op that is stored in a weight file."""
    for _, value in sorted(op.attributes.items()):
        if is_blob(value):
            yield value
    for _, argument in sorted(op.inputs.items()):
        for binding in argument.arguments:
            if binding.WhichOneof("choice") == "value" and is_blob(binding.value):
                yield binding.value


def blob_places(stored: Sequence[proto.Value]) -> tuple[tuple[str, int], ...]:
    """Return where in which weight files some values are stored."""
    return tuple(
        (value.blobFileValue.fileName, value.blobFileValue.offset)
        for value in stored
        if is_blob(value)
    )
