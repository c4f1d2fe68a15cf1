"""Feeds milpress with damaged packages. The law: only errors of milpress come out, and they fit on
a line; nothing hangs, nothing takes much more memory than the package, the source stays as it is,
and what is written is where it was asked for.

    python tests/fuzz/packages.py --runs 2000 --seed 1
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from mutation import Files, damaged
from rich.console import Console

import milpress
from milpress import Recipe
from milpress.errors import CompressionError

SEEDS = Path(__file__).parent / "corpus" / "packages"
SECONDS_A_CASE = 120
MEMORY = 3 << 30

_ALL = {"min_size": 0}
RECIPES = tuple(
    Recipe.from_dict(recipe)
    for recipe in (
        {"steps": [{"palettize": {"bits": 2}, "select": _ALL}]},
        {"steps": [{"quantize": {"dtype": "int8"}, "select": _ALL}]},
        {"steps": [{"prune": {"sparsity": 0.5}, "select": _ALL}]},
        {
            "target": "iOS18",
            "steps": [
                {"prune": {"sparsity": 0.5}, "select": _ALL},
                {"palettize": {"bits": 4, "group_size": 4}, "select": _ALL},
            ],
        },
        {
            "target": "iOS26",
            "steps": [
                {"palettize": {"bits": 2, "vector_size": 2}, "select": _ALL},
                {"quantize": {"dtype": "int8", "granularity": "per_tensor"}, "select": _ALL},
            ],
        },
        {
            "target": "iOS18",
            "steps": [{"quantize": {"dtype": "uint4", "block_size": 8}, "select": _ALL}],
        },
    )
)


def read_files(package: Path) -> Files:
    return {
        path.relative_to(package).as_posix(): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file()
    }


def seeds() -> dict[str, Files]:
    return {path.stem: read_files(path) for path in sorted(SEEDS.iterdir())}


def write_files(files: Files, package: Path) -> None:
    for name, data in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_bytes(data)


@contextlib.contextmanager
def ours_only() -> Iterator[list[str]]:
    """Let errors of milpress pass as answers, which the list gets."""
    answers: list[str] = []
    try:
        yield answers
    except CompressionError as error:
        text = str(error)
        if not text.isprintable():
            msg = f"a message must fit on a line and be printable, got {text!r}"
            raise AssertionError(msg) from error
        answers.append(text)


def show(source: Path) -> None:
    found = milpress.inspect(source)
    json.dumps(found.to_dict())
    Console(file=io.StringIO(), width=100).print(found)


def exercise(source: Path, whole: Path, rng: random.Random) -> None:
    """Do all that reads packages to a damaged one and check the law."""
    folder = source.parent
    out = folder / "out.mlpackage"
    before = read_files(folder)
    recipe = rng.choice(RECIPES)
    with ours_only() as damage:
        show(source)
    with ours_only():
        milpress.compress(source, out, recipe, dry_run=True)
    with ours_only():
        milpress.verify(whole, source)
    with ours_only():
        milpress.verify(source, whole)
    assert read_files(folder) == before, "reading must leave all files as they are"
    jobs = (
        lambda: milpress.compress(source, out, recipe),
        lambda: milpress.decompress(source, out),
    )
    for job in jobs:
        with ours_only() as refusal:
            job()
        if not refusal:
            if not damage:
                show(out)
            shutil.rmtree(out)
        assert read_files(folder) == before, "a job must leave nothing behind"
        assert sorted(path.name for path in folder.iterdir()) == [source.name]


def run_case(seed: int, corpus: dict[str, Files], folder: Path) -> None:
    """Damage a package as ``seed`` says and check the law."""
    rng = random.Random(seed)
    name = rng.choice(sorted(corpus))
    source = folder / "model.mlpackage"
    shutil.rmtree(folder, ignore_errors=True)
    write_files(damaged(corpus[name], list(corpus.values()), rng), source)
    exercise(source, SEEDS / f"{name}.mlpackage", rng)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first run; the next is one more"
    )
    asked = parser.parse_args()
    warnings.simplefilter("error")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    corpus = seeds()
    failures: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        for seed in range(asked.seed, asked.seed + asked.runs):
            faulthandler.dump_traceback_later(SECONDS_A_CASE, exit=True)
            try:
                run_case(seed, corpus, Path(name) / "case")
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"
                if failures.setdefault(place, seed) == seed:
                    print(f"seed {seed}:")
                    traceback.print_exc(file=sys.stdout)
    faulthandler.cancel_dump_traceback_later()
    print(f"{asked.runs} damaged packages, {len(failures)} kinds of failure")
    for place, seed in failures.items():
        print(f"  {place} (--seed {seed} --runs 1)")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
