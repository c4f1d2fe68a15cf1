"""What must hold of a result, above all of where its numbers come from.

Each rule yields one sentence for each breach.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, TypeAlias

from milpress.device import stats
from milpress.device.schema import (
    APPLE_UNITS,
    FAKE_UNITS_PREFIX,
    INTERPRETER_UNITS,
    PROCESSORS,
    Distribution,
    Entry,
    Kind,
    Result,
)

Rule: TypeAlias = Callable[[Result], Iterator[str]]

# The drivers whose numbers may be of a kind.
_DRIVERS: dict[Kind, tuple[str, ...]] = {
    "measured": ("coreml", "iphone"),
    "cpu_reference": ("interpreter",),
    "estimate": ("estimate",),
    "replay": ("replay",),
    "fake": ("fake", "coreml", "iphone"),
}
# What only a device can tell.
_DEVICE_SECTIONS = (
    "throughput",
    "placement",
    "memory",
    "thermal",
    "energy",
    "parity",
    "decompression",
)
_DEVICE_TIMES = ("package_compile", "load_cached", "core")
_SYSTEMS = {"coreml": "macOS ", "iphone": "iOS "}


def problems(result: Result) -> list[str]:
    """Return every breach of every rule."""
    return [problem for rule in RULES for problem in rule(result)]


def only_known_drivers_make_a_kind(result: Result) -> Iterator[str]:
    """Measured numbers are Core ML's, from a Mac."""
    kind, driver = result.provenance.kind, result.provenance.driver
    if driver not in _DRIVERS[kind]:
        yield f"a result of kind {kind} must be by {' or '.join(_DRIVERS[kind])}, got {driver}"
    if kind == "measured" and result.host.system != "Darwin":
        yield f"a measured result must be from a Mac (Darwin), got {result.host.system}"


def a_replay_names_what_it_replays(result: Result) -> Iterator[str]:
    """Require hash and kind of its origin of a replay, and of nothing else."""
    kind, origin = result.provenance.kind, result.provenance.origin
    if kind != "replay":
        if origin is not None:
            yield f"only a replay must have an origin, not a result of kind {kind}"
        return
    if origin is None:
        yield "a replay must name its origin"
        return
    if origin.kind in ("replay", "estimate"):
        yield f"a replay must be of something that ran, got {origin.kind}"
    if not re.fullmatch("[0-9a-f]{64}", origin.sha256):
        yield f"the origin of a replay must have a SHA-256, got {origin.sha256!r}"


def only_measured_results_have_a_device(result: Result) -> Iterator[str]:
    """Allow a device if, and only if, something was measured on it."""
    is_measured = result.provenance.effective == "measured"
    if result.device is None:
        if is_measured:
            yield "a measured result must describe its device"
        return
    if not is_measured:
        yield f"a device must be that of a measured result, got {result.provenance.effective}"
    system = _SYSTEMS.get(result.provenance.driver, "")
    if not result.device.os.startswith(system or ("macOS ", "iOS ")):
        yield f"the system of a device must be {system or 'macOS or iOS'}, got {result.device.os!r}"


def only_measured_entries_have_device_fields(result: Result) -> Iterator[str]:
    """Placement, memory, thermal state and the like are a device's."""
    effective = result.provenance.effective
    if effective == "measured":
        return
    for entry in result.entries:
        for name in _DEVICE_SECTIONS:
            if getattr(entry, name) is not None:
                yield f"{entry.id}: {name} must be measured on a device, got {effective}"
        if effective == "fake":
            continue
        for name in _DEVICE_TIMES:
            if entry.timing is not None and getattr(entry.timing, name):
                yield f"{entry.id}: timing.{name} must be Core ML's, got {effective}"


def units_are_named_after_what_ran(result: Result) -> Iterator[str]:
    """Core ML's names of compute units stand for Core ML alone."""
    effective = result.provenance.effective
    for entry in result.entries:
        units = entry.settings.compute_units
        if effective in ("measured", "estimate"):
            is_right, wanted = units in APPLE_UNITS, f"one of {', '.join(APPLE_UNITS)}"
        elif effective == "cpu_reference":
            is_right, wanted = units == INTERPRETER_UNITS, INTERPRETER_UNITS
        else:
            is_right, wanted = units.startswith(FAKE_UNITS_PREFIX), f"{FAKE_UNITS_PREFIX}..."
        if not is_right:
            yield f"{entry.id}: compute_units of {effective} must be {wanted}, got {units}"


def every_number_says_its_kind(result: Result) -> Iterator[str]:
    """Require the run's kind of each section; accuracy is a reference, an estimate an estimate."""
    for entry in result.entries:
        for item in fields(Entry):
            section = getattr(entry, item.name)
            if not hasattr(section, "kind"):
                continue
            wanted = {"accuracy": "cpu_reference", "estimate": "estimate"}.get(
                item.name, result.provenance.kind
            )
            if section.kind != wanted:
                yield f"{entry.id}: the kind of {item.name} must be {wanted}, got {section.kind}"


