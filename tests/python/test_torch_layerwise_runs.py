"""LayerwiseCompressor: what runs of samples, which take turns with a model, have of each other."""

from __future__ import annotations

import contextvars
import copy
from collections import deque
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from milpress.torch.layerwise_compression import (
    GPTQ,
    LayerwiseCompressor,
    LayerwiseCompressorConfig,
    ModuleGPTQConfig,
)

INT4 = {"algorithm": "gptq", "weight_dtype": "int4"}


def compressor(model: nn.Module) -> LayerwiseCompressor:
    return LayerwiseCompressor(model, LayerwiseCompressorConfig.from_dict({"global_config": INT4}))


def one_by_one(model: nn.Module, batches, names) -> nn.Module:
    """Compress layers in an order; each sample runs alone, through a model of its own."""
    model = copy.deepcopy(model).eval()
    for name in names:
        algorithm = GPTQ(model.get_submodule(name), ModuleGPTQConfig.from_dict(INT4))
        for batch in batches:
            alone = copy.deepcopy(model)
            alone.get_submodule(name).register_forward_pre_hook(
                lambda _, args, algorithm=algorithm: algorithm.add_batch(args[0])
            )
            with torch.no_grad():
                alone(batch)
        if algorithm.moments is not None:
            algorithm.compress()
    return model


def assert_same_weights(made: nn.Module, oracle: nn.Module, names) -> None:
    for name in names:
        weights = [model.get_submodule(name).weight for model in (made, oracle)]
        assert torch.equal(*weights), name


MEMORY = None
MEMORIES: dict[str, torch.Tensor] = {}


