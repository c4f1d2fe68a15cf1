"""Puts coremltools' own tests into the module that names them, redirected to milpress."""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.assertion.rewrite import rewrite_asserts
from matching import reasons

# The imported tests need these to be importable; only the mobilenet examples need what is inside.
STUBS = ("PIL", "PIL.Image", "torchvision")

# The warnings of the tests themselves, and of what they call in coremltools and torch.
WARNINGS = (
    "ignore:Passing a non-Collection iterable to parametrize",
    "ignore:`torch.jit",
    "ignore:Implicitly cleaning up <TemporaryDirectory",
    "ignore:::coremltools.*",
    "ignore:::torch.*",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--peer",
        choices=("milpress", "coremltools"),
        default="milpress",
        help="the library that coremltools' tests are run against",
    )
    parser.addoption(
        "--peer-full",
        action="store_true",
        help="run them for the targets iOS16, iOS17 and iOS18, not for iOS16 alone",
    )
    parser.addoption(
        "--peer-all",
        action="store_true",
        help="run all cases of the tests of which a SAMPLE is run otherwise",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--peer-full", False):
        os.environ["RUN_BACKWARD_COMPATIBILITY"] = "1"  # coremltools' own switch
    config.addinivalue_line("markers", "slow: as coremltools marks it")
    strict = config.getoption("--peer", "milpress") == "milpress"
    for warning in WARNINGS if strict else ["ignore"]:
        config.addinivalue_line("filterwarnings", warning)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)  # the tests draw random weights


def pytest_make_parametrize_id(val: object) -> str | None:
    if type(val).__name__ == "BackendConfig":
        return f"{val.opset_version.name}-{val.precision}"
    return None


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    module = pytest.Module.from_parent(parent, path=module_path)
    if hasattr(module.obj, "PEER"):
        fill(module.obj, parent.config.getoption("--peer", "milpress"))
    return module


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if is_other(item)]
    if not config.getoption("--peer-all", False):
        others += unsampled(items)
    config.hook.pytest_deselected(items=others)
    dropped = {id(item) for item in others}
    items[:] = [item for item in items if id(item) not in dropped]
    for item in items:
        module = getattr(item, "module", None)
        if not hasattr(module, "PEER"):
            continue
        name = item.nodeid.partition("::")[2]
        if "mobilenet" in name and "torchvision" in module.STUBBED:
            item.add_marker(pytest.mark.skip(reason="torchvision is not installed"))
        if sys.platform != "darwin":
            for reason in reasons(module.NEEDS_MACOS, name):
                item.add_marker(pytest.mark.skip(reason=reason))
        if config.getoption("--peer", "milpress") == "milpress":
            for reason in reasons(module.DIFFERENCES, name):
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))


def is_other(item: pytest.Item) -> bool:
    """Whether a test is of a class that milpress does not have."""
    patterns = getattr(getattr(item, "module", None), "NOT_OURS", ())
    return bool(reasons(dict.fromkeys(patterns, ""), item.nodeid.partition("::")[2]))


