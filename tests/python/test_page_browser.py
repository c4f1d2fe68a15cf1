"""The page in a real browser: what is drawn, what clicks do, and that nothing is fetched."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import browser
import pytest
from device_results import entry, failed, model, result
from test_page import bench, compression, evaluation, hostile, published, write

from milpress import page

pytestmark = pytest.mark.skipif(
    browser.CHROMIUM is None and not os.environ.get("MILPRESS_REQUIRE_CHROMIUM"),
    reason="wants Chromium (apt-get install chromium)",
)
NAMES = ("alpha", "beta", "gamma")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    with browser.opened(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a page of everything: three ways to compress, evaluated, run in two units."""
    folder = tmp_path_factory.mktemp("page")
    contents: dict[str, Any] = {"published": published()}
    entries = [entry("measured", units, "tiny") for units in ("CPU_ONLY", "CPU_AND_NE")]
    for i, name in enumerate(NAMES):
        size = 700 - 200 * i
        contents[f"made_{name}"] = compression(name, package_bytes_after=size + 24)
        contents[f"found_{name}"] = evaluation(
            name,
            outputs=[{"name": "y", "snr_db": 40.0 - 10 * i, "top1": 0.9 - 0.1 * i, "kl": 0.1 + i}],
        )
        entries += [
            entry("measured", units, name, 0.8 - 0.2 * i, model=model(name, size))
            for units in ("CPU_ONLY", "CPU_AND_NE")
        ]
    contents["run"] = result("measured", *entries)
    page.write(write(folder, **contents), folder / "report.html")
    return folder / "report.html"


@pytest.fixture
def opened(tab: browser.Tab, report: Path) -> browser.Tab:
    tab.looks()
    tab.open(report)
    return tab


def texts(tab: browser.Tab, selector: str) -> list[str]:
    found: list[str] = tab.evaluate(
        f"[...document.querySelectorAll({selector!r})].map((e) => e.textContent)"
    )
    return found


def test_charts_are_drawn_without_a_complaint_or_a_request(opened):
    assert opened.complaints == []
    assert opened.requests == []
    # Size, and latency in each of two units: the original and three packages.
    assert opened.evaluate("document.querySelectorAll('svg.chart').length") == 3
    assert opened.evaluate(
        "[...document.querySelectorAll('svg.chart')].map((c) => c.querySelectorAll('.dot').length)"
    ) == [4, 4, 4]
    assert opened.evaluate("document.querySelectorAll('svg.chart .front').length") == 3
    boxes = opened.evaluate(
        """[...document.querySelectorAll('svg.chart .dot, svg.chart text')].map((e) => {
            const c = e.closest('svg').getBoundingClientRect(), b = e.getBoundingClientRect();
            return [b.left - c.left, c.right - b.right, b.top - c.top, c.bottom - b.bottom];
        })"""
    )
    assert min(min(box) for box in boxes) >= -1, "everything must be inside its chart"


def test_points_stand_where_their_numbers_say(opened):
    places = opened.evaluate(
        """Object.fromEntries([...document.querySelectorAll('#size-chart .dot')].map((dot) => [
            dot.getAttribute('aria-label').split(':')[0],
            [+dot.getAttribute('cx'), +dot.getAttribute('cy')]]))"""
    )
    xs, ys = zip(*(places[name] for name in ("tiny", *NAMES)), strict=True)
    # Ever smaller and ever worse; sizes 1024, 724, 524, 324 and ratios in steps of 10 dB.
    steps = [a - b for a, b in itertools.pairwise(xs)]
    assert steps[0] / steps[1] == pytest.approx(300 / 200, rel=0.01)
    assert steps[1] == pytest.approx(steps[2], rel=0.01)
    assert ys[2] - ys[1] == pytest.approx(ys[3] - ys[2], rel=0.01)
    assert ys[0] < ys[1] < ys[2] < ys[3]


