"""The part of Core ML's protobuf schema that milpress reads and edits.

Field names and numbers are those of ``Model.proto`` and ``MIL.proto`` in coremltools
(BSD-3-Clause). A field that is not listed survives parsing and serialising untouched, as protobuf's
unknown fields do. The messages live in a descriptor pool of their own, so that they never clash
with coremltools' generated modules.
"""

from __future__ import annotations

import functools

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from numpy.typing import NDArray

import milpress._core as _core

_PACKAGE = "milpress.mil"

# message -> field -> (number, type): "T" is a field, "[T]" repeated, "{T}" a map from string to T.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Model": {
        "specificationVersion": (1, "int32"),
        "description": (2, "ModelDescription"),
        "pipelineClassifier": (200, "PipelineHolder"),
        "pipelineRegressor": (201, "PipelineHolder"),
        "pipeline": (202, "Pipeline"),
        "mlProgram": (502, "Program"),
        "nonMaximumSuppression": (610, "NonMaximumSuppression"),
    },
    "PipelineHolder": {"pipeline": (1, "Pipeline")},
    "Pipeline": {"models": (1, "[Model]"), "names": (2, "[string]")},
    "NonMaximumSuppression": {
        "pickTop": (1, "PickTop"),
        "stringClassLabels": (100, "StringVector"),
        "int64ClassLabels": (101, "Int64Vector"),
        "iouThreshold": (110, "double"),
        "confidenceThreshold": (111, "double"),
        "confidenceInputFeatureName": (200, "string"),
        "coordinatesInputFeatureName": (201, "string"),
        "iouThresholdInputFeatureName": (202, "string"),
        "confidenceThresholdInputFeatureName": (203, "string"),
        "confidenceOutputFeatureName": (210, "string"),
        "coordinatesOutputFeatureName": (211, "string"),
    },
    "PickTop": {"perClass": (1, "bool")},
    "StringVector": {"vector": (1, "[string]")},
    "Int64Vector": {"vector": (1, "[int64]")},
    "ModelDescription": {
        "input": (1, "[FeatureDescription]"),
        "output": (10, "[FeatureDescription]"),
        "state": (13, "[FeatureDescription]"),
        "functions": (20, "[FunctionDescription]"),
        "defaultFunctionName": (21, "string"),
        "metadata": (100, "Metadata"),
    },
    "FunctionDescription": {
        "name": (1, "string"),
        "input": (2, "[FeatureDescription]"),
        "output": (3, "[FeatureDescription]"),
        "state": (6, "[FeatureDescription]"),
    },
    "FeatureDescription": {"name": (1, "string"), "type": (3, "FeatureType")},
    "FeatureType": {
        "int64Type": (1, "PlainType"),
        "doubleType": (2, "PlainType"),
        "stringType": (3, "PlainType"),
        "imageType": (4, "ImageType"),
        "multiArrayType": (5, "ArrayType"),
        "dictionaryType": (6, "PlainType"),
        "sequenceType": (7, "PlainType"),
        "isOptional": (1000, "bool"),
    },
    "PlainType": {},
    "SizeRange": {"lowerBound": (1, "uint64"), "upperBound": (2, "int64")},
    "ImageType": {
        "width": (1, "int64"),
        "height": (2, "int64"),
        "colorSpace": (3, "int32"),
        "enumeratedSizes": (21, "ImageSizes"),
        "imageSizeRange": (31, "ImageSizeRange"),
    },
    "ImageSizes": {"sizes": (1, "[ImageSize]")},
    "ImageSize": {"width": (1, "uint64"), "height": (2, "uint64")},
    "ImageSizeRange": {"widthRange": (1, "SizeRange"), "heightRange": (2, "SizeRange")},
    "ArrayType": {
        "shape": (1, "[int64]"),
        "dataType": (2, "int32"),
        "enumeratedShapes": (21, "ArrayShapes"),
        "shapeRange": (31, "ArrayShapeRange"),
        "intDefaultValue": (41, "int32"),
        "floatDefaultValue": (51, "float"),
        "doubleDefaultValue": (61, "double"),
    },
    "ArrayShapes": {"shapes": (1, "[ArrayShape]")},
    "ArrayShape": {"shape": (1, "[int64]")},
    "ArrayShapeRange": {"sizeRanges": (1, "[SizeRange]")},
    "Metadata": {"userDefined": (100, "{string}")},
    "Program": {
        "version": (1, "int64"),
        "functions": (2, "{Function}"),
        "attributes": (4, "{Value}"),
    },
    "Function": {
        "inputs": (1, "[NamedValueType]"),
        "opset": (2, "string"),
        "block_specializations": (3, "{Block}"),
        "attributes": (4, "{Value}"),
    },
    "Block": {
        "inputs": (1, "[NamedValueType]"),
        "outputs": (2, "[string]"),
        "operations": (3, "[Operation]"),
        "attributes": (4, "{Value}"),
    },
    "Operation": {
        "type": (1, "string"),
        "inputs": (2, "{Argument}"),
        "outputs": (3, "[NamedValueType]"),
        "blocks": (4, "[Block]"),
        "attributes": (5, "{Value}"),
    },
    "Argument": {"arguments": (1, "[Binding]")},
    "Binding": {"name": (1, "string"), "value": (2, "Value")},
    "NamedValueType": {"name": (1, "string"), "type": (2, "ValueType")},
    "ValueType": {
        "tensorType": (1, "TensorType"),
        "listType": (2, "ListType"),
        "dictionaryType": (4, "PlainType"),
        "stateType": (5, "StateType"),
    },
    "ListType": {"type": (1, "ValueType"), "length": (2, "Dimension")},
    "StateType": {"wrappedType": (1, "ValueType")},
    "TensorType": {
        "dataType": (1, "int32"),
        "rank": (2, "int64"),
        "dimensions": (3, "[Dimension]"),
        "attributes": (4, "{Value}"),
    },
    "Dimension": {"constant": (1, "ConstantDimension"), "unknown": (2, "UnknownDimension")},
    "ConstantDimension": {"size": (1, "uint64")},
    "UnknownDimension": {"variadic": (1, "bool")},
    "Value": {
        "docString": (1, "string"),
        "type": (2, "ValueType"),
        "immediateValue": (3, "ImmediateValue"),
        "blobFileValue": (5, "BlobFileValue"),
    },
    "ImmediateValue": {"tensor": (1, "TensorValue"), "list": (3, "ListValue")},
    "ListValue": {"values": (1, "[Value]")},
    "BlobFileValue": {"fileName": (1, "string"), "offset": (2, "uint64")},
    "TensorValue": {
        "floats": (1, "Floats"),
        "ints": (2, "Ints"),
        "bools": (3, "Bools"),
        "strings": (4, "Strings"),
        "longInts": (5, "LongInts"),
        "doubles": (6, "Doubles"),
        "bytes": (7, "Bytes"),
    },
    "Floats": {"values": (1, "[float]")},
    "Ints": {"values": (1, "[int32]")},
    "Bools": {"values": (1, "[bool]")},
    "Strings": {"values": (1, "[string]")},
    "LongInts": {"values": (1, "[int64]")},
    "Doubles": {"values": (1, "[double]")},
    "Bytes": {"values": (1, "bytes")},
}

