"""Check the Metal sources as far as a compiler that is not Apple's can.

Reads them (msl.py), lets clang take them for C++ for OpenCL, whose address spaces are Metal's, and
looks through clang's syntax tree for what OpenCL allows and Metal does not.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msl

HERE = Path(__file__).parent
FLAGS = [
    *("-x", "clcpp", "-cl-std=CLC++2021", "-target", "spir64"),
    *("-Xclang", "-finclude-default-header", "-D__METAL_VERSION__=310"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Werror", "-fsyntax-only"),
]
PRAGMAS = ("#pragma METAL fp math_mode(safe)", "#pragma METAL fp contract(off)")


def text_problems(path: Path) -> Iterator[str]:
    """Say what is wrong with the text of a source or header."""
    text = path.read_text()
    code = msl.blanked(text)
    for number, line in enumerate(code.splitlines(), 1):
        if re.search(r"mem_flags::(?!mem_threadgroup\b)", line):
            yield f"{path.name}:{number}: a barrier must order threadgroup memory"
        if re.search(r"\b(fast::|half_|atomic_float\b|sincos|goto\b)", line):
            yield f"{path.name}:{number}: not for kernels that must be exact: {line.strip()}"
    if path.suffix == ".metal" and '#include "numeric.h"' not in text:
        yield f"{path.name}: must include numeric.h, which forbids contraction"
    if path.name == "numeric.h":
        yield from (f"{path.name}: must say {pragma}" for pragma in PRAGMAS if pragma not in text)


def own_declarations(tree: dict[str, Any], folder: Path) -> Iterator[tuple[dict[str, Any], bool]]:
    """Give each declaration of our files, and whether it stands outside of functions."""
    file = ""

    def walk(node: dict[str, Any], is_outside: bool) -> Iterator[tuple[dict[str, Any], bool]]:
        nonlocal file
        places = [node.get("loc", {}), *node.get("range", {}).values()]
        for place in places:
            for part in (place, place.get("spellingLoc", {}), place.get("expansionLoc", {})):
                file = part.get("file", file)
        is_own = file.endswith(".clcpp") or Path(file).parent == folder
        kind = node.get("kind", "")
        if is_own and kind.endswith("Decl"):
            yield node, is_outside
        is_outside = is_outside and kind in ("TranslationUnitDecl", "NamespaceDecl")
        for child in node.get("inner", []):
            yield from walk(child, is_outside)

    yield from walk(tree, True)


def called(node: dict[str, Any]) -> Iterator[str]:
    """Give the ids of the functions that a function refers to."""
    other = node.get("referencedDecl", {})
    if other.get("kind", "").endswith(("FunctionDecl", "MethodDecl")):
        yield other["id"]
    for child in node.get("inner", []):
        yield from called(child)


def tree_problems(name: str, tree: dict[str, Any], folder: Path) -> Iterator[str]:
    """Say what the syntax tree holds that Metal has not."""
    calls: dict[str, set[str]] = {}
    names: dict[str, str] = {}
    for node, is_outside in own_declarations(tree, folder):
        kind, label = node["kind"], node.get("name", "")
        written = node.get("type", {}).get("qualType", "")
        if kind in ("VarDecl", "ParmVarDecl", "FieldDecl"):
            if label and "__generic" in written:
                yield f"{name}: the pointer {label} must have an address space"
            if re.search(r"\bdouble\b", written):
                yield f"{name}: {label} must not be a double"
        if kind == "VarDecl" and is_outside and "__constant" not in written:
            yield f"{name}: {label}, outside of functions, must be constant"
        if kind in ("FunctionDecl", "CXXMethodDecl"):
            names[node["id"]] = label
            calls[node["id"]] = set(called(node))
            if re.search(r"\bdouble\b", written):
                yield f"{name}: {label} must not take or return a double"
    for start in calls:
        reached: set[str] = set()
        new = set(calls[start])
        while new:
            reached |= new
            new = {c for r in new for c in calls.get(r, ())} - reached
        if start in reached:
            yield f"{name}: {names[start]} must not call itself"


def compiler_problems(path: Path, compiler: str, folder: Path) -> Iterator[str]:
    """Say what clang has against a source."""
    source = msl.read(path)
    translated = folder / f"{path.stem}.clcpp"
    translated.write_text(msl.as_opencl(source))
    includes = [f"-I{HERE / 'opencl'}", f"-I{path.parent}"]
    command = [compiler, *FLAGS, *includes, str(translated)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    if checked.returncode != 0:
        yield checked.stderr
        return
    dumped = subprocess.run(
        [*command, "-Xclang", "-ast-dump=json"], capture_output=True, text=True, check=True
    )
    yield from tree_problems(path.name, json.loads(dumped.stdout), path.parent)


def main() -> int:
    """Check all sources of a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--compiler", default="clang++-19")
    arguments = parser.parse_args()
    sources = sorted(arguments.folder.glob("*.metal"))
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for path in [*sources, *sorted(arguments.folder.glob("*.h"))]:
            problems += text_problems(path)
        for path in sources:
            try:
                problems += compiler_problems(path, arguments.compiler, Path(folder))
            except msl.SourceError as error:
                problems.append(str(error))
    names = [name for path in sources for name in _instances(path)]
    problems += sorted({f"{n} must be defined in one file" for n in names if names.count(n) > 1})
    for problem in dict.fromkeys(problems):
        print(problem, file=sys.stderr)
    print(f"{len(sources)} sources, {len(names)} kernels, {len(problems)} problems")
    return 1 if problems or not sources else 0


def _instances(path: Path) -> list[str]:
    try:
        return list(msl.read(path).instances)
    except msl.SourceError:
        return []


if __name__ == "__main__":
    sys.exit(main())
