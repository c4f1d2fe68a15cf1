"""Recipes: a value that survives YAML, and errors that name the place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from command_line import run
from hypothesis import given
from hypothesis import strategies as st

from milpress import formats as f
from milpress.errors import ConfigError
from milpress.recipe import Keep, Recipe, Rule, Select, Step

SEED = Path(__file__).parents[1] / "fuzz" / "corpus" / "packages" / "branches-iOS17.mlpackage"

granularities = st.one_of(
    st.just(f.PerTensor()), st.just(f.PerChannel()), st.builds(f.PerBlock, st.integers(1, 256))
)
treatments = st.one_of(
    st.builds(
        f.PalettizeConfig,
        bits=st.sampled_from([1, 2, 3, 4, 6, 8]),
        group_size=st.none() | st.integers(1, 64),
    ),
    st.builds(
        f.QuantizeConfig,
        dtype=st.sampled_from(["int8", "uint8", "int4", "uint4"]),
        granularity=granularities,
        offset=st.booleans(),
    ),
    st.builds(f.PruneConfig, sparsity=st.floats(0, 1)),
    st.builds(f.PruneConfig, threshold=st.floats(0, 10)),
)
selects = st.builds(
    Select,
    name=st.none() | st.sampled_from(["a", "glob:*x", "re:y.*"]),
    op_types=st.lists(st.sampled_from(["conv", "linear"])).map(tuple),
    min_size=st.integers(0, 10_000),
)
rules = st.builds(Rule, select=selects, treatment=treatments | st.just(Keep()))
steps = st.builds(
    Step, treatment=treatments, select=selects, rules=st.lists(rules, max_size=3).map(tuple)
)
recipes = st.builds(
    Recipe,
    steps=st.lists(steps, min_size=1, max_size=3).map(tuple),
    target=st.none() | st.sampled_from(["iOS16", "iOS18"]),
)


@given(recipe=recipes)
def test_a_recipe_survives_yaml(recipe):
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


def test_the_documented_form_is_read():
    recipe = Recipe.from_dict(
        yaml.safe_load(
            """
            version: 1
            target: iOS18
            steps:
              - prune: {sparsity: 0.5}
                select: {op_types: [linear, conv], min_size: 2048}
              - palettize: {bits: 4, group_size: 16}
                rules:
                  - {name: "glob:*embed*", quantize: {dtype: int8}}
                  - {name: "re:.*lm_head.*", keep: true}
            """
        )
    )
    second = recipe.steps[1]
    assert second.treatment_for("my_embed_0", ["gather"])[0] == f.QuantizeConfig()
    assert second.treatment_for("lm_head_w", ["linear"])[0] == Keep()
    assert second.treatment_for("other", ["linear"])[0] == f.PalettizeConfig(bits=4, group_size=16)
    assert recipe.steps[0].treatment_for("other", ["gather"])[0] == Keep()


def test_the_first_rule_that_matches_wins():
    step = Step(
        treatment=f.PalettizeConfig(),
        rules=(
            Rule(select=Select(name="re:conv[12]"), treatment=Keep()),
            Rule(select=Select(name="glob:conv*"), treatment=f.QuantizeConfig()),
        ),
    )
    assert step.treatment_for("conv1", [])[0] == Keep()
    assert step.treatment_for("conv3", [])[0] == f.QuantizeConfig()
    assert step.treatment_for("a_conv1", [])[0] == f.PalettizeConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", r"recipe\.yaml must be a mapping, got \[\]"),
        ("{}", "a recipe needs steps"),
        ("{steps: []}", "a recipe needs steps"),
        ("{steps: 4}", "steps must be a list, got 4"),
        ("{version: 2, steps: [{prune: {sparsity: 0.5}}]}", "version must be 1, got 2"),
        (
            "{steps: [{prune: {sparsity: 0.5}}], extra: 1}",
            "recipe.yaml: unknown key extra; the keys are version, target, steps",
        ),
        ("{steps: [{}]}", "a step needs one of palettize, quantize, prune, or rules"),
        ("{steps: [{prune: {}}]}", "exactly one of sparsity, threshold and n_m"),
        (
            "{steps: [{prune: {sparsity: half}}]}",
            r"steps\[0\].prune: sparsity must be a finite number, got 'half'",
        ),
        ("{steps: [{palettize: {bits: 4.0}}]}", r"palettize: bits must be a whole number, got 4.0"),
        ("{steps: [{palettize: {nbits: 4}}]}", r"steps\[0\].palettize: unknown key nbits; .* bits"),
        (
            "{steps: [{palettize: {}, prune: {sparsity: 0.5}}]}",
            "palettize and prune stand together",
        ),
        (
            "{steps: [{quantize: {granularity: per_row}}]}",
            r"granularity must be one of per_tensor, .*'per_row'",
        ),
        ("{steps: [{quantize: {offset: perhaps}}]}", "offset must be true or false"),
        (
            "{steps: [{prune: {n_m: [2, 4], axis: -1}}]}",
            r"steps\[0\].prune: axis must be 0 or 1 .* got -1",
        ),
        (
            "{steps: [{palettize: {group_size: -1}}]}",
            r"steps\[0\].palettize: group_size must be at least 1, got -1",
        ),
        (
            "{steps: [{quantize: {block_size: 0}}]}",
            r"steps\[0\].quantize: block_size must be at least 1, got 0",
        ),
        ("{steps: [{palettize: {}, rules: [{name: x}]}]}", r"rules\[0\]: a rule has either keep"),
        ("{steps: [{palettize: {}, rules: [{keep: true, prune: {sparsity: 1}}]}]}", "either keep"),
        ("{steps: [{palettize: {}, select: {name: 're:('}}]}", "regular expression"),
        ("{steps: [{palettize: {}, select: {min_size: -1}}]}", "min_size must not be negative"),
        ("{steps: [{palettize: {}, select: {op_types: conv}}]}", "op_types must be a list"),
    ],
)
def test_a_malformed_recipe_names_the_place(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.from_yaml(path)
    assert str(path) in str(caught.value)


WRONG = """
version: 2
steps:
  - prune: {sparsity: 0.5}
  - prune: {sparsity: 2}
  - palettize: {bits: 5}
    rules: [{name: x, keep: 1, quantize: {block_size: [1, a], dtype: int9}}, 4]
  - quantize_activations: {percentile: 20}
    extra: 1
