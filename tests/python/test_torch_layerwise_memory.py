"""LayerwiseCompressor: what samples that wait take in memory, and what is in files."""

from __future__ import annotations

import gc
import tempfile

import pytest
import torch
from test_torch_layerwise_runs import Keeper, Loop, Mixture, compressor, samples_of
from torch import nn

from milpress.errors import ConfigError, StorageError
from milpress.torch.layerwise_compression import _activations

BYTES = 400 * 16 * 4  # of one activation of `Wide`


class Wide(nn.Module):
    """Of a sample, six activations are alive at a time."""

    def __init__(self):
        super().__init__()
        self.up, self.right, self.left = (nn.Linear(16, 16) for _ in range(3))
        self.down = nn.Linear(16, 4)

    def forward(self, x):
        x = torch.relu(self.up(x))
        parts = [x * i for i in range(4)]
        return self.down(self.left(x) + self.right(x) + sum(parts))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def bytes_of_tensors():
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def compressed(model, batches, budget, **settings):
    made = compressor(model).compress(batches, activation_memory=budget, **settings)
    return list(made.state_dict().values())


def assert_equal(ours, others):
    assert len(ours) == len(others)
    assert all(map(torch.equal, ours, others))


def models():
    torch.manual_seed(0)
    plain = [torch.randn(32, 8) for _ in range(4)]
    yield Wide(), [torch.randn(400, 16) for _ in range(6)]
    yield Loop(), samples_of([2, 3, 1, 2])
    yield Mixture(out_is_first=True), plain
    for way in ("attribute", "list", "new buffer", "changed buffer", "changed tensor"):
        yield Keeper(way), plain


@pytest.mark.parametrize("budget", [0, 3000, 10**9])
def test_files_make_no_difference(budget, folder):
    for model, batches in models():
        assert_equal(compressed(model, batches, budget), compressed(model, batches, None))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("n_in_memory", [0, 5, 17])
def test_samples_that_wait_take_no_more_than_the_budget(n_in_memory, folder):
    model, batches = Wide(), [torch.randn(400, 16) for _ in range(20)]
    found, files = [], []

    def progress(_done, _total, name):
        found.append(bytes_of_tensors() - before)
        files.append(sum(path.stat().st_size for path in folder.glob("*/*")))

    before = bytes_of_tensors()
    compressed(model, batches, n_in_memory * BYTES, progress=progress, inplace=True)
    # Beside second moments, copies of weights and the like.
    assert max(found) < n_in_memory * BYTES + 20_000
    assert max(files) > (20 - n_in_memory) * BYTES
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_files_are_deleted_when_a_run_fails(error, folder):
    files = []

    def failing(_done, _total, name):
        files.extend(folder.glob("*/*"))
        if name == "left.weight":
            raise error

    with pytest.raises(error):
        compressed(Wide(), [torch.randn(400, 16)] * 3, 0, progress=failing)
    assert files
    assert list(folder.iterdir()) == []


def test_what_samples_share_and_what_hooks_keep_is_in_memory_when_it_is_used(folder):
    cache: dict[int, torch.Tensor] = {}
    kept = []

    class Sharing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            if len(x) not in cache:
                cache[len(x)] = torch.arange(len(x) * 8.0).reshape(-1, 8).cos()
            y = self.a(x * cache[len(x)])
            shared = y.numpy()
            x = self.b(x + cache[len(x)])
            return x + torch.from_numpy(shared)

    torch.manual_seed(0)
    model, batches = Sharing(), [torch.randn(30, 8) for _ in range(4)]
    model.a.register_forward_hook(lambda _module, _args, out: kept.append(out * 2))
    expected = compressed(model, batches, None)
    in_memory, kept[:] = list(kept), []
    cache.clear()
    assert_equal(compressed(model, batches, 0), expected)
    assert torch.equal(cache[30], torch.arange(240.0).reshape(-1, 8).cos())
    assert_equal(kept, in_memory)


def test_a_full_disk_is_an_error_that_says_what_to_do(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_activations, "_write", full)
    with pytest.raises(StorageError, match=r"No space left on device.*activation_memory"):
        compressed(Wide(), [torch.randn(40, 16)] * 3, 0)
    assert list(folder.iterdir()) == []


def test_a_file_that_is_cut_short_is_an_error(folder):
    def cut(_done, _total, name):
        if name == "left.weight":
            for path in folder.glob("*/*"):
                path.write_bytes(b"")

    with pytest.raises(StorageError, match="can't be read: it was cut short"):
        compressed(Wide(), [torch.randn(40, 16)] * 3, 0, progress=cut)


def test_a_negative_budget_is_refused():
    with pytest.raises(ConfigError, match="activation_memory must be at least 0, got -1"):
        compressed(Wide(), [torch.randn(40, 16)], -1)
