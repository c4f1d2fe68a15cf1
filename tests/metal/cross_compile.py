"""Build the Python module for Macs with Apple silicon, from Linux, and look at what it needs there.

Compiles and links all that a wheel would, host and Metal's side included, with the compiler of the
PyPI package ziglang, which carries the system's own headers and stubs of its libraries. It can't be
run here. The symbols that the loader has to find must be on the list below.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import struct
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).parents[2]
TARGET = "aarch64-macos.13.0"
# What there is besides the system library: the Objective-C runtime, Metal and Foundation, Python.
ALLOWED = re.compile(
    r"_(_?Py\w+|_Py_\w+|MTL\w+|NS\w+"
    r"|objc_msgSend|objc_lookUpClass|objc_getProtocol|sel_registerName)"
)


def system_symbols() -> set[str]:
    """Return what the stub of the system library that ziglang carries names."""
    (package,) = importlib.util.find_spec("ziglang").submodule_search_locations
    (stub,) = Path(package).glob("lib/libc/darwin/libSystem.tbd")
    return set(re.findall(r"[\w$.]+", stub.read_text()))


# Functions that Metal has had since macOS 10.11. All else of it may be missing on an older system.
ALWAYS_THERE = {
    "_MTLCopyAllDevices",
    "_MTLCopyAllDevicesWithObserver",
    "_MTLCreateSystemDefaultDevice",
    "_MTLRemoveDeviceObserver",
}


def undefined_symbols(module: Path) -> dict[str, bool]:
    """Return what a Mach-O file of 64 bits leaves to the loader, and whether it may be missing."""
    data = module.read_bytes()
    magic, cpu, _, kind, n_commands = struct.unpack_from("<5I", data)
    if (magic, cpu) != (0xFEEDFACF, 0x0100000C) or kind not in (6, 8):
        sys.exit(f"{module} must be a Mach-O library for arm64")
    offset = 32
    names = {}
    for _ in range(n_commands):
        command, size = struct.unpack_from("<2I", data, offset)
        if command == 2:  # LC_SYMTAB
            symbols, n_symbols, strings, _ = struct.unpack_from("<4I", data, offset + 8)
            for i in range(n_symbols):
                name, flags, _, description = struct.unpack_from("<I2BH", data, symbols + 16 * i)
                if flags & 0x0E == 0 and flags & 0x01:  # undefined and external
                    end = data.index(b"\0", strings + name)
                    names[data[strings + name : end].decode()] = bool(description & 0x40)
        offset += size
    return names


def main() -> int:
    """Compile, link, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metal-cpp", type=Path, required=True)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "macos")
    parser.add_argument("--list", action="store_true", help="print all undefined symbols")
    arguments = parser.parse_args()
    build = arguments.build
    build.mkdir(parents=True, exist_ok=True)
    embedded = build / "metal_source.cpp"
    script = str(ROOT / "cmake" / "embed_metal.cmake")
    embed = ["cmake", f"-DOUT={embedded}", f"-DDIR={ROOT / 'metal'}", "-P", script]
    subprocess.run(embed, check=True)
    folders = ("bindings", "blob", "core", "kernels", "metal")
    sources = [path for f in folders for path in sorted((ROOT / "csrc" / f).glob("*.cpp"))]
    sources = [path for path in sources if path.name != "runtime_none.cpp"] + [embedded]
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", TARGET]
    flags = ["-std=c++20", "-O2", "-fno-sanitize=undefined", "-fblocks"]
    flags += ["-fvisibility=hidden", "-ffp-contract=off"]
    flags += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
    flags += ["-Wno-unknown-attributes", "-Wno-nullability-completeness", f"-I{ROOT / 'csrc'}"]
    for folder in (
        arguments.metal_cpp,
        Path(__file__).parent / "frameworks",
        pybind11.get_include(),
        sysconfig.get_path("include"),
    ):
        flags += ["-isystem", str(folder)]

    def compiled(source: Path) -> str:
        out = build / f"{source.parent.name}-{source.stem}.o"
        if not out.exists() or out.stat().st_mtime < newest:
            part = out.with_suffix(".part.o")
            subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(part)], check=True)
            part.replace(out)
        return str(out)

    inputs = [*ROOT.glob("csrc/**/*"), *ROOT.glob("metal/*")]
    newest = max(path.stat().st_mtime for path in inputs)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    module = build / "_core.so"
    link = ["-shared", "-undefined", "dynamic_lookup", *objects, "-o", str(module)]
    subprocess.run([*compiler, *link], check=True)
    names = undefined_symbols(module)
    if arguments.list:
        print("\n".join(sorted(names)))
    system = system_symbols()
    strange = sorted(n for n in names if n not in system and not ALLOWED.fullmatch(n))
    strange += [
        f"{name}, which older systems lack,"
        for name, may_be_missing in names.items()
        if name.startswith(("_MTL", "_NS")) and not may_be_missing and name not in ALWAYS_THERE
    ]
    needed = {"_objc_msgSend", "_MTLCreateSystemDefaultDevice"}
    for name in strange:
        print(f"{name} must not be needed", file=sys.stderr)
    for name in sorted(needed - names.keys()):
        print(f"{name} must be needed, or Metal is left out", file=sys.stderr)
    print(f"{module}: {len(names)} undefined symbols, {len(strange)} not allowed")
    return 1 if strange or not needed <= names.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
