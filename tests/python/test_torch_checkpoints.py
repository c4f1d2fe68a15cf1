"""Checkpoints that are compressed from file to file, against models compressed in memory."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch_models import Layers

import milpress as cto
from milpress.errors import (
    ConfigError,
    DestinationError,
    PackageError,
    PackageNotFoundError,
    StorageError,
)
from milpress.torch import _metadata, load_compressed
from milpress.torch._safetensors import Shard, ShardWriter
from milpress.torch.layerwise_compression import LayerwiseCompressor, LayerwiseCompressorConfig

P = cto.torch.palettization
Q = cto.torch.quantization

GROUPED = {"n_bits": 4, "granularity": "per_grouped_channel", "group_size": 16}
PALETTES = {
    "groups": GROUPED,
    "tensor": {"n_bits": 2},
    "integers": {**GROUPED, "lut_dtype": "int8"},
    "vectors": {"n_bits": 4, "cluster_dim": 4},
    "scales": {"n_bits": 3, "enable_per_channel_scale": True},
}
CODES = {
    "channels": {"weight_dtype": "int8"},
    "blocks": {"weight_dtype": "int4", "granularity": "per_block", "block_size": 16},
    "offsets": {"weight_dtype": "uint4", "quantization_scheme": "affine"},
}


class Tied(nn.Module):
    """Two names of one parameter, a module with two names, a buffer, a weight that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(48, 32)
        self.layers = nn.ModuleList([nn.Linear(32, 32), nn.BatchNorm1d(32)])
        self.layers.append(self.layers[0])
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids).mean(1)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(self.computed(x))


