"""Driver that plays the samples of a recorded result."""

from __future__ import annotations

import itertools
from typing import Any

from milpress.device.drivers import Driver
from milpress.device.schema import Entry, Timing
from milpress.plain.arrays import Arrays


class ReplayDriver(Driver):
    """Plays one entry of a result, in this process: nothing is loaded or run.

    Parameters
    ----------
    entry
        What was recorded. Warm-up was discarded then, so the first sample stands in for it.
    """

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self._timing = entry.timing or Timing(kind="replay")
        self._played = 0
        self._is_warm = False

    def describe(self) -> dict[str, Any]:
        """Return that this is a replay."""
        return {"kind": "replay", "device": None, "tool": {}}

    def compile(self, package: str, units: str, folder: str) -> dict[str, Any]:
        """Return the recorded time."""
        del units, folder
        return {"ms": self._timing.package_compile, "path": package}

    def load(self, path: str, units: str) -> dict[str, Any]:
        """Return the recorded time of the first load."""
        del path, units
        return {"ms": self._timing.load_first}

    def feed(self, inputs: str) -> dict[str, Any]:
        """Take nothing."""
        del inputs
        return {}

    def predict(self, n: int) -> dict[str, Any]:
        """Return the next recorded samples."""
        core, e2e = self._timing.core, self._timing.e2e
        if not self._is_warm:
            self._is_warm = True
            first = [self._timing.predict_first or 0.0] * n
            return {"core_ms": first if core else None, "e2e_ms": first}
        taken = slice(self._played, self._played + n)
        self._played += n
        samples = e2e or core
        return {
            "core_ms": list(itertools.islice(core.samples, taken.start, taken.stop))
            if core
            else None,
            "e2e_ms": list(samples.samples[taken]) if samples else [],
        }

    def output(self, sample: Arrays) -> Arrays:
        """Return the sample: nothing is run."""
        return sample

    def outputs(self, path: str) -> dict[str, Any]:
        """Write nothing."""
        del path
        return {}