class Keeper(nn.Module):
    """Keeps the output of a layer on itself, in one of the ways there are, until after another."""

    shared: Any = None
    shared_items: ClassVar[list[Any]] = []

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.encode, self.other, self.decode = (nn.Linear(8, 8) for _ in range(3))
        self.memory = None
        self.items, self.queue = [0], deque([0])
        self.entries, self.members = {"a": {}}, set()
        self.nested = SimpleNamespace(inner=SimpleNamespace())
        self.register_buffer("replaced", torch.zeros(1))
        self.register_buffer("changed", torch.zeros(32, 8), persistent=False)
        self.tensors = (torch.zeros(32, 8),)

    def keep(self, value: torch.Tensor) -> None:
        match self.way:
            case "attribute":
                self.memory = value
            case "new attribute":
                self.fresh = value
            case "list":
                self.items.append(value)
            case "deque":
                self.queue.append(value)
            case "dictionary":
                self.entries["a"]["b"] = value
            case "set":
                self.members.add(value)
            case "object":
                self.nested.inner.memory = value
            case "of another module":
                self.other.memory = value
            case "replaced buffer":
                self.replaced = value
            case "new buffer":
                self.register_buffer("later", value)
            case "changed buffer":
                self.changed.add_(value)
            case "changed tensor":
                self.tensors[0][:, :4] += value[:, :4]
            case "class":
                type(self).shared = value
            case "new of a class":
                type(self).fresh_of_class = value
            case "list of a class":
                self.shared_items.append(value)
            case "global":
                globals()["MEMORY"] = value
            case "new global":
                globals()["FRESH_MEMORY"] = value
            case "global dictionary":
                MEMORIES["last"] = value

    def kept(self) -> torch.Tensor:
        match self.way:
            case "attribute":
                return self.memory
            case "new attribute":
                return self.fresh
            case "list":
                return self.items.pop() if len(self.items) == 2 else self.items[0]
            case "deque":
                return self.queue.pop() if len(self.queue) == 2 else self.queue[0]
            case "dictionary":
                return self.entries["a"].pop("b")
            case "set":
                return sum(self.members)
            case "object":
                return self.nested.inner.memory
            case "of another module":
                return self.other.memory
            case "replaced buffer":
                return self.replaced
            case "new buffer":
                return self.later
            case "changed buffer":
                return self.changed
            case "class":
                return self.shared
            case "new of a class":
                return self.fresh_of_class
            case "list of a class":
                return self.shared_items.pop()
            case "global":
                return MEMORY
            case "new global":
                return FRESH_MEMORY  # noqa: F821
            case "global dictionary":
                return MEMORIES.pop("last")
        return self.tensors[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.keep(self.encode(x))
        y = self.other(torch.tanh(x))
        return self.decode(y * self.kept())


WAYS = (
    "attribute", "new attribute", "list", "deque", "dictionary", "set", "object",
    "of another module", "replaced buffer", "new buffer", "changed buffer", "changed tensor",
    "class", "new of a class", "list of a class", "global", "new global", "global dictionary",
)  # fmt: skip
KEEPERS = ("encode", "other", "decode")


def held(model: nn.Module) -> list[dict]:
    return [
        {key: value for key, value in vars(module).items() if not key.startswith("_")}
        | {"buffers": {k: v for k, v in module.named_buffers() if "_COREML_" not in k}}
        for module in model.modules()
    ] + [
        {name: vars(Keeper).get(name) for name in ("shared", "shared_items", "fresh_of_class")},
        {name: globals().get(name) for name in ("MEMORY", "MEMORIES", "FRESH_MEMORY")},
    ]


@pytest.mark.parametrize("way", WAYS)
def test_what_a_module_holds_is_of_the_sample_that_runs(way):
    torch.manual_seed(0)
    model = Keeper(way)
    batches = [torch.randn(32, 8) * (i + 1) for i in range(4)]
    oracle = one_by_one(model, batches, KEEPERS)
    before = repr(held(model))
    compressor(model).compress(batches, inplace=True)
    assert_same_weights(model, oracle, KEEPERS)
    assert repr(held(model)) == before


NOTES: list[float] = []
SEEN: dict[int, float] = {}


class Noting(nn.Module):
    """Two layers, and notes of what comes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        NOTES.append(float(x[0, 0]))
        SEEN[int(x[0, 0])] = len(NOTES)
        return self.second(self.first(x))


def test_notes_that_a_forward_takes_in_globals_are_there_in_the_end():
    NOTES.clear()
    SEEN.clear()
    batches = [torch.randn(8, 8).index_fill(0, torch.tensor(0), i) for i in range(4)]
    compressor(Noting()).compress(batches)
    # The first is run once more, alone, to see which way it goes.
    assert sorted(NOTES) == [0, 0, 1, 2, 3]
    assert dict.fromkeys(range(4), 1) == SEEN


def test_what_a_module_holds_in_inference_mode_is_of_the_sample_that_runs():
    torch.manual_seed(0)
    with torch.inference_mode():
        model = Keeper("changed buffer").requires_grad_(False)
    batches = [torch.randn(32, 8) * (i + 1) for i in range(4)]
    plain = copy.deepcopy(model)
    plain.changed = torch.zeros(32, 8)
    oracle = one_by_one(plain, batches, KEEPERS)
    with torch.inference_mode():
        made = compressor(model).compress(batches)
    assert_same_weights(made, oracle, KEEPERS)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_module_holds_what_it_held_when_a_run_fails(error):
    model = Keeper("list")
    before = repr(held(model))

    def failing(_done, _total, name):
        if name == "other.weight":
            raise error

    with pytest.raises(error):
        compressor(model).compress([torch.randn(32, 8)] * 3, inplace=True, progress=failing)
    assert repr(held(model)) == before


class Seeing(TorchFunctionMode):
    """A mode that says that it is in force."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.cummax:
            return "function mode"
        return func(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    """The same of another kind."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out + 1 if func is torch.ops.aten.cumsum.default else out


def test_the_modes_of_the_caller_are_in_force_in_each_run():
    variable = contextvars.ContextVar("variable", default=0)

    class Modes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            seen.append(modes())
            variable.set(2)
            y = self.a(x)
            assert variable.get() == 2
            assert y.dtype == torch.bfloat16
            return self.b(y)

    def modes():
        return (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_inference_mode_enabled(),
            torch.get_default_device(),
            torch.cummax(torch.ones(1), 0),
            torch.ones(1).cumsum(0).item(),
            variable.get(),
        )

    seen = []
    variable.set(1)
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode(),
        torch.device("cpu:0"),
        Seeing(),
        Dispatching(),
    ):
        expected = modes()
        variable.set(1)
        compressor(Modes()).compress([torch.randn(40, 4) for _ in range(3)])
        assert seen[-3:] == [expected] * 3
    assert torch.is_autocast_enabled("cpu") is False


class Mixture(nn.Module):
    """A few experts, each token to two of them, in front of a layer defined at either end."""

    def __init__(self, out_is_first: bool) -> None:
        super().__init__()
        if out_is_first:
            self.out = nn.Linear(8, 8)
        self.router = nn.Linear(8, 5, bias=False)
        self.up = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.down = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        if not out_is_first:
            self.out = nn.Linear(8, 8)

    def forward(self, x):
        chosen = self.router(x).topk(2, dim=-1).indices
        y = torch.zeros_like(x)
        for i, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            rows = (chosen == i).any(dim=-1).nonzero()[:, 0]
            if len(rows):
                y.index_add_(0, rows, down(torch.relu(up(x[rows]))))
        return self.out(y)


@pytest.mark.parametrize("out_is_first", [False, True])
def test_experts_and_what_follows_them_see_all_that_is_routed_to_them(out_is_first):
    torch.manual_seed(0)
    model = Mixture(out_is_first)
    batches = [torch.randn(3, 8) for _ in range(40)]  # which leave out an expert or two each
    names = ["router"]
    for i in range(5):
        names += [f"up.{i}", f"down.{i}"]
    names.append("out")
    oracle = one_by_one(model, batches, names)
    optimizer = compressor(model)
    made = optimizer.compress(batches)
    assert_same_weights(made, oracle, names)
    assert not any("compressed" in note for note in optimizer.report().notes)


class Loop(nn.Module):
    """A layer that is run as often as a sample says."""

    def __init__(self):
        super().__init__()
        self.head, self.step, self.first = nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        n = int(x[0, 0].abs() * 10) % 3 + 1
        x = self.first(x)
        for _ in range(n):
            x = torch.tanh(self.step(x))
        return self.head(x)


def samples_of(lengths):
    batches = [torch.randn(30, 8) for _ in lengths]
    for batch, n in zip(batches, lengths, strict=True):
        batch[0, 0] = (n - 1) / 10 + 0.05
    return batches


@pytest.mark.parametrize("lengths", [[3, 2, 1, 3], [2, 3, 3, 1], [2, 2, 3, 2]])
def test_a_loop_may_run_differently_often_for_each_sample(lengths):
    torch.manual_seed(0)
    model, batches = Loop(), samples_of(lengths)
    names = ("first", "step", "head")
    oracle = one_by_one(model, batches, names)
    optimizer = compressor(model)
    assert_same_weights(optimizer.compress(batches), oracle, names)
    assert not any("already" in note for note in optimizer.report().notes)


def test_samples_that_come_to_a_layer_too_late_are_counted():
    torch.manual_seed(0)
    optimizer = compressor(Loop())
    optimizer.compress(samples_of([1, 2, 2, 1, 3]))
    (note,) = [note for note in optimizer.report().notes if "already" in note]
    assert note.endswith(": step.weight (3).")


def test_layers_that_samples_come_to_in_different_orders_are_noted():
    class Crossing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            a_first = x[0, 0] > 0
            x = self.a(x) if a_first else self.b(x)
            x = torch.tanh(x)
            return self.out(self.b(x) if a_first else self.a(x))

    torch.manual_seed(0)
    batches = [torch.randn(40, 8) for _ in range(5)]
    for i, batch in enumerate(batches):
        batch[0, 0] = 1 if i < 2 else -1
    optimizer = compressor(Crossing())
    made = optimizer.compress(batches)
    crossed, late = optimizer.report().notes[-2:]
    assert crossed.endswith("in different orders: b.weight.")
    assert late.endswith("how many: b.weight (2).")
    # The others, of which no sample was missed.
    assert optimizer.report().left == {}
    assert made.out.get_buffer("_COREML_/weight/quantization_n_bits") == 4


def test_a_model_whose_samples_go_one_way_is_run_once_for_each():
    runs = []

    class Plain(nn.Sequential):
        def forward(self, x):
            runs.append(1)
            return super().forward(x)

    batches = [torch.randn(40, 8) for _ in range(5)]
    compressor(Plain(nn.Linear(8, 8), nn.Linear(8, 8))).compress(batches)
    assert len(runs) == 6
