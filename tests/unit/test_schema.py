"""The messages of Core ML: what mypy is told of them is what protobuf makes of them."""

import ast
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor

from milpress.mil import proto, schema

STUB = ast.parse(Path(proto.__file__).with_suffix(".pyi").read_text())
STUBS = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
del STUBS["_OneOf"]
SCALARS = {
    FieldDescriptor.CPPTYPE_INT32: "int",
    FieldDescriptor.CPPTYPE_INT64: "int",
    FieldDescriptor.CPPTYPE_UINT64: "int",
    FieldDescriptor.CPPTYPE_FLOAT: "float",
    FieldDescriptor.CPPTYPE_DOUBLE: "float",
    FieldDescriptor.CPPTYPE_BOOL: "bool",
}


def type_of(field):
    """Return what a field is, as the stub has to say it."""
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        value = message.fields_by_name["value"]
        kind = "ScalarMap" if value.message_type is None else "MessageMap"
        return f"{kind}[{type_of(message.fields_by_name['key'])}, {type_of(value)}]"
    if message is not None:
        single = message.name
    elif field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        single = "bytes" if field.type == FieldDescriptor.TYPE_BYTES else "str"
    else:
        single = SCALARS[field.cpp_type]
    if field.default_value != []:  # that of a list
        return single
    return f"{'Scalars' if message is None else 'Messages'}[{single}]"


def test_the_stub_has_every_message_and_no_other():
    assert list(STUBS) == list(schema._MESSAGES)


@pytest.mark.parametrize("name", schema._MESSAGES)
def test_the_stub_has_every_field_with_its_type_and_every_choice(name):
    message = getattr(proto, name).DESCRIPTOR
    fields = [node for node in STUBS[name].body if isinstance(node, ast.AnnAssign)]
    stated = {node.target.id: ast.unparse(node.annotation) for node in fields}
    assert stated == {field.name: type_of(field) for field in message.fields}
    (base,) = STUBS[name].bases
    choices = {part.value for part in ast.walk(base) if isinstance(part, ast.Constant)}
    assert choices == {field.name for one in message.oneofs for field in one.fields}
    assert ast.unparse(base).startswith("_OneOf[" if choices else "Message")


def test_a_message_that_is_not_there_is_no_attribute():
    with pytest.raises(AttributeError, match="Modell"):
        proto.Modell  # noqa: B018
