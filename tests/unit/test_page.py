"""What a page holds, and what a hostile file can't do to it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from command_line import failed as failed_call
from command_line import run
from device_results import device, entry, failed, model, placement, result

from milpress import errors, page
from milpress.device import schema
from milpress.page import captions
from milpress.page.groups import groups
from milpress.page.sources import Literature

EVIL = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>[/red]\x1b[2J\u202e\u2028|`*\"'&"
)


def compression(name: str = "small", source: str = "tiny", **changes: Any) -> dict[str, Any]:
    weight = {
        "name": f"{name}_conv",
        "op_types": ["conv"],
        "shape": [64, 48],
        "status": "compressed",
        "treatment": "palettize 4 bits",
        "note": "",
        "bytes_before": 6144,
        "bytes_after": 1568,
        "bits_per_weight": 4.083,
        "snr_db": 21.5,
    }
    left = {
        **weight,
        "name": f"{name}_linear",
        "status": "left",
        "treatment": "",
        "note": "too small",
        "snr_db": None,
        "bytes_after": 6144,
        "bits_per_weight": 16.0,
    }
    return {
        "version": 1,
        "source": f"models/{source}.mlpackage",
        "destination": f"models/{name}.mlpackage",
        "package_bytes_before": 8000,
        "package_bytes_after": 3000,
        "bits_per_weight": 10.04,
        "snr_db": 21.0,
        "verified": True,
        "notes": [],
        "weights": [weight, left],
        **changes,
    }


def evaluation(name: str = "small", **changes: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "original": "models/tiny.mlpackage",
        "compressed": f"elsewhere/{name}.mlpackage",
        "n_samples": 8,
        "is_random": False,
        "precision": "float32",
        "outputs": [
            {"name": "y", "snr_db": 24.5, "top1": 0.95, "kl": 0.01, "cosine": 0.999},
            {"name": "z", "snr_db": "inf", "top1": 1.0, "max_error": 0.0},
        ],
        "ops": [
            {"name": "conv_out", "op_type": "conv", "snr_db": 24.0, "own_snr_db": 25.0},
            {"name": "relu_out", "op_type": "relu", "snr_db": 24.0, "own_snr_db": "inf"},
        ],
        "n_uncompared": 0,
        **changes,
    }


def published(**changes: Any) -> dict[str, Any]:
    table = {
        "title": "A table",
        "source": "a page",
        "device": "a phone",
        "method": "a method",
        "columns": ["model", "ms"],
        "rows": [["net", "1.5"]],
    }
    return {
        "schema": "milpress-literature/1",
        "publisher": "Somebody",
        "tables": [{**table, **changes}],
    }


def write(folder: Path, **contents: Any) -> list[Path]:
    paths = []
    for name, content in contents.items():
        path = folder / f"{name}.json"
        data = content.to_dict() if isinstance(content, schema.Result) else content
        path.write_text(json.dumps(data))
        paths.append(path)
    return paths


def bench(kind: Any = "measured", **changes: Any) -> schema.Result:
    units = "CPU_AND_NE" if kind == "measured" else "INTERPRETER"
    entries = (
        entry(kind, units, "tiny", 1.0),
        entry(kind, units, "small", 0.5, model=model("small", 250)),
        failed(kind, units) if kind == "measured" else entry(kind, units, "other"),
    )
    return result(kind, *entries, **changes)


def test_what_is_known_of_a_package_is_put_together(tmp_path):
    made = page.collect(write(tmp_path, a=compression(), b=evaluation(), c=bench()))
    tiny, small, broken = made.packages
    assert (tiny.name, tiny.is_original, tiny.n_bytes) == ("tiny", True, 1024)
    assert small.ratio == pytest.approx(8000 / small.n_bytes)
    assert small.compression is not None
    assert small.evaluation is not None
    assert len(small.runs) == 1
    # The evaluation's, of the output that does worst, and not the benchmark's.
    assert small.metrics == {
        "snr_db": 24.5,
        "top1": 0.95,
        "cosine": 0.999,
        "kl": 0.01,
        "max_error": 0.0,
    }
    assert broken.name == "broken"
    assert made.title == "tiny"


@pytest.mark.parametrize("made", [compression, evaluation])
@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0])
def test_a_report_of_another_version_is_refused(made, version, tmp_path):
    (path,) = write(tmp_path, a=made(version=version))
    line = failed_call("report", path, "-o", tmp_path / "r.html")
    assert line.startswith(f"error: {path}: version must be 1, got {version!r}; make")
    data = made()
    del data["version"]
    (path,) = write(tmp_path, a=data)
    assert "version must be 1, got None" in failed_call("report", path, "-o", tmp_path / "r.html")


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where in JSON numbers are."""
    if isinstance(data, dict):
        return [place for key, item in data.items() for place in places(item, (*path, key))]
    if isinstance(data, list):
        return [place for i, item in enumerate(data) for place in places(item, (*path, i))]
    return [path] if isinstance(data, (int, float)) and not isinstance(data, bool) else []