# Messages of which only one field is set at a time. Of a model's, those that may hold ML programs.
_CHOICES = {
    "Model": ("pipelineClassifier", "pipelineRegressor", "pipeline", "mlProgram"),
    "FeatureType": tuple(name for name in _MESSAGES["FeatureType"] if name != "isOptional"),
    "ArrayType": ("intDefaultValue", "floatDefaultValue", "doubleDefaultValue"),
    "ValueType": tuple(_MESSAGES["ValueType"]),
    "ImmediateValue": ("tensor", "list"),
    "Binding": ("name", "value"),
    "Dimension": ("constant", "unknown"),
    "Value": ("immediateValue", "blobFileValue"),
    "TensorValue": tuple(_MESSAGES["TensorValue"]),
}


def _add_field(
    message: descriptor_pb2.DescriptorProto, name: str, number: int, kind: str
) -> descriptor_pb2.FieldDescriptorProto:
    field = message.field.add(name=name, number=number)
    repeated, kind = kind.startswith("["), kind.strip("[]")
    field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
    if kind in _MESSAGES or "." in kind:
        field.type = field.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{kind}"
    else:
        field.type = getattr(field, f"TYPE_{kind.upper()}")
    return field


def _add_map(message: descriptor_pb2.DescriptorProto, name: str, number: int, kind: str) -> None:
    entry_name = "".join(part[:1].upper() + part[1:] for part in name.split("_")) + "Entry"
    entry = message.nested_type.add(name=entry_name)
    entry.options.map_entry = True
    _add_field(entry, "key", 1, "string")
    _add_field(entry, "value", 2, kind)
    _add_field(message, name, number, f"[{message.name}.{entry_name}]")


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(
        name="milpress/mil.proto", package=_PACKAGE, syntax="proto3"
    )
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for field_name, (number, kind) in fields.items():
            if kind.startswith("{"):
                _add_map(message, field_name, number, kind.strip("{}"))
            else:
                field = _add_field(message, field_name, number, kind)
                if field_name in _CHOICES.get(message_name, ()):
                    field.oneof_index = 0
        if message_name in _CHOICES:
            message.oneof_decl.add(name="choice")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