def test_the_front_joins_what_nothing_beats(tab, tmp_path):
    evaluations = {
        name: evaluation(name, outputs=[{"name": "y", "snr_db": snr}])
        for name, snr in {"alpha": 30.0, "beta": 10.0, "gamma": 20.0}.items()
    }
    made = {
        f"made_{name}": compression(name, package_bytes_after=size)
        for name, size in {"alpha": 700, "beta": 500, "gamma": 300}.items()
    }
    page.write(write(tmp_path, **made, **evaluations), tmp_path / "r.html")
    tab.open(tmp_path / "r.html")
    radii = tab.evaluate(
        """Object.fromEntries([...document.querySelectorAll('#size-chart .dot')].map((dot) => [
            dot.getAttribute('aria-label').split(':')[0], +dot.getAttribute('r')]))"""
    )
    # gamma is smaller than beta and better.
    assert {name for name, radius in radii.items() if radius == 6} == {"tiny", "alpha", "gamma"}


def test_hovering_tells_the_configuration(opened):
    assert opened.evaluate("document.getElementById('tip').hidden")
    opened.hover("#latency-1 .dot[aria-label^=beta]")
    assert not opened.evaluate("document.getElementById('tip').hidden")
    shown = opened.evaluate("document.getElementById('tip').innerText")
    for words in ("beta", "palettize 4 bits", "30.0 dB", "0.713 ms", "Measured"):
        assert words in shown
    opened.hover("h1")
    assert opened.evaluate("document.getElementById('tip').hidden")


def test_the_metric_can_be_chosen(opened):
    assert texts(opened, "[data-choice=metric] button") == [
        "SNR, dB",
        "top-1",
        "KL, nats",
    ]
    opened.click("[data-choice=metric] button[data-value=top1]")
    label = opened.evaluate(
        "document.querySelector('#size-chart .dot[aria-label^=alpha]').getAttribute('aria-label')"
    )
    assert label == "alpha: 724 B, 90.0 %"
    assert opened.complaints == []


@pytest.mark.parametrize("metric", ["snr_db", "top1", "kl"])
def test_up_is_better_whatever_the_metric(metric, opened):
    opened.click(f"[data-choice=metric] button[data-value={metric}]")
    ys = opened.evaluate(
        """Object.fromEntries([...document.querySelectorAll('#size-chart .dot')].map((dot) => [
            dot.getAttribute('aria-label').split(':')[0], +dot.getAttribute('cy')]))"""
    )
    assert ys["tiny"] < ys["alpha"] < ys["beta"] < ys["gamma"]


def test_the_filter_narrows_charts_and_table(opened):
    opened.type("#filter", "BETA")
    assert opened.evaluate("document.querySelectorAll('#size-chart .dot').length") == 1
    rows = "[...document.querySelectorAll('#packages-table tbody tr')].filter((r) => !r.hidden)"
    assert opened.evaluate(f"{rows}.map((r) => r.dataset.search)") == ["beta palettize 4 bits"]
    assert texts(opened, "#shown") == ["1 of 4 shown"]
    opened.type("#filter", "nothing like it")
    assert texts(opened, "#size-chart .empty") == [
        "Nothing here matches the filter and has this metric."
    ]


def test_a_kind_of_treatment_can_be_left_out(opened):
    opened.click("#legend [data-family=palette]")
    assert opened.evaluate("document.querySelectorAll('#size-chart .dot').length") == 1
    opened.click("#legend [data-family=palette]")
    assert opened.evaluate("document.querySelectorAll('#size-chart .dot').length") == 4


def test_tables_sort_by_number_both_ways(opened):
    column = "#packages-table th:nth-child(3) button"
    names = "#packages-table tbody td.name"
    opened.click(column)
    assert texts(opened, names) == ["gamma", "beta", "alpha", "tiny"]
    header = "document.querySelector('#packages-table th:nth-child(3)').getAttribute('aria-sort')"
    assert opened.evaluate(header) == "ascending"
    opened.click(column)
    assert texts(opened, names) == ["tiny", "alpha", "beta", "gamma"]
    # The original has no bits: it stands last, whichever way.
    for _ in range(2):
        opened.click("#packages-table th:nth-child(5) button")
        assert texts(opened, names)[-1] == "tiny"


