"""Pictures as samples and inputs: read, turned, resized, and refused by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import pytest
import torch
from command_line import failed, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import milpress
from milpress.errors import DependencyError, InputError, PackageNotFoundError
from milpress.interpreter import Feature, load
from milpress.samples.data import Samples
from milpress.samples.pictures import Picture


def image(layout: Any = "RGB", height: int = 6, width: int = 8, **limits: Any) -> Feature:
    n_channels = 3 if layout in ("RGB", "BGR") else 1
    shape = (1, n_channels, height, width)
    return Feature(
        name="image", kind="image", dtype="float32", shape=shape, layout=layout, **limits
    )


def pixels(height: int = 6, width: int = 8, *channels: int) -> np.ndarray:
    rng = np.random.default_rng([height, width, *channels])
    return rng.integers(0, 256, (height, width, *channels)).astype(np.uint8)


def save(path: Path, array: np.ndarray, **extra: Any) -> Path:
    Image.fromarray(array).save(path, **extra)
    return path


def only(samples: Samples) -> np.ndarray:
    (sample,) = samples
    return sample["image"]


@pytest.mark.parametrize("layout", ["RGB", "BGR"])
def test_colors_are_red_green_and_blue_whatever_layout_the_model_wants(tmp_path, layout):
    array = pixels(6, 8, 3)
    samples = Samples(save(tmp_path / "a.png", array), [image(layout)])
    np.testing.assert_array_equal(only(samples), array)
    assert samples.notes == ()


@pytest.mark.parametrize("layout", ["gray", "gray float16"])
def test_a_gray_picture_is_rows_and_columns(tmp_path, layout):
    array = pixels()
    found = only(Samples(save(tmp_path / "a.png", array), [image(layout)]))
    np.testing.assert_array_equal(found, array)
    assert found.dtype == (np.float32 if layout == "gray float16" else np.uint8)
    colored = only(Samples(save(tmp_path / "a.png", array), [image("RGB")]))
    np.testing.assert_array_equal(colored, np.repeat(array[..., None], 3, 2))


def test_sixteen_bits_are_brought_down_to_eight_not_cut_off(tmp_path):
    array = np.linspace(0, 65535, 48).reshape(6, 8).astype(np.uint16)
    path = save(tmp_path / "a.png", array)
    for layout, expected in (
        ("gray", (array / 257).round()),
        ("gray float16", np.float32(array / 257)),
        ("RGB", np.repeat((array / 257).round()[..., None], 3, 2)),
    ):
        # One rounding to float32 of numbers up to 255.
        np.testing.assert_allclose(only(Samples(path, [image(layout)])), expected, atol=2.0**-16)


def test_transparency_palettes_and_other_colors_are_taken_off(tmp_path):
    array = pixels(6, 8, 4)
    path = save(tmp_path / "a.png", array)
    np.testing.assert_array_equal(only(Samples(path, [image()])), array[..., :3])
    few = Image.fromarray(array[..., :3]).convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    few.save(tmp_path / "b.png")
    found = only(Samples(tmp_path / "b.png", [image()]))
    np.testing.assert_array_equal(found, np.asarray(few.convert("RGB")))
    Image.new("CMYK", (8, 6), (0, 255, 255, 0)).save(tmp_path / "c.jpg")
    red = only(Samples(tmp_path / "c.jpg", [image()]))
    assert red.shape == (6, 8, 3)
    assert (red[..., 0] > 200).all()
    assert (red[..., 1:] < 60).all()


def test_a_photo_is_turned_as_the_camera_was_held(tmp_path):
    array = pixels(8, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the right side is up
    path = save(tmp_path / "a.png", array, exif=exif)
    samples = Samples(path, [image()])
    np.testing.assert_array_equal(only(samples), np.rot90(array, -1))
    assert samples.notes == ()


def test_pictures_of_another_size_are_resized_and_that_is_said(tmp_path):
    save(tmp_path / "a.png", np.full((12, 20, 3), 7, np.uint8))
    save(tmp_path / "b.png", pixels(6, 8, 3))
    save(tmp_path / "c.JPG", np.full((3, 3), 200, np.uint8))
    samples = Samples(tmp_path, [image()])
    first, second, third = (one["image"] for one in samples)
    np.testing.assert_array_equal(first, np.full((6, 8, 3), 7))
    np.testing.assert_array_equal(second, pixels(6, 8, 3))
    assert third.shape == (6, 8, 3)
    assert samples.notes == (
        "2 of 3 pictures were resized, a.png from 12x20 to 6x8 (height x width)",
    )
    assert len(samples) == 3
    assert samples.digest() == Samples(tmp_path, [image()]).digest()


@pytest.mark.parametrize(
    ("limits", "size", "expected"),
    [
        ({"shapes": ((1, 3, 4, 4), (1, 3, 8, 16))}, (8, 16), (8, 16)),
        ({"shapes": ((1, 3, 4, 4), (1, 3, 8, 16))}, (9, 14), (8, 16)),
        ({"shapes": ((1, 3, 4, 4), (1, 3, 8, 16))}, (2, 2), (4, 4)),
        ({"bounds": ((1, 1), (3, 3), (4, 10), (4, 10))}, (5, 9), (5, 9)),
        ({"bounds": ((1, 1), (3, 3), (4, 10), (4, 10))}, (10, 20), (5, 10)),
        ({"bounds": ((1, 1), (3, 3), (4, 10), (4, 10))}, (2, 3), (4, 6)),
        ({"bounds": ((1, 1), (3, 3), (4, 10), (4, 10))}, (10, 100), (4, 10)),
        ({"bounds": ((1, 1), (3, 3), (4, None), (4, None))}, (2, 100), (4, 200)),
    ],
)
def test_a_size_is_one_that_the_input_allows(tmp_path, limits, size, expected):
    feature = image(**limits)
    path = save(tmp_path / "a.png", np.zeros((*size, 3), np.uint8))
    assert only(Samples(path, [feature])).shape == (*expected, 3)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    limits=st.tuples(*(st.tuples(st.integers(1, 20), st.integers(0, 20)) for _ in range(2))),
)
def test_every_picture_gets_a_size_within_the_bounds(tmp_path_factory, size, limits):
    bounds = ((1, 1), (3, 3), *((low, low + more) for low, more in limits))
    path = tmp_path_factory.getbasetemp() / "any.png"
    save(path, np.zeros((*size, 3), np.uint8))
    shape = Picture(path, image(bounds=bounds)).shape
    assert image(bounds=bounds).admits((1, 3, *shape[:2]))


# Folders


def number(name: str, **extra: Any) -> Feature:
    return Feature(name=name, kind="array", dtype="float32", shape=(1, 2), **extra)


def test_files_are_named_after_the_inputs_if_several_must_be_given(tmp_path):
    array, values = pixels(6, 8, 3), np.ones((1, 2), np.float32)
    save(tmp_path / "image.png", array)
    np.save(tmp_path / "x.npy", values)
    (sample,) = Samples(tmp_path, [image(), number("x")])
    np.testing.assert_array_equal(sample["image"], array)
    np.testing.assert_array_equal(sample["x"], values)
    save(tmp_path / "image.jpg", array)
    with pytest.raises(InputError, match=r"several files for input 'image', such as image\.png"):
        Samples(tmp_path, [image(), number("x")])


def test_pictures_have_any_name_if_only_one_input_must_be_given(tmp_path):
    for name in ("a.png", "b.png", "._a.png"):
        (tmp_path / name).write_bytes(b"")
    for name in ("a", "b"):
        save(tmp_path / f"{name}.png", pixels(6, 8, 3))
    (tmp_path / "notes.txt").write_text("of a camera")
    samples = Samples(tmp_path, [image(), number("least", default=0.5)])
    assert [one.keys() for one in samples] == [{"image"}] * 2


def test_paths_may_be_among_arrays(tmp_path):
    path = save(tmp_path / "a.png", pixels(6, 8, 3))
    for given_as in (path, str(path)):
        (sample,) = Samples([{"image": given_as}], [image()])
        np.testing.assert_array_equal(sample["image"], pixels(6, 8, 3))
    with pytest.raises(PackageNotFoundError, match=r"b\.png: no such picture"):
        Samples([{"image": str(tmp_path / "b.png")}], [image()])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": b"no picture"}, r"a\.png: not a PNG or JPEG picture that can be read"),
        (
            {"a.png": b"\x89PNG\r\n\x1a\n" + bytes(40)},
            r"a\.png: not a PNG or JPEG picture that can be read",
        ),
        ({"a.png": b"", "b.npz": b""}, r"must be pictures or arrays, got b\.npz beside a\.png"),
        ({"a.png": b"", "b.npy": b""}, r"must be pictures or arrays, got b\.npy beside a\.png"),
        ({"a.heic": b""}, r"a\.heic: a picture must be a \.png, \.jpg or \.jpeg file, got \.heic"),
        ({}, r"no samples in it; samples are \.npz or \.npy files, or pictures"),
        ({"a.txt": b""}, r"no samples in it, but a\.txt; samples are"),
        ({"cats/": b""}, r"no samples in it, but the folder cats; samples are"),
    ],
)
def test_what_can_not_be_read_is_named(tmp_path, files, message):
    for name, data in files.items():
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        list(Samples(tmp_path, [image()]))


def test_a_picture_that_is_cut_off_is_named(tmp_path):
    for name in ("a.png", "b.jpg"):
        path = save(tmp_path / name, pixels(64, 64, 3))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(InputError, match=f"{name}: not a PNG or JPEG picture that can be read"):
            list(Samples(path, [image(height=64, width=64)]))


def test_pictures_are_for_images_alone(tmp_path):
    path = save(tmp_path / "a.png", pixels(6, 8, 3))
    with pytest.raises(InputError, match=r"a\.png: .* got 'x', which is an array 1x2 of float32"):
        Samples(tmp_path, [number("x")])
    # Beside arrays they may show what is in these.
    np.save(tmp_path / "x.npy", np.ones((1, 2), np.float32))
    assert len(Samples(tmp_path, [number("x")])) == 1
    with pytest.raises(InputError, match="must be for an input that is an image"):
        Samples([{"x": path}], [number("x")])


def test_without_pillow_it_is_said_how_to_install_it(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", pixels(6, 8, 3))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        DependencyError, match=r"a\.png: reading pictures \(\.png, \.jpg, \.jpeg\) needs Pillow"
    ):
        Samples(path, [image()])


# Models


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A convolution over pictures of 6 x 8, blue first."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU()).eval()
    shape = (1, 3, 6, 8)
    made = ct.convert(
        torch.jit.trace(module, torch.zeros(shape)),
        inputs=[ct.ImageType("image", shape, color_layout="BGR", scale=1 / 255)],
        outputs=[ct.TensorType("y")],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    path = tmp_path_factory.mktemp("pictures") / "m.mlpackage"
    made.save(str(path))
    return path


def test_a_picture_runs_as_its_pixels_do(model, tmp_path):
    path = save(tmp_path / "a.png", pixels(6, 8, 3))
    expected = load(model)(image=pixels(6, 8, 3))["y"]
    for given_as in (path, str(path)):
        report = milpress.run(model, {"image": given_as})
        np.testing.assert_array_equal(report.outputs[0].value, expected)
        assert report.notes == ()
    np.save(tmp_path / "a.npy", pixels(6, 8, 3))
    plain, shown = (
        run("run", model, "--input", f"image={tmp_path / name}", "--json").stdout
        for name in ("a.npy", "a.png")
    )
    assert plain.partition('"outputs"')[2] == shown.partition('"outputs"')[2]


def test_activations_are_quantized_by_paths_of_pictures(model, tmp_path):
    path = save(tmp_path / "a.png", pixels(6, 8, 3))
    config = milpress.coreml.OptimizationConfig(
        global_config=milpress.coreml.OpLinearQuantizerConfig(mode="linear_symmetric")
    )
    made = [
        milpress.coreml.linear_quantize_activations(model, config, [{"image": given_as}])
        for given_as in (str(path), pixels(6, 8, 3))
    ]
    shown, plain = (one.get_spec().SerializeToString(deterministic=True) for one in made)
    assert shown == plain


def test_the_command_line_says_what_it_did_to_pictures(model, tmp_path):
    path = save(tmp_path / "a.jpg", pixels(60, 80, 3))
    shown = run("run", model, "--input", f"image={path}").stdout
    assert "a.jpg was resized from 60x80 to 6x8 (height x width)" in shown
    note = "1 of 2 pictures were resized, a.jpg from 60x80 to 6x8"
    save(tmp_path / "b.png", pixels(6, 8, 3))
    out = tmp_path / "out.mlpackage"
    options = ["--weight-threshold", 99, "--calibration-data", tmp_path]
    assert note in run("compress", model, out, "--palettize", 4, *options).stdout
    assert note in run("evaluate", model, out, "--data", tmp_path).stdout
    assert note in run("plan", model, "--target-bits", 6, *options, "--no-cache").stdout
    quantized = run(
        "compress", model, out, "--quantize-activations", "int8", *options[2:], "--force"
    )
    assert note in quantized.stdout
    for given_as, message in (
        (f"image={tmp_path / 'c.webp'}", "a picture must be a .png, .jpg or .jpeg file"),
        (f"image={tmp_path / 'c.png'}", "c.png: no such picture"),
        (path, "--input must be NAME=FILE.npy, NAME=PICTURE or FILE.npz"),
    ):
        assert message in failed("run", model, "--input", given_as)