@functools.cache
def message_class(name: str) -> type[Message]:
    """Return the class of a message; `proto` hands it on with its type.

    Raises
    ------
    KeyError
        If there is no such message.
    """
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{_PACKAGE}.{name}"))


# Bytes of memory for each message, rounded up: what protobuf and the graph of a program take.
_MESSAGE_BYTES = 64
_LARGER_BYTES = {
    "Operation": 1000,
    "Block": 1000,
    "Function.block_specializations": 1000,
    "Program.functions": 500,
    "NamedValueType": 1000,
    "Function": 500,
    "Model": 500,
    "Binding": 400,
}


@functools.cache
def _counted_fields() -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Return what `_core.count_messages` counts, and the names of its rows.

    An entry of a map is a message of its own, named after its field.
    """
    names = list(_MESSAGES)
    counted: list[tuple[str, int, str]] = []  # message, field number, what the field holds
    for message, fields in _MESSAGES.items():
        for field, (number, kind) in fields.items():
            content = kind.strip("[]{}")
            if kind.startswith("{"):
                entry = f"{message}.{field}"
                names.append(entry)
                counted += [(message, number, entry), (entry, 2, content)]
            elif content in _MESSAGES or kind == "[string]":
                counted.append((message, number, content))
    rows = {name: i for i, name in enumerate(names)}
    kinds = np.zeros((len(names), 1 + max(number for _, number, _ in counted)), np.uint8)
    for message, number, content in counted:
        kinds[rows[message], number] = 1 + rows.get(content, len(names))
    return kinds, tuple(names)


def memory_of(counts: dict[str, int]) -> int:
    """Return about how many bytes of memory a model takes once it is parsed, at most.

    Its numbers, texts and bytes come on top: up to eight times what they take in the file.
    """
    return sum(_LARGER_BYTES.get(name, _MESSAGE_BYTES) * n for name, n in counts.items())


def count_messages(data: bytes) -> dict[str, int]:
    """Count the messages of a serialised model by their names, before anything is parsed.

    Texts in lists are counted as ``"string"``, entries of maps as ``"Message.field"``.

    Raises
    ------
    ValueError
        If the bytes break protobuf's wire format, or nest deeper than 100 levels.
    """
    kinds, names = _counted_fields()
    counts = _core.count_messages(data, kinds)
    return dict(zip((*names, "string"), counts.tolist(), strict=True))