"""
PLACES = [
    "version must be 1, got 2",
    "steps[1].prune: sparsity must be from 0 to 1, got 2",
    "steps[2].palettize: bits must be one of (1, 2, 3, 4, 6, 8), got 5",
    "steps[2].rules[0].quantize: dtype must be one of int8, uint8, int4, uint4, got 'int9'",
    "steps[2].rules[0].quantize: block_size[1] must be a whole number, got 'a'",
    "steps[2].rules[0]: keep must be true or false, got 1",
    "steps[2]: rules[1] must be a mapping, got 4",
    "steps[3].quantize_activations: percentile must be above 50 and at most 100, got 20",
    "steps[3]: unknown key extra; the keys are quantize_activations, select, rules",
]


def test_all_that_is_wrong_is_said_at_once_a_line_for_each_place(tmp_path):
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(yaml.safe_load(WRONG))
    assert str(caught.value).splitlines() == PLACES
    path = tmp_path / "recipe.yaml"
    path.write_text(WRONG)
    shown = run("compress", SEED, tmp_path / "out.mlpackage", "--recipe", path, code=2).stderr
    assert shown.removeprefix("error: ").splitlines() == [f"{path}: {line}" for line in PLACES]


def test_of_many_wrong_places_the_first_are_shown_and_the_others_counted():
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict({"steps": [4] * 1000})
    lines = str(caught.value).splitlines()
    assert lines[19:] == ["steps[19] must be a mapping, got 4", "and 980 more places"]


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        (
            {"bits": 4, "vector_size": 2, "seed": 7},
            f.PalettizeConfig(vector_size=2, table=f.KMeans(7)),
        ),
        ({"bits": None, "table": "unique"}, f.PalettizeConfig(bits=None, table=f.Unique())),
        ({"bits": 3, "table": "uniform"}, f.PalettizeConfig(bits=3, table=f.Uniform())),
    ],
)
def test_tables_are_read_and_written(settings, config):
    recipe = Recipe.from_dict({"steps": [{"palettize": settings}]})
    assert recipe == Recipe.of(config)
    assert recipe.to_dict()["steps"] == [{"palettize": settings}]
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("text", ["a: [", "!!python/object/apply:os.getcwd []", "\x00"])
def test_a_file_that_is_no_plain_yaml_is_refused(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="can't be read as a recipe: "):
        Recipe.from_yaml(path)
