"""Types of Core ML's messages; `tests/unit/test_schema.py` holds them to `schema`."""

from typing import Generic, Literal, TypeVar

from google.protobuf.internal.containers import MessageMap, ScalarMap
from google.protobuf.internal.containers import RepeatedCompositeFieldContainer as Messages
from google.protobuf.internal.containers import RepeatedScalarFieldContainer as Scalars
from google.protobuf.message import Message

_Choice = TypeVar("_Choice")

class _OneOf(Message, Generic[_Choice]):
    """A message of which only one field of several is set at a time."""

    def WhichOneof(self, oneof_group: Literal["choice"]) -> _Choice | None: ...

class Model(_OneOf[Literal["pipelineClassifier", "pipelineRegressor", "pipeline", "mlProgram"]]):
    specificationVersion: int
    description: ModelDescription
    pipelineClassifier: PipelineHolder
    pipelineRegressor: PipelineHolder
    pipeline: Pipeline
    mlProgram: Program
    nonMaximumSuppression: NonMaximumSuppression

class PipelineHolder(Message):
    pipeline: Pipeline

class Pipeline(Message):
    models: Messages[Model]
    names: Scalars[str]

class NonMaximumSuppression(Message):
    pickTop: PickTop
    stringClassLabels: StringVector
    int64ClassLabels: Int64Vector
    iouThreshold: float
    confidenceThreshold: float
    confidenceInputFeatureName: str
    coordinatesInputFeatureName: str
    iouThresholdInputFeatureName: str
    confidenceThresholdInputFeatureName: str
    confidenceOutputFeatureName: str
    coordinatesOutputFeatureName: str

class PickTop(Message):
    perClass: bool

class StringVector(Message):
    vector: Scalars[str]

class Int64Vector(Message):
    vector: Scalars[int]

class ModelDescription(Message):
    input: Messages[FeatureDescription]
    output: Messages[FeatureDescription]
    state: Messages[FeatureDescription]
    functions: Messages[FunctionDescription]
    defaultFunctionName: str
    metadata: Metadata

class FunctionDescription(Message):
    name: str
    input: Messages[FeatureDescription]
    output: Messages[FeatureDescription]
    state: Messages[FeatureDescription]

class FeatureDescription(Message):
    name: str
    type: FeatureType

class FeatureType(
    _OneOf[
        Literal[
            "int64Type",
            "doubleType",
            "stringType",
            "imageType",
            "multiArrayType",
            "dictionaryType",
            "sequenceType",
        ]
    ]
):
    int64Type: PlainType
    doubleType: PlainType
    stringType: PlainType
    imageType: ImageType
    multiArrayType: ArrayType
    dictionaryType: PlainType
    sequenceType: PlainType
    isOptional: bool

class PlainType(Message): ...

class SizeRange(Message):
    lowerBound: int
    upperBound: int

class ImageType(Message):
    width: int
    height: int
    colorSpace: int
    enumeratedSizes: ImageSizes
    imageSizeRange: ImageSizeRange

class ImageSizes(Message):
    sizes: Messages[ImageSize]

class ImageSize(Message):
    width: int
    height: int

class ImageSizeRange(Message):
    widthRange: SizeRange
    heightRange: SizeRange

class ArrayType(_OneOf[Literal["intDefaultValue", "floatDefaultValue", "doubleDefaultValue"]]):
    shape: Scalars[int]
    dataType: int
    enumeratedShapes: ArrayShapes
    shapeRange: ArrayShapeRange
    intDefaultValue: int
    floatDefaultValue: float
    doubleDefaultValue: float

class ArrayShapes(Message):
    shapes: Messages[ArrayShape]

class ArrayShape(Message):
    shape: Scalars[int]

class ArrayShapeRange(Message):
    sizeRanges: Messages[SizeRange]

class Metadata(Message):
    userDefined: ScalarMap[str, str]

class Program(Message):
    version: int
    functions: MessageMap[str, Function]
    attributes: MessageMap[str, Value]

class Function(Message):
    inputs: Messages[NamedValueType]
    opset: str
    block_specializations: MessageMap[str, Block]
    attributes: MessageMap[str, Value]

class Block(Message):
    inputs: Messages[NamedValueType]
    outputs: Scalars[str]
    operations: Messages[Operation]
    attributes: MessageMap[str, Value]

class Operation(Message):
    type: str
    inputs: MessageMap[str, Argument]
    outputs: Messages[NamedValueType]
    blocks: Messages[Block]
    attributes: MessageMap[str, Value]

class Argument(Message):
    arguments: Messages[Binding]

class Binding(_OneOf[Literal["name", "value"]]):
    name: str
    value: Value

class NamedValueType(Message):
    name: str
    type: ValueType

class ValueType(_OneOf[Literal["tensorType", "listType", "dictionaryType", "stateType"]]):
    tensorType: TensorType
    listType: ListType
    dictionaryType: PlainType
    stateType: StateType

class ListType(Message):
    type: ValueType
    length: Dimension

class StateType(Message):
    wrappedType: ValueType

class TensorType(Message):
    dataType: int
    rank: int
    dimensions: Messages[Dimension]
    attributes: MessageMap[str, Value]

class Dimension(_OneOf[Literal["constant", "unknown"]]):
    constant: ConstantDimension
    unknown: UnknownDimension

class ConstantDimension(Message):
    size: int

class UnknownDimension(Message):
    variadic: bool

class Value(_OneOf[Literal["immediateValue", "blobFileValue"]]):
    docString: str
    type: ValueType
    immediateValue: ImmediateValue
    blobFileValue: BlobFileValue

class ImmediateValue(_OneOf[Literal["tensor", "list"]]):
    tensor: TensorValue
    list: ListValue

class ListValue(Message):
    values: Messages[Value]

class BlobFileValue(Message):
    fileName: str
    offset: int

class TensorValue(
    _OneOf[Literal["floats", "ints", "bools", "strings", "longInts", "doubles", "bytes"]]
):
    floats: Floats
    ints: Ints
    bools: Bools
    strings: Strings
    longInts: LongInts
    doubles: Doubles
    bytes: Bytes

class Floats(Message):
    values: Scalars[float]

class Ints(Message):
    values: Scalars[int]

class Bools(Message):
    values: Scalars[bool]

class Strings(Message):
    values: Scalars[str]

class LongInts(Message):
    values: Scalars[int]

class Doubles(Message):
    values: Scalars[float]

class Bytes(Message):
    values: bytes
