"""Build the Python module for Macs with Apple silicon, from Linux, and look at what it needs there.

Compiles and links all that a wheel would, host and Metal's side included, with the compiler of the
PyPI package ziglang, which carries the system's own headers and stubs of its libraries. It can't be
run here. The symbols that the loader has to find must be on the list below.
"""

from __future__ import annotations

import argparse
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
# Of the C and C++ libraries, the Objective-C runtime, Metal with Foundation, and Python.
ALLOWED = re.compile(
    r"_(Py|_Py|objc_(msgSend|lookUpClass|getProtocol)$|sel_registerName$|MTL|NS|_NSConcrete"
    r"|_Block_object_(assign|dispose)$|_Unwind_|_cxa_|_gxx_personality_v0$|__cxa_|__gxx_|__Unwind_|_Z"
    r"|(mem(chr|cmp|cpy|move|set)|bzero|_bzero|str(len|cmp|ncmp|chr|dup|toul|error_r|error)|free|malloc|realloc"
    r"|calloc|abort|exp2?f?|log2?f?|ldexpf?|nextafterf?|nearbyintf?|rintf?|fma|ilogbf?|open|close"
    r"|read|write|pread|pwrite|lseek|fstat|ftruncate|mmap|munmap|madvise|fsync|unlink|rename|dlsym"
    r"|getenv|sysconf|strtol|sprintf|snprintf|_?_?error|__error|_memset_pattern16|memset_pattern16"
    r"|pthread_\w+|sched_yield|_tlv_bootstrap|tlv_bootstrap|__stack_chk_\w+|_stack_chk_\w+|__assert_rtn|_assert_rtn"
    r"|dyld_stub_binder|posix_memalign|aligned_alloc|fputs|fputc|fwrite|fprintf|fflush|vfprintf"
    r"|_stderrp|__stderrp|_maskrune|__maskrune|isxdigit|isdigit|write|strtod|strtof|fmodf?|lroundf?|floorf?|ceilf?)$)"
)


def undefined_symbols(module: Path) -> set[str]:
    """Return what a Mach-O file of 64 bits leaves to the loader."""
    data = module.read_bytes()
    magic, cpu, _, kind, n_commands = struct.unpack_from("<5I", data)
    if (magic, cpu) != (0xFEEDFACF, 0x0100000C) or kind not in (6, 8):
        sys.exit(f"{module} must be a Mach-O library for arm64")
    offset = 32
    names = set()
    for _ in range(n_commands):
        command, size = struct.unpack_from("<2I", data, offset)
        if command == 2:  # LC_SYMTAB
            symbols, n_symbols, strings, _ = struct.unpack_from("<4I", data, offset + 8)
            for i in range(n_symbols):
                name, flags = struct.unpack_from("<IB", data, symbols + 16 * i)
                if flags & 0x0E == 0 and flags & 0x01:  # undefined and external
                    end = data.index(b"\0", strings + name)
                    names.add(data[strings + name : end].decode())
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
            subprocess.run([*compiler, *flags, "-c", str(source), "-o", str(out)], check=True)
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
    strange = sorted(name for name in names if not ALLOWED.match(name))
    needed = {"_objc_msgSend", "_MTLCreateSystemDefaultDevice"}
    for name in strange:
        print(f"{name} must not be needed", file=sys.stderr)
    for name in sorted(needed - names):
        print(f"{name} must be needed, or Metal is left out", file=sys.stderr)
    print(f"{module}: {len(names)} undefined symbols, {len(strange)} not allowed")
    return 1 if strange or not needed <= names else 0


if __name__ == "__main__":
    sys.exit(main())