def estimates_have_fields_of_their_own(result: Result) -> Iterator[str]:
    """Refuse times in a run of estimates."""
    if result.provenance.kind != "estimate":
        return
    for entry in result.entries:
        if entry.timing is not None:
            yield f"{entry.id}: an estimate must have estimate_ms and no timing"


def a_neural_engine_is_there_if_it_is_named(result: Result) -> Iterator[str]:
    """Nothing runs on, or is planned for, a Neural Engine that Core ML does not offer."""
    if result.device is None or result.device.has_neural_engine:
        return
    if result.device.neural_engine_cores:
        yield "a device without Neural Engine must have no cores of it"
    for entry in result.entries:
        if entry.placement is not None and entry.placement.counts["neural_engine"]:
            yield f"{entry.id}: ops are placed on a Neural Engine, which the device does not have"
        if entry.energy is not None and entry.energy.neural_engine_mw is not None:
            yield f"{entry.id}: power is given of a Neural Engine, which the device does not have"


def statistics_follow_from_samples(result: Result) -> Iterator[str]:
    """No median without the samples that it is the median of."""
    for entry in result.entries:
        for name in ("core", "e2e"):
            times: Distribution | None = getattr(entry.timing, name, None)
            if times is None:
                continue
            place = f"{entry.id}: timing.{name}"
            sizes = times.round_sizes
            if (
                not times.samples
                or any(size < 1 for size in sizes)
                or sum(sizes) != len(times.samples)
                or len(set(times.rounds)) != len(times.rounds)
                or len(sizes) != len(times.rounds)
            ):
                yield f"{place}: rounds must hold each of {len(times.samples)} samples once"
                continue
            for key, right in stats.order_statistics(times.samples).items():
                given = getattr(times, key)
                # Other versions of NumPy may add up in another order: two ulps.
                if not math.isclose(given, right, rel_tol=2**-51):
                    yield f"{place}.{key} must be {right}, as the samples say, got {given}"
            low, high = times.ci95
            if not times.minimum <= low <= high <= times.maximum:
                yield f"{place}.ci95 must be an interval within the samples, got {low} to {high}"


def numbers_are_possible(result: Result) -> Iterator[str]:
    """Nothing takes negative time or memory; shares are shares."""
    for entry in result.entries:
        for name in ("model", "timing", "throughput", "memory", "energy", "estimate"):
            for key, number in _numbers(getattr(entry, name)):
                if number < 0:
                    yield f"{entry.id}: {name}.{key} must be at least 0, got {number}"
        for op in entry.placement.ops if entry.placement is not None else ():
            unknown = {op.preferred, *op.supported} - set(PROCESSORS)
            if unknown:
                yield f"{entry.id}: a processor must be one of {PROCESSORS}, got {unknown}"
            if op.cost is not None and not 0 <= op.cost <= 1:
                yield f"{entry.id}: the cost of an op must be from 0 to 1, got {op.cost}"


def an_entry_has_figures_or_a_failure(result: Result) -> Iterator[str]:
    """Require a reason of what failed, and a latency of what did not."""
    for entry in result.entries:
        if entry.status == "failed":
            if entry.failure is None:
                yield f"{entry.id}: a failed entry must say why, as failure"
            if entry.latency is not None:
                yield f"{entry.id}: a failed entry must have no latency"
        else:
            if entry.failure is not None:
                yield f"{entry.id}: only a failed entry must have a failure"
            if entry.latency is None and entry.estimate is None:
                yield f"{entry.id}: an entry must have a latency or an estimate"


def entries_are_told_apart(result: Result) -> Iterator[str]:
    """No two entries have the same id."""
    names = [entry.id for entry in result.entries]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"several entries have the id {name!r}"


RULES: tuple[Rule, ...] = (
    only_known_drivers_make_a_kind,
    a_replay_names_what_it_replays,
    only_measured_results_have_a_device,
    only_measured_entries_have_device_fields,
    units_are_named_after_what_ran,
    every_number_says_its_kind,
    estimates_have_fields_of_their_own,
    a_neural_engine_is_there_if_it_is_named,
    statistics_follow_from_samples,
    numbers_are_possible,
    an_entry_has_figures_or_a_failure,
    entries_are_told_apart,
)


def _numbers(section: Any) -> Iterator[tuple[str, float]]:
    for item in fields(section) if section is not None else ():
        value = getattr(section, item.name)
        if isinstance(value, Distribution):
            yield f"{item.name}.samples", min(value.samples, default=0.0)
        elif isinstance(value, tuple):
            yield from ((item.name, each) for each in value if isinstance(each, (int, float)))
        elif isinstance(value, (int, float)):
            yield item.name, value
