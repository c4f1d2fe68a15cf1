"""Recipes: a value that survives YAML, and errors that name the place."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from milpress import formats as f
from milpress.errors import ConfigError
from milpress.recipe import Keep, Recipe, Rule, Select, Step

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
        ("[]", "the recipe must be a mapping"),
        ("{}", "a recipe must have steps, got none"),
        ("{steps: []}", "a recipe must have steps, got none"),
        ("{steps: 4}", "steps must be a list, got 4"),
        ("{version: 2, steps: [{prune: {sparsity: 0.5}}]}", "version must be 1, got 2"),
        ("{steps: [{prune: {sparsity: 0.5}}], extra: 1}", "the recipe must have no keys .*extra"),
        ("{steps: [{}]}", "a step must have one of"),
        ("{steps: [{prune: {}}]}", "exactly one of sparsity, threshold and n_m"),
        ("{steps: [{prune: {sparsity: half}}]}", r"steps\[0\].prune.sparsity must be a number"),
        ("{steps: [{palettize: {bits: 4.0}}]}", r"palettize.bits must be a whole number, got 4.0"),
        ("{steps: [{palettize: {nbits: 4}}]}", r"steps\[0\].palettize must have no keys .*nbits"),
        ("{steps: [{palettize: {}, prune: {sparsity: 0.5}}]}", r"got palettize and prune"),
        ("{steps: [{quantize: {granularity: per_row}}]}", "granularity must be per_tensor or"),
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
        ("{steps: [{palettize: {}, rules: [{name: x}]}]}", r"rules\[0\] must have either keep"),
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


@pytest.mark.parametrize("text", ["a: [", "!!python/object/apply:os.getcwd []", "\x00"])
def test_a_file_that_is_no_plain_yaml_is_refused(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="can't be read as a recipe: "):
        Recipe.from_yaml(path)
