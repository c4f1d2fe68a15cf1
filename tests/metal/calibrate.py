"""Feed the shim sources that Apple's compiler is known to accept, and see that it accepts them.

They are headers of kernels out of the packages mlx-metal and torch. Those listed pass; others use
what ours do not, and the shim does not have: constructors of vectors, complex numbers, vectors of
bfloat, function constants.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
MLX = ("arange", "atomic", "bf16", "defines", "hadamard", "ternary_ops")
TORCH = ("atomic", "common", "error", "expm1f")


def main() -> int:
    """Compile each header by itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mlx", type=Path, help="folder that holds mlx/backend/metal/kernels")
    parser.add_argument("--torch", type=Path, help="folder that holds c10/metal")
    parser.add_argument("--compiler", default="clang++-19")
    arguments = parser.parse_args()
    headers = []
    if arguments.mlx:
        headers += [(arguments.mlx, f"mlx/backend/metal/kernels/{name}.h") for name in MLX]
    if arguments.torch:
        headers += [(arguments.torch, f"c10/metal/{name}.h") for name in TORCH]
    n_refused = 0
    for folder, header in headers:
        flags = ["-std=c++20", "-fsyntax-only", "-w", "-D__METAL_VERSION__=310", "-D__METAL__"]
        flags += [f"-I{HERE}", f"-I{HERE / 'shim'}", f"-I{folder}", "-x", "c++", "-"]
        text = f"#include <metal_stdlib>\nusing namespace metal;\n#include <{header}>\n"
        done = subprocess.run(
            [arguments.compiler, *flags], input=text, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            n_refused += 1
            print(f"{header}:\n{done.stderr}", file=sys.stderr)
    print(f"{len(headers)} headers, {n_refused} refused")
    return 1 if n_refused or not headers else 0


if __name__ == "__main__":
    sys.exit(main())