def test_weights_sort_and_can_be_found(opened):
    names = "#layers .layer[data-name] .who"
    assert len(texts(opened, names)) == 2
    opened.click("[data-choice=layers] [data-value=bits]")
    assert texts(opened, names)[0].startswith("alpha_linear")  # 16 bits, left as it was
    opened.click("[data-choice=layers] [data-value=snr]")
    assert texts(opened, "#layers .head .what") == ["SNR"]
    opened.type("#layer-search", "A_CONV")
    assert [text[:10] for text in texts(opened, names)] == ["alpha_conv"]
    width = opened.evaluate(
        """(() => {
            const bar = document.querySelector('#layers .bar');
            return bar.firstChild.getBoundingClientRect().width / bar.getBoundingClientRect().width;
        })()"""
    )
    assert width == pytest.approx(1, abs=0.01)
    opened.evaluate(
        "(() => { const s = document.getElementById('layer-report'); s.value = 2;"
        " s.dispatchEvent(new Event('change')); })()"
    )
    assert [text[:10] for text in texts(opened, names)] == ["gamma_conv"]


def test_placement_is_drawn_in_proportion(opened):
    shares = opened.evaluate(
        """[...document.querySelector('.placement .stack').children].map((part) =>
            part.getBoundingClientRect().width)"""
    )
    assert len(shares) == 2
    assert shares[0] == pytest.approx(shares[1], abs=1)  # one op each
    opened.type("#op-search", "softmax")
    rows = "[...document.querySelectorAll('.placement tbody tr')].filter((r) => !r.hidden)"
    assert set(opened.evaluate(f"{rows}.map((r) => r.cells[1].textContent)")) == {"softmax"}


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_either_light(opened, report, dark):
    opened.looks(dark=dark)
    opened.open(report)
    assert opened.evaluate("document.documentElement.dataset.theme") == (
        "dark" if dark else "light"
    )
    contrasts = opened.evaluate(
        """(() => {
            const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
            const light = (c) => {
                const [r, g, b] = c.slice(0, 3).map((v) => {
                    v /= 255;
                    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
                });
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const behind = (e) => {
                for (; e; e = e.parentElement) {
                    const c = parse(getComputedStyle(e).backgroundColor);
                    if (c.length && (c.length < 4 || c[3] === 1)) return c;
                }
            };
            const kinds = 'h1, h2, h3, p, td, th, b, small, summary, .badge, .label, .detail';
            return [...document.querySelectorAll(kinds)]
                .filter((e) => e.textContent.trim() && e.getClientRects().length)
                .map((e) => {
                    const one = light(parse(getComputedStyle(e).color)), two = light(behind(e));
                    const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
                    return [ratio, e.outerHTML.slice(0, 80)];
                });
        })()"""
    )
    # What the Web's guidelines ask of small text.
    assert [each for each in contrasts if each[0] < 4.5] == []


def test_the_light_can_be_switched(opened):
    opened.click("#theme")
    assert opened.evaluate("document.documentElement.dataset.theme") == "dark"
    opened.click("#theme")
    assert opened.evaluate("document.documentElement.dataset.theme") == "light"


@pytest.mark.parametrize("width", [360, 820, 1280, 2000])
def test_nothing_sticks_out_at_any_width(opened, report, width):
    opened.looks(width=width)
    opened.open(report)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_it_prints(opened):
    # A4 without its margins, at the 96 points to an inch of the Web.
    opened.looks(media="print", width=688)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 688
    columns = "getComputedStyle(document.querySelector('.charts')).gridTemplateColumns"
    assert len(opened.evaluate(columns).split()) == 2
    hidden = "(s) => getComputedStyle(document.querySelector(s)).display === 'none'"
    for selector in ("#theme", ".toolbar"):
        assert opened.evaluate(f"({hidden})({selector!r})")
    # Where numbers come from is on paper too.
    assert opened.evaluate(
        "[...document.querySelectorAll('.banner, .badge')].every((e) => e.getClientRects().length)"
    )
    assert opened.pdf().startswith(b"%PDF")


