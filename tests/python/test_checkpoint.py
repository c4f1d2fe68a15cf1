"""Runs that are interrupted go on from the weights that they had finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import failed, run

import milpress
from milpress.compression import treating
from milpress.errors import ConfigError, DestinationError
from milpress.formats import Custom, PalettizeConfig, PerBlock, PruneConfig, QuantizeConfig
from milpress.recipe import Recipe, Step

RECIPES = {
    "palettes": [PalettizeConfig(bits=4, group_size=8)],
    "palettes of vectors": [PalettizeConfig(bits=4, vector_size=2)],
    "integers": [QuantizeConfig(dtype="int4", granularity=PerBlock(8), offset=True)],
    "pruned": [PruneConfig(sparsity=0.5)],
    "pruned palettes": [PruneConfig(sparsity=0.5), PalettizeConfig(bits=4)],
    "palettes of integers": [PalettizeConfig(bits=4), QuantizeConfig(dtype="int8")],
}


def recipe_of(kind: str) -> Recipe:
    return Recipe(steps=tuple(Step(treatment=treatment) for treatment in RECIPES[kind]))


def files(package: Path) -> dict[str, bytes]:
    """Return the model and the weights of a package."""
    paths = [path for path in package.rglob("*") if path.suffix in (".bin", ".mlmodel")]
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture
def interrupt(monkeypatch):
    """Return a function that lets so many weights be treated before it interrupts."""
    treated = treating._treat

    def after(n_weights: int) -> list[str]:
        names: list[str] = []

        def count(job: Any, *rest: Any) -> Any:
            if len(names) == n_weights:
                raise KeyboardInterrupt
            names.append(job.weight.name)
            return treated(job, *rest)

        monkeypatch.setattr(treating, "_treat", count)
        return names

    return after


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_an_interrupted_run_goes_on_and_gives_the_same(kind, threads, build, interrupt, tmp_path):
    source, folder = build("layers"), tmp_path / "kept"
    whole, out = tmp_path / "whole.mlpackage", tmp_path / "out.mlpackage"
    milpress.compress(source, whole, recipe_of(kind))
    first = interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        milpress.compress(source, out, recipe_of(kind), threads=threads, checkpoint=folder)
    assert not out.exists()
    assert any(folder.iterdir())
    later = interrupt(1000)
    report = milpress.compress(source, out, recipe_of(kind), threads=threads, checkpoint=folder)
    assert report.verified
    assert files(out) == files(whole)
    assert len(first) == 3
    assert later
    assert not set(first) & set(later)
    assert not folder.exists()


def test_feedback_and_corrections_go_on(build, interrupt, tmp_path):
    source, folder = build("layers", dtype="fp32"), tmp_path / "kept"
    x = np.random.default_rng(0).standard_normal((3, 1, 48, 8, 8)).astype(np.float32)
    settings = {"sample_data": {"x": x}, "feedback": True, "bias_correction": True}
    whole, out = tmp_path / "whole.mlpackage", tmp_path / "out.mlpackage"
    expected = milpress.compress(source, whole, recipe_of("palettes"), **settings)
    interrupt(3)
    with pytest.raises(KeyboardInterrupt):
        milpress.compress(source, out, recipe_of("palettes"), checkpoint=folder, **settings)
    kept = sorted(folder.iterdir())
    interrupt(1000)
    for other in (
        {"feedback": False},
        {"feedback_memory": 10**9},
        {"sample_data": {"x": x + 1}},
        {"bias_correction": False},
    ):
        with pytest.raises(
            ConfigError, match="holds weights of another package, other samples or settings"
        ):
            milpress.compress(
                source, out, recipe_of("palettes"), checkpoint=folder, **(settings | other)
            )
    with pytest.raises(ConfigError, match="delete the folder to begin anew"):
        milpress.compress(source, out, recipe_of("pruned"), checkpoint=folder, **settings)
    assert sorted(folder.iterdir()) == kept
    report = milpress.compress(source, out, recipe_of("palettes"), checkpoint=folder, **settings)
    assert files(out) == files(whole)
    assert [each.note for each in report.weights] == [each.note for each in expected.weights]


def test_a_table_of_ones_own_is_made_anew(build, tmp_path):
    def table(rows: Any) -> Any:
        return np.sort(rows, axis=None)[:: max(1, rows.size // 16)][:16], np.zeros(rows.size, int)

    def chosen(rows: Any) -> Any:
        lut, _ = table(rows)
        return lut, np.abs(rows.reshape(-1)[:, None] - lut).argmin(axis=1).astype(np.uint8)

    folder, out = tmp_path / "kept", tmp_path / "out.mlpackage"
    recipe = Recipe.of(PalettizeConfig(bits=None, table=Custom(chosen)))
    milpress.compress(build("shared"), out, recipe, checkpoint=folder)
    assert not folder.exists()


def test_a_folder_that_is_no_checkpoint_is_refused_and_kept(build, tmp_path):
    source, out = build("shared"), tmp_path / "out.mlpackage"
    recipe = recipe_of("palettes")
    with pytest.raises(DestinationError, match="give a folder outside it for the checkpoint"):
        milpress.compress(source, out, recipe, checkpoint=source / "kept")
    taken = tmp_path / "file"
    taken.write_text("own")
    with pytest.raises(DestinationError, match="a file; give a folder"):
        milpress.compress(source, out, recipe, checkpoint=taken)
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "own.txt").write_text("own")
    assert milpress.compress(source, out, recipe, checkpoint=folder).verified
    assert [path.name for path in folder.iterdir()] == ["own.txt"]


def test_a_damaged_file_is_named(build, interrupt, tmp_path):
    source, out, folder = build("layers"), tmp_path / "out.mlpackage", tmp_path / "kept"
    interrupt(1)
    with pytest.raises(KeyboardInterrupt):
        milpress.compress(source, out, recipe_of("palettes"), checkpoint=folder, threads=1)
    (path,) = folder.iterdir()
    interrupt(1000)
    whole = path.read_bytes()
    for damaged in (b"", b"PK other", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=rf"{path.name}: not a weight of an interrupted run"):
            milpress.compress(source, out, recipe_of("palettes"), checkpoint=folder)


def test_the_command_line_keeps_weights(build, tmp_path):
    source, folder = build("shared"), tmp_path / "kept"
    options = ["--palettize", 4, "--checkpoint", folder]
    run("compress", source, tmp_path / "out.mlpackage", *options)
    assert not folder.exists()
    folder.write_text("own")
    assert "a file; give a folder" in failed(
        "compress", source, tmp_path / "twin.mlpackage", *options
    )
