"""What a leading underscore means: this folder only, and the folders in it.

Which room may import which is import-linter's to check; its layers are in pyproject.toml.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import milpress

ROOT = Path(milpress.__file__).parents[1]


def module_of(name: str) -> PurePosixPath | None:
    """Return the path of a module, without a suffix; ``None`` if there is none."""
    path = PurePosixPath(*name.split("."))
    if (ROOT / path / "__init__.py").exists() or (ROOT / path / "__init__.pyi").exists():
        return path / "__init__"
    return path if (ROOT / path).with_suffix(".py").exists() else None


def private_folders(name: str, inside: str = "") -> Iterator[PurePosixPath]:
    """Yield the folders that hold what is private of a module's name, and of a name inside it."""
    path = PurePosixPath(*name.split("."))
    for part in (path, *path.parents):
        if part.name.startswith("_"):
            yield part.parent
    if inside.startswith("_") and not inside.startswith("__"):
        module = module_of(name)
        assert module is not None, name
        yield module.parent


def trespasses(code: str, folder: PurePosixPath) -> set[tuple[int, str]]:
    """Return the lines of a module in a folder that name what is private elsewhere."""
    found = set()
    modules: dict[str, str] = {}
    for node in ast.walk(ast.parse(code)):
        named: list[tuple[str, str]] = []
        if isinstance(node, ast.Import):
            named = [(alias.name, "") for alias in node.names]
            modules |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if (node.module or "").split(".")[0] == "milpress" and module_of(whole):
                    modules[alias.asname or alias.name] = whole
                    named.append((whole, ""))
                else:
                    named.append((node.module or "", alias.name))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            named = [(modules.get(node.value.id, ""), node.attr)]
        for name, inside in named:
            if name.split(".")[0] == "milpress":
                for home in private_folders(name, inside):
                    if home not in (folder, *folder.parents):
                        found.add((node.lineno, f"{name} {inside}".strip()))
    return found


def test_the_search_finds_what_is_private_elsewhere():
    folder = PurePosixPath("milpress/device")
    for code, name in (
        ("from milpress.torch import _metadata", "milpress.torch._metadata"),
        ("from milpress.torch._metadata import Stored", "milpress.torch._metadata Stored"),
        ("import milpress.torch._metadata", "milpress.torch._metadata"),
        (
            "from milpress.recipe import _x\nfrom milpress.mil.values import _y",
            "milpress.mil.values _y",
        ),
        ("from milpress.mil import values\nvalues._y", "milpress.mil.values _y"),
    ):
        assert {what for _, what in trespasses(code, folder)} == {name}
    assert not trespasses("import milpress._core as _core\n_core.pack", folder)
    assert not trespasses("from milpress.torch import _metadata", folder.parent / "torch/pruning")


def test_an_underscore_means_this_folder_only():
    for path in sorted((ROOT / "milpress").rglob("*.py")):
        place = PurePosixPath(path.relative_to(ROOT).as_posix())
        assert not trespasses(path.read_text(encoding="utf-8"), place.parent), place
