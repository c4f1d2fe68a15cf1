"""Metrics of accuracy: what each is called, and which way is better."""

from __future__ import annotations

import math
from dataclasses import dataclass

from milpress.show import human_snr


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of an output; ``name`` is its field in JSON."""

    name: str
    short: str
    more_is_better: bool

    def words(self, value: float) -> str:
        """Return a value as people read it."""
        if math.isnan(value):
            return "not a number"
        if self.name == "snr_db":
            return human_snr(value) if math.isfinite(value) or value > 0 else "none"
        if not math.isfinite(value):
            return "infinite"
        return {"top1": f"{value:.1%}", "cosine": f"{value:.6f}"}.get(self.name, f"{value:.4g}")


METRICS = (
    Metric("snr_db", "SNR, dB", more_is_better=True),
    Metric("top1", "top-1", more_is_better=True),
    Metric("cosine", "cosine", more_is_better=True),
    Metric("kl", "KL, nats", more_is_better=False),
    Metric("max_error", "max error", more_is_better=False),
)
