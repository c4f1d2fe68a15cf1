"""A page as one HTML file: styles and script inside, nothing fetched, every string escaped.

The script gets its data as JSON and puts text into text nodes. A policy in the page allows just
that script and those styles, by their hashes, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

from milpress._version import __version__
from milpress.device.comparison import units_words
from milpress.device.schema import PROCESSORS, Entry, Placement
from milpress.errors import printable
from milpress.page import words
from milpress.page.collect import (
    METRICS,
    Compression,
    Literature,
    OpMetrics,
    Page,
    PublishedTable,
)
from milpress.show import human_bytes, human_snr

_PROCESSOR_NAMES = {
    "neural_engine": "Neural Engine",
    "gpu": "GPU",
    "cpu": "CPU",
    "none": "no device (constants)",
}
# Rows beyond these are left out of tables of ops, and said to be.
_MOST_OPS = 400


def render(page: Page) -> str:
    """Return the page."""
    style, script = (_asset(name) for name in ("page.css", "page.js"))
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="milpress {_e(__version__)}">
<title>{_e(page.title)} - milpress report</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header class="top">
<div>
<p class="over">milpress report</p>
<h1>{_e(page.title)}</h1>
{_lead(page)}
</div>
<button type="button" id="theme">Dark</button>
</header>
<main>
{_banners(page)}
{_tiles(page)}
{_charts(page)}
{_packages(page)}
{_latencies(page)}
{_estimates(page)}
{_layers(page)}
{_errors(page)}
{_placements(page)}
{_failures(page)}
{_notes(page)}
{_published(page)}
</main>
{_footer(page)}
<div id="tip" role="status" hidden></div>
<script type="application/json" id="data">{_data(page)}</script>
<script>{script}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return resources.files("milpress.page").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _e(text: object) -> str:
    """Return text that is neither markup nor steers a terminal or the direction of writing."""
    return escape(printable(str(text)), quote=True)


def _data(page: Page) -> str:
    """Return what the script draws, such that no text in it can end the element that holds it."""
    families = {id(package): package.family for package in page.packages}
    groups = words.groups(page)
    numbers = {id(package): i for i, package in enumerate(page.packages)}
    found = {
        "metrics": [
            {
                "name": name,
                "short": words.SHORT_METRICS[name],
                "more": METRICS[name][1],
            }
            for name in words.metrics(page)
        ],
        "packages": [
            {
                "name": printable(package.name),
                "treatment": printable(package.treatment),
                "family": families[id(package)],
                "bytes": package.n_bytes,
                "ratio": package.ratio,
                "bits": package.compression.bits_per_weight if package.compression else None,
                "metrics": {name: _number(value) for name, value in package.metrics.items()},
                "metricsSource": package.metrics_source,
            }
            for package in page.packages
        ],
        "groups": [
            {
                "id": f"latency-{i}",
                "title": printable(group.title),
                "axis": group.axis,
                "stamp": group.stamp,
                "kindText": words.KIND_NAMES[group.kind],
                "runs": [
                    {
                        "package": numbers[id(run.package)],
                        "run": printable(run.name),
                        "median": run.latency.median,
                        "ci95": list(run.latency.ci95),
                        "p90": run.latency.p90,
                        "p99": run.latency.p99,
                        "n": len(run.latency.samples),
                    }
                    for run in group.runs
                ],
            }
            for i, group in enumerate(groups)
        ],
        "compressions": [
            {
                "family": families[id(package)],
                "weights": [
                    {
                        "name": printable(weight.name),
                        "ops": printable(", ".join(weight.op_types)),
                        "shape": "x".join(map(str, weight.shape)),
                        "status": printable(weight.status),
                        "treatment": printable(weight.treatment),
                        "note": printable(weight.note),
                        "bits": weight.bits_per_weight,
                        "snr": None if weight.snr_db is None else _number(weight.snr_db),
                        "after": weight.bytes_after,
                    }
                    for weight in package.compression.weights
                    if weight.status != "not asked"
                ],
            }
            for package in page.packages
            if package.compression is not None
        ],
    }
    text = json.dumps(found, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _lead(page: Page) -> str:
    originals = [package for package in page.packages if package.is_original]
    n_made = len(page.packages) - len(originals)
    parts = []
    if n_made:
        parts.append(f"{n_made} compressed package{'s' * (n_made != 1)}")
    if page.results:
        created = max(result.created for result in page.results)
        parts.append(f"last run {_e(created[:16].replace('T', ' '))}")
    return f'<p class="lead">{", ".join(parts)}</p>' if parts else ""


def _banners(page: Page) -> str:
    rows = [
        f'<div class="banner {_e(banner.kind)}" role="note"><b>{_e(banner.name)}</b>'
        f"<p>{_e(banner.text)}</p></div>"
        for banner in words.banners(page)
    ]
    return f'<div class="banners">{"".join(rows)}</div>' if rows else ""


def _tiles(page: Page) -> str:
    made = [package for package in page.packages if package.ratio and not package.is_original]
    tiles = []
    if made:
        smallest = min(made, key=lambda package: package.n_bytes or 0)
        before = human_bytes(smallest.original_bytes or 0)
        size, _, unit = human_bytes(smallest.n_bytes or 0).partition(" ")
        tiles.append(
            _tile(
                "Smallest package",
                f"{size} <small>{unit}</small>",
                f"{smallest.name}: {smallest.ratio:.1f}x smaller than {before}",
            )
        )
        names = words.metrics(page)
        closest = [package for package in made if names and names[0] in package.metrics]
        if closest:
            name = names[0]
            sign = 1 if METRICS[name][1] else -1
            best = max(closest, key=lambda package: sign * package.metrics[name])
            shown = words.metric_words(name, best.metrics[name])
            unit = "dB" if name == "snr_db" and shown != "exact" else ""
            size = human_bytes(best.n_bytes or 0)
            tiles.append(
                _tile(
                    "Closest to the original",
                    f"{_e(shown)} <small>{unit}</small>",
                    f"{best.name}, {size}, {best.ratio:.1f}x smaller",
                )
            )
    measured = [
        (run, group)
        for group in words.groups(page)
        if group.kind == "measured"
        for run in group.runs
    ]
    if measured:
        run, group = min(measured, key=lambda found: found[0].latency.median)
        tiles.append(
            _tile(
                "Fastest prediction",
                f"{run.latency.median:.3g} <small>ms</small>",
                f"{run.package.name}, {group.title}, measured on {group.where}",
            )
        )
    n_weights = sum(
        weight.status == "compressed"
        for content in page.contents(Compression)
        for weight in content.weights
    )
    if n_weights and len(tiles) < 4:
        reports = page.contents(Compression)
        n_verified = sum(content.verified for content in reports)
        tiles.append(
            _tile(
                "Weights compressed",
                f"{n_weights:,}",
                f"in {len(reports)} packages, {n_verified} of them read back and verified",
            )
        )
    runs = [entry for result in page.results for entry in result.entries if not entry.estimate]
    if runs and len(tiles) < 4:
        n_failed = sum(entry.status == "failed" for entry in runs)
        tiles.append(
            _tile(
                "Configurations run",
                f"{len(runs) - n_failed} <small>of {len(runs)}</small>",
                f"{n_failed} failed" if n_failed else "none failed",
            )
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _tile(label: str, value: str, detail: str) -> str:
    """Return a tile; the value is markup already."""
    return (
        f'<div class="tile"><div class="label">{_e(label)}</div>'
        f'<div class="value">{value}</div><div class="detail">{_e(detail)}</div></div>'
    )


def _charts(page: Page) -> str:
    groups, metrics = words.groups(page), words.metrics(page)
    if not metrics:
        return ""
    buttons = "".join(
        f'<button type="button" data-value="{name}" aria-pressed="{str(i == 0).lower()}">'
        f"{_e(words.SHORT_METRICS[name])}</button>"
        for i, name in enumerate(metrics)
    )
    sizes = any(package.n_bytes is not None for package in page.packages)
    cards = []
    if sizes:
        cards.append(
            f'<div class="card{"" if len(groups) == 1 else " wide"}"><header><h3>Size against '
            'accuracy</h3></header><p class="sub">Up and left is better; the line joins '
            'what nothing beats in both</p><div id="size-chart"></div></div>'
        )
    for i, group in enumerate(groups):
        name = words.KIND_NAMES[group.kind]
        cards.append(
            f'<div class="card"><header><h3>Latency against accuracy: {_e(group.title)}</h3>'
            f'<span class="badge {group.kind}">{_e(name)}</span></header>'
            f'<p class="sub">{_e(group.where)}</p><div id="latency-{i}"></div></div>'
        )
    return f"""<section id="tradeoffs">
