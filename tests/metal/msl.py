"""Read our Metal sources: their kernels as data, as C++ for the emulator, as C++ for OpenCL.

Only the part of the language that the sources use is understood; anything else is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

# What a thread may be told about its place, and the types that may hold it.
BUILTINS = {
    "thread_position_in_grid": ("uint", "uint2", "uint3"),
    "threads_per_grid": ("uint", "uint2", "uint3"),
    "thread_position_in_threadgroup": ("uint", "uint2", "uint3"),
    "threads_per_threadgroup": ("uint", "uint2", "uint3"),
    "threadgroup_position_in_grid": ("uint", "uint2", "uint3"),
    "threadgroups_per_grid": ("uint", "uint2", "uint3"),
    "thread_index_in_threadgroup": ("uint",),
    "thread_index_in_simdgroup": ("uint",),
    "simdgroup_index_in_threadgroup": ("uint",),
    "simdgroups_per_threadgroup": ("uint",),
    "threads_per_simdgroup": ("uint",),
}
WEIGHT_TYPES = ("float", "half")

_KERNEL = re.compile(
    r"(?P<doc>(?:^///[^\n]*\n)*)"
    r"(?P<template>^template <typename T>\s*)?"
    r"\[\[kernel\]\]\s+void\s+(?P<name>\w+)\s*\(",
    re.MULTILINE,
)
_PARAMETER = re.compile(
    r"(?P<type>.+?)\s*\b(?P<name>\w+)\s*\[\[(?P<attribute>[^\]]*)\]\]", re.DOTALL
)
_INSTANTIATE = re.compile(r"^MILPRESS_INSTANTIATE\((\w+), (\w+)\)[ ]*$", re.MULTILINE)
_THREADGROUP = re.compile(
    r"^(?P<indent>[ ]*)threadgroup (?P<type>\w+) (?P<name>\w+)(?P<size>\[[^\]]+\])?;", re.MULTILINE
)


class SourceError(Exception):
    """A source that breaks a rule; the message begins with file and line."""


@dataclass(frozen=True)
class Parameter:
    """A parameter: a buffer with its index, or a builtin."""

    type: str
    name: str
    attribute: str
    index: int | None

    @property
    def is_constant(self) -> bool:
        """Whether it is read only."""
        return self.type.startswith("constant ") or " const " in f" {self.type} "

    @property
    def element(self) -> str:
        """Type of what the buffer holds."""
        words = re.sub(r"[*&]", "", self.type).split()
        return next(w for w in words if w not in ("device", "constant", "const"))


@dataclass(frozen=True)
class Kernel:
    """A kernel as it is written."""

    name: str
    is_template: bool
    parameters: tuple[Parameter, ...]
    line: int
    begin: int  # of `template` or `[[kernel]]` in the text
    end: int  # behind the body

    @property
    def buffers(self) -> tuple[Parameter, ...]:
        """Its buffers, in order."""
        return tuple(p for p in self.parameters if p.index is not None)


@dataclass(frozen=True)
class Source:
    """A file: its text, kernels, and (kernel, type or None) for each name the host may ask for."""

    path: Path
    text: str
    code: str  # the same without comments, of equal length
    kernels: dict[str, Kernel]
    instances: dict[str, tuple[Kernel, str | None]]


def blanked(text: str) -> str:
    """Return text with comments replaced by spaces."""
    return re.sub(
        r"//[^\n]*|/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.DOTALL
    )


def _closing(code: str, opening: int) -> int:
    """Return the position behind the bracket that closes the one at `opening`."""
    pairs = {"(": ")", "{": "}"}
    depth = 0
    for i in range(opening, len(code)):
        depth += (code[i] == code[opening]) - (code[i] == pairs[code[opening]])
        if depth == 0:
            return i + 1
    return len(code)


def _parameters(where: str, text: str) -> tuple[Parameter, ...]:
    parameters = []
    for part in text.split(","):
        match = _PARAMETER.fullmatch(part.strip())
        if match is None:
            msg = f"{where}: a parameter must be 'type name [[attribute]]', got {part.strip()!r}"
            raise SourceError(msg)
        kind = " ".join(match["type"].split())
        attribute, _, index = match["attribute"].rstrip(")").partition("(")
        parameter = Parameter(kind, match["name"], attribute, int(index) if index else None)
        if attribute == "buffer":
            pointer = re.fullmatch(r"(device (const )?\w+ ?\*|constant \w+ ?[&*])", kind)
            if pointer is None or parameter.index is None:
                msg = f"{where}: a buffer must be a device pointer or a constant, got {kind!r}"
                raise SourceError(msg)
        elif kind not in BUILTINS.get(attribute, ()):
            msg = f"{where}: {kind} {match['name']} can't be [[{match['attribute']}]]"
            raise SourceError(msg)
        parameters.append(parameter)
    buffers = [p for p in parameters if p.index is not None]
    if [p.index for p in buffers] != list(range(len(buffers))) or parameters[
        : len(buffers)
    ] != buffers:
        msg = f"{where}: buffers must come first and count from 0, got {[p.index for p in buffers]}"
        raise SourceError(msg)
    order = [2 if p.type.startswith("constant ") else 0 if p.is_constant else 1 for p in buffers]
    if order != sorted(order):
        msg = f"{where}: inputs must come first, then outputs, then constants"
        raise SourceError(msg)
    return tuple(parameters)


def read(path: Path) -> Source:
    """Read and check a source.

    Raises
    ------
    SourceError
        If a rule is broken.
    """
    text = path.read_text()
    code = blanked(text)
    kernels: dict[str, Kernel] = {}
    for match in _KERNEL.finditer(text):
        if code[match.end() - 1] != "(":
            continue  # in a comment
        line = text.count("\n", 0, match.start("name")) + 1
        where = f"{path.name}:{line}: {match['name']}"
        if not (re.search(r"^/// Grid: .", match["doc"], re.MULTILINE)) or not re.search(
            r"^/// Oracle: .", match["doc"], re.MULTILINE
        ):
            msg = f"{where}: the comment of a kernel must have 'Grid:' and 'Oracle:'"
            raise SourceError(msg)
        if match["name"] in kernels:
            msg = f"{where}: a kernel must be defined once"
            raise SourceError(msg)
        close = _closing(code, match.end() - 1)
        body = code.index("{", close)
        kernels[match["name"]] = Kernel(
            name=match["name"],
            is_template=match["template"] is not None,
            parameters=_parameters(where, code[match.end() : close - 1]),
            line=line,
            begin=match.start("template")
            if match["template"]
            else text.index("[[kernel]]", match.start()),
            end=_closing(code, body),
        )
    if code.count("[[kernel]]") != len(kernels):
        msg = f"{path.name}: every kernel must be '[[kernel]] void name(...)', with its comment"
        raise SourceError(msg)
    instances: dict[str, tuple[Kernel, str | None]] = {
        name: (kernel, None) for name, kernel in kernels.items() if not kernel.is_template
    }
    for name, kind in _INSTANTIATE.findall(code):
        if name not in kernels or not kernels[name].is_template or kind not in WEIGHT_TYPES:
            msg = f"{path.name}: {name} for {kind} must be a template here and a type of weights"
            raise SourceError(msg)
        if f"{name}_{kind}" in instances:
            msg = f"{path.name}: {name} must be instantiated once for {kind}"
            raise SourceError(msg)
        instances[f"{name}_{kind}"] = (kernels[name], kind)
    for kernel in kernels.values():
        missing = [k for k in WEIGHT_TYPES if f"{kernel.name}_{k}" not in instances]
        if kernel.is_template and missing:
            msg = f"{path.name}: {kernel.name} must be instantiated for {', '.join(missing)}"
            raise SourceError(msg)
    return Source(path, text, code, kernels, instances)


def manifest(source: Source) -> dict[str, object]:
    """Return what the host has to know to call the kernels."""
    return {
        name: {"type": kind, "buffers": [asdict(p) for p in kernel.buffers]}
        for name, (kernel, kind) in source.instances.items()
    }


def as_cxx(source: Source) -> str:
    """Return the source as C++ whose kernels the emulator knows by name."""
    text = _INSTANTIATE.sub("", source.text)
    text = _THREADGROUP.sub(
        lambda m: (
            f"{m['indent']}static {m['type']} {m['name']}{m['size'] or ''}; "
            f"emulator::threadgroup_memory(&{m['name']}, sizeof({m['name']}));"
        ),
        text,
    )
    calls = []
    for name, (kernel, kind) in source.instances.items():
        arguments = []
        buffers = []
        for p in kernel.parameters:
            element = kind if p.element == "T" else p.element
            if p.index is None:
                arguments.append(f"call.{p.attribute}<{p.type}>()")
                continue
            is_reference = p.type.endswith("&")
            const = "const " if p.is_constant else ""
            arguments.append(
                f"{'*' if is_reference else ''}call.buffer<{const}{element}>({p.index})"
            )
            size = f"sizeof({element})" if is_reference else "0"
            buffers.append(f"{{{size}, alignof({element}), {str(not p.is_constant).lower()}}}")
        function = kernel.name if kind is None else f"{kernel.name}<{kind}>"
        calls.append(
            f'const emulator::Registration register_{name}{{"{name}", {{{", ".join(buffers)}}},\n'
            f"    [](const emulator::Call& call) {{ {function}({', '.join(arguments)}); }}}};\n"
        )
    return f'#line 1 "{source.path}"\n{text}\n#line 1 "calls"\nnamespace {{\n{"".join(calls)}}}\n'


def as_opencl(source: Source) -> str:
    """Return the source as C++ for OpenCL, whose compiler checks address spaces."""
    bodies = []
    last = 0
    for kernel in sorted(source.kernels.values(), key=lambda k: k.begin):
        bodies.append(source.text[last : kernel.begin])
        last = kernel.end
        head = source.text[kernel.begin : kernel.end]
        line = source.text.count("\n", 0, kernel.begin) + 1
        head = re.sub(r"template <typename T>\s*|\[\[kernel\]\]", "", head).lstrip()
        head = re.sub(r"\[\[[^\]]*\]\]", "", head)
        for p in kernel.buffers:
            if p.type.endswith("&"):  # a kernel of OpenCL can't take a reference
                opening = head.index("{")
                body = re.sub(rf"(?<![.\w]){p.name}\b", f"(*{p.name})", head[opening:])
                signature = re.sub(rf"& ?{p.name}\b", f"* {p.name}", head[:opening])
                head = signature + body
        for name, (other, kind) in source.instances.items():
            if other is kernel:
                text = head.replace(f"void {kernel.name}(", f"kernel void {name}(", 1)
                text = re.sub(r"\bT\b", kind, text) if kind else text
                bodies.append(f'\n#line {line} "{source.path.name}"\n{text}\n')
    bodies.append(source.text[last:])
    return _INSTANTIATE.sub("", "".join(bodies))


def main() -> int:
    """Check sources, and write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("--manifest", type=Path, help="write the buffers of all kernels as JSON")
    parser.add_argument("--cxx", type=Path, help="write the one source as C++ for the emulator")
    parser.add_argument("--opencl", type=Path, help="write the one source as C++ for OpenCL")
    arguments = parser.parse_args()
    try:
        sources = [read(path) for path in arguments.sources]
        names = [name for source in sources for name in source.instances]
        if len(set(names)) != len(names):
            msg = "a kernel must have a name of its own among all sources"
            raise SourceError(msg)
    except SourceError as error:
        print(f"msl: {error}", file=sys.stderr)
        return 1
    if arguments.manifest:
        merged = {k: v for source in sources for k, v in manifest(source).items()}
        arguments.manifest.write_text(json.dumps(merged, indent=2) + "\n")
    if arguments.cxx:
        arguments.cxx.write_text(as_cxx(sources[0]))
    if arguments.opencl:
        arguments.opencl.write_text(as_opencl(sources[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
