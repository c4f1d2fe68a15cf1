"""Ranges of quantized activations where values are joined, infinite, or not there."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from command_line import failed, run
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from small_models import TARGETS, save

import milpress
from milpress import interpreter
from milpress.coreml import OpLinearQuantizerConfig, linear_quantize_activations
from milpress.mil import values
from milpress.mil.package import Package

TARGET = "iOS18"
SHAPE = (1, 4, 6, 6)


def program(**shapes: tuple[int, ...]) -> Any:
    specs = [mb.TensorSpec(shape=shape, dtype=types.fp16) for shape in shapes.values()]
    return mb.program(input_specs=specs, opset_version=TARGETS[TARGET])


def conv(x: Any, name: str, size: float = 1.0, n_out: int = 4, **settings: Any) -> Any:
    """A convolution of 1x1 whose outputs are about `size` times as large as its inputs."""
    rng = np.random.default_rng([n_out, x.shape[1]])
    weight = rng.standard_normal((n_out, x.shape[1], 1, 1)) * size / math.sqrt(x.shape[1])
    return mb.conv(x=x, weight=weight.astype(np.float16), name=name, **settings)


def weighed(x: Any, name: str, *sizes: float) -> Any:
    """A convolution that makes up for the sizes of groups of four channels, so that all count."""
    rng = np.random.default_rng(len(sizes))
    weight = rng.standard_normal((4, x.shape[1], 1, 1)) / np.repeat(sizes, 4)[:, None, None]
    return mb.conv(x=x, weight=weight.astype(np.float16), name=name)


def unet(ratio: float) -> Any:
    """A skip connection whose values are smaller than those it is concatenated with."""

    @program(x=SHAPE)
    def prog(x: Any) -> Any:
        skip = mb.relu(x=conv(x, "encoder"), name="skip")
        deep = mb.relu(x=conv(skip, "decoder", ratio), name="deep")
        return weighed(mb.concat(values=[deep, skip], axis=1, name="joined"), "y", ratio, 1)

    return prog


def samples(n: int = 3) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal(SHAPE).astype(np.float32)} for _ in range(n)]


class Made:
    """A program with quantized activations, beside the one it was made of."""

    def __init__(
        self, prog: Any, folder: Any, data: list[dict[str, Any]] | None = None, **settings: Any
    ) -> None:
        self.data = samples() if data is None else data
        self.source = save(prog, folder / "source.mlpackage", TARGET)
        self.out = folder / "out.mlpackage"
        config = OpLinearQuantizerConfig(**settings.pop("config", {}))
        self.report = linear_quantize_activations(
            self.source, config, self.data, destination=self.out, **settings
        ).activation_report
        milpress.verify(self.source, self.out)
        self.by_name = {each.name: each for each in self.report.activations}

    @property
    def left(self) -> set[str]:
        return {each.name for each in self.report.activations if each.note}

    @property
    def scales(self) -> dict[str, set[float]]:
        """The scales by which each value is quantized, in the package."""
        package = Package(self.out)
        found: dict[str, set[float]] = {}
        for graph in package.graphs:
            for node in graph.nodes:
                if node.op.type == "quantize":
                    (binding,) = node.op.inputs["input"].arguments
                    stored = values.read(graph.constant(node, "scale"), package).values
                    found.setdefault(binding.name, set()).add(float(stored))
        return found

    def decibels(self, name: str = "y") -> float:
        dense, coded = interpreter.load(self.source), interpreter.load(self.out)
        one = np.stack([dense(**sample)[name] for sample in self.data]).astype(np.float64)
        two = np.stack([coded(**sample)[name] for sample in self.data]).astype(np.float64)
        return float(10 * np.log10(np.square(one).sum() / np.square(one - two).sum()))


def greatest(made: Made, name: str) -> float:
    run_ = interpreter.load(made.source)
    found = [run_.run(sample, taps=[name]).taps[name] for sample in made.data]
    return float(np.abs(np.stack(found)).max())


@pytest.mark.parametrize("calibration", ["minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("mode", ["linear_symmetric", "linear"])
def test_a_small_part_of_a_concatenation_keeps_its_values(tmp_path, mode, calibration):
    made = Made(unet(200), tmp_path, config={"mode": mode}, calibration=calibration)
    assert made.left == {"joined"}
    assert "skip" in made.by_name["joined"].note
    (note,) = made.report.notes
    assert note.startswith("joined: ")
    assert "skip" in note
    assert made.report.shared == ()
    # A range holds what was seen of the skip connection alone, or less.
    n_steps = 255 if mode == "linear" else 127
    (scale,) = made.scales["skip"]
    assert scale <= greatest(made, "skip") / n_steps * (1 + 2**-10)
    # Each of at most three values on the way to the output has an error of half a step, where a
    # step is a 127th of the greatest value and that is no more than five times the deviation:
    # 127 / 5 * sqrt(12), or 39 dB. Ranges that clip lose no more than that once more.
    # That of least divergence does where there are so few values.
    if calibration != "entropy":
        assert made.decibels() > 39 - 10 * math.log10(3) - 6


def test_parts_of_one_size_share_a_range_which_is_listed(tmp_path):
    made = Made(unet(4), tmp_path)
    assert made.left == set()
    assert made.report.notes == ()
    (names,) = made.report.shared
    assert set(names) == {"joined", "deep", "skip"}
    assert len({scale for name in names for scale in made.scales[name]}) == 1
    data = made.report.to_dict()
    assert data["shared"] == [list(names)]
    assert f"one range: {', '.join(names)}" in text_of(made.report)


def text_of(report: Any) -> str:
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(report)
    return capture.get()


def halves(behind: Any = None) -> Any:
    """Two inputs that are concatenated, and a layer behind them or what is made of them."""

    @program(x=(1, 4), z=(1, 4))
    def prog(x: Any, z: Any) -> Any:
        joined = mb.concat(values=[x, z], axis=1, name="joined")
        taken = joined if behind is None else behind(joined)
        return mb.linear(x=taken, weight=np.eye(8, dtype=np.float16), name="y")

    return prog


@pytest.mark.parametrize(
    ("mode", "low", "high", "is_left"),
    [
        ("linear_symmetric", -1 / 15, 1 / 15, False),
        ("linear_symmetric", -1 / 16, 1 / 16, True),
        ("linear_symmetric", 0, -1 / 16, True),
        # Codes with a zero point divide the range from -1 to 1, not its greater half.
        ("linear", 0, 1 / 7, False),
        ("linear", 0, 1 / 8, True),
        ("linear_symmetric", 0, 1 / 8, False),
    ],
)
def test_a_part_is_small_from_a_sixteenth_on(tmp_path, mode, low, high, is_left):
    data = [{"x": np.float32([[1, -1, 0.5, 0]]), "z": np.float32([[low, high, 0, 0]])}]
    made = Made(halves(), tmp_path, data, config={"mode": mode})
    assert made.left == ({"joined"} if is_left else set())


def test_what_relu_leaves_of_a_part_counts_behind_it(tmp_path):
    data = [{"x": np.float32([[1, -1, 0.5, 0]]), "z": np.float32([[0.01, -1, 0.005, 0]])}]
    made = Made(halves(lambda joined: mb.relu(x=joined, name="behind")), tmp_path, data)
    assert made.left == {"behind"}
    assert made.report.notes == ()


def test_a_chain_is_parted_where_sizes_differ_and_nowhere_else(tmp_path):
    @program(x=SHAPE)
    def prog(x: Any) -> Any:
        a = mb.relu(x=conv(x, "c1"), name="a")
        b = mb.relu(x=conv(a, "c2"), name="b")
        ab = mb.concat(values=[a, b], axis=1, name="ab")
        c = mb.relu(x=conv(ab, "c3", 100), name="c")
        abc = mb.concat(values=[ab, c], axis=1, name="abc")
        d = mb.relu(x=weighed(abc, "c4", 1, 1, 100), name="d")
        # What abc has lost is not made good by joining it with something else.
        e = mb.concat(values=[abc, mb.mul(x=d, y=np.float16(40))], axis=1, name="e")
        return weighed(e, "y", 1, 1, 100, 100)

    made = Made(prog, tmp_path)
    assert made.left == {"abc", "e"}
    shared = [set(names) for names in made.report.shared]
    assert shared == [{"a", "b", "ab"}]
    assert len(made.scales["a"] | made.scales["b"] | made.scales["ab"]) == 1
    assert made.decibels() > 25  # five values on the way, 39 dB each


def test_a_range_that_grows_along_a_chain_is_cut_where_it_is_too_wide(tmp_path):
    @program(x=SHAPE)
    def prog(x: Any) -> Any:
        a = mb.relu(x=conv(x, "c1", 1), name="a")
        b = mb.relu(x=conv(x, "c2", 6), name="b")
        c = mb.relu(x=conv(x, "c3", 36), name="c")
        ab = mb.concat(values=[a, b], axis=1, name="ab")
        bc = mb.concat(values=[b, c], axis=1, name="bc")
        return mb.add(x=weighed(ab, "y1", 1, 6), y=weighed(bc, "y2", 6, 36), name="y")

    made = Made(prog, tmp_path)
    assert made.left == set()
    shared = [set(names) for names in made.report.shared]
    assert shared == [{"b", "c", "bc"}]
    assert made.scales["a"] != made.scales["ab"] != made.scales["bc"]
    (note,) = made.report.notes
    assert note.startswith("ab: ")


BEHIND = {
    "relu": lambda x: mb.relu(x=x, name="behind"),
    "max_pool": lambda x: mb.max_pool(
        x=x, kernel_sizes=[1, 1], strides=[1, 1], pad_type="valid", name="behind"
    ),
    "transposed twice": lambda x: mb.transpose(
        x=mb.transpose(x=x, perm=[0, 1, 3, 2]), perm=[0, 1, 3, 2], name="behind"
    ),
    "upsampled": lambda x: mb.upsample_nearest_neighbor(
        x=x, scale_factor_height=2, scale_factor_width=2, name="behind"
    ),
}


@pytest.mark.parametrize("behind", BEHIND)
def test_what_an_op_makes_of_joined_values_is_left_too(tmp_path, behind):
    @program(x=SHAPE)
    def prog(x: Any) -> Any:
        skip = conv(x, "skip")
        deep = conv(skip, "deep", 200)
        joined = mb.concat(values=[deep, skip], axis=1, name="joined")
        return weighed(BEHIND[behind](joined), "y", 200, 1)

    made = Made(prog, tmp_path)
    assert "behind" in made.left
    assert made.decibels() > 30  # three values on the way, 39 dB each


def test_stacked_values_share_no_range_and_are_not_lost(tmp_path):
    @program(x=SHAPE)
    def prog(x: Any) -> Any:
        skip = conv(x, "skip")
        deep = conv(skip, "deep", 200)
        stacked = mb.stack(values=[deep, skip], axis=1, name="stacked")
        flat = mb.reshape(x=stacked, shape=[1, 8, 6, 6], name="flat")
        return weighed(flat, "y", 200, 1)

    made = Made(prog, tmp_path)
    assert made.left == {"flat"}
    assert made.report.shared == ()


def test_only_concatenation_shares_ranges(tmp_path):
    @program(x=(1, 4), z=(1, 4))
    def prog(x: Any, z: Any) -> Any:
        a = mb.linear(x=x, weight=np.eye(4, dtype=np.float16), name="a")
        b = mb.linear(x=z, weight=np.eye(4, dtype=np.float16), name="b")
        stacked = mb.stack(values=[a, b], axis=0, name="stacked")
        return mb.linear(x=stacked, weight=np.eye(4, dtype=np.float16), name="y")

    data = [{"x": np.float32([[1, -1, 0.5, 0]]), "z": np.float32([[0.5, -0.5, 0.25, 0]])}]
    made = Made(prog, tmp_path, data)
    assert made.left == set()
    assert made.report.shared == ()
    assert made.scales["a"] != made.scales["b"]


def test_a_small_constant_that_is_joined_is_not_lost(tmp_path):
    @program(x=SHAPE)
    def prog(x: Any) -> Any:
        places = mb.const(
            val=np.linspace(-0.01, 0.01, 144).astype(np.float16).reshape(SHAPE), name="places"
        )
        joined = mb.concat(values=[conv(x, "c"), places], axis=1, name="joined")
        return weighed(joined, "y", 1, 0.01)

    made = Made(prog, tmp_path)
    assert made.left == {"joined"}
    assert "places" in made.by_name["joined"].note
    assert made.decibels() > 30


def test_infinities_of_a_constant_make_no_part_small(tmp_path):
    @program(x=(1, 4))
    def prog(x: Any) -> Any:
        mask = mb.const(val=np.float16([[-np.inf, 1, 0.5, 0]]), name="mask")
        a = mb.linear(x=x, weight=np.eye(4, dtype=np.float16), name="a")
        p = mb.softmax(x=mb.concat(values=[a, mask], axis=1, name="joined"), axis=-1, name="p")
        b = mb.linear(x=a, weight=np.eye(4, dtype=np.float16), name="b")
        return mb.concat(values=[p, b], axis=1, name="y")

    made = Made(prog, tmp_path, [{"x": np.float32([[1, -1, 0.5, 0]])}])
    assert made.left == set()
    assert made.report.notes == ()


def test_zeros_have_a_code_in_whatever_range(tmp_path):
    @program(x=SHAPE)
    def prog(x: Any) -> Any:
        nothing = mb.relu(x=conv(mb.mul(x=x, y=np.float16(0)), "c"), name="nothing")
        values_ = mb.relu(x=conv(x, "d", 100), name="some")
        joined = mb.concat(values=[values_, nothing], axis=1, name="joined")
        return weighed(joined, "y", 100, 1)

    made = Made(prog, tmp_path)
    assert made.left == set()
    assert any({"some", "nothing", "joined"} == set(names) for names in made.report.shared)


def test_a_concatenation_inside_a_branch_is_parted_too(tmp_path):
    @program(x=SHAPE, flag=(1,))
    def prog(x: Any, flag: Any) -> Any:
        skip = mb.relu(x=conv(x, "encoder"), name="skip")

        def joined() -> Any:
            deep = mb.relu(x=conv(skip, "decoder", 100), name="deep")
            return weighed(mb.concat(values=[deep, skip], axis=1, name="joined"), "inner", 100, 1)

        pred = mb.squeeze(x=mb.cast(x=flag, dtype="bool"))
        return mb.cond(pred=pred, _true_fn=joined, _false_fn=lambda: conv(x, "other"), name="y")

    data = [{**sample, "flag": [flag]} for sample, flag in zip(samples(), (1, 0, 1), strict=True)]
    made = Made(prog, tmp_path, data)
    assert made.left == {"joined"}
    assert made.scales["skip"] != made.scales["deep"]


def test_a_part_that_no_sample_computes_has_the_range_that_it_shares(tmp_path):
    # Of a concatenation in a branch not taken nothing is known; of one outside, something is.
    @program(x=SHAPE, flag=(1,))
    def prog(x: Any, flag: Any) -> Any:
        a = mb.relu(x=conv(x, "c1"), name="a")

        def never() -> Any:
            b = mb.relu(x=conv(a, "c2"), name="b")
            return conv(mb.concat(values=[a, b], axis=1, name="ab"), "inner")

        pred = mb.squeeze(x=mb.cast(x=flag, dtype="bool"))
        return mb.cond(pred=pred, _true_fn=never, _false_fn=lambda: conv(a, "other"), name="y")

    made = Made(prog, tmp_path, [{**sample, "flag": [0]} for sample in samples()])
    assert made.left == set()
    assert made.scales["a"] == made.scales["b"] == made.scales["ab"]
    late = {note.partition(":")[0] for note in made.report.notes}
    assert late == {"b", "ab"}


def attention(hidden: float) -> tuple[Any, list[dict[str, Any]]]:
    """Scores to which a mask is added, as attention does."""

    @program(x=(3, 8), mask=(3, 3))
    def prog(x: Any, mask: Any) -> Any:
        q = mb.linear(x=x, weight=np.eye(8, dtype=np.float16), name="q")
        scores = mb.matmul(x=q, y=x, transpose_y=True, name="scores")
        p = mb.softmax(x=mb.add(x=scores, y=mask, name="masked"), axis=-1, name="p")
        return mb.matmul(x=p, y=x, name="y")

    mask = np.triu(np.full((3, 3), hidden, np.float32), 1)
    rng = np.random.default_rng(0)
    return prog, [{"x": rng.standard_normal((3, 8)).astype(np.float32), "mask": mask}]


def test_infinities_of_a_mask_are_kept(tmp_path):
    made = Made(*attention_at(tmp_path, -np.inf))
    assert made.left == {"mask", "masked"}
    assert "infinity" in made.by_name["mask"].note
    run_ = interpreter.load(made.out)
    p = run_.run(made.data[0], taps=["p"]).taps["p"]
    np.testing.assert_array_equal(p[np.triu_indices(3, 1)], 0)
    assert made.decibels() > 30


def attention_at(folder: Any, hidden: float) -> tuple[Any, Any, list[dict[str, Any]]]:
    prog, data = attention(hidden)
    return prog, folder, data


def test_what_is_no_number_is_left_and_named(tmp_path):
    @program(x=SHAPE, z=SHAPE)
    def prog(x: Any, z: Any) -> Any:
        return mb.add(x=conv(x, "a"), y=conv(z, "b"), name="y")

    data = [{**sample, "z": sample["x"].copy()} for sample in samples()]
    data[1]["z"][0, 0, 0, 0] = np.nan
    made = Made(prog, tmp_path, data)
    assert made.left == {"z", "b"}
    assert "NaN" in made.by_name["z"].note
    json.loads(json.dumps(made.report.to_dict(), allow_nan=False))


def test_a_model_of_which_no_value_can_be_quantized_says_why(tmp_path):
    @program(x=SHAPE)
    def prog(x: Any) -> Any:
        return conv(x, "y")

    source = save(prog, tmp_path / "source.mlpackage", TARGET)
    np.savez(tmp_path / "data.npz", x=np.full((2, *SHAPE), np.nan, np.float32))
    line = failed(
        *["compress", source, tmp_path / "out.mlpackage", "--quantize-activations", "int8"],
        *["--calibration-data", tmp_path / "data.npz"],
    )
    assert "x: a sample gave it NaN" in line
    assert not (tmp_path / "out.mlpackage").exists()


def branches(path: Any) -> Any:
    @program(x=(1, 16))
    def prog(x: Any) -> Any:
        weight = np.eye(16, dtype=np.float16)
        total = mb.reduce_sum(x=mb.square(x=x), axes=[0, 1], keep_dims=False)
        return mb.cond(
            pred=mb.greater(x=total, y=np.float16(0)),
            _true_fn=lambda: mb.linear(x=x, weight=weight, name="taken"),
            _false_fn=lambda: mb.linear(x=mb.relu(x=x, name="never"), weight=weight, name="no"),
        )

    return save(prog, path, TARGET)


def test_the_json_of_a_branch_that_never_ran_is_json_and_makes_a_page(tmp_path):
    source, out = branches(tmp_path / "source.mlpackage"), tmp_path / "out.mlpackage"
    np.savez(tmp_path / "data.npz", x=np.ones((2, 1, 16), np.float32))
    printed = run(
        *["compress", source, out, "--quantize-activations", "int8", "--json"],
        *["--calibration-data", tmp_path / "data.npz"],
    ).stdout

    def refuse(constant: str) -> Any:
        raise AssertionError(constant)

    report = json.loads(printed, parse_constant=refuse)
    left = {each["name"]: each for each in report["activations"]["activations"] if each["note"]}
    assert {*left} == {"never"}
    assert left["never"]["note"] == "no sample gave it a finite value"
    assert [left["never"][key] for key in ("scale", "low", "high")] == [None] * 3
    (tmp_path / "report.json").write_text(printed)
    page = tmp_path / "page.html"
    run("report", tmp_path / "report.json", "-o", page)
    assert page.stat().st_size
    table = run(
        *["compress", source, out, "--quantize-activations", "int8", "--force"],
        *["--calibration-data", tmp_path / "data.npz"],
    ).stdout
    assert "no sample gave it a finite value" in table
    assert "nan" not in table.lower()
