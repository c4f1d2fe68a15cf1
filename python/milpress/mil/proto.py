"""Core ML's messages by name: built from `schema` on first use, their types in ``proto.pyi``."""

from __future__ import annotations

from google.protobuf.message import Message

from milpress.mil.schema import message_class


def __getattr__(name: str) -> type[Message]:
    try:
        return message_class(name)
    except KeyError:
        raise AttributeError(name) from None
