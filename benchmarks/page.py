"""The picture of README.md: the report page of a suite, run on tones on this machine's CPU.

``python -m benchmarks.page`` writes ``docs/images/report.png``; it wants Chromium.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from examples.demo import packages

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "report.png"
_RATE, _FRAME = 16_000, 1024  # of CREPE's input: samples a second, samples a frame
_N_TONES = 48
_CHROMIUM = "chromium"
# The head of the page and its first chart.
_SIZE = "1180,1010"


def tones() -> np.ndarray:
    """Return frames of tones with overtones and noise, normalized as CREPE wants them."""
    rng = np.random.default_rng(0)
    pitches = 55 * 2 ** rng.uniform(0, 4, (_N_TONES, 1))
    phases = 2 * np.pi * pitches * np.arange(_FRAME) / _RATE
    frames = sum(np.sin(k * phases + rng.uniform(0, 6)) / k for k in range(1, 7))
    frames = frames + 0.05 * rng.standard_normal(frames.shape)
    frames -= frames.mean(1, keepdims=True)
    return np.asarray(frames / frames.std(1, keepdims=True), np.float32)


def main() -> None:
    """Run the suite, and draw the top of its page."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "tones.npz", frames=tones()[:, None])
        suite = [*("bench", "suite", str(packages()["full"]), "-o", str(folder / "bench"))]
        once = [*("--warmup", "1", "--round", "5", "--min-rounds", "1", "--max-rounds", "1")]
        data = [*("--driver", "interpreter", "--data", str(folder / "tones.npz"))]
        milpress = [sys.executable, "-m", "milpress"]
        subprocess.run([*milpress, *suite, *once, *data], check=True)
        bench = folder / "bench"
        sources = [bench / "results.json", *sorted((bench / "reports").glob("*.json"))]
        page = [*("-o", str(folder / "page.html")), *("--title", "CREPE, compressed in 13 ways")]
        subprocess.run([*milpress, "report", *map(str, sources), *page], check=True)
        PICTURE.parent.mkdir(exist_ok=True)
        browser = [_CHROMIUM, "--headless", "--no-sandbox", "--hide-scrollbars"]
        shot = [f"--window-size={_SIZE}", f"--screenshot={PICTURE}"]
        subprocess.run([*browser, *shot, str(folder / "page.html")], check=True)


if __name__ == "__main__":
    main()