def unsampled(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return all cases but each `SAMPLE`th of a test, the first one included."""
    counts: dict[tuple[str, str], int] = {}
    left = []
    for item in items:
        step = getattr(getattr(item, "module", None), "SAMPLE", 1)
        test = (item.nodeid.partition("::")[0], getattr(item, "originalname", item.name))
        counts[test] = counts.get(test, -1) + 1
        if counts[test] % step:
            left.append(item)
    return left


def fill(module: types.ModuleType, peer: str) -> None:
    """Execute in `module` the tests that it names, so that failures show the wheel's own lines."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import coremltools._deps  # looks for torchvision, which must not be the stub

        # Where transformers is installed, a module of the tests imports peft too.
        coremltools._deps._HAS_HF = False
        path = Path(importlib.util.find_spec(module.PEER).origin)
        source = path.read_bytes()
        tree = ast.parse(source, filename=str(path))
        replaced = getattr(module, "REPLACED", {}) if peer == "milpress" else {}
        Redirect(peer, module.REWRITTEN, {*replaced}).run(tree)
        rewrite_asserts(tree, source, str(path))
        with stubs() as stubbed:
            module.STUBBED = stubbed
            for name in getattr(module, "FIXTURES", ()):
                vars(module).update(fixtures(name))
            vars(module).update(replaced)  # tests take classes as parameters
            exec(compile(tree, str(path), "exec", dont_inherit=True), vars(module))
            vars(module).update(replaced)
    gc.freeze()  # coremltools collects garbage after each conversion: leave the modules out of it


def fixtures(name: str) -> dict[str, Any]:
    """Return the fixtures that a module of coremltools' tests holds."""
    found = vars(importlib.import_module(name))
    return {key: value for key, value in found.items() if key.startswith("mnist_")}


class Stub(types.ModuleType):
    """A module that has whatever is imported from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return types.SimpleNamespace()


@contextlib.contextmanager
def stubs() -> Iterator[list[str]]:
    """Let the missing ones of `STUBS` be imported inside the block."""
    stubbed: list[str] = []
    try:
        for name in STUBS:
            package, _, child = name.partition(".")
            if package in stubbed or importlib.util.find_spec(name) is None:
                sys.modules[name] = Stub(name)
                stubbed.append(name)
                if child:
                    setattr(sys.modules[package], child, sys.modules[name])
        yield stubbed
    finally:
        for name in stubbed:
            del sys.modules[name]


class Redirect(ast.NodeTransformer):
    """Replaces coremltools.optimize by its peer, and every answer that excuses a test."""

    # What the tests ask before they excuse themselves, and the answer that lets them run.
    ANSWERS = {  # noqa: RUF012
        "platform.machine()": "arm64",
        "_HAS_SKLEARN": True,
        "ct.utils._macos_version()": (15, 0),
        "pytest.importorskip('coremltools.optimize.coreml._utils')": None,
        "torch.__version__": "2.5.0",
        "pytest.xfail(...)": None,
    }

    def __init__(self, peer: str, expected: set[str], replaced: set[str]) -> None:
        self.peer = peer
        self.replaced = replaced
        self.answers = {key: self.ANSWERS[key] for key in expected & {*self.ANSWERS}}
        self.expected = expected if peer == "milpress" else {*self.answers}
        self.done: set[str] = set()

    def run(self, tree: ast.Module) -> None:
        self.visit(tree)
        ast.fix_missing_locations(tree)
        assert self.done == self.expected, f"rewrote {self.done}, expected {self.expected}"

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.Call | ast.Name | ast.Attribute):
            asked = [ast.unparse(node)]
            if isinstance(node, ast.Call):
                asked.append(f"{ast.unparse(node.func)}(...)")
            for text in self.answers.keys() & asked:
                self.done.add(text)
                return ast.copy_location(ast.Constant(self.answers[text]), node)
        return super().visit(node)

    def visit_Import(self, node: ast.Import) -> ast.Import:
        for alias in node.names:
            if self.peer == "milpress" and alias.name == "coremltools.optimize":
                self.done.add("import")
                alias.name = "milpress"
        return node

    def visit_ImportFrom(
        self, node: ast.ImportFrom
    ) -> ast.ImportFrom | list[ast.ImportFrom] | ast.Pass:
        if self.peer != "milpress":
            return node
        node.names = [alias for alias in node.names if alias.name not in self.replaced]
        if not node.names:
            return ast.copy_location(ast.Pass(), node)
        if node.module.startswith("coremltools.optimize.coreml"):
            self.done.add("from import")
            node.module = "milpress.coreml"
        elif node.module.startswith("coremltools.optimize.torch"):
            return self.from_torch(node)
        return node

    def from_torch(self, node: ast.ImportFrom) -> list[ast.ImportFrom]:
        """Take from milpress.torch what it has; the rest stays coremltools'."""
        module = node.module.replace("coremltools.optimize", "milpress")
        names: dict[bool, list[ast.alias]] = {True: [], False: []}
        for alias in node.names:
            names[offers(module, alias.name)].append(alias)
        if names[True]:
            self.done.add("from import")
        made = [(module, names[True]), (node.module, names[False])]
        return [
            ast.copy_location(ast.ImportFrom(module=home, names=group, level=0), node)
            for home, group in made
            if group
        ]

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if self.peer == "milpress" and ast.unparse(node) == "ct.optimize":
            self.done.add("ct.optimize")
            return ast.copy_location(ast.Name("cto", ast.Load()), node)
        return self.generic_visit(node)


def offers(module: str, name: str) -> bool:
    """Whether a public module of milpress has a name."""
    if any(part.startswith("_") for part in module.split(".")):
        return False
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return False