def changed(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    made = json.loads(json.dumps(data))
    inner = made
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return made


@pytest.mark.parametrize(
    "data",
    [compression(asked=2, compressed=1, left=1, ratio=2.5, seconds=0.5), evaluation()],
    ids=["compression", "evaluation"],
)
def test_a_text_for_a_number_is_refused_wherever_it_is(data, tmp_path):
    found = places(data)
    assert len(found) > 10
    for place in found:
        for value in ("12", "<b>", [], {}, True):
            (path,) = write(tmp_path, a=changed(data, place, value))
            with pytest.raises(errors.ResultError, match=r"^.*a\.json: .*, got ") as caught:
                page.collect([path])
            assert str(place[-1]).removeprefix("-") in str(caught.value), place


@pytest.mark.parametrize(
    ("place", "made"),
    [
        (("package_bytes_after",), compression),
        (("weights", 1, "bytes_after"), compression),
        (("weights", 0, "bits_per_weight"), compression),
        (("n_samples",), evaluation),
    ],
)
def test_what_counts_is_not_negative(place, made, tmp_path):
    (path,) = write(tmp_path, a=changed(made(), place, -1))
    with pytest.raises(errors.ResultError, match=f"{place[-1]} must be at least 0, got -1"):
        page.collect([path])


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 5, '{"a": NaN}', "\ud800", ""])
def test_what_is_no_json_is_a_sentence(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    assert "a.json: not valid JSON: " in failed_call("report", path)


def test_two_runs_of_one_package_are_told_apart(tmp_path):
    later = bench(created="2026-03-04T05:06:07+00:00", run_id="2")
    paths = write(tmp_path, a=bench(), b=later)
    for name in ("r.html", "r.md"):
        page.write(paths, tmp_path / name)
        text = (tmp_path / name).read_text().replace("\\", "")
        assert "run 1, 2026-01-01 00:00" in text
        assert "run 2, 2026-03-04 05:06" in text
    page.write(paths[:1], tmp_path / "r.md")
    assert "run 1" not in (tmp_path / "r.md").read_text()


def test_packages_with_one_name_in_two_folders_stay_apart(tmp_path):
    one = compression(destination="a/m.mlpackage")
    two = compression(destination="b/m.mlpackage")
    # The second finds the first by its name alone: there is no other.
    made = page.collect(write(tmp_path, a=one, b=evaluation("m")))
    assert len(made.packages) == 2
    made = page.collect(write(tmp_path, a=one, b={**two, "source": "x/tiny.mlpackage"}))
    assert [each.path for each in made.packages if not each.is_original] == ["a/m.mlpackage"]


def test_accuracies_of_other_samples_do_not_stand_beside_each_other(tmp_path):
    sources = write(
        tmp_path,
        a=evaluation("one"),
        b=evaluation("two"),
        c=evaluation("three", n_samples=9),
        d=evaluation("four", is_random=True),
        e=bench(),
    )
    made = page.collect(sources)
    kept = {each.name for each in made.packages if each.metrics and not each.is_original}
    assert kept == {"one", "two"}
    (text,) = [b.text for b in captions.banners(made) if b.name == "Accuracy left out"]
    assert text == "The accuracy of three, four, small, broken is of other samples than the rest."
    assert not any(b.name == "Random inputs" for b in captions.banners(made))
    alone = page.collect(sources[4:])
    assert any(b.name == "Random inputs" for b in captions.banners(alone))


@pytest.mark.parametrize(
    ("treatment", "family"),
    [
        ("palettize 4 bits", "palette"),
        ("quantize int8, per channel", "integer"),
        ("prune 50%", "pruned"),
        ("prune 50%, then palettize 4 bits", "joint"),
        ("8-bit activations, then quantize int8", "activations"),
        ("as it is", "original"),
        ("something", "other"),
        ("", "other"),
    ],
)
def test_colours_are_of_kinds_of_treatment(treatment, family):
    from milpress.page.collect import PackageResults

    assert PackageResults(path="m", name="m", treatment=treatment).family == family


@pytest.mark.parametrize("kind", schema.KINDS)
def test_every_kind_has_its_banner_in_both_forms(kind, tmp_path):
    sources = write(tmp_path, r=result(kind))
    for name in ("r.html", "r.md"):
        page.write(sources, tmp_path / name)
    html, markdown = (tmp_path / "r.html").read_text(), (tmp_path / "r.md").read_text()
    assert f'<div class="banner {kind}" role="note"><b>{captions.KIND_NAMES[kind]}</b>' in html
    assert f"> **{captions.KIND_NAMES[kind]}.**" in markdown
    assert ('<section id="estimates">' in html) == (kind == "estimate")
    assert ("## Estimates, not measured" in markdown) == (kind == "estimate")


def test_groups_hold_one_kind_one_machine_and_one_choice_of_units(tmp_path):
    sources = write(
        tmp_path,
        a=result("measured", entry("measured", "CPU_ONLY"), entry("measured", "ALL")),
        b=bench("cpu_reference"),
        c=result("replay", entry("replay", "CPU_ONLY")),
        d=result("fake"),
        e=result("estimate"),
    )
    found = groups(page.collect(sources))
    assert sorted((each.kind, each.title, each.stamp) for each in found) == [
        ("cpu_reference", "Interpreter", ""),
        ("fake", "FAKE:CPU_AND_NE", "FAKE"),
        ("measured", "ALL", ""),
        ("measured", "CPU_ONLY", ""),
        ("replay", "CPU_ONLY", "REPLAY"),
    ]
    for group in found:
        assert {run.entry.timing.kind for run in group.runs if run.entry.timing} == {group.kind}


def test_two_devices_have_two_charts(tmp_path):
    sources = write(
        tmp_path,
        a=bench(),
        b=result("measured", bench().entries[0], device=device(chip="Apple M4")),
    )
    found = groups(page.collect(sources))
    assert [group.where.partition(",")[0] for group in found] == ["Apple M2", "Apple M4"]


def test_no_neural_engine_is_named_where_there_is_none(tmp_path):
    quiet = {"placement": placement("measured", "gpu"), "energy": None}
    made = result(
        "measured",
        entry("measured", "CPU_AND_NE", **quiet),
        entry("measured", "ALL", **quiet),
        entry("measured", "CPU_ONLY", **quiet),
    )
    without = replace(made, device=device(compute_devices=("cpu",), neural_engine_cores=None))
    titles = [group.title for group in groups(page.collect(write(tmp_path, r=without)))]
    assert titles == [
        "CPU_AND_NE (no Neural Engine here)",
        "ALL (no Neural Engine here)",
        "CPU_ONLY",
    ]
    page.write(write(tmp_path, r=result("cpu_reference")), tmp_path / "r.html")
    text = re.sub(r"<(script|style).*?</\1>", "", (tmp_path / "r.html").read_text(), flags=re.S)
    # Once, in the banner that says that nothing is one of a Neural Engine.
    assert text.count("Neural Engine") == 1


class Elements(HTMLParser):
    """Elements and their attributes, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def hostile(folder: Path, text: str = EVIL) -> list[Path]:
    """Write results in which all that can be any text is this one."""
    made = compression(
        text,
        weights=[
            {
                **compression()["weights"][0],
                "name": text,
                "treatment": text,
                "note": text,
                "op_types": [text],
            }
        ],
    )
    measured = entry(
        "measured",
        "CPU_AND_NE",
        text,
        model=model(text, path=text, treatment=text),
        warnings=(text,),
    )
    broken = replace(
        failed("measured", "ALL", text),
        failure=schema.Failure(phase=text, reason=text, message=text),
    )
    op = schema.OpPlacement(name=text, op_type=text, preferred="cpu", cost=0.5)
    plan = schema.Placement(kind="measured", source=text, ops=(op,))
    evidence = schema.Decompression(kind="measured", verdict="unknown", evidence=(text,))
    run_of = result(
        "measured",
        replace(measured, placement=plan, decompression=evidence),
        broken,
        warnings=(text,),
        device=device(model=text, chip=text, os=f"macOS {text}", os_build=text),
        created=text,
    )
    ops = [{"name": text, "op_type": text, "snr_db": 1.0, "own_snr_db": 1.0}]
    return write(
        folder,
        a=made,
        b=evaluation(text, ops=ops),
        c=run_of,
        d=published(
            title=text,
            source=text,
            device=text,
            method=text,
            note=text,
            columns=[text],
            rows=[[text]],
        ),
    )


def test_hostile_text_is_no_markup(tmp_path):
    pages = {}
    for name, text in {"evil": EVIL, "plain": "plain"}.items():
        (tmp_path / name).mkdir()
        page.write(hostile(tmp_path / name, text), tmp_path / f"{name}.html", title=text)
        pages[name] = (tmp_path / f"{name}.html").read_text()
    for character in "\x1b\u202e\u2028":
        assert character not in pages["evil"]
    evil, plain = (Elements(text).found for text in pages.values())
    assert not [attributes for tag, attributes in evil if tag == "img"]
    assert len([tag for tag, _ in evil if tag == "script"]) == 2
    # Nothing of the text begins an element, or ends one or an attribute, wherever it stands.
    assert [(tag, [*attributes]) for tag, attributes in evil] == [
        (tag, [*attributes]) for tag, attributes in plain
    ]
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', pages["evil"])
    assert json.loads(data)["compressions"][0]["weights"][0]["name"] == errors.printable(EVIL)


def test_nothing_but_style_and_script_is_filled_in_as_it_is():
    folder = Path(page.__file__).parent / "templates"
    unescaped = [
        line
        for path in folder.iterdir()
        for line in path.read_text().splitlines()
        if "safe" in line
    ]
    assert unescaped == [
        "<style>{{ style | safe }}</style>",
        "<script>{{ script | safe }}</script>",
    ]
    assert not [path for path in folder.iterdir() if "autoescape" in path.read_text()]


def test_hostile_text_is_no_markdown(tmp_path):
    page.write(hostile(tmp_path), tmp_path / "evil.md", title=EVIL)
    text = (tmp_path / "evil.md").read_text()
    for character in "\x1b\u202e\u2028":
        assert character not in text
    assert not re.search(r"(?<!\\)[<`]", text)
    # The only bars that are not escaped are those of tables.
    for line in text.splitlines():
        if re.search(r"(?<!\\)\|", line):
            assert line.startswith("| ")
            assert line.endswith(" |")


def test_a_page_needs_nothing_but_itself(tmp_path):
    page.write(write(tmp_path, a=compression(), c=bench()), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    for tag, attributes in Elements(text).found:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert not attributes.get(name) or attributes[name] == "data:,", (tag, name)
        assert "style" not in attributes
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert "default-src 'none'" in text


def test_pages_say_the_same_each_time(tmp_path):
    sources = write(tmp_path, a=compression(), b=evaluation(), c=bench())
    for name in ("a.html", "b.html"):
        page.write(sources, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_published_tables_are_well_formed_and_name_their_source():
    made = page.collect([page.LITERATURE])
    (literature,) = made.contents(Literature)
    assert literature.publisher == "Apple"
    for table in literature.tables:
        assert table.source
        assert table.device
        assert table.method
        assert table.rows


WEIGHT = compression()["weights"][0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "a report must be of what `milpress compress --json`"),
        ({"a": 1}, "got another object"),
        ({"schema": "milpress-bench/2"}, "schema must be 'milpress-bench/1'"),
        (compression(weights=[{}]), "weights[0]: name, op_types, shape, "),
        (
            compression(package_bytes_after="3"),
            "package_bytes_after must be a whole number",
        ),
        (compression(package_bytes_after=10**400), "must be a whole number of 64 bits"),
        (
            compression(weights=[{**WEIGHT, "status": EVIL}]),
            "status must be one of compressed, left",
        ),
        (compression(weights=[{**WEIGHT, "shape": [4, 0]}]), "sizes of at least 1, got [4, 0]"),
        (evaluation(outputs=[{"name": "y", "snr_db": "much"}]), "must be a finite number"),
        (published(rows=[["net"]]), "not every row of 'A table' has 2 cells"),
        (published(extra=1), "tables[0]: unknown key extra"),
    ],
)
def test_another_file_is_one_sentence(content, message, tmp_path):
    (path,) = write(tmp_path, x=content)
    line = failed_call("report", path, "-o", tmp_path / "r.html")
    assert str(path) in line
    assert message in line
    assert not (tmp_path / "r.html").exists()


def test_a_page_is_html_or_markdown_and_is_not_overwritten(tmp_path):
    (source,) = write(tmp_path, a=compression())
    with pytest.raises(errors.ConfigError, match=r"a page must be \.html or \.md, got '\.pdf'"):
        page.write([source], tmp_path / "r.pdf")
    with pytest.raises(errors.ConfigError, match="no result to show: give at least one"):
        page.write([], tmp_path / "r.html")
    out = tmp_path / "r.html"
    out.write_text("mine")
    assert f"{out} exists already; --force (force=True) replaces it" in failed_call(
        "report", source, "-o", out
    )
    assert out.read_text() == "mine"
    shown = run("report", source, "-o", out, "--force", "--title", "A title").stdout
    assert "1 results of 2 packages" in shown
    assert "<h1>A title</h1>" in out.read_text()
    assert "PackageNotFound" not in failed_call(
        "report", tmp_path / "no.json", "-o", out, "--force"
    )
