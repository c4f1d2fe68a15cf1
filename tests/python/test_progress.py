"""Long work shows a bar where somebody looks, and calls a function as it always did."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import safetensors.torch
import torch
from small_models import linear, weight
from torch import nn

import milpress
from milpress import coreml, device
from milpress import torch as mt
from milpress.device import suite
from milpress.device.drivers.fake import FakeDriver
from milpress.formats import PalettizeConfig, QuantizeConfig
from milpress.progress import shown
from milpress.torch import layerwise_compression, palettization, pruning, quantization

HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"  # the cursor, while a bar is there and afterwards

MODULES = (
    "milpress",
    "milpress.coreml",
    "milpress.device",
    "milpress.device.suite",
    "milpress.planner",
    "milpress.torch",
    "milpress.torch.base_model_optimizer",
    "milpress.torch.layerwise_compression",
    "milpress.torch.palettization",
    "milpress.torch.pruning",
    "milpress.torch.quantization",
)


def with_progress() -> Iterator[str]:
    """Yield the names of all that is public, no abstract method and takes ``progress``."""
    for name in MODULES:
        module = importlib.import_module(name)
        for own in getattr(module, "__all__", ["run"]):
            value = getattr(module, own)
            members = vars(value).items() if inspect.isclass(value) else ()
            methods = [(f"{own}.{key}", each) for key, each in members if not key.startswith("_")]
            for path, each in [(own, value), *methods]:
                is_abstract = getattr(each, "__isabstractmethod__", False)
                if not inspect.isfunction(each) or is_abstract:
                    continue
                if "progress" in inspect.signature(each).parameters:
                    yield f"{name}.{path}"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def terminal() -> Iterator[Screen]:
    """Have a terminal for errors; pytest puts its own stream there after each fixture."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(Screen()) as screen:
        patch.setenv("TERM", "xterm")
        yield screen


