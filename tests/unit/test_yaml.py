"""YAML files: plain values of bounded size, whose keys are given once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import failed

from milpress.device import suite
from milpress.errors import CompressionError, ConfigError
from milpress.plain.yaml import load
from milpress.planner.linting import lint
from milpress.recipe import Recipe

SEED = Path(__file__).parents[1] / "fuzz" / "corpus" / "packages" / "branches-iOS17.mlpackage"
RECIPE = """
version: 1
target: iOS18
steps:
  - palettize: {bits: 4, group_size: 16}
    select: {min_size: 10, op_types: [linear]}
    rules:
      - {op_types: [linear], quantize: {dtype: int8, block_size: 32}}
      - {name: "glob:*conv1_*", keep: true}
  - prune: {sparsity: 0.5}
"""


def loaded(text: str) -> Any:
    return load(io.StringIO(text), "a recipe")


def bomb(levels: int, width: int, kind: str) -> str:
    """Return lists of aliases of the list before, or mappings that merge the one before."""
    lines = ["l0: &l0 {a: 1}" if kind == "merge" else f"l0: &l0 [{', '.join('x' * width)}]"]
    for i in range(1, levels):
        aliases = ", ".join([f"*l{i - 1}"] * width)
        inside = f"{{<<: [{aliases}]}}" if kind == "merge" else f"[{aliases}]"
        lines.append(f"l{i}: &l{i} {inside}")
    return "\n".join(lines)


@pytest.mark.parametrize("kind", ["list", "merge"])
def test_aliases_that_stand_for_too_many_values_are_refused_before_they_are_made(kind, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(bomb(9, 9, kind))
    line = failed("compress", SEED, tmp_path / "out.mlpackage", "--recipe", path)
    # Nine times nine, and so on: 9 ** 6 is more, and 9 ** 5 is not.
    assert line.startswith(f"error: {path}, line ")
    assert line.endswith("can't be read as a recipe: more than 200000 values, aliases written out")


def test_aliases_and_merges_of_a_few_values_are_what_they_stand_for():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [*a, *a]\nd: {<<: [*a, {z: 4}]}"
    assert loaded(text) == yaml.safe_load(text)
    assert loaded(RECIPE) == yaml.safe_load(RECIPE)
    assert loaded(bomb(5, 9, "list")) == yaml.safe_load(bomb(5, 9, "list"))
    # One that overrides what it merges is merged in turn.
    text = "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}"
    assert loaded(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "line", "got"),
    [
        ("a: 1\nb: 2\na: 3", 3, "the key 'a' again, which line 1 has"),
        ("a:\n  - x: 1\n    y: 2\n    x: 1", 4, "the key 'x' again, which line 2 has"),
        ("a: {x: 1, 'x': 2}", 1, "the key 'x' again"),
        ("1: 2\n0x1: 3", 2, "the key '0x1' again"),
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}", 2, "the key '<<' again"),
        ("? [1, 2]\n: 3", 1, "a list or mapping as a key"),
        ("a: &a\n  - [*a]", 1, "an alias of what it is in"),
        ("a: *b", 1, "found undefined alias 'b'"),
        ("a: !!python/object/apply:os.system [ls]", 1, "could not determine a constructor"),
        ("a: 1\n--- \nb: 2", 2, "but found another document"),
        ("a: " + "9" * 5000, 1, "a number of more than 300 digits"),
        ("a: 0x" + "f" * 5000, 1, "a number of more than 300 digits"),
        ("a: 1" + ":59" * 5000, 1, "a number of more than 300 digits"),
        ("a: b: c", 1, "mapping values are not allowed here"),
        ("[" * 60 + "]" * 60, 1, "more than 50 levels"),
        ("a: &a " + "[" * 30 + "]" * 30 + "\nb: " + "[" * 30 + "*a" + "]" * 30, 2, "more than 50"),
        ("- " * 5000, 1, "more than 50 levels"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_plain_tree_is_refused_with_its_line(text, line, got):
    with pytest.raises(ConfigError) as caught:
        loaded(text)
    assert str(caught.value).startswith(f"stream, line {line}: can't be read as a recipe: ")
    assert got in str(caught.value)


@pytest.mark.parametrize("text", ["\0", "!!int x", "!!float x", "!!bool x", "a: \ud800b: \x07"])
def test_what_is_no_yaml_is_refused(text):
    with pytest.raises(ConfigError, match="stream: can't be read as a recipe: "):
        loaded(text)


def test_a_file_of_another_size_or_encoding_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    for data in (b"\xff\xfe\x00", b"#" * (5 << 20)):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"a\.yaml: can't be read as a recipe: "):
            load(path, "a recipe")
    path.write_text("a: mod\u00e8le", encoding="utf-8")
    assert load(path, "a recipe") == {"a": "mod\u00e8le"}


def test_what_looks_like_a_date_is_text():
    assert loaded("a: 2020-01-01\nb: 9999-99-99") == {"a": "2020-01-01", "b": "9999-99-99"}


HOSTILE = [None, True, -1, 10**200, float("nan"), float("inf"), "", "x" * 1000, "\ud800", [], {}]
HOSTILE += [[[]], {1: 2}, {None: 1, "a": 2}, [None, 1], b"bytes", {"a"}]


def variants(data: Any) -> Any:
    """Yield data with each value, in turn, replaced by a hostile one, and keys added."""
    yield from HOSTILE
    if isinstance(data, dict):
        for key, item in data.items():
            yield from ({**data, key: value} for value in variants(item))
        yield from ({**data, key: 1} for key in (1, None, True, 1.5, "\ud800", b"a"))
    elif isinstance(data, list):
        for i, item in enumerate(data):
            yield from ([*data[:i], value, *data[i + 1 :]] for value in variants(item))


def test_whatever_values_a_recipe_has_it_is_one_or_refused():
    said = []
    for data in variants(yaml.safe_load(RECIPE)):
        try:
            Recipe.from_dict(data)
        except CompressionError as error:
            said.append(str(error))
    assert len(said) > 200
    assert all(line.isprintable() for text in said for line in text.split("\n"))


@pytest.mark.parametrize("text", ["[" * 60, "a: 1\na: 2", "1: 2", "a: [.nan]", "- 1", "2020-01-01"])
def test_other_files_of_settings_are_refused_so_too(text, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    for read in (suite.Suite.from_yaml, lambda path: lint(SEED, facts=[path])):
        with pytest.raises(CompressionError, match=r"a\.yaml"):
            read(path)
