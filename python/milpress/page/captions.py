"""What a page says of its numbers, the same in HTML and in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from milpress.device.comparison import device_words
from milpress.device.schema import Kind, Result
from milpress.evaluation.results import Evaluation
from milpress.page.collect import Page
from milpress.page.sources import Literature

KIND_NAMES: dict[Kind, str] = {
    "measured": "Measured",
    "cpu_reference": "CPU reference",
    "estimate": "Estimate",
    "replay": "Replay",
    "fake": "Fake",
}
PROCESSOR_NAMES = {
    "neural_engine": "Neural Engine",
    "gpu": "GPU",
    "cpu": "CPU",
    "none": "no device (constants)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Banner:
    """A sentence that must not be missed, and what it is about."""

    kind: str
    name: str
    text: str


def banners(page: Page) -> Iterator[Banner]:
    """Yield what a reader must know of where the numbers come from."""
    for result in page.results:
        yield _result_banner(result)
        for warning in result.warnings:
            yield Banner(kind="caution", name="Caution", text=warning)
    if any(package.is_random for package in page.packages):
        yield Banner(
            kind="caution",
            name="Random inputs",
            text="Accuracy was computed on random inputs, which say little of real ones.",
        )
    others = [package.name for package in page.packages if not package.is_comparable]
    if others:
        yield Banner(
            kind="caution",
            name="Accuracy left out",
            text=f"The accuracy of {', '.join(others)} is of other samples than the rest.",
        )
    if page.contents(Evaluation) and not page.results:
        yield Banner(
            kind="info",
            name="No latencies",
            text="Accuracy is the interpreter's, on a CPU; nothing here was run on a device.",
        )
    for literature in page.contents(Literature):
        yield Banner(
            kind="info",
            name="Published",
            text=f"Tables by {literature.publisher} stand apart at the end. "
            "Nothing in them was measured here, and they are of other models.",
        )


def _result_banner(result: Result) -> Banner:
    kind, where = result.provenance.kind, device_words(result)
    texts = {
        "measured": f"Latencies are Core ML's on {where}. Placement is Core ML's plan, which is "
        "what it anticipates.",
        "cpu_reference": f"Latencies are of milpress' interpreter, on {where}. They are a "
        "reference for the harness and say nothing of an iPhone, a Mac or a Neural Engine.",
        "estimate": "Latencies are estimates, not measured.",
        "fake": "Latencies are invented, by a driver for tests. Don't use them for anything.",
    }
    text = texts.get(kind, "")
    if kind == "replay" and result.provenance.origin is not None:
        origin = result.provenance.origin
        what = KIND_NAMES[origin.kind].lower()
        text = (
            f"Recorded numbers ({what}, on {where}) played again from {origin.name}, "
            f"SHA-256 {origin.sha256[:16]}. Nothing was run for this."
        )
        if origin.kind == "fake":
            text += " What was recorded is fake."
    return Banner(kind=kind, name=KIND_NAMES[kind], text=text)


def notes(page: Page) -> list[str]:
    """Return what runs warned of, each once with the number of entries that it is of."""
    counts = Counter(
        warning for result in page.results for entry in result.entries for warning in entry.warnings
    )
    return [f"{text} ({n} configurations)" for text, n in counts.items()]