class Small:
    """A model of each kind, and what is done to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.package = folder / "model.mlpackage"
        linear(weight(64, 64)).save(str(self.package))
        self.compressed = folder / "compressed.mlpackage"
        milpress.compress(self.package, self.compressed, milpress.Recipe.of(QuantizeConfig()))
        self.samples = [{"x": np.ones((1, 64), np.float32)}] * 2

    def new(self) -> Path:
        return self.folder / f"{len(list(self.folder.iterdir()))}"

    def opened(self, path: Path) -> Any:
        return ct.models.MLModel(str(path), skip_model_load=True)

    def checkpoint(self) -> Path:
        path = self.folder / "model.safetensors"
        safetensors.torch.save_file(self.module().state_dict(), path)
        return path

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().sum()


def finalized(optimizer: Any, *example: Any, **options: Any) -> Any:
    optimizer.prepare(*example)
    optimizer.step()
    return optimizer.finalize(**options)


BATCHES = [torch.ones(2, 64)] * 2
int8 = coreml.OptimizationConfig(coreml.OpLinearQuantizerConfig(weight_threshold=0))
palette = coreml.OptimizationConfig(coreml.OpPalettizerConfig(nbits=4, weight_threshold=0))
zeros = coreml.OptimizationConfig(coreml.OpThresholdPrunerConfig(1.0, weight_threshold=0))
GRID = replace(device.Suite.from_yaml(), variants=device.Suite.from_yaml().variants[:1])
PLAN = device.Plan(min_rounds=2, max_rounds=2, cooldown=0, cached_loads=0)


class Session:
    """A fake driver in this process."""

    def __init__(self) -> None:
        self.driver = FakeDriver()

    def ask(self, command: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        return getattr(self.driver, command)(**arguments)

    def close(self) -> None:
        pass


fake = {"driver": "fake", "units": ("CPU_ONLY",), "plan": PLAN, "open_session": Session}

CALLS: dict[str, Callable[..., Any]] = {
    "milpress.calibrate": lambda s, **p: milpress.calibrate(s.package, s.samples, **p),
    "milpress.compress": lambda s, **p: milpress.compress(
        s.package, s.new(), milpress.Recipe.of(PalettizeConfig()), **p
    ),
    "milpress.decompress": lambda s, **p: milpress.decompress(s.compressed, s.new(), **p),
    "milpress.evaluate": lambda s, **p: milpress.evaluate(s.package, s.compressed, s.samples, **p),
    "milpress.plan": lambda s, **p: milpress.plan(
        s.package, target_bits=8, sample_data=s.samples, use_cache=False, **p
    ),
    "milpress.tune": lambda s, **p: milpress.tune(
        s.package,
        s.compressed,
        s.new(),
        s.samples,
        config=milpress.TuneConfig(steps=3, batch=1),
        force=True,
        **p,
    ),
    "milpress.verify": lambda s, **p: milpress.verify(s.package, s.compressed, **p),
    "milpress.planner.plan": lambda s, **p: milpress.planner.plan(
        s.package, target_bits=8, use_cache=False, **p
    ),
    "milpress.coreml.decompress_weights": lambda s, **p: coreml.decompress_weights(
        s.opened(s.compressed), **p
    ),
    "milpress.coreml.linear_quantize_activations": lambda s, **p: (
        coreml.linear_quantize_activations(s.opened(s.package), int8, s.samples, **p)
    ),
    "milpress.coreml.linear_quantize_weights": lambda s, **p: coreml.linear_quantize_weights(
        s.opened(s.package), int8, **p
    ),
    "milpress.coreml.palettize_weights": lambda s, **p: coreml.palettize_weights(
        s.opened(s.package), palette, **p
    ),
    "milpress.coreml.prune_weights": lambda s, **p: coreml.prune_weights(
        s.opened(s.package), zeros, **p
    ),
    "milpress.device.run": lambda s, **p: device.run([s.package], **fake, **p),
    "milpress.device.suite.run": lambda s, **p: suite.run(
        s.package, s.new(), suite=GRID, **fake, **p
    ),
    "milpress.torch.convert": lambda s, **p: mt.convert(
        palettization.PostTrainingPalettizer(s.module()).compress(), (BATCHES[0],), **p
    ),
    "milpress.torch.load_compressed": lambda s, **p: mt.load_compressed(
        s.module(), s.checkpoint(), **p
    ),
    "milpress.torch.layerwise_compression.LayerwiseCompressor.compress": lambda s, **p: (
        layerwise_compression.LayerwiseCompressor(s.module()).compress(BATCHES, **p)
    ),
    "milpress.torch.layerwise_compression.LayerwiseCompressor.compress_checkpoint": lambda s, **p: (
        layerwise_compression.LayerwiseCompressor(s.module()).compress_checkpoint(
            s.checkpoint(), s.new(), BATCHES, **p
        )
    ),
    "milpress.torch.palettization.DKMPalettizer.finalize": lambda s, **p: finalized(
        palettization.DKMPalettizer(
            s.module(),
            palettization.DKMPalettizerConfig.from_dict({"global_config": {"weight_threshold": 0}}),
        ),
        **p,
    ),
    "milpress.torch.palettization.PostTrainingPalettizer.compress": lambda s, **p: (
        palettization.PostTrainingPalettizer(s.module()).compress(**p)
    ),
    "milpress.torch.palettization.PostTrainingPalettizer.compress_checkpoint": lambda s, **p: (
        palettization.PostTrainingPalettizer(s.module()).compress_checkpoint(
            s.checkpoint(), s.new(), **p
        )
    ),
    "milpress.torch.palettization.SKMPalettizer.compress": lambda s, **p: (
        palettization.SKMPalettizer(s.module()).compress(BATCHES, loss, **p)
    ),
    "milpress.torch.palettization.SKMPalettizer.compute_sensitivity": lambda s, **p: (
        palettization.SKMPalettizer(s.module()).compute_sensitivity(BATCHES, loss, **p)
    ),
    "milpress.torch.pruning.MagnitudePruner.finalize": lambda s, **p: finalized(
        pruning.MagnitudePruner(s.module()), **p
    ),
    "milpress.torch.quantization.LinearQuantizer.finalize": lambda s, **p: finalized(
        quantization.LinearQuantizer(s.module()), (BATCHES[0],), **p
    ),
    "milpress.torch.quantization.PostTrainingQuantizer.compress_checkpoint": lambda s, **p: (
        quantization.PostTrainingQuantizer(s.module()).compress_checkpoint(
            s.checkpoint(), s.new(), **p
        )
    ),
    "milpress.torch.quantization.PostTrainingQuantizer.compress": lambda s, **p: (
        quantization.PostTrainingQuantizer(s.module()).compress(**p)
    ),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Small:
    return Small(tmp_path_factory.mktemp("progress"))


def test_nothing_that_takes_progress_is_forgotten_here():
    assert set(with_progress()) == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_true_shows_a_bar_and_a_function_is_called(name, small, monkeypatch):
    # The interpreter, in a process of its own, to compare outputs with.
    monkeypatch.setattr("milpress.device.entries.References._run", lambda *_: "left out")
    steps: list[tuple[int, int, str]] = []
    with terminal() as screen:
        CALLS[name](small, progress=lambda *step: steps.append(step))
        assert HIDDEN not in screen.getvalue()
        CALLS[name](small, progress=True)
    text = screen.getvalue()
    assert 0 < text.count(HIDDEN) == text.count(SHOWN)
    assert all(0 <= done <= total for done, total, _ in steps)
    done, total, last = steps[-1]
    assert done == total > 0
    assert last == ""
    assert any(name for _, _, name in steps)


@pytest.mark.parametrize("nothing", [None, False])
def test_nothing_is_shown_unless_asked_for(nothing):
    with terminal() as screen, shown(nothing) as note:
        note(1, 2, "weight")
    assert screen.getvalue() == ""


def test_a_bar_has_the_share_the_time_left_and_the_name():
    with terminal() as screen, shown(True) as note:
        for i in range(3):
            note(i, 4, f"layer.{i}[red]\x1b[2J")
    text = screen.getvalue()
    assert "50%" in text
    assert "layer.2[red]\\x1b[2J" in text
    assert "-:--:--" in text


def test_what_begins_again_has_a_bar_of_its_own_and_may_be_without_end():
    with terminal() as screen, shown(True) as note:
        for step in ((3, 3, ""), (0, 3, "again"), (0, 0, "no end"), (7, 0, "of it")):
            note(*step)
    (last,) = [line for line in screen.getvalue().splitlines() if "of it" in line][-1:]
    assert "100%" not in last


def end_halfway(error: Any) -> None:
    with shown(True) as note:
        note(0, 2, "first")
        note(1, 2, "second")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_bar_ends_with_the_work_however_that_ends(error):
    with terminal() as screen:
        for _ in range(2):  # nothing is left of the first that would refuse a second
            with pytest.raises(error):
                end_halfway(error)
    assert screen.getvalue().count(HIDDEN) == screen.getvalue().count(SHOWN) == 2
    assert screen.getvalue().endswith("\x1b[2K")  # the line is empty again


def test_a_file_gets_nothing_and_rich_stays_outside():
    code = (
        "import sys; from milpress.progress import shown\n"
        "with shown(True) as note: note(1, 2, 'weight')\n"
        "with shown(None) as note: note(1, 2, 'weight')\n"
        "sys.exit('rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_without_an_error_stream_nothing_is_shown(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with shown(True) as note:
        note(1, 2, "weight")


class Notebook:
    """As much of IPython as a kernel shows."""

    def __init__(self) -> None:
        self.pictures: list[Any] = []
        self.kernel = self

    def display(self, shown: Any, *, display_id: bool) -> Notebook:
        assert display_id
        self.update(shown)
        return self

    def update(self, shown: Any, raw: bool = False) -> None:
        bundle = shown if raw else shown._repr_mimebundle_(include=(), exclude=())
        self.pictures.append(bundle["text/plain"])


def test_a_notebook_gets_pictures_of_the_bar(monkeypatch, capsys):
    notebook = Notebook()
    ipython, displaying = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython, displaying.display = lambda: notebook, notebook.display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", displaying)
    monkeypatch.setattr("milpress.progress._PAUSE", 0.0)
    with pytest.raises(ValueError, match="halfway"):
        end_halfway(ValueError("halfway"))
    assert len(notebook.pictures) == 4
    assert "first" in notebook.pictures[1]
    assert "50%" in notebook.pictures[2]
    assert notebook.pictures[3] == ""
    assert capsys.readouterr() == ("", "")
    ipython.get_ipython = lambda: types.SimpleNamespace()  # IPython on a terminal, or none at all
    with shown(True) as note:
        note(1, 2, "weight")
    assert len(notebook.pictures) == 4
