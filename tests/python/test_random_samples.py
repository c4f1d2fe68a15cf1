"""Random inputs: integers that tables have rows for, noise that looks like photographs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb  # noqa: N813
from coremltools.converters.mil.mil import types
from small_models import TARGETS, save, weight

import milpress
from milpress.interpreter import load
from milpress.mil.features import Feature
from milpress.samples.data import RandomSamples, Samples


def test_indices_name_rows_of_the_smallest_table_and_masks_let_everything_through(tmp_path):
    @mb.program(
        input_specs=[
            mb.TensorSpec(shape=(1, 64), dtype=types.int32),
            mb.TensorSpec(shape=(1, 64), dtype=types.int32),
        ],
        opset_version=TARGETS["iOS18"],
    )
    def prog(ids: Any, mask: Any) -> Any:
        ahead = mb.add(x=ids, y=np.int32(0))
        words = mb.gather(x=weight(300, 16), indices=mb.expand_dims(x=ahead, axes=[0]), axis=0)
        kinds = mb.gather(x=weight(16, 120, seed=1), indices=ids, axis=1)
        return mb.mul(
            x=mb.reduce_sum(x=words),
            y=mb.mul(x=mb.cast(x=mask, dtype="fp16"), y=mb.reduce_sum(x=kinds)),
        )

    program = load(save(prog, tmp_path / "m.mlpackage", "iOS18"))
    assert {one.name: one.n_rows for one in program.inputs} == {"ids": 120, "mask": None}
    drawn = list(Samples(RandomSamples(8), program.inputs))
    ids = np.concatenate([one["ids"] for one in drawn])
    assert ids.min() >= 0
    assert 100 < ids.max() < 120
    assert all((one["mask"] == 1).all() for one in drawn)
    assert np.isfinite(next(iter(program(**drawn[0]).values()))).all()


@pytest.mark.parametrize("kind", ["array", "image"])
def test_pictures_are_mostly_large_structures(kind):
    feature = Feature(
        name="x", kind=kind, dtype="float32", shape=(1, 3, 64, 48), layout="RGB" * (kind == "image")
    )
    (sample,) = Samples(milpress.RandomSamples(1), [feature])
    x = np.float64(sample["x"])
    assert x.shape == (1, 3, 64, 48)
    if kind == "image":
        assert x.min() >= 0
        assert x.max() <= 255
        assert abs(x.mean() - 128) < 10
        x = (x - 128) / 64
    assert x.std() == pytest.approx(1, abs=0.1)
    # Neighbours are alike, as in photographs: of white noise they would not be.
    assert np.mean(x[..., 1:] * x[..., :-1]) > 0.6
    again = next(iter(Samples(milpress.RandomSamples(1), [feature])))["x"]
    np.testing.assert_array_equal(again, sample["x"])
