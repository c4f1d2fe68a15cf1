"""Types of Core ML's messages; `tests/unit/test_schema.py` holds them to `schema`."""

from typing import Literal

from google.protobuf.internal.containers import MessageMap, ScalarMap
from google.protobuf.internal.containers import RepeatedCompositeFieldContainer as Messages
from google.protobuf.internal.containers import RepeatedScalarFieldContainer as Scalars
from google.protobuf.message import Message

class Model(Message):
    specificationVersion: int
    description: ModelDescription
    pipelineClassifier: PipelineHolder
    pipelineRegressor: PipelineHolder
    pipeline: Pipeline
    mlProgram: Program
    nonMaximumSuppression: NonMaximumSuppression
    def WhichOneof(
        self, oneof_group: Literal["choice"]
    ) -> Literal["pipelineClassifier", "pipelineRegressor", "pipeline", "mlProgram"] | None: ...

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

class FeatureType(Message):
    int64Type: PlainType
    doubleType: PlainType
    stringType: PlainType
    imageType: ImageType
    multiArrayType: ArrayType
    dictionaryType: PlainType
    sequenceType: PlainType
    isOptional: bool
    def WhichOneof(
        self, oneof_group: Literal["choice"]
    ) -> (
        Literal[
            "int64Type",
            "doubleType",
            "stringType",
            "imageType",
            "multiArrayType",
            "dictionaryType",
            "sequenceType",
        ]
        | None
    ): ...

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

class ArrayType(Message):
    shape: Scalars[int]
    dataType: int
    enumeratedShapes: ArrayShapes
    shapeRange: ArrayShapeRange
    intDefaultValue: int
    floatDefaultValue: float
    doubleDefaultValue: float
    def WhichOneof(
        self, oneof_group: Literal["choice"]
    ) -> Literal["intDefaultValue", "floatDefaultValue", "doubleDefaultValue"] | None: ...

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

class Binding(Message):
    name: str
    value: Value
    def WhichOneof(self, oneof_group: Literal["choice"]) -> Literal["name", "value"] | None: ...

class NamedValueType(Message):
    name: str
    type: ValueType

class ValueType(Message):
    tensorType: TensorType
    listType: ListType
    dictionaryType: PlainType
    stateType: StateType
    def WhichOneof(
        self, oneof_group: Literal["choice"]
    ) -> Literal["tensorType", "listType", "dictionaryType", "stateType"] | None: ...

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

class Dimension(Message):
    constant: ConstantDimension
    unknown: UnknownDimension
    def WhichOneof(
        self, oneof_group: Literal["choice"]
    ) -> Literal["constant", "unknown"] | None: ...

class ConstantDimension(Message):
    size: int

class UnknownDimension(Message):
    variadic: bool

class Value(Message):
    docString: str
    type: ValueType
    immediateValue: ImmediateValue
    blobFileValue: BlobFileValue
    def WhichOneof(
        self, oneof_group: Literal["choice"]
    ) -> Literal["immediateValue", "blobFileValue"] | None: ...

class ImmediateValue(Message):
    tensor: TensorValue
    list: ListValue
    def WhichOneof(self, oneof_group: Literal["choice"]) -> Literal["tensor", "list"] | None: ...

class ListValue(Message):
    values: Messages[Value]

class BlobFileValue(Message):
    fileName: str
    offset: int

class TensorValue(Message):
    floats: Floats
    ints: Ints
    bools: Bools
    strings: Strings
    longInts: LongInts
    doubles: Doubles
    bytes: Bytes
    def WhichOneof(
        self, oneof_group: Literal["choice"]
    ) -> Literal["floats", "ints", "bools", "strings", "longInts", "doubles", "bytes"] | None: ...

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
