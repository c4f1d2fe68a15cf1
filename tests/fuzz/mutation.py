"""Damages the files of a package, in ways that keep most of their structure and in others.

What is drawn depends on the random generator alone, so a seed names a damaged package.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Iterator, MutableMapping, MutableSequence
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError

from milpress.mil import proto

Files: TypeAlias = dict[str, bytes]

MANIFEST = "Manifest.json"
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"

_HOSTILE = (
    "",
    "\0",
    "..",
    "/etc/hostname",
    "@model_path/../../../secret",
    "@model_path/weights/other.bin",
    "@model_path/",
    "[red]a[/]\x1b[31m\nb\u202e",
    "\N{LATIN SMALL LETTER E WITH ACUTE}\N{PILE OF POO}",
    "n" * 300,
    "const",
    "CoreML5",
    "CoreML8",
    "CoreML9",
    "constexpr_lut_to_dense",
    "constexpr_cast",
    "constexpr_unknown",
    "val",
    "name",
)
_TYPES = (0, 1, 2, 10, 11, 12, 13, 21, 23, 24, 25, 31, 35, 36, 37, 38, 39, 40, 99)


def damaged(files: Files, donors: list[Files], rng: random.Random) -> Files:
    """Return the files with one to four damages; parts may come from those of other packages."""
    files = dict(files)
    for _ in range(1 + min(3, int(rng.expovariate(1.0)))):
        kind = rng.choices((_damage_model, _damage_weights, _damage_manifest), (12, 3, 1))[0]
        kind(files, donors, rng)
    return files


def _damage_model(files: Files, donors: list[Files], rng: random.Random) -> None:
    if rng.random() < 0.1:
        files[MODEL] = _scrambled(files[MODEL], rng)
        return
    try:
        model = proto.Model.FromString(files[MODEL])
    except DecodeError:  # scrambled before
        return
    donor = proto.Model.FromString(rng.choice(donors)[MODEL])
    for _ in range(20):
        if _damage_message(model, donor, rng):
            break
    files[MODEL] = model.SerializeToString(deterministic=True)


def _damage_manifest(files: Files, donors: list[Files], rng: random.Random) -> None:
    if rng.random() < 0.3:
        files[MANIFEST] = _scrambled(files[MANIFEST], rng)
    else:
        files[MANIFEST] = _damaged_json(files[MANIFEST].decode(errors="replace"), rng).encode()


def _damage_weights(files: Files, donors: list[Files], rng: random.Random) -> None:
    data = bytearray(files[WEIGHTS])
    draw = rng.random()
    if draw < 0.2 or len(data) < 128:
        files[WEIGHTS] = _scrambled(bytes(data), rng)
    elif draw < 0.3:
        files[WEIGHTS] = rng.choice(donors)[WEIGHTS]
    else:
        # A word of some blob's metadata, or of what looks like it.
        place = rng.randrange(0, len(data) - 64, 64) + rng.choice((0, 4, 8, 16, 24))
        number = struct.unpack_from("<Q", data, place)[0]
        struct.pack_into("<Q", data, place, _integer(number, rng) % 2**64)
        files[WEIGHTS] = bytes(data)


def _scrambled(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(changed[: rng.randrange(len(data) + 1)])
    if kind == 1:
        place = rng.randrange(len(data) + 1)
        changed[place:place] = rng.randbytes(rng.randrange(1, 80))
    for _ in range(rng.randrange(1, 20)):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


# ------------------------------------------------------------------------------------------------
# Protobuf


def _inside(message: Any) -> Iterator[Any]:
    """Yield a message and all in it."""
    yield message
    for _, value in message.ListFields():
        if isinstance(value, MutableMapping):
            parts = [part for _, part in sorted(value.items())]
        else:
            parts = list(value) if isinstance(value, MutableSequence) else [value]
        for part in parts:
            if hasattr(part, "ListFields"):
                yield from _inside(part)


def _damage_message(model: Any, donor: Any, rng: random.Random) -> bool:
    """Change one field somewhere; return whether anything could be done there."""
    message = rng.choice(list(_inside(model)))
    fields = dict(message.ListFields())
    if fields and rng.random() < 0.85:
        field = rng.choice(sorted(fields, key=lambda f: f.number))
    elif message.DESCRIPTOR.fields:
        field = rng.choice(message.DESCRIPTOR.fields)
    else:
        return False
    value = getattr(message, field.name)
    try:
        if isinstance(value, MutableMapping):
            return _damage_map(value, model, donor, rng)
        if isinstance(value, MutableSequence):
            return _damage_list(value, model, donor, rng)
        if hasattr(value, "ListFields"):
            return _damage_part(message, field.name, value, donor, rng)
        setattr(message, field.name, _scalar(field.name, value, model, rng))
    except (ValueError, TypeError):  # a number that the field can't hold
        return False
    return True


def _damage_part(message: Any, name: str, part: Any, donor: Any, rng: random.Random) -> bool:
    if rng.random() < 0.3:
        message.ClearField(name)
    elif rng.random() < 0.2:
        part.SetInParent()
    else:
        return _transplant(part, donor, rng)
    return True


def _transplant(part: Any, donor: Any, rng: random.Random) -> bool:
    """Replace a message by one of its kind from another model."""
    alike = [other for other in _inside(donor) if other.DESCRIPTOR.name == part.DESCRIPTOR.name]
    if alike:
        part.ParseFromString(rng.choice(alike).SerializeToString(deterministic=True))
    return bool(alike)


def _damage_map(items: Any, model: Any, donor: Any, rng: random.Random) -> bool:
    if not items:
        return False
    key = rng.choice(sorted(items))
    kind = rng.randrange(4)
    if kind == 0:
        del items[key]
    elif kind == 3 and len(items) > 1:
        _assign(items, key, items[rng.choice(sorted(items))])
    elif kind == 2 and hasattr(items[key], "ListFields"):
        return _transplant(items[key], donor, rng)
    elif isinstance(items[key], str):
        items[key] = _text(items[key], model, rng)
    else:
        kept = items[key]
        _assign(items, _text(key, model, rng), kept)
        if kind == 1:
            del items[key]
    return True


def _assign(items: Any, key: str, value: Any) -> None:
    if hasattr(value, "ListFields"):
        items[key].CopyFrom(value)
    else:
        items[key] = value


def _damage_list(items: Any, model: Any, donor: Any, rng: random.Random) -> bool:
    if not items:
        if hasattr(items, "add"):
            return _transplant(items.add(), donor, rng)
        return False
    i, j = rng.randrange(len(items)), rng.randrange(len(items))
    of_messages = hasattr(items[i], "ListFields")
    kind = rng.randrange(4)
    if kind == 0:
        del items[i]
    elif kind == 1:
        items.append(items[i])
    elif of_messages and kind == 2:
        return _transplant(items[i], donor, rng)
    elif of_messages:
        kept = type(items[i]).FromString(items[i].SerializeToString())
        items[i].CopyFrom(items[j])
        items[j].CopyFrom(kept)
    else:
        items[i] = _scalar("", items[i], model, rng)
    return True


def _scalar(name: str, value: Any, model: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(_TYPES) if name == "dataType" else _integer(value, rng)
    if isinstance(value, float):
        return rng.choice((0.0, -1.0, math.inf, math.nan, 1e300, 1e-45, 65520.0))
    if isinstance(value, bytes):
        return _scrambled(value, rng)
    return _text(value, model, rng)


def _integer(value: int, rng: random.Random) -> int:
    choices: tuple[Callable[[], int], ...] = (
        lambda: rng.choice((0, 1, -1, 2**31 - 1, -(2**31), 2**32, 2**62, 2**63 - 1, 2**64 - 1)),
        lambda: value + rng.choice((-64, -1, 1, 64)),
        lambda: value * rng.choice((-1, 2, 3)),
        lambda: value // 2,
        lambda: rng.randrange(70),
    )
    return rng.choice(choices)()


def _text(value: str, model: Any, rng: random.Random) -> str:
    if value.startswith("{") and rng.random() < 0.7:
        return _damaged_json(value, rng)
    if rng.random() < 0.4:
        return rng.choice(_HOSTILE)
    return rng.choice([value, *_texts(model)])


def _texts(model: Any) -> Iterator[str]:
    for message in _inside(model):
        for _, value in message.ListFields():
            if isinstance(value, str):
                yield value
            elif isinstance(value, MutableMapping):
                yield from sorted(value)


# ------------------------------------------------------------------------------------------------
# JSON


def _damaged_json(text: str, rng: random.Random) -> str:
    try:
        data = json.loads(text)
    except ValueError:
        return text
    holders = [holder for holder in _holders(data) if holder]
    if not holders:
        return rng.choice(("", "[]", "null", "{" * 5000, "[" * 200_000, '{"version": 1}'))
    holder = rng.choice(holders)
    key = rng.choice(sorted(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    kind = rng.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = rng.choice((None, True, 0, -1, 1e400, 2**70, [], {}, [[]], "w", "\ud800"))
    elif kind == 2:
        holder[key] = rng.choice(_HOSTILE)
    else:
        holder[key] = rng.choice(holders)
    try:
        return json.dumps(data)
    except ValueError:  # it holds itself
        return text


def _holders(data: Any) -> Iterator[Any]:
    if isinstance(data, dict | list):
        yield data
        for part in data.values() if isinstance(data, dict) else data:
            yield from _holders(part)