def test_hostile_text_is_shown_and_does_nothing(tab, tmp_path):
    page.write(hostile(tmp_path), tmp_path / "evil.html", title="<script>alert(0)</script>")
    tab.open(tmp_path / "evil.html")
    assert tab.complaints == []
    assert tab.requests == []
    assert tab.evaluate("document.querySelectorAll('img').length") == 0
    assert tab.evaluate("document.querySelectorAll('script').length") == 2
    assert texts(tab, "h1") == ["<script>alert(0)</script>"]
    assert any("<img src=x onerror=alert(2)>[/red]" in text for text in texts(tab, "#layers .who"))
    tab.hover("svg.chart .dot")
    # What is shown of a path is its last part.
    assert "\\u202e\\u2028|`*" in tab.evaluate("document.getElementById('tip').innerText")


def test_a_script_that_got_in_would_not_run(tab, report, tmp_path):
    text = report.read_text()
    assert "</main>" in text
    (tmp_path / "r.html").write_text(
        text.replace(
            "</main>",
            "<script>window.got = 1</script><img src='https://example.invalid/x' "
            "onerror='window.got = 2'></main>",
        )
    )
    tab.open(tmp_path / "r.html")
    assert tab.evaluate("window.got === undefined")
    assert len(tab.complaints) >= 2  # The policy says what it refused.
    assert tab.evaluate("document.querySelectorAll('svg.chart').length") == 3


def test_a_fake_is_stamped(tab, tmp_path):
    page.write(write(tmp_path, a=result("fake"), b=bench("cpu_reference")), tmp_path / "r.html")
    tab.open(tmp_path / "r.html")
    assert texts(tab, "svg .stamp") == ["FAKE"]
    assert "fake" in texts(tab, ".banner b")[0].lower()
    assert tab.complaints == []


@pytest.mark.parametrize(
    "contents",
    [
        {"a": compression()},
        {"a": evaluation()},
        {"a": published()},
        {"a": result("estimate")},
        {"a": compression(weights=[])},
        {"a": evaluation(outputs=[{"name": "y", "snr_db": "nan"}])},
    ],
    ids=["compression", "evaluation", "published", "estimate", "no weights", "no number"],
)
def test_a_page_of_little_is_whole_too(contents, tab, tmp_path):
    page.write(write(tmp_path, **contents), tmp_path / "r.html")
    tab.open(tmp_path / "r.html")
    assert tab.complaints == []
    assert len(texts(tab, "footer tbody tr")) == 1


def benchmarks() -> dict[str, Any]:
    """Return runs that know more or less of the packages they are of."""
    tiny, small = (entry("measured", "CPU_AND_NE", name) for name in ("tiny", "small"))
    blind = replace(small, accuracy=None)
    broken = failed("measured", "ALL", "small")
    return {
        "everything": result("measured", tiny, small),
        "latencies alone": result("measured", replace(tiny, accuracy=None), blind),
        "an accuracy of the original alone": result("measured", tiny, blind),
        "failures without an accuracy": result("measured", replace(broken, accuracy=None)),
        "the original alone": result("measured", tiny),
        "failures alone": result("measured", broken),
        "a failure of the rest": result("measured", tiny, broken),
        "an interpreter": bench("cpu_reference"),
        "an estimate": result("estimate"),
        "a replay": result("replay"),
    }


REPORTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a compression": {"made": compression()},
    "a compression of another": {"made": compression("strange", source="stranger")},
    "a compression of nothing": {"made": compression(weights=[], snr_db=None)},
    "an evaluation": {"found": evaluation()},
    "an evaluation without a number": {
        "found": evaluation(ops=[], outputs=[{"name": "y", "snr_db": "nan", "kl": "inf"}])
    },
    "an evaluation that diverges": {
        "made": compression(),
        "found": evaluation(outputs=[{"name": "y", "snr_db": "-inf", "kl": "inf", "top1": 0.5}]),
    },
    "both": {"made": compression(), "found": evaluation()},
}