<h2>What compression buys, and what it costs</h2>
<p class="note">Accuracy compares outputs with the original's, both run by the interpreter. Whiskers
are 95 % intervals of the median. Point at a dot, or tab to it, for its numbers.</p>
<div class="toolbar">
<div class="group" data-choice="metric"><span>Accuracy</span>{buttons}</div>
<input type="search" id="filter" placeholder="Filter configurations" aria-label="Filter">
<div class="legend" id="legend"></div>
</div>
<div class="charts">{"".join(cards)}</div>
</section>"""


def _packages(page: Page) -> str:
    metrics = words.metrics(page)
    if not page.packages:
        return ""
    head = [("Package", ""), ("Treatment", ""), ("Size", "n"), ("Smaller", "n"), ("Bits", "n")]
    head += [(words.SHORT_METRICS[name], "n") for name in metrics]
    rows = []
    for package in page.packages:
        bits = package.compression.bits_per_weight if package.compression else None
        cells = [
            f'<td class="name"><i class="dotmark {package.family}"></i>{_e(package.name)}</td>',
            f'<td class="what">{_e(package.treatment)}</td>',
            _cell(package.n_bytes, None if package.n_bytes is None else human_bytes),
            _cell(package.ratio, lambda value: f"{value:.2f}x"),
            _cell(bits, lambda value: f"{value:.2f}"),
        ]
        for name in metrics:
            value = package.metrics.get(name)
            shown = words.metric_words(name, value)
            order = {math.inf: "1e300", -math.inf: "-1e300"}.get(value or 0.0, value)
            cells.append(
                f'<td class="n" data-v="{"" if value is None else order}">{_e(shown)}</td>'
            )
        search = _e(f"{package.name} {package.treatment}")
        rows.append(
            f'<tr data-family="{package.family}" data-search="{search}">{"".join(cells)}</tr>'
        )
    return f"""<section id="packages">
