"""The instruments measure what they say: turns, ratios, files; nothing here looks at a time."""

from __future__ import annotations

import dataclasses
import json

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import pytest

import milpress
import milpress._core as _core
from benchmarks import generate_package, kernels, machine, measure, results
from benchmarks.measure import Contender, Effort, Figure, Line, Times


class Watch:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log = ""

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, seconds: float, n_items: int = 1) -> Contender:
        def work() -> None:
            self.now += seconds
            self.log += name

        return Contender(name, work, n_items)


def take_turns(watch: Watch, effort: Effort, **seconds: float) -> dict[str, Times]:
    contenders = [watch.contender(name, length) for name, length in seconds.items()]
    return measure.alternate(contenders, effort, watch, wall=watch)


def test_contenders_take_turns():
    watch = Watch()
    take_turns(watch, Effort(rounds=2, budget=100), a=1, b=2, c=3)
    assert watch.log == "abc" * 3  # the first round warms up


def test_a_short_first_turn_is_a_warm_up_and_a_long_one_counts():
    times = take_turns(Watch(), Effort(rounds=3, budget=10), short=1, long=4)
    assert times["short"].seconds == (1, 1, 1)
    assert times["long"].seconds == (4, 4, 4)


def test_a_contender_beyond_its_budget_had_one_turn_and_does_not_stop_others():
    watch = Watch()
    times = take_turns(watch, Effort(rounds=4, budget=10), slow=50, fast=1)
    assert times["slow"].seconds == (50,)
    assert times["fast"].seconds == (1,) * 4


def test_a_ratio_compares_medians_by_item():
    times = {"milpress": Times(1000, (1.0, 3.0, 2.0)), "peer": Times(10, (5.0, 4.0, 60.0))}
    figure = measure.speed_beside(times, "peer", 200.0)
    assert figure.measured == (5 / 10) / (2 / 1000)
    assert figure.of_minima == (4 / 10) / (1 / 1000)
    assert figure.reached


def test_a_target_is_reached_at_its_value_from_the_right_side_only():
    def reached(measured: float, sense: measure.Sense) -> bool | None:
        return Figure(label="", unit="x", measured=measured, target=2.0, sense=sense).reached

    assert [reached(value, "at least") for value in (1.9, 2.0, 2.1)] == [False, True, True]
    assert [reached(value, "at most") for value in (1.9, 2.0, 2.1)] == [True, True, False]
    assert Figure(label="", unit="x", measured=1.0).reached is None


def test_nan_reaches_nothing():
    for sense in ("at least", "at most"):
        figure = Figure(label="", unit="x", measured=float("nan"), target=1.0, sense=sense)
        assert figure.reached is False


def test_a_run_survives_its_file():
    line = Line(
        group="kernels",
        name="a line",
        clock="wall",
        item="code",
        times={"milpress": Times(8, (0.5, 0.25)), "memcpy": Times(4, (0.125,))},
        figures=(
            Figure(label="speed", unit="x", measured=1.5, of_minima=1.25, target=2.0),
            Figure(label="memory", unit="MB", measured=80.0, target=100.0, sense="at most"),
        ),
        note="A note.",
    )
    run = results.Results(machine={"cores": 2}, lines=(line,), quick=True, warning="busy")
    assert results.parse(results.dump(run)) == run
    assert run.summary == "1 of 2 targets reached"


def test_a_file_of_another_schema_is_refused():
    data = json.loads(results.dump(results.Results(machine={})))
    data["schema"] += 1
    with pytest.raises(ValueError, match="schema must be 1, got 2"):
        results.parse(json.dumps(data))


def test_the_page_shows_the_published_run():
    page = results.PAGE.read_text()
    assert results.set_into(page, results.load(results.PUBLISHED)) == page


def test_a_page_without_marks_is_refused():
    with pytest.raises(ValueError, match="the page must hold"):
        results.set_into("nothing", results.load(results.PUBLISHED))


@pytest.mark.parametrize("busy", [0.0, 0.1, float("nan")])
def test_an_idle_machine_gives_no_warning(busy):
    assert machine.idleness_warning({"busy_cores": busy, "load_average": [9.0]}) == ""


def test_a_busy_machine_gives_a_warning():
    warning = machine.idleness_warning({"busy_cores": 1.5, "load_average": [2.0]})
    assert "not idle: 1.5 cores" in warning


