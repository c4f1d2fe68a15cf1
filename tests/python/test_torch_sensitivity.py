"""SKMPalettizer: sensitivities against a naive oracle, and what is made of them."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from coremltools.optimize.torch import palettization as reference
from torch import nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.multiprocessing.spawn import spawn
from torch_processes import batches, build, loss_fn, work_in_a_group

import milpress as cto
from milpress.errors import (
    ConfigError,
    ConfigTypeError,
    PackageNotFoundError,
    StorageError,
    UnsupportedError,
)
from milpress.torch import _metadata
from milpress.torch._module_weights import ModuleWeight
from milpress.torch.palettization import _sensitivity
from milpress.torch.palettization._tensor_file import TensorFile

P = cto.torch.palettization


def fisher(model: nn.Module, samples, weights) -> dict[str, np.ndarray]:
    """Return the sum of squared gradients in double precision, normalised as coremltools does."""
    model = copy.deepcopy(model).double().eval().requires_grad_(True)
    parameters = dict(model.named_parameters())
    sums = {name: np.zeros(tuple(parameters[name].shape)) for name in weights}
    for sample in samples:
        model.zero_grad()
        loss_fn(model, sample).backward()
        for name in weights:
            if parameters[name].grad is not None:
                sums[name] += parameters[name].grad.numpy() ** 2
    for name, total in sums.items():
        if not total.any():
            total[:] = 1
        total /= total.max()
        total[total == 0] = total[total > 0].min()
        sums[name] = total.clip(1e-12)
    return sums


WEIGHTS = ("words.weight", "frozen.weight", "unused.weight")


def config(**settings):
    return P.SKMPalettizerConfig.from_dict(settings)


def test_sensitivities_are_the_mean_squares_of_the_gradients_of_samples():
    model = build()
    found = P.SKMPalettizer(model, config()).compute_sensitivity(batches(), loss_fn)
    samples = [(ids[i : i + 1], y[i : i + 1]) for ids, y in batches() for i in range(len(y))]
    oracle = fisher(model, samples, WEIGHTS)
    assert set(found) == set(WEIGHTS)
    for name, values in oracle.items():
        # Gradients pass through a dozen float32 operations with sums of at most 20 terms.
        np.testing.assert_allclose(found[name].numpy(), values, rtol=1e-3, atol=1e-6)


def test_without_splitting_they_are_those_of_whole_batches_like_coremltools():
    model = build().requires_grad_(True).eval()
    del model.unused
    ours = P.SKMPalettizer(model, config(per_sample=False)).compute_sensitivity(batches(), loss_fn)
    theirs = reference.SKMPalettizer(model).compute_sensitivity(batches(), loss_fn)
    for name, values in ours.items():
        torch.testing.assert_close(values, theirs[name], rtol=1e-5, atol=1e-7)


def test_samples_are_counted_not_batches():
    seen = []

    def counting(model, batch):
        seen.append(len(batch[1]))
        return loss_fn(model, batch)

    P.SKMPalettizer(build(), config(calibration_nsamples=6)).compute_sensitivity(
        batches(), counting
    )
    assert seen == [1] * 6


def test_the_model_is_as_before_whatever_happens():
    model = build()
    model.head.eval()
    model.norm.weight.grad = torch.ones(8)
    state = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}

    def failing(model, batch):
        assert not model.training
        loss = loss_fn(model, batch)
        if failing.left == 0:
            raise KeyboardInterrupt
        failing.left -= 1
        return loss

    for failing.left in (100, 2):
        palettizer = P.SKMPalettizer(model)
        try:
            palettizer.compute_sensitivity(batches(), failing)
        except KeyboardInterrupt:
            assert failing.left == 0
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert torch.equal(model.norm.weight.grad, torch.ones(8))
        assert model.words.weight.grad is None
        assert not model.words.weight._post_accumulate_grad_hooks


def test_gradients_are_dropped_one_by_one():
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(5)])
    alive = []

    def watch(_gradient):
        alive.append(sum(p.grad is not None for p in model.parameters()))

    def watched(model, batch):
        x = batch
        for layer in model:
            x = layer(x)
            x.register_hook(watch)
        return x.square().sum()

    P.SKMPalettizer(model).compute_sensitivity([torch.ones(1, 8)], watched)
    assert alive == [0] * 5


def test_the_table_is_of_least_error_in_sensitivities(tmp_path):
    torch.manual_seed(3)
    model = nn.Linear(32, 32)
    sensitivity = torch.rand(32, 32) ** 4

    def cost(module):
        return float((sensitivity * (module.weight - model.weight).square()).sum().detach())

    path = tmp_path / "sensitivity.pt"
    torch.save({"weight": sensitivity}, path)
    results = [
        cost(home.SKMPalettizer(copy.deepcopy(model)).compress(sensitivity_path=str(path)))
        for home in (P, reference)
    ]
    plain = P.PostTrainingPalettizer(copy.deepcopy(model)).compress()
    # Both are exact; the table is rounded to float32 once, and coremltools clips at 1e-12.
    assert results[0] <= results[1] * (1 + 1e-6)
    assert results[0] < cost(plain)


def test_saved_sensitivities_give_the_same_model(tmp_path):
    path = tmp_path / "sensitivity.pt"
    direct = P.SKMPalettizer(build()).compress(batches(), loss_fn)
    found = P.SKMPalettizer(build()).compute_sensitivity(batches(), loss_fn, path)
    saved = torch.load(path, weights_only=True)
    assert all(torch.equal(saved[name], values) for name, values in found.items())
    again = P.SKMPalettizer(build()).compress(sensitivity_path=path)
    for name, value in direct.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert [file.name for file in tmp_path.iterdir()] == ["sensitivity.pt"]


def test_an_interrupted_run_goes_on_where_it_was_and_ends_bit_for_bit_the_same(tmp_path):
    path = tmp_path / "sensitivity.pt"
    settings = {"calibration_nsamples": 12}
    whole = P.SKMPalettizer(build(), config(**settings)).compute_sensitivity(batches(), loss_fn)
    seen = []

    def breaking(model, batch):
        seen.append(batch)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return loss_fn(model, batch)

    with pytest.raises(KeyboardInterrupt):
        P.SKMPalettizer(build(), config(**settings)).compute_sensitivity(batches(), breaking, path)
    seen.clear()
    resumed = P.SKMPalettizer(build(), config(**settings)).compute_sensitivity(
        batches(), lambda model, batch: (seen.append(batch), loss_fn(model, batch))[1], path
    )
    assert len(seen) == 12 - 7
    for name, values in whole.items():
        assert torch.equal(resumed[name], values), name
    assert [file.name for file in tmp_path.iterdir()] == ["sensitivity.pt"]


def test_sums_in_a_file_are_those_in_memory_bit_for_bit(tmp_path):
    model = build()
    found = P.SKMPalettizer(model, config()).compute_sensitivity(batches(), loss_fn, tmp_path / "s")
    alone = copy.deepcopy(model).eval().requires_grad_(True)
    sums = {name: torch.zeros_like(alone.get_parameter(name)).detach() for name in WEIGHTS}
    for ids, y in batches():
        for i in range(len(y)):
            alone.zero_grad()
            loss_fn(alone, (ids[i : i + 1], y[i : i + 1])).backward()
            for name, total in sums.items():
                gradient = alone.get_parameter(name).grad
                if gradient is not None:
                    total.addcmul_(gradient, gradient)
    saved = torch.load(tmp_path / "s", weights_only=True)
    for name, total in sums.items():
        expected, _ = _sensitivity.normalized(total)
        assert torch.equal(found[name], expected), name
        assert torch.equal(saved[name], expected), name
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_sums_of_one_weight_are_in_memory_at_a_time(tmp_path, monkeypatch):
    read, alive = [], []
    original = TensorFile.__getitem__

    def watched(self, name):
        alive.append(sum(tensor() is not None for tensor in read))
        tensor = original(self, name)
        read.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(TensorFile, "__getitem__", watched)
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(4)])
    data = [torch.ones(4, 8)]

    def loss(model, batch):
        return model(batch).square().sum()

    for path in (None, tmp_path / "s.pt"):  # with a path, copied to be gone on from, too
        P.SKMPalettizer(model, config(calibration_nsamples=4)).compute_sensitivity(data, loss, path)
    P.SKMPalettizer(model).compress(data, loss)
    n_runs, n_samples, n_weights = 3, 4, 4
    # For each sample, to keep them after each where there is a path, and for what is made of them.
    assert len(alive) == (n_runs * n_samples + n_samples + n_runs) * n_weights
    assert set(alive) == {0}


def test_a_weight_without_elements_has_no_sensitivity():
    model = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 4))
    model.append(nn.Linear(4, 4))
    palettizer = P.SKMPalettizer(model)
    found = palettizer.compute_sensitivity([torch.ones(1, 4)], lambda m, x: m(x).square().sum())
    assert list(found) == ["2.weight"]


def test_a_missing_folder_is_found_out_before_any_sample_is_taken(tmp_path):
    with pytest.raises(PackageNotFoundError, match=r"the folder .*none does not exist"):
        P.SKMPalettizer(build()).compute_sensitivity(None, loss_fn, tmp_path / "none" / "s.pt")


def test_a_file_of_sums_that_was_cut_says_so(tmp_path):
    file = TensorFile.create(tmp_path / "s.pt", {"weight": (4, 4), "empty": (0, 4)})
    file["weight"] = torch.ones(4, 4)
    assert torch.equal(file["weight"], torch.ones(4, 4))
    assert file["empty"].shape == (0, 4)
    data = file.path.read_bytes()
    file.path.write_bytes(data[: data.index(np.float32(1).tobytes() * 16) + 8])
    with pytest.raises(StorageError, match="weight ends too early"):
        file["weight"]


def test_the_model_runs_on_the_device_and_comes_home_also_after_an_error(monkeypatch):
    model = build()
    went = []
    monkeypatch.setattr(model, "to", went.append, raising=False)
    expected = P.SKMPalettizer(model).compute_sensitivity(batches(), loss_fn)
    assert went == []
    found = P.SKMPalettizer(model).compute_sensitivity(batches(), loss_fn, device="cpu:0")
    assert went == ["cpu:0", torch.device("cpu")]
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    with pytest.raises(ConfigTypeError, match="loss_fn must return one number"):
        P.SKMPalettizer(model).compress(batches(), lambda *_: None, device="cpu:0")
    assert went == ["cpu:0", torch.device("cpu")] * 2
    model.hf_device_map = {"": 0}  # accelerate refuses to move what it has dispatched
    P.SKMPalettizer(model).compute_sensitivity(batches(), loss_fn, device="cpu:0")
    assert len(went) == 4


def test_batches_go_to_the_device_and_keep_their_kinds():
    Pair = namedtuple("Pair", "x y")
    batch = UserDict(pair=Pair(torch.ones(2), [torch.ones(1)]), name="a")
    there = _sensitivity.moved(batch, "meta")
    assert type(there) is UserDict
    assert type(there["pair"]) is Pair
    assert there["pair"].x.is_meta
    assert there["pair"].y[0].is_meta
    assert there["name"] == "a"


def test_what_is_said_of_a_weight_is_where_the_weight_is():
    model = nn.Linear(16, 16)
    compressed = P.PostTrainingPalettizer(model).compress()
    stored = _metadata.read(ModuleWeight("", compressed, "weight"))
    elsewhere = nn.Linear(16, 16, device="meta")
    _metadata.register(ModuleWeight("", elsewhere, "weight"), stored)
    assert all(buffer.is_meta for buffer in elsewhere.buffers())


def test_sums_of_other_weights_are_not_taken_up(tmp_path):
    path = tmp_path / "s.pt"
    torch.save({"n_samples": 1, "squares": {}}, tmp_path / "s.pt.partial")
    with pytest.raises(ConfigError, match="of an interrupted run with other weights"):
        P.SKMPalettizer(build()).compute_sensitivity(batches(), loss_fn, path)


def test_a_file_is_read_as_data_and_never_run(tmp_path):
    path = tmp_path / "s.pt"
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(ConfigError, match="dictionary of tensors"):
        P.SKMPalettizer(build()).compress(sensitivity_path=path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(ConfigTypeError, match="dictionary of tensors"):
        P.SKMPalettizer(build()).compress(sensitivity_path=path)
    with pytest.raises(ConfigError, match="dictionary of tensors"):
        P.SKMPalettizer(build()).compress(sensitivity_path=tmp_path / "none.pt")


def test_weights_without_fitting_sensitivities_are_in_the_report_with_the_reason(tmp_path):
    path = tmp_path / "s.pt"
    given = {
        "head.weight": torch.rand(20, 8),  # the other name of a tied weight
        "frozen.weight": torch.rand(8, 7),
    }
    torch.save(given, path)
    palettizer = P.SKMPalettizer(build())
    palettizer.compress(sensitivity_path=path)
    left = palettizer.report().left
    assert "words.weight" not in left
    assert "of the shape (8, 8), got (8, 7)" in left["frozen.weight"]
    assert "no sensitivities are given" in left["unused.weight"]


def test_the_report_says_what_is_unused_and_which_batches_were_not_split():
    palettizer = P.SKMPalettizer(build())
    uneven = [(ids, y, torch.ones(7)) for ids, y in batches()]
    palettizer.compress(uneven, loss_fn)
    report = palettizer.report()
    assert "does not depend on it" in report["unused.weight"]["note"]
    assert report.notes == (
        "3 of 3 batches were used as given: their tensors don't share their first dimension",
    )
    assert report.notes[0] in str(report)
    palettizer.compress(batches(), loss_fn)
    assert palettizer.report().notes == ()


Pair = namedtuple("Pair", "x y")


def test_a_batch_of_any_shape_is_split_and_only_along_a_shared_dimension():
    x, y = torch.arange(6).reshape(3, 2), torch.arange(3)
    for batch in ((x, y), [x, y], {"x": x, "y": y, "flag": True}, Pair(x, y), UserDict(x=x, y=y)):
        parts = _sensitivity.split(batch)
        assert [type(part) for part in parts] == [type(batch)] * 3
    assert _sensitivity.split({"x": (x, [y]), "name": "a"})[1]["x"][1][0].tolist() == [1]
    assert torch.equal(_sensitivity.split(x)[2], x[2:])
    for batch in ((x, torch.ones(2)), (x, torch.tensor(1.0)), "text", ()):
        assert _sensitivity.split(batch) is None


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda m, b: 1.0, ConfigTypeError, "one number that depends on the weights"),
        (lambda m, b: m(b[0]), ConfigTypeError, "one number that depends on the weights"),
        (lambda m, b: torch.ones(()), ConfigTypeError, "depends on the weights"),
        (lambda m, b: loss_fn(m, b) * torch.nan, UnsupportedError, "sample 1 must be finite"),
    ],
)
def test_what_is_no_loss_is_refused(loss, error, message):
    with pytest.raises(error, match=message):
        P.SKMPalettizer(build()).compute_sensitivity(batches(), loss)


def test_there_must_be_samples_or_sensitivities():
    with pytest.raises(ConfigError, match="dataloader gives no sample"):
        P.SKMPalettizer(build()).compute_sensitivity([], loss_fn)
    with pytest.raises(ConfigError, match="sensitivities are missing: give dataloader and loss_fn"):
        P.SKMPalettizer(build()).compress()
    with pytest.raises(ConfigError, match="calibration_nsamples must be at least 1"):
        config(calibration_nsamples=0)


def test_float16_gradients_don_t_vanish_when_squared():
    torch.manual_seed(5)
    model = nn.Linear(8, 8, dtype=torch.bfloat16)
    found = P.SKMPalettizer(model).compute_sensitivity(
        [(torch.eye(8) * 2.0 ** -torch.arange(8)).bfloat16()],
        lambda m, x: (m(x).float() * 1e-3).sum(),
    )
    # The input of column i is 2^-i, so its squared gradient is 4^-i of that of column 0.
    expected = (4.0 ** -torch.arange(8)).expand(8, 8)
    torch.testing.assert_close(found["weight"], expected, rtol=2**-6, atol=0)


def test_two_processes_agree_with_one_whether_they_share_samples_or_the_model(tmp_path):
    spawn(work_in_a_group, (str(tmp_path),), 2)
    alone = P.SKMPalettizer(build(), config(calibration_nsamples=11))
    found = alone.compute_sensitivity(batches(), loss_fn)
    model = alone.compress(batches(), loss_fn)
    for rank in range(2):
        together = torch.load(tmp_path / f"together{rank}")
        sharded = torch.load(tmp_path / f"sharded{rank}")
        compressed = torch.load(tmp_path / f"compressed{rank}")
        for name, values in found.items():
            # Sums of 11 float32 squares, in another order.
            torch.testing.assert_close(sharded[name], values, rtol=1e-5, atol=1e-8)
        for name, values in model.state_dict().items():
            if "." in name and "_COREML_" not in name:
                torch.testing.assert_close(together[name], values, rtol=1e-4, atol=1e-5)
                if name in compressed:
                    torch.testing.assert_close(compressed[name], values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "policy", [None, pytest.param(ModuleWrapPolicy({nn.Linear}), marks=pytest.mark.large)]
)
def test_workers_that_are_started_for_it_find_the_same(policy):
    alone = P.SKMPalettizer(build()).compute_sensitivity(batches(), loss_fn)
    found = P.SKMPalettizer(build()).compute_sensitivity(
        batches(), loss_fn, num_sensitivity_workers=2, fsdp_auto_wrap_policy=policy
    )
    for name, values in alone.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-8)