<h2>Packages</h2>
<p class="note">Bits count all that is stored for the weights that were asked for, tables and scales
included. <span id="shown"></span></p>
{_table(head, rows, identity="packages-table")}
</section>"""


def _cell(value: float | None, shown: Any) -> str:
    if value is None:
        return '<td class="n" data-v=""></td>'
    return f'<td class="n" data-v="{value}">{_e(shown(value))}</td>'


def _table(
    head: Sequence[tuple[str, str]],
    rows: Iterable[str],
    *,
    identity: str = "",
    sortable: bool = True,
) -> str:
    cells = "".join(
        f'<th scope="col" class="{kind}">{_e(name)}</th>'
        if kind
        else f'<th scope="col">{_e(name)}</th>'
        for name, kind in head
    )
    named = f' id="{identity}"' if identity else ""
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll"><table{named}{kind}><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _latencies(page: Page) -> str:
    groups = words.groups(page)
    if not groups:
        return ""
    parts = []
    for group in groups:
        parts.append(
            f'<div class="heading"><h3>{_e(group.title)}</h3><span class="badge {group.kind}">'
            f'{_e(words.KIND_NAMES[group.kind])}</span><span class="muted">{_e(group.where)}; '
            f"{_e(group.axis.partition(',')[0])}</span></div>"
        )
        is_device = group.effective == "measured"
        head = [("Package", "")]
        head += [(name, "n") for name in ("Median, ms", "95 % interval", "p90", "p99", "Samples")]
        head += [("First load, ms", "n")]
        if is_device:
            head += [("Cached", "n"), ("Compile", "n"), ("Per second", "n")]
            head += [("Memory", "n"), ("Parity, dB", "n")]
        rows = [_latency_row(run, is_device) for run in group.runs]
        parts.append(_table(head, rows))
    device = ""
    if any(group.effective == "measured" for group in groups):
        device = (
            " Loads are at a new path, and by new processes later; memory is what loading added to "
            "the process; parity is the ratio of the interpreter's output to the difference."
        )
    return f"""<section id="latencies">