def test_the_peak_memory_is_that_of_a_process_of_its_own():
    ballast = np.ones(64 << 20)  # 512 MB, of which the child must not know
    process = machine.run_milpress(["--version"])
    assert 1 < process.peak_mb < ballast.nbytes / 1e6


def test_a_command_that_fails_is_no_measurement(tmp_path):
    with pytest.raises(RuntimeError, match="must succeed"):
        machine.run_milpress(["inspect", str(tmp_path / "none.mlpackage")])


DECODER = generate_package.Decoder(width=64, n_layers=2, vocabulary=96)


def test_a_generated_package_is_what_was_asked_for(tmp_path):
    path = generate_package.write_package(DECODER, tmp_path / "a.mlpackage")
    sizes = [np.prod(weight.shape) for weight in milpress.inspect(path).weights]
    assert sum(sizes) == DECODER.n_weights
    assert 2 * max(sizes) == DECODER.largest


def test_coremltools_reads_a_generated_package(tmp_path):
    path = generate_package.write_package(DECODER, tmp_path / "a.mlpackage")
    model = ct.models.MLModel(str(path), skip_model_load=True)
    # coremltools adds the biases that the linear ops lack.
    weights = cto.get_weights_metadata(model, weight_threshold=DECODER.width**2)
    users = [op.op_type for weight in weights.values() for op in weight.child_ops]
    assert users == ["gather"] + ["linear"] * 6 * DECODER.n_layers
    assert sum(weight.val.size for weight in weights.values()) == DECODER.n_weights


def test_a_package_is_generated_alike_each_time(tmp_path):
    paths = [generate_package.write_package(DECODER, tmp_path / f"{i}.mlpackage") for i in range(2)]
    first, second = (
        {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}
        for path in paths
    )
    assert first == second


def test_no_other_number_of_layers_comes_nearer_to_the_size():
    decoder = generate_package.Decoder.of_megabytes(50, width=256, vocabulary=1000)
    off = [
        abs(2 * dataclasses.replace(decoder, n_layers=decoder.n_layers + i).n_weights - 50e6)
        for i in (-1, 0, 1)
    ]
    assert off[1] == min(off)


def distinct(n_weights: int) -> np.ndarray:
    """Weights of distinct magnitudes, so that peers may break ties as they like."""
    rng = np.random.default_rng(0)
    magnitudes = np.arange(1, n_weights + 1).astype(np.uint16).view(np.float16)
    return rng.permutation(magnitudes) * rng.choice(np.float16([-1, 1]), n_weights)


@pytest.mark.parametrize("bits", kernels.WIDTHS)
def test_numpy_packs_alike(bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, 8 * 101, np.uint8)
    packed = kernels.numpy_pack(codes, bits)
    np.testing.assert_array_equal(_core.pack(codes, bits), packed)
    np.testing.assert_array_equal(kernels.numpy_unpack(packed, bits, codes.size), codes)


def test_numpy_quantizes_alike():
    rows = (np.random.default_rng(0).standard_normal((50, 32)) * 0.03).astype(np.float16)
    for code_max in (7, 127):
        codes, scale = kernels.numpy_quantize(rows, code_max)
        ours, scales, _ = _core.quantize(rows, -code_max, code_max, False)
        np.testing.assert_array_equal(ours, codes)
        np.testing.assert_array_equal(scales, scale[:, 0])


def test_numpy_sparsifies_alike():
    weights = distinct(4096)
    n_zeros = weights.size // 2
    threshold = float(np.sort(np.abs(weights))[n_zeros - 1])
    mask, nonzeros = kernels.numpy_sparsify(weights, threshold)
    np.testing.assert_array_equal(_core.keep_above(weights, threshold), mask)
    np.testing.assert_array_equal(_core.compact(weights, mask), nonzeros)
    np.testing.assert_array_equal(
        _core.keep_largest(weights, n_zeros), kernels.numpy_keep_largest(weights, n_zeros)
    )
    mask, nonzeros = kernels.numpy_two_of_four(weights)
    np.testing.assert_array_equal(_core.keep_n_m(weights, 64, 64, 1, 2, 4), mask)
    np.testing.assert_array_equal(_core.compact(weights, mask), nonzeros)


def test_the_squared_error_is_that_of_the_entries_named():
    weights = np.float16([[1, 2, 3], [4, 5, 7]])
    luts = np.float16([[1, 2], [4, 6]])
    codes = np.uint8([[0, 1, 1], [0, 0, 1]])
    assert kernels.squared_error(weights, luts, codes) == 0 + 0 + 1 + 0 + 1 + 1
