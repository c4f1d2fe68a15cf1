"""The page in a real browser: what is drawn, what clicks do, and that nothing is fetched."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from device_results import entry, failed, model, result
from playwright.sync_api import Browser, Page, expect, sync_playwright
from test_page import bench, compression, evaluation, hostile, published, write

from milpress import page

CHROMIUM = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        if (path := shutil.which(name))
    ),
    None,
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("MILPRESS_REQUIRE_CHROMIUM"),
    reason="wants Chromium (apt-get install chromium)",
)
NAMES = ("alpha", "beta", "gamma")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with sync_playwright() as playwright:
        # The sandbox does not start for root, who is the only user of a container.
        sandbox = os.geteuid() != 0
        with playwright.chromium.launch(
            executable_path=CHROMIUM, chromium_sandbox=sandbox
        ) as browser:
            yield browser


@pytest.fixture
def tab(chromium: Browser) -> Iterator[Page]:
    with chromium.new_context(viewport={"width": 1280, "height": 900}) as context:
        context.set_default_timeout(60_000)
        yield context.new_page()


@pytest.fixture
def complaints(tab: Page) -> list[str]:
    """Return errors and messages of the console, as they come."""
    messages: list[str] = []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    return messages


@pytest.fixture
def requests(tab: Page) -> list[str]:
    """Return what is asked of the network, as it comes."""
    urls: list[str] = []
    tab.on("request", lambda request: urls.append(request.url))
    return urls


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
def opened(tab: Page, complaints: list[str], requests: list[str], report: Path) -> Page:
    tab.goto(report.as_uri())
    return tab


def texts(tab: Page, selector: str) -> list[str]:
    return tab.locator(selector).all_text_contents()


# Where what is drawn has its middle, or how large it is, by the name in its label.
DOTS = """(dots, attribute) => Object.fromEntries(dots.map((dot) =>
    [dot.getAttribute("aria-label").split(":")[0], Number(dot.getAttribute(attribute))]))"""


def dots(tab: Page, attribute: str) -> dict[str, float]:
    """Return an attribute of each point of the chart of sizes."""
    return tab.locator("#size-chart .dot").evaluate_all(DOTS, attribute)


def test_charts_are_drawn_without_a_complaint_or_a_request(opened, complaints, requests, report):
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()]
    # Size, and latency in each of two units: the original and three packages.
    charts = opened.locator("svg.chart")
    expect(charts).to_have_count(3)
    for chart in charts.all():
        expect(chart.locator(".dot")).to_have_count(4)
        expect(chart.locator(".front")).to_have_count(1)
    boxes = opened.locator("svg.chart .dot, svg.chart text").evaluate_all(
        """(parts) => parts.map((part) => {
            const c = part.closest("svg").getBoundingClientRect(), b = part.getBoundingClientRect();
            return [b.left - c.left, c.right - b.right, b.top - c.top, c.bottom - b.bottom];
        })"""
    )
    assert min(min(box) for box in boxes) >= -1, "everything must be inside its chart"


def test_points_stand_where_their_numbers_say(opened):
    xs, ys = (
        [places[name] for name in ("tiny", *NAMES)]
        for places in (dots(opened, "cx"), dots(opened, "cy"))
    )
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
    tab.goto((tmp_path / "r.html").as_uri())
    # gamma is smaller than beta and better.
    assert {name for name, radius in dots(tab, "r").items() if radius == 6} == {
        "tiny",
        "alpha",
        "gamma",
    }


def test_hovering_tells_the_configuration(opened):
    tip = opened.locator("#tip")
    expect(tip).to_be_hidden()
    opened.hover("#latency-1 .dot[aria-label^=beta]")
    for words in ("beta", "palettize 4 bits", "30.0 dB", "0.713 ms", "Measured"):
        expect(tip).to_contain_text(words)
    expect(tip).to_be_visible()
    opened.hover("h1")
    expect(tip).to_be_hidden()


def test_the_metric_can_be_chosen(opened, complaints):
    metrics = opened.locator("[data-choice=metric] button")
    expect(metrics).to_have_text(["SNR, dB", "top-1", "KL, nats"])
    opened.click("[data-choice=metric] button[data-value=top1]")
    alpha = opened.locator("#size-chart .dot[aria-label^=alpha]")
    expect(alpha).to_have_attribute("aria-label", "alpha: 724 B, 90.0 %")
    assert complaints == []


@pytest.mark.parametrize("metric", ["snr_db", "top1", "kl"])
def test_up_is_better_whatever_the_metric(metric, opened):
    opened.click(f"[data-choice=metric] button[data-value={metric}]")
    ys = dots(opened, "cy")
    assert ys["tiny"] < ys["alpha"] < ys["beta"] < ys["gamma"]


def test_the_filter_narrows_charts_and_table(opened):
    opened.fill("#filter", "BETA")
    expect(opened.locator("#size-chart .dot")).to_have_count(1)
    row = opened.locator("#packages-table tbody tr:visible")
    expect(row).to_have_count(1)
    expect(row).to_have_attribute("data-search", "beta palettize 4 bits")
    expect(opened.locator("#shown")).to_have_text("1 of 4 shown")
    opened.fill("#filter", "nothing like it")
    expect(opened.locator("#size-chart .empty")).to_have_text(
        "Nothing here matches the filter and has this metric."
    )


def test_a_kind_of_treatment_can_be_left_out(opened):
    for n_left in (1, 4):
        opened.click("#legend [data-family=palette]")
        expect(opened.locator("#size-chart .dot")).to_have_count(n_left)


def test_tables_sort_by_number_both_ways(opened):
    column = "#packages-table th:nth-child(3) button"
    names = "#packages-table tbody td.name"
    opened.click(column)
    assert texts(opened, names) == ["gamma", "beta", "alpha", "tiny"]
    header = opened.locator("#packages-table th:nth-child(3)")
    expect(header).to_have_attribute("aria-sort", "ascending")
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
    opened.fill("#layer-search", "A_CONV")
    assert [text[:10] for text in texts(opened, names)] == ["alpha_conv"]
    bar, filled = (
        opened.locator(selector).first.bounding_box()
        for selector in ("#layers .bar", "#layers .bar > *")
    )
    assert filled["width"] == pytest.approx(bar["width"], rel=0.01)
    opened.select_option("#layer-report", "2")
    assert [text[:10] for text in texts(opened, names)] == ["gamma_conv"]


def test_placement_is_drawn_in_proportion(opened):
    parts = opened.locator(".placement .stack:visible").first.locator("> *").all()
    shares = [part.bounding_box()["width"] for part in parts]
    assert len(shares) == 2
    assert shares[0] == pytest.approx(shares[1], abs=1)  # one op each
    opened.fill("#op-search", "softmax")
    types = texts(opened, ".placement tbody tr:not([hidden]) td:nth-child(2)")
    assert set(types) == {"softmax"}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_in_either_light(tab, report, theme):
    tab.emulate_media(color_scheme=theme)
    tab.goto(report.as_uri())
    expect(tab.locator("html")).to_have_attribute("data-theme", theme)
    contrasts = tab.evaluate(
        """() => {
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
        }"""
    )
    # What the Web's guidelines ask of small text.
    assert [each for each in contrasts if each[0] < 4.5] == []


def test_the_light_can_be_switched(opened):
    for theme in ("dark", "light"):
        opened.click("#theme")
        expect(opened.locator("html")).to_have_attribute("data-theme", theme)


@pytest.mark.parametrize("width", [360, 820, 1280, 2000])
def test_nothing_sticks_out_at_any_width(tab, report, width):
    tab.set_viewport_size({"width": width, "height": 900})
    tab.goto(report.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_it_prints(opened):
    # A4 without its margins, at the 96 points to an inch of the Web.
    opened.emulate_media(media="print")
    opened.set_viewport_size({"width": 688, "height": 900})
    assert opened.evaluate("document.documentElement.scrollWidth") <= 688
    columns = "getComputedStyle(document.querySelector('.charts')).gridTemplateColumns"
    assert len(opened.evaluate(columns).split()) == 2
    expect(opened.locator("#theme")).to_be_hidden()
    expect(opened.locator(".toolbar").first).to_be_hidden()
    # Where numbers come from is on paper too.
    assert opened.locator(".banner, .badge").evaluate_all(
        "(parts) => parts.every((part) => part.getClientRects().length)"
    )
    assert opened.pdf(print_background=True).startswith(b"%PDF")


def test_hostile_text_is_shown_and_does_nothing(tab, complaints, requests, tmp_path):
    page.write(hostile(tmp_path), tmp_path / "evil.html", title="<script>alert(0)</script>")
    tab.goto((tmp_path / "evil.html").as_uri())
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [
        (tmp_path / "evil.html").as_uri()
    ]
    expect(tab.locator("img")).to_have_count(0)
    expect(tab.locator("script")).to_have_count(2)
    expect(tab.locator("h1")).to_have_text("<script>alert(0)</script>")
    assert any("<img src=x onerror=alert(2)>[/red]" in text for text in texts(tab, "#layers .who"))
    tab.hover("svg.chart .dot >> nth=0")
    # What is shown of a path is its last part.
    expect(tab.locator("#tip")).to_contain_text("\\u202e\\u2028|`*")


def test_a_script_that_got_in_would_not_run(tab, complaints, report, tmp_path):
    text = report.read_text()
    assert "</main>" in text
    (tmp_path / "r.html").write_text(
        text.replace(
            "</main>",
            "<script>window.got = 1</script><img src='https://example.invalid/x' "
            "onerror='window.got = 2'></main>",
        )
    )
    tab.goto((tmp_path / "r.html").as_uri())
    assert tab.evaluate("window.got === undefined")
    assert len(complaints) >= 2  # The policy says what it refused.
    expect(tab.locator("svg.chart")).to_have_count(3)


def test_a_fake_is_stamped(tab, complaints, tmp_path):
    page.write(write(tmp_path, a=result("fake"), b=bench("cpu_reference")), tmp_path / "r.html")
    tab.goto((tmp_path / "r.html").as_uri())
    expect(tab.locator("svg .stamp")).to_have_text(["FAKE"])
    assert "fake" in texts(tab, ".banner b")[0].lower()
    assert complaints == []


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
def test_a_page_of_little_is_whole_too(contents, tab, complaints, tmp_path):
    page.write(write(tmp_path, **contents), tmp_path / "r.html")
    tab.goto((tmp_path / "r.html").as_uri())
    assert complaints == []
    expect(tab.locator("footer tbody tr")).to_have_count(1)


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
def test_every_combination_is_drawn(run, reports, tab, complaints, tmp_path):
    contents = dict(REPORTS[reports])
    if run is not None:
        contents["run"] = benchmarks()[run]
    if not contents:
        contents["published"] = published()
    page.write(write(tmp_path, **contents), tmp_path / "r.html", title="a page")
    page.write(write(tmp_path, **contents), tmp_path / "r.md")
    tab.goto((tmp_path / "r.html").as_uri())
    assert complaints == []
    # The script has run to its end: the last thing it does is to draw the weights.
    weights = contents["made"]["weights"] if "made" in contents else None
    expect(tab.locator("#layers .layer[data-name]")).to_have_count(len(weights or []))
    expect(tab.locator("#layers .head")).to_have_count(int(weights is not None))
    # No place for a chart is left empty, and each table can be sorted and filtered.
    expect(tab.locator(".charts .card > div:empty")).to_have_count(0)
    assert tab.locator("html").get_attribute("data-theme") in ("light", "dark")
    expect(tab.locator("table.sortable thead th > :first-child:not(button)")).to_have_count(0)
    expect(tab.locator("table.sortable thead th:not(:has(> button))")).to_have_count(0)
    # By the script, as what is folded has no place to click on.
    tab.locator("table.sortable thead button").evaluate_all(
        "(buttons) => buttons.forEach((each) => { each.click(); each.click(); })"
    )
    for field in tab.locator("input[type=search]").all():
        field.fill("small")
    tab.locator(".group button, #legend button").evaluate_all(
        "(buttons) => buttons.forEach((each) => each.click())"
    )
    n_packages = tab.locator("#packages-table tbody tr").count()
    if n_packages:
        expect(tab.locator("#shown")).to_have_text(re.compile(rf" of {n_packages} shown$"))
    assert complaints == []


def test_what_is_infinitely_bad_is_not_drawn_as_exact(tab, complaints, tmp_path):
    bad = evaluation(outputs=[{"name": "y", "kl": "inf"}])
    good = evaluation("good", outputs=[{"name": "y", "kl": 0.5}])
    made = {"a": compression(), "b": compression("good"), "c": bad, "d": good}
    page.write(write(tmp_path, **made), tmp_path / "r.html")
    tab.goto((tmp_path / "r.html").as_uri())
    assert sorted(dots(tab, "r")) == ["good", "tiny"]
    assert complaints == []


@pytest.mark.parametrize(
    "sizes", [(2**60, 2**60 + 512), (0, 0), (1, 2**62), (7, 7)], ids=lambda sizes: str(sizes)
)
def test_odd_sizes_are_drawn_too(sizes, tab, complaints, tmp_path):
    made = {
        f"made_{i}": compression(f"m{i}", package_bytes_after=size, package_bytes_before=2**62)
        for i, size in enumerate(sizes)
    }
    found = {f"found_{i}": evaluation(f"m{i}") for i in range(len(sizes))}
    page.write(write(tmp_path, **made, **found), tmp_path / "r.html")
    tab.goto((tmp_path / "r.html").as_uri())
    assert complaints == []
    expect(tab.locator("#size-chart .dot")).to_have_count(3)


def test_many_weights_are_shown_on_demand_and_on_paper(tab, tmp_path):
    one = compression()["weights"][0]
    many = compression(weights=[{**one, "name": f"w{i}"} for i in range(100)])
    page.write(write(tmp_path, a=many), tmp_path / "r.html")
    for event in (
        "document.querySelector('.more button').click()",
        "dispatchEvent(new Event('beforeprint'))",
    ):
        tab.goto((tmp_path / "r.html").as_uri())
        expect(tab.locator("#layers .layer[data-name]")).to_have_count(60)
        tab.evaluate(event)
        expect(tab.locator("#layers .layer[data-name]")).to_have_count(100)