<h2>Latency</h2>
<p class="note">Each table is of one kind of number, one machine and one choice of units; don't
compare across them. The first prediction and warm-up are left out.{device}</p>
{"".join(parts)}
</section>"""


def _estimates(page: Page) -> str:
    head = [("Configuration", ""), ("Estimate, ms", "n"), ("Method", ""), ("Source", "")]
    rows = [
        f'<tr><td class="name">{_e(entry.id)}</td>'
        f"{_cell(entry.estimate.estimate_ms, '{:.3g}'.format)}"
        f"<td>{_e(entry.estimate.method)}</td><td>{_e(entry.estimate.source)}</td></tr>"
        for entry in words.estimates(page)
        if entry.estimate is not None
    ]
    if not rows:
        return ""
    return f"""<section id="estimates">
<h2>Estimates <span class="badge estimate">Not measured</span></h2>
<p class="note">Nobody measured these. They stand in no chart.</p>
{_table(head, rows)}
</section>"""


def _latency_row(run: words.Run, is_device: bool) -> str:
    latency, timing, entry = run.latency, run.entry.timing, run.entry
    low, high = latency.ci95

    def number(value: float) -> str:
        return f"{value:.3f}" if value < 100 else f"{value:.1f}"

    cells = [
        f'<td class="name"><i class="dotmark {run.package.family}"></i>{_e(run.package.name)}'
        f"{f' <small>run {_e(run.name)}</small>' if run.name else ''}</td>",
        _cell(latency.median, number),
        f'<td class="n" data-v="{low}">{number(low)} to {number(high)}</td>',
        _cell(latency.p90, number),
        _cell(latency.p99, number),
        _cell(len(latency.samples), str),
        _cell(timing.load_first if timing else None, "{:.1f}".format),
    ]
    if is_device and timing is not None:
        cached = timing.load_cached
        cells += [
            _cell(sorted(cached)[len(cached) // 2] if cached else None, "{:.1f}".format),
            _cell(timing.package_compile, "{:.1f}".format),
            _cell(entry.throughput.per_second if entry.throughput else None, "{:.1f}".format),
            _cell(entry.memory.model if entry.memory else None, human_bytes),
            _cell(
                min(entry.parity.snr_db, 1e300) if entry.parity else None,
                lambda _: human_snr(entry.parity.snr_db) if entry.parity else "",
            ),
        ]
    return f"<tr>{''.join(cells)}</tr>"


def _layers(page: Page) -> str:
    made = [package for package in page.packages if package.compression is not None]
    if not made:
        return ""
    options = "".join(
        f'<option value="{i}">{_e(package.name)}</option>' for i, package in enumerate(made)
    )
    return f"""<section id="weights">