def built(kind: type[nn.Module], dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind().eval().to(dtype)


def on_meta(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.device("meta"):
        return kind().eval().to(dtype)


def named_once(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of a model, of which shared tensors have their first name alone."""
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors.setdefault(id(tensor), (name, tensor.detach().clone().contiguous()))
    return dict(tensors.values())


def save(tensors: dict[str, torch.Tensor], path: Path, n_shards: int) -> Path:
    """Write a checkpoint by the library: a file, or a folder of shards and an index."""
    if n_shards == 0:
        safetensors.torch.save_file(tensors, path, {"format": "pt", "made": "by hand"})
        return path
    path.mkdir()
    files = {
        name: f"model-{i % n_shards + 1:05}-of-{n_shards:05}.safetensors"
        for i, name in enumerate(tensors)
    }
    for file in set(files.values()):
        held = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        safetensors.torch.save_file(held, path / file)
    index = {"metadata": {"total_size": 1, "note": "kept"}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def optimizer(model: nn.Module, settings: dict[str, Any]) -> Any:
    if "weight_dtype" in settings:
        config = Q.PostTrainingQuantizerConfig.from_dict({"global_config": settings})
        return Q.PostTrainingQuantizer(model, config)
    config = P.PostTrainingPalettizerConfig.from_dict({"global_config": settings})
    return P.PostTrainingPalettizer(model, config)


def assert_same(ours: nn.Module, expected: nn.Module) -> None:
    one, other = ours.state_dict(), expected.state_dict()
    assert set(one) == set(other)
    for name, tensor in other.items():
        assert one[name].dtype == tensor.dtype, name
        assert torch.equal(one[name], tensor), name


@pytest.mark.parametrize("n_shards", [0, 1, 3])
@pytest.mark.parametrize(
    ("kind", "settings", "dtype"),
    [
        *((Layers, each, torch.float32) for each in (*PALETTES.values(), *CODES.values())),
        (Tied, PALETTES["groups"], torch.bfloat16),
        (Tied, CODES["blocks"], torch.float16),
    ],
    ids=[*PALETTES, *CODES, "tied-bfloat16", "tied-float16"],
)
def test_files_hold_what_is_made_in_memory(kind, settings, dtype, n_shards, tmp_path, caplog):
    model = built(kind, dtype)
    source = save(named_once(model), tmp_path / "source", n_shards)
    in_memory = optimizer(model, settings)
    expected = in_memory.compress()
    said = [record.getMessage() for record in caplog.records]
    caplog.clear()
    streaming = optimizer(on_meta(kind, dtype), settings)
    report = streaming.compress_checkpoint(source, tmp_path / "out")
    assert [record.getMessage() for record in caplog.records] == said
    assert report is streaming.report()
    assert report.data == in_memory.report().data
    assert report.weights == in_memory.report().weights
    for loading in (built(kind, dtype, seed=1), on_meta(kind, dtype)):
        assert_same(load_compressed(loading, tmp_path / "out"), expected)
    names = {path.name for path in source.iterdir()} if n_shards else set()
    assert {path.name for path in (tmp_path / "out").iterdir()} == names if n_shards else True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_the_library_reads_what_is_written(tmp_path):
    model = built(Tied)
    source = save(named_once(model), tmp_path / "in", 2)
    optimizer(on_meta(Tied), GROUPED).compress_checkpoint(source, tmp_path / "out")
    expected = named_once(optimizer(model, GROUPED).compress())
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        held = safetensors.torch.load_file(tmp_path / "out" / file)
        assert {name for name, each in index["weight_map"].items() if each == file} == set(held)
        tensors |= held
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    n_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"] == {"total_size": n_bytes, "note": "kept"}


def test_a_file_keeps_its_metadata_and_is_the_same_each_time(tmp_path):
    source = save(named_once(built(Tied)), tmp_path / "in", 0)
    for name in ("one", "two"):
        optimizer(on_meta(Tied), GROUPED).compress_checkpoint(source, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safetensors.safe_open(tmp_path / "one", "pt") as file:
        assert file.metadata() == {"format": "pt", "made": "by hand"}


def test_a_model_of_another_type_than_the_file_decides(tmp_path):
    half = built(Tied, torch.bfloat16)
    source = save(named_once(half), tmp_path / "in", 0)
    optimizer(on_meta(Tied), GROUPED).compress_checkpoint(source, tmp_path / "out")
    expected = optimizer(half.float(), GROUPED).compress()
    assert_same(load_compressed(built(Tied, seed=1), tmp_path / "out"), expected)


def test_names_that_are_tied_may_both_be_stored_in_any_order(tmp_path):
    model = built(Tied)
    state = {name: tensor.clone() for name, tensor in named_once(model).items()}
    first = {"head.weight": state["words.weight"] + 1}  # the last in the model counts
    source = save({**first, **state}, tmp_path / "in", 3)
    optimizer(on_meta(Tied), GROUPED).compress_checkpoint(source, tmp_path / "out")
    with torch.no_grad():
        model.words.weight += 1
    assert_same(
        load_compressed(on_meta(Tied), tmp_path / "out"), optimizer(model, GROUPED).compress()
    )


def test_what_was_pruned_before_stays_so(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    pruner = cto.torch.pruning.MagnitudePruner(model)
    pruner.prepare(inplace=True)
    pruner.step()
    pruned = pruner.finalize()
    source = save(named_once(pruned), tmp_path / "in", 2)
    blank = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).to("meta")
    report = optimizer(blank, GROUPED).compress_checkpoint(source, tmp_path / "out")
    assert_same(load_compressed(blank, tmp_path / "out"), optimizer(pruned, GROUPED).compress())
    assert float((blank[0].weight == 0).float().mean()) >= 0.5
    again = optimizer(blank, GROUPED).compress_checkpoint(tmp_path / "out", tmp_path / "again")
    assert not report.left
    assert set(again.left.values()) == {"compressed already"}
    for file in (tmp_path / "out").iterdir():
        ours, theirs = (
            path.read_bytes() if file.suffix == ".json" else safetensors.torch.load_file(path)
            for path in (tmp_path / "again" / file.name, file)
        )
        assert ours == theirs if file.suffix == ".json" else set(ours) == set(theirs)


def test_what_is_loaded_converts_as_what_was_made_in_memory(tmp_path):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    source = save(named_once(model), tmp_path / "in", 0)
    blank = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).to("meta")
    optimizer(blank, GROUPED).compress_checkpoint(source, tmp_path / "out")
    paths = [tmp_path / "ours.mlpackage", tmp_path / "theirs.mlpackage"]
    modules = (load_compressed(blank, tmp_path / "out"), optimizer(model, GROUPED).compress())
    for path, module in zip(paths, modules, strict=True):
        cto.torch.convert(module, (torch.ones(1, 32),), path, skip_model_load=True)
    ours, theirs = ((path / "Data/com.apple.CoreML/weights/weight.bin") for path in paths)
    assert ours.read_bytes() == theirs.read_bytes()


def test_the_model_is_as_before_also_after_an_error(tmp_path):
    source = save(named_once(built(Tied)), tmp_path / "in", 0)
    model = on_meta(Tied)
    parameters = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}

    def interrupt(done, _total, _name):
        if done:
            raise KeyboardInterrupt

    optimizer(model, GROUPED).compress_checkpoint(source, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        optimizer(model, GROUPED).compress_checkpoint(
            source, tmp_path / "interrupted", progress=interrupt
        )
    after = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert after == parameters
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    read, alive = [], []
    original = Shard.__getitem__

    def watched(self, name):
        alive.append(sum(tensor() is not None for tensor in read))
        tensor = original(self, name)
        read.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Shard, "__getitem__", watched)
    source = save(named_once(built(Tied)), tmp_path / "in", 2)
    optimizer(on_meta(Tied), GROUPED).compress_checkpoint(source, tmp_path / "out")
    assert len(alive) == len(named_once(built(Tied)))
    assert set(alive) == {0}


def test_tensors_that_the_model_lacks_are_copied_and_named(tmp_path):
    model = built(Tied)
    extra = {f"old.{i}": torch.full((3,), i, dtype=torch.int16) for i in range(5)}
    source = save({**named_once(model), **extra}, tmp_path / "in", 2)
    report = optimizer(on_meta(Tied), GROUPED).compress_checkpoint(source, tmp_path / "out")
    (note,) = report.notes
    assert note.startswith("Not in the model and copied as they are: old.")
    assert note.endswith("and 2 more.")
    held = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        held |= safetensors.torch.load_file(file)
    assert all(torch.equal(held[name], tensor) for name, tensor in extra.items())
    with pytest.raises(ConfigError, match=r"holds old\.\d, which the model lacks"):
        load_compressed(on_meta(Tied), tmp_path / "out")


def cut(path: Path, n_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:n_bytes])


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda folder: (folder / SECOND).unlink(),
            PackageNotFoundError,
            rf"{SECOND}: missing, though {INDEX} says that it holds layers\.0\.weight",
        ),
        (
            lambda folder: cut(folder / SECOND, 3000),
            PackageError,
            rf"{SECOND}: cut off, \S+ ends beyond the file; copy it again",
        ),
        (
            lambda folder: cut(folder / SECOND, 40),
            PackageError,
            rf"{SECOND}: not a file of safetensors, or cut off within its header",
        ),
        (
            lambda folder: (folder / SECOND).write_bytes(b"\2\0\0\0\0\0\0\0[]"),
            PackageError,
            rf"{SECOND}: the header is damaged: it is no dictionary of tensors and metadata",
        ),
        (
            lambda folder: (folder / SECOND).write_bytes(b'\x0c\0\0\0\0\0\0\0{"a": "b"}  '),
            PackageError,
            rf"{SECOND}: what the header says of a is damaged, or of a type that torch lacks",
        ),
        (
            lambda folder: safetensors.torch.save_file({"a": torch.ones(2)}, folder / SECOND),
            PackageError,
            rf"{SECOND}: lacks \S+, which {INDEX} says is in it",
        ),
        (
            lambda folder: rewrite(folder / INDEX, weight_map={"a": "../a"}),
            PackageError,
            rf"{INDEX}: damaged, it must be JSON with the file of each tensor",
        ),
        (
            lambda folder: (folder / INDEX).write_text("{"),
            PackageError,
            rf"{INDEX}: damaged, it must be JSON with the file of each tensor",
        ),
        (
            lambda folder: (folder / INDEX).unlink(),
            PackageError,
            "holds 2 files and no index; give the path of one file",
        ),
        (
            lambda folder: [path.unlink() for path in folder.iterdir()],
            PackageNotFoundError,
            "in: holds no file of safetensors",
        ),
    ],
    ids=[
        "missing shard",
        "cut",
        "cut header",
        "header of no dictionary",
        "header of other things",
        "shard of other weights",
        "index out of the folder",
        "index of no JSON",
        "no index",
        "nothing",
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_one_sentence(damage, error, message, tmp_path):
    source = save(named_once(built(Tied)), tmp_path / "in", 2)
    damage(source)
    with pytest.raises(error, match=message):
        optimizer(on_meta(Tied), GROUPED).compress_checkpoint(source, tmp_path / "out")
    with pytest.raises(error, match=message):
        load_compressed(on_meta(Tied), source)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_checkpoint_must_be_of_the_model(tmp_path):
    state = named_once(built(Tied))
    del state["layers.0.bias"]
    source = save(state, tmp_path / "lacking", 0)
    with pytest.raises(ConfigError, match=r"lacking: lacks layers\.0\.bias, which the model has"):
        optimizer(on_meta(Tied), GROUPED).compress_checkpoint(source, tmp_path / "out")
    state["layers.0.bias"] = torch.ones(31)
    source = save(state, tmp_path / "other", 0)
    message = r"other: layers\.0\.bias must have the shape 32, as in the model, got 31"
    with pytest.raises(ConfigError, match=message):
        optimizer(on_meta(Tied), GROUPED).compress_checkpoint(source, tmp_path / "out")
    with pytest.raises(PackageNotFoundError, match="none: no such file"):
        optimizer(on_meta(Tied), GROUPED).compress_checkpoint(tmp_path / "none", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lacking", "other"]


@pytest.mark.parametrize("n_shards", [0, 2])
def test_a_destination_is_replaced_if_that_is_said(n_shards, tmp_path):
    source = save(named_once(built(Tied)), tmp_path / "in", n_shards)
    palettizer = optimizer(on_meta(Tied), GROUPED)
    out = tmp_path / "out"
    palettizer.compress_checkpoint(source, out)
    with pytest.raises(DestinationError, match="out exists already"):
        palettizer.compress_checkpoint(source, out)

    def failing(*_):
        raise KeyboardInterrupt

    before = sorted(out.iterdir()) if n_shards else out.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        palettizer.compress_checkpoint(source, out, force=True, progress=failing)
    assert (sorted(out.iterdir()) if n_shards else out.read_bytes()) == before
    optimizer(on_meta(Tied), CODES["channels"]).compress_checkpoint(source, out, force=True)
    loaded = load_compressed(on_meta(Tied), out)
    assert "_COREML_/weight/quantization_scale" in dict(loaded.words.named_buffers())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_folder_comes_back_if_its_successor_can_not_take_its_place(tmp_path, monkeypatch):
    source = save(named_once(built(Tied)), tmp_path / "in", 2)
    palettizer = optimizer(on_meta(Tied), GROUPED)
    palettizer.compress_checkpoint(source, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    original = Path.rename

    def refusing(path, target):
        if Path(target).name == "out" and (path / SECOND).read_bytes() != before[SECOND]:
            raise PermissionError(13, "Permission denied", str(target))
        return original(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(StorageError, match="Permission denied"):
        optimizer(on_meta(Tied), CODES["channels"]).compress_checkpoint(
            source, tmp_path / "out", force=True
        )
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_destination_is_never_the_source_nor_another_folder(tmp_path):
    source = save(named_once(built(Tied)), tmp_path / "in", 2)
    palettizer = optimizer(on_meta(Tied), GROUPED)
    for place in (source, source / "within"):
        with pytest.raises(DestinationError, match="must be apart from the source"):
            palettizer.compress_checkpoint(source, place, force=True)
    (tmp_path / "letters").mkdir()
    with pytest.raises(DestinationError, match="is no folder of safetensors"):
        palettizer.compress_checkpoint(source, tmp_path / "letters", force=True)
    with pytest.raises(PackageNotFoundError, match="does not exist"):
        palettizer.compress_checkpoint(source, tmp_path / "none" / "out")


def test_weights_without_values_are_left_with_a_way_out():
    palettizer = optimizer(on_meta(Tied), GROUPED)
    palettizer.compress()
    weights = {name for name, p in on_meta(Tied).named_parameters() if p.ndim > 1}
    assert set(palettizer.report().left) == weights
    assert "compress_checkpoint takes them from files" in palettizer.report().left["words.weight"]


def test_a_buffer_that_is_made_with_the_model_needs_its_values(tmp_path):
    class Rotary(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.register_buffer("angles", torch.arange(4.0), persistent=False)

    source = save(named_once(Rotary()), tmp_path / "in", 0)
    blank = Rotary().to("meta")
    optimizer(blank, {"n_bits": 2}).compress_checkpoint(source, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"angles is no part of a checkpoint .* on the CPU"):
        load_compressed(blank, tmp_path / "out")
    loaded = load_compressed(Rotary(), tmp_path / "out")
    assert _metadata.compressed_parameters(loaded) == ["weight"]


def test_tensors_of_any_type_and_shape_come_back_from_a_file(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = "bool uint8 float8_e4m3fn uint16 float16 bfloat16 float32 int64 float64 complex64"
    tensors = {
        f"{dtype}{shape}": torch.from_numpy(rng.integers(0, 2, shape)).to(getattr(torch, dtype))
        for dtype in dtypes.split()
        for shape in ((), (3,), (0, 2), (5, 3))
    }
    with ShardWriter(tmp_path / "ours", {}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    safetensors.torch.save_file(tensors, tmp_path / "theirs")
    read = safetensors.torch.load_file(tmp_path / "ours")
    shards = Shard(tmp_path / "ours"), Shard(tmp_path / "theirs")
    for name, tensor in tensors.items():
        for other in (read[name], *(shard[name] for shard in shards)):
            assert other.dtype == tensor.dtype
            assert other.shape == tensor.shape
            assert other.contiguous().view(-1).view(torch.uint8).tolist() == (
                tensor.contiguous().view(-1).view(torch.uint8).tolist()
            )
        entry = shards[0].entries[name]
        assert entry.begin % min(entry.dtype.itemsize, 8) == 0


class Reading(nn.Module):
    """A decoder of sorts: tied, normalized by a buffer, with positions that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(48, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.norm = nn.BatchNorm1d(32)
        self.experts = nn.Parameter(torch.randn(2, 32, 32))
        self.unused = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("places", torch.linspace(0, 1, 6)[:, None], persistent=False)
        self.head = nn.Linear(32, 48, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids) + self.places
        for layer in self.layers:
            x = torch.tanh(layer(x))
        x = self.norm(x.mT).mT
        x = x + nn.functional.linear(x, self.experts[0]) + x @ self.experts[1].mT
        return self.head(x)


def without_values(model: nn.Module) -> nn.Module:
    """Put the parameters on meta, as accelerate's ``init_empty_weights`` does."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"))
    model.head.weight = model.words.weight
    return model


def layerwise(model: nn.Module, settings: dict[str, Any]) -> LayerwiseCompressor:
    return LayerwiseCompressor(
        model, LayerwiseCompressorConfig.from_dict({"global_config": settings})
    )


SAMPLES = [torch.arange(6)[None] * (i + 1) % 48 for i in range(8)]
GPTQ4 = {"algorithm": "gptq", "weight_dtype": "uint4"}
GPTQ_PALETTES = {"algorithm": "gptq_palette", "n_bits": 3}


@pytest.mark.parametrize("n_shards", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [GPTQ4, GPTQ_PALETTES], ids=["gptq", "palettes"])
def test_layers_of_files_are_those_that_are_compressed_in_memory(
    settings, dtype, n_shards, tmp_path, monkeypatch
):
    monkeypatch.setattr("milpress.torch._mapped._TOUCHED", 1000)
    model = built(Reading, dtype)
    source = save(named_once(model), tmp_path / "source", n_shards)
    in_memory = layerwise(model, settings)
    expected = in_memory.compress(SAMPLES)
    empty = without_values(built(Reading, dtype, seed=1))
    before = {name: id(tensor) for name, tensor in empty.state_dict(keep_vars=True).items()}
    streaming = layerwise(empty, settings)
    report = streaming.compress_checkpoint(source, tmp_path / "out", SAMPLES)
    assert report is streaming.report()
    assert report.data == in_memory.report().data
    assert report.weights == in_memory.report().weights
    assert set(report.left) == {"unused"}
    assert before == {name: id(tensor) for name, tensor in empty.state_dict(keep_vars=True).items()}
    assert not any(module._forward_hooks for module in empty.modules())
    loaded = load_compressed(without_values(built(Reading, dtype, seed=2)), tmp_path / "out")
    assert_same(loaded, expected)
    assert torch.equal(loaded(SAMPLES[0]), expected(SAMPLES[0]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_second_way_goes_on_from_what_files_hold_compressed(tmp_path):
    model = built(Reading)
    source = save(named_once(model), tmp_path / "source.safetensors", 0)
    first = LayerwiseCompressorConfig.from_dict({"module_name_configs": {r"layers\..*": GPTQ4}})
    compressor = LayerwiseCompressor(built(Reading), first)
    compressor.compress_checkpoint(source, tmp_path / "half.safetensors", SAMPLES)
    report = layerwise(built(Reading), GPTQ_PALETTES).compress_checkpoint(
        tmp_path / "half.safetensors", tmp_path / "all.safetensors", SAMPLES
    )
    done = {name for name in report.left if report.left[name] == "compressed already"}
    assert done == {f"layers.{i}.weight" for i in range(3)}
    names = set(Shard(tmp_path / "all.safetensors"))
    assert "layers.0._COREML_/weight/quantization_scale" in names
    assert "experts" in names
    assert "_COREML_/experts/lut" in names


def test_what_fails_while_layers_run_leaves_the_model_and_no_file(tmp_path):
    source = save(named_once(built(Reading)), tmp_path / "source", 2)
    model = without_values(built(Reading))
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(IndexError):
        layerwise(model, GPTQ4).compress_checkpoint(
            source, tmp_path / "out", [torch.tensor([[99]])]
        )
    assert before == {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises(ConfigError, match="places is no part of a checkpoint"):
        layerwise(on_meta(Reading), GPTQ4).compress_checkpoint(source, tmp_path / "out", SAMPLES)
