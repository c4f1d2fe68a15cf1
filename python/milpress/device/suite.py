"""Suite of treatments of one model, each compressed and run in every unit."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from milpress.compression.packages import compress
from milpress.device import benchmark, files, schema
from milpress.device.entries import Candidate, failed_entry, model_of
from milpress.device.runner import Plan
from milpress.device.schema import Failure, Result
from milpress.errors import CompressionError, ConfigError, DestinationError
from milpress.mil.package import Package
from milpress.plain import json, yaml
from milpress.plain.files import system_errors, write_whole
from milpress.progress import Progress, shown
from milpress.recipe import Recipe, describe
from milpress.samples.data import RandomSamples

if TYPE_CHECKING:
    from milpress.samples.data import Data

VERSION = 1
RESULTS = "results.json"
_BUILT_IN = Path(__file__).with_name("suite.yaml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One treatment of the grid, by the name of its package and report; none without a recipe."""

    name: str
    recipe: Recipe | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A grid: variants, and the units that each is run in."""

    units: tuple[str, ...]
    variants: tuple[Variant, ...]

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str] | None = None) -> Suite:
        """Return the grid of a file, or the one that comes with milpress.

        Raises
        ------
        ConfigError
            If it is no grid.
        """
        if path is None:
            return cls.from_dict(yaml.load(_BUILT_IN, "a suite"))
        return cls.from_dict(yaml.load(path, "a suite"), str(path))

    @classmethod
    def from_dict(cls, data: Any, place: str = "the suite") -> Suite:
        """Return the grid that a dictionary stands for.

        Raises
        ------
        ConfigError
            If it is none.
        """
        keys = {"version", "target", "units", "variants"}
        if not isinstance(data, dict) or data.get("version") != VERSION or set(data) - keys:
            msg = (
                f"{place} must be a mapping of {', '.join(sorted(keys))}, with version {VERSION}, "
                f"got {str(data)[:100]!r}"
            )
            raise ConfigError(msg)
        units = data.get("units", list(schema.APPLE_UNITS))
        if not isinstance(units, list) or set(map(str, units)) - set(schema.APPLE_UNITS):
            msg = f"{place}: units must be a list of {', '.join(schema.APPLE_UNITS)}, got {units!r}"
            raise ConfigError(msg)
        variants = data.get("variants")
        if not isinstance(variants, list) or not variants:
            msg = f"{place}: variants must be a list, got {variants!r}"
            raise ConfigError(msg)
        treated = tuple(
            _variant(each, data.get("target"), f"{place}: variants[{i}]")
            for i, each in enumerate(variants)
        )
        names = [each.name for each in treated]
        if len(set(names)) < len(names):
            msg = f"{place}: the name of a variant must be its own, got {', '.join(names)}"
            raise ConfigError(msg)
        return cls(units=tuple(units), variants=treated)


def _variant(data: Any, target: Any, place: str) -> Variant:
    keys = {"name", "steps"}
    if not isinstance(data, dict) or set(data) - keys or not isinstance(data.get("name"), str):
        msg = f"{place} must be a mapping of {', '.join(sorted(keys))}, got {data!r}"
        raise ConfigError(msg)
    name = data["name"]
    if not name or Path(name).name != name or name.startswith("."):
        msg = f"{place}: a name must be that of a file, got {name!r}"
        raise ConfigError(msg)
    if not data.get("steps"):
        return Variant(name=name)
    recipe = Recipe.from_dict({"version": 1, "target": target, "steps": data["steps"]})
    return Variant(name=name, recipe=recipe)


def run(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    suite: Suite | None = None,
    driver: str = "coreml",
    units: Sequence[str] = (),
    data: Data | None = None,
    seed: int = 0,
    plan: Plan | None = None,
    options: dict[str, Any] | None = None,
    open_session: benchmark.OpenSession | None = None,
    progress: Progress | bool | None = None,
) -> Result:
    """Make every variant of a model, run it in every unit, and write all that was found.

    The folder gets ``models/``, ``reports/`` (what was done to each weight) and ``results.json``.
    A variant that can't be made is in the result, with the reason.

    Parameters
    ----------
    model
        The ``.mlpackage``.
    folder
        Where everything is written; it must not exist, or be empty.
    suite
        The grid; by default the one that comes with milpress.
    driver, units, data, seed, plan, options, open_session, progress
        As `milpress.device.run` takes them.

    Raises
    ------
    DestinationError
        If the folder is not empty.
    DriverError
        If the driver can do nothing on this machine; nothing is written then.
    """
    suite = suite or Suite.from_yaml()
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        msg = f"{folder} exists already and is not an empty folder; give another"
        raise DestinationError(msg)
    Package(model)
    session = open_session or benchmark.sessions_of(driver, options or {})
    benchmark.check_driver(session, driver)
    with system_errors(folder):
        for name in ("models", "reports"):
            (folder / name).mkdir(parents=True)
    source = Path(model)
    candidates: list[Candidate] = []
    failed: list[tuple[str, str]] = []
    with shown(progress) as note:
        for i, variant in enumerate(suite.variants):
            note(i, len(suite.variants), f"making {variant.name}")
            path = folder / "models" / f"{variant.name}.mlpackage"
            try:
                treatment = _make(source, path, folder / "reports", variant, data, seed)
            except CompressionError as error:
                failed.append((variant.name, str(error)))
                continue
            candidates.append(Candidate(package=path, name=variant.name, treatment=treatment))
            if variant.recipe is None:
                # The others are made of the copy, so that reports and results name one original.
                source = path
    if not candidates:
        msg = f"no variant of the suite is possible: {'; '.join(why for _, why in failed)}"
        raise ConfigError(msg)
    chosen = tuple(units) or (() if driver == "interpreter" else suite.units)
    result = benchmark.run(
        candidates,
        driver=driver,
        units=chosen,
        data=data,
        seed=seed,
        plan=plan,
        options=options,
        open_session=session,
        progress=progress,
    )
    original = model_of(Candidate(package=Path(model), name=""))
    names = {entry.settings.compute_units: None for entry in result.entries}
    missing = [
        failed_entry(
            dataclasses.replace(original, name=name),
            each,
            Failure(phase="compress", reason="error", message=why),
        )
        for each in names
        for name, why in failed
    ]
    result = dataclasses.replace(result, entries=(*result.entries, *missing))
    files.save(result, folder / RESULTS)
    return result


def _make(
    source: Path, path: Path, reports: Path, variant: Variant, data: Data | None, seed: int
) -> str:
    """Make one variant, write its report, and return the treatment in words."""
    if variant.recipe is None:
        with system_errors(path):
            shutil.copytree(source, path)
        return "as it is"
    samples = None
    if variant.recipe.activations is not None:
        samples = RandomSamples(8, seed) if data is None else data
    report = compress(source, path, variant.recipe, sample_data=samples)
    text = json.text(report.to_dict(), indent=1)
    write_whole(reports / f"{variant.name}.json", text.encode())
    words = [] if variant.recipe.activations is None else ["8-bit activations"]
    words += [
        describe(step.treatment) for step in variant.recipe.steps if step.treatment is not None
    ]
    return ", then ".join(words)