<h2>Weight by weight</h2>
<p class="note">What became of each weight that was asked for. The ratio is that of the decoded
weight to its error.</p>
<div class="toolbar">
<select id="layer-report" aria-label="Package">{options}</select>
<div class="group" data-choice="layers"><span>Order</span>
<button type="button" data-value="graph" aria-pressed="true">Graph</button>
<button type="button" data-value="bits" aria-pressed="false">Bits</button>
<button type="button" data-value="snr" aria-pressed="false">Worst SNR</button>
<button type="button" data-value="bytes" aria-pressed="false">Bytes</button></div>
<input type="search" id="layer-search" placeholder="Find a weight" aria-label="Find a weight">
</div>
<div class="layers" id="layers"></div>
</section>"""


def _errors(page: Page) -> str:
    found = [package for package in page.packages if package.evaluation is not None]
    if not found:
        return ""
    parts = []
    for package in found:
        evaluation = package.evaluation
        if evaluation is None or not evaluation.ops:
            continue
        ops = [op for op in evaluation.ops if not math.isinf(op.own_snr_db)]
        head = [("Value", ""), ("Op", ""), ("Own SNR dB", "n"), ("With errors before it", "n")]
        rows = [_op_row(op) for op in ops[:_MOST_OPS]]
        n_left = len(evaluation.ops) - len(rows)
        parts.append(
            f"<details><summary>{_e(package.name)}: where the error arises, {len(rows)} values"
            f"; {n_left} more without error of their own or left out</summary>"
            f"{_table(head, rows)}</details>"
        )
    if not parts:
        return ""
    return f"""<section id="errors">
<h2>Where errors arise</h2>
<p class="note">An op's own error is what it adds when it is given the original's values.</p>
{"".join(parts)}
</section>"""


def _op_row(op: OpMetrics) -> str:
    return (
        f'<tr><td class="name">{_e(op.name)}</td><td>{_e(op.op_type)}</td>'
        f'<td class="n" data-v="{_number(op.own_snr_db)}">{_e(human_snr(op.own_snr_db))}</td>'
        f'<td class="n" data-v="{_number(op.snr_db)}">{_e(human_snr(op.snr_db))}</td></tr>'
    )


def _placements(page: Page) -> str:
    found = [
        (result, entry, entry.placement)
        for result in page.results
        for entry in result.entries
        if entry.placement is not None
    ]
    if not found:
        return ""
    by_units: dict[str, list[str]] = {}
    for result, entry, placement in found:
        units = units_words(result, entry)
        row = _placement_row(entry, units, result.provenance.kind, placement)
        by_units.setdefault(units, []).append(row)
    # That of the Neural Engine is what people come for.
    first = next((units for units in by_units if units.startswith("CPU_AND_NE")), "")
    groups = "".join(
        f"<details{' open' if units == first or len(by_units) == 1 else ''}><summary>{_e(units)}, "
        f'{len(rows)} packages</summary><div class="placement">{"".join(rows)}</div></details>'
        for units, rows in by_units.items()
    )
    key = "".join(
        f'<span><i class="{name}"></i>{_e(shown)}</span>'
        for name, shown in _PROCESSOR_NAMES.items()
    )
    return f"""<section id="placement">
