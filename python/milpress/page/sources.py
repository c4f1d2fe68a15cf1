"""Files that a page is of: reports, evaluations, benchmarks and published tables."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from milpress.compression.report import Report
from milpress.device import files
from milpress.device.schema import Result
from milpress.errors import ResultError
from milpress.evaluation.results import Evaluation
from milpress.plain.structure import Metric, structured

VERSION = 1
LITERATURE_SCHEMA = "milpress-literature/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedTable:
    """A table that somebody else published."""

    title: str
    source: str
    device: str
    method: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Literature:
    """Tables that somebody else published: nothing in them was measured here."""

    schema: str
    publisher: str
    tables: tuple[PublishedTable, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Derived:
    """What a report of a package or a weight says besides its fields; it is computed anew."""

    bits_per_weight: float
    snr_db: Metric | None
    asked: int = 0
    compressed: int = 0
    left: int = 0
    ratio: float = 0.0


Content: TypeAlias = Report | Evaluation | Result | Literature


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file that the page is of."""

    name: str
    sha256: str
    content: Content

    @property
    def what(self) -> str:
        """What it holds, in a word."""
        return {
            Report: "compression report",
            Evaluation: "evaluation",
            Result: "benchmark",
            Literature: "published tables",
        }[type(self.content)]


def read(path: Path) -> Source:
    """Read a file.

    Raises
    ------
    ResultError
        If it is none of those that are known, or is damaged.
    PackageNotFoundError
        If nothing is there.
    """
    data, digest = files.read_json(path)
    return Source(name=path.name, sha256=digest, content=_content(data, str(path)))


def _content(data: Any, place: str) -> Content:
    keys = set(data) if isinstance(data, dict) else set()
    if keys and data.get("schema") == LITERATURE_SCHEMA:
        literature: Literature = structured(data, Literature, place)
        for table in literature.tables:
            if any(len(row) != len(table.columns) for row in table.rows):
                n = len(table.columns)
                msg = f"{place}: not every row of {table.title!r} has {n} cells"
                raise ResultError(msg)
        return literature
    if str(data.get("schema") if keys else "").startswith("milpress-bench/"):
        return files.parse(data, place)
    if {"original", "compressed", "outputs"} <= keys:
        _check_version(data, place)
        evaluation: Evaluation = structured(data, Evaluation, place, strict=False)
        _check_counts(evaluation, place)
        return evaluation
    if {"source", "destination", "weights"} <= keys:
        _check_version(data, place)
        # What became of activations is on no page.
        report: Report = structured({**data, "activations": None}, Report, place, strict=False)
        _check_counts(report, place)
        _check_counts(structured(data, _Derived, place, strict=False), place)
        for i, weight in enumerate(report.weights):
            at = f"{place}: weights[{i}]"
            _check_counts(weight, at)
            _check_counts(structured(data["weights"][i], _Derived, at, strict=False), at)
            if min(weight.shape, default=1) < 1:
                msg = f"{at}: shape must be of sizes of at least 1, got {list(weight.shape)}"
                raise ResultError(msg)
        return report
    msg = (
        f"{place}: a report must be of what `milpress compress --json`, `evaluate --json` or "
        f"`bench` wrote, got {'another object' if keys else type(data).__name__}"
    )
    raise ResultError(msg)


def _check_version(data: dict[str, Any], place: str) -> None:
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        msg = (
            f"{place}: version must be {VERSION}, got {version!r}; make the report again with this "
            "milpress"
        )
        raise ResultError(msg)


def _check_counts(content: Any, place: str) -> None:
    """Refuse negative counts, sizes and bits, which nothing has."""
    for item in fields(content):
        value = getattr(content, item.name)
        is_number = type(value) is int or (type(value) is float and item.name != "snr_db")
        if is_number and value < 0:
            msg = f"{place}: {item.name} must be at least 0, got {value}"
            raise ResultError(msg)