# What a page of these has, by the words of what it was made of.
@pytest.mark.parametrize("reports", REPORTS)
@pytest.mark.parametrize("run", [None, *benchmarks()])
def test_every_combination_is_drawn(run, reports, tab, tmp_path):
    contents = dict(REPORTS[reports])
    if run is not None:
        contents["run"] = benchmarks()[run]
    if not contents:
        contents["published"] = published()
    page.write(write(tmp_path, **contents), tmp_path / "r.html", title="a page")
    page.write(write(tmp_path, **contents), tmp_path / "r.md")
    tab.open(tmp_path / "r.html")
    assert tab.complaints == []
    # The script has run to its end: the last thing it does is to draw the weights.
    weights = contents["made"]["weights"] if "made" in contents else None
    drawn = "document.querySelectorAll('#layers .layer[data-name]').length"
    assert tab.evaluate(drawn) == len(weights or [])
    assert len(texts(tab, "#layers .head")) == (weights is not None)
    # No place for a chart is left empty, and each table can be sorted and filtered.
    assert tab.evaluate(
        "[...document.querySelectorAll('.charts .card > div')].every((e) => e.childElementCount)"
    )
    assert tab.evaluate("document.documentElement.dataset.theme") in ("light", "dark")
    headers = "document.querySelectorAll('table.sortable thead th')"
    assert tab.evaluate(f"[...{headers}].every((e) => e.firstChild.tagName === 'BUTTON')")
    tab.evaluate(
        f"[...{headers}].forEach((e) => {{ e.firstChild.click(); e.firstChild.click(); }})"
    )
    tab.evaluate(
        """for (const input of document.querySelectorAll('input[type=search]')) {
            input.value = 'small';
            input.dispatchEvent(new Event('input'));
        }"""
    )
    tab.evaluate(
        "document.querySelectorAll('.group button, #legend button').forEach((b) => b.click())"
    )
    n_packages = len(texts(tab, "#packages-table tbody tr"))
    if n_packages:
        (shown,) = texts(tab, "#shown")
        assert shown.endswith(f" of {n_packages} shown")
    assert tab.complaints == []


def test_what_is_infinitely_bad_is_not_drawn_as_exact(tab, tmp_path):
    bad = evaluation(outputs=[{"name": "y", "kl": "inf"}])
    good = evaluation("good", outputs=[{"name": "y", "kl": 0.5}])
    made = {"a": compression(), "b": compression("good"), "c": bad, "d": good}
    page.write(write(tmp_path, **made), tmp_path / "r.html")
    tab.open(tmp_path / "r.html")
    labels = "[...document.querySelectorAll('#size-chart .dot')].map((e) => e.ariaLabel)"
    assert sorted(label.split(":")[0] for label in tab.evaluate(labels)) == ["good", "tiny"]
    assert tab.complaints == []


@pytest.mark.parametrize(
    "sizes", [(2**60, 2**60 + 512), (0, 0), (1, 2**62), (7, 7)], ids=lambda sizes: str(sizes)
)
def test_odd_sizes_are_drawn_too(sizes, tab, tmp_path):
    made = {
        f"made_{i}": compression(f"m{i}", package_bytes_after=size, package_bytes_before=2**62)
        for i, size in enumerate(sizes)
    }
    found = {f"found_{i}": evaluation(f"m{i}") for i in range(len(sizes))}
    page.write(write(tmp_path, **made, **found), tmp_path / "r.html")
    tab.open(tmp_path / "r.html")
    assert tab.complaints == []
    assert tab.evaluate("document.querySelectorAll('#size-chart .dot').length") == 3


def test_many_weights_are_shown_on_demand_and_on_paper(tab, tmp_path):
    one = compression()["weights"][0]
    many = compression(weights=[{**one, "name": f"w{i}"} for i in range(100)])
    count = "document.querySelectorAll('#layers .layer[data-name]').length"
    page.write(write(tmp_path, a=many), tmp_path / "r.html")
    for event in (
        "document.querySelector('.more button').click()",
        "dispatchEvent(new Event('beforeprint'))",
    ):
        tab.open(tmp_path / "r.html")
        assert tab.evaluate(count) == 60
        tab.evaluate(event)
        assert tab.evaluate(count) == 100