<h2>Placement</h2>
<p class="note">Where Core ML plans to run each op (MLComputePlan). A plan is anticipated, not
observed; the shares are of ops that are run.</p>
<div class="toolbar">
<input type="search" id="op-search" placeholder="Find an op" aria-label="Find an op">
</div>
<div class="key">{key}</div>
{groups}
</section>"""


def _placement_row(entry: Entry, units: str, kind: str, placement: Placement) -> str:
    counts, costs = placement.counts, placement.costs
    style, badge = ("literature", "Plan") if kind == "measured" else (_e(kind), f"Plan, {kind}")
    n_run = sum(counts[name] for name in PROCESSORS if name != "none")
    bars = "".join(
        f'<i class="{name}" data-share="{counts[name]}" title="{_e(_PROCESSOR_NAMES[name])}"></i>'
        for name in PROCESSORS
        if counts[name] and name != "none"
    )
    shares = ", ".join(
        f"{_PROCESSOR_NAMES[name]} {counts[name]} ops ({costs[name]:.0%} of the cost)"
        for name in PROCESSORS
        if counts[name] and name != "none"
    )
    head = [("Op", ""), ("Type", ""), ("Planned for", ""), ("Could run on", ""), ("Cost", "n")]
    ops = [
        f'<tr><td class="name">{_e(op.name)}</td><td>{_e(op.op_type)}</td>'
        f"<td>{_e(_PROCESSOR_NAMES[op.preferred])}</td>"
        f"<td>{_e(', '.join(_PROCESSOR_NAMES[name] for name in op.supported))}</td>"
        f"{_cell(op.cost, '{:.2%}'.format)}</tr>"
        for op in [op for op in placement.ops if op.preferred != "none"][:_MOST_OPS]
    ]
    return (
        f'<div class="row"><p><b>{_e(entry.model.name)}</b>, {_e(units)} '
        f'<span class="badge {style}">{_e(badge)}</span> '
        f'<span class="muted">{n_run} ops: {_e(shares)}</span></p>'
        f'<div class="stack">{bars}</div>'
        f"<details><summary>Op by op</summary>{_table(head, ops)}</details></div>"
    )


def _failures(page: Page) -> str:
    found = words.failures(page)
    if not found:
        return ""
    rows = "".join(
        f"<li><b>{_e(entry.id)}</b> <span class='muted'>in {_e(entry.failure.phase)}, "
        f"{_e(entry.failure.reason)}</span><br>{_e(entry.failure.message)}</li>"
        for entry in found
        if entry.failure is not None
    )
    return f"""<section id="failures">
<h2>What failed</h2>
<p class="note">These configurations have no latency; the others went on without them.</p>
<ul class="plain">{rows}</ul>
</section>"""


def _notes(page: Page) -> str:
    found = words.notes(page)
    evidence = [
        f"{entry.id}: {entry.decompression.verdict.replace('_', ' ')}"
        f"{'; '.join(('', *entry.decompression.evidence))}"
        for result in page.results
        for entry in result.entries
        if entry.decompression is not None
    ]
    if not found and not evidence:
        return ""
    rows = "".join(f"<li>{_e(text)}</li>" for text in [*found, *evidence])
    return f"""<section id="notes">
<h2>Notes of the runs</h2>
<p class="note">When weights are decoded can't be observed; figures are consistent with one or the
other, never more.</p>
<ul class="plain caution">{rows}</ul>
</section>"""


def _published(page: Page) -> str:
    parts = [
        _published_table(literature.publisher, table)
        for literature in page.contents(Literature)
        for table in literature.tables
    ]
    if not parts:
        return ""
    return f"""<section id="published">
<h2>Published tables</h2>
<p class="note">For orientation: other models on other devices, copied from their source.</p>
<div class="published">{"".join(parts)}</div>
</section>"""


def _published_table(publisher: str, table: PublishedTable) -> str:
    head = [(name, "" if i == 0 else "n") for i, name in enumerate(table.columns)]
    rows = [
        "<tr>"
        + "".join(
            f"<td>{_e(cell)}</td>" if i == 0 else f'<td class="n">{_e(cell)}</td>'
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in table.rows
    ]
    note = f" {table.note}" if table.note else ""
    return (
        f'<div><h3>{_e(table.title)} <span class="badge literature">Published by '
        f"{_e(publisher)}</span></h3><p>{_e(table.device)}; {_e(table.method)}.{_e(note)} Source: "
        f"{_e(table.source)}</p>{_table(head, rows, sortable=False)}</div>"
    )


def _footer(page: Page) -> str:
    rows = [
        f"<tr><td>{_e(source.name)}</td><td>{_e(source.what)}</td>"
        f"<td><code>{source.sha256}</code></td></tr>"
        for source in page.sources
    ]
    return f"""<footer><div>
<p>Made by milpress {_e(__version__)} of these files. The page is one file and fetches nothing.</p>
{_table([("File", ""), ("What", ""), ("SHA-256", "")], rows, sortable=False)}
</div></footer>"""
