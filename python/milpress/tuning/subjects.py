"""The functions of a package that samples suit, beside those of the original."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from milpress.engines.programs import SuitedProgram, suited_programs
from milpress.errors import ConfigError, InputError, UnsupportedError
from milpress.mil.package import Package
from milpress.mil.program import ProgramGraph
from milpress.samples.data import Data, Samples
from milpress.tuning.config import Loss, TuneConfig

if TYPE_CHECKING:
    from milpress.interpreter import Program
    from milpress.interpreter.distillation import Distance, OutputScale

# What hands numbers on: behind it, logits are still logits.
_PASSING = ("cast", "reshape", "squeeze", "expand_dims", "transpose", "identity", "add", "softmax")
_PRODUCTS = ("linear", "matmul", "conv")
_LEAST_LOGITS = 33
DEFAULT_MASK = "attention_mask"


class Subject(NamedTuple):
    """A function of both packages, and the samples that suit it.

    Parameters
    ----------
    original, compressed
        The programs.
    samples, validation
        What is learned from; what is set aside, if that is given by itself.
    name
        What stands before the names of its outputs.
    """

    original: Program
    compressed: Program
    samples: Samples
    validation: Samples | None
    name: str

    def path(self, graph: ProgramGraph, weight: str) -> str | None:
        """Return the name of a weight among the program's; ``None`` if it is not run here."""
        place = "".join(f"{part}/" for part in graph.place)
        is_here = self.compressed.functions.get(place) == graph.function_name and graph.is_run
        return place + weight if is_here else None


def find_subjects(
    original: Package, compressed: Package, data: Data, validation: Data | None
) -> list[Subject]:
    """Return the functions that samples suit.

    Raises
    ------
    InputError
        If a sample suits none.
    """
    from milpress.interpreter import load

    data = tuple(data) if isinstance(data, Iterator) else data
    suited = list(suited_programs(compressed, data))
    aside: dict[str, SuitedProgram] = {}
    if validation is not None:
        aside = {_function(each.program): each for each in suited_programs(compressed, validation)}
    subjects = []
    for each in suited:
        name = _function(each.program)
        if validation is not None and name not in aside:
            msg = f"the samples for validation must suit function {name!r} too, as the others do"
            raise InputError(msg)
        twin = load(original, name or None)
        samples = aside[name].samples if aside else None
        shown = f"{name}/" if len(suited) > 1 else ""
        subjects.append(Subject(twin, each.program, each.samples, samples, shown))
    return subjects


def _function(program: Program) -> str:
    """Return the name of a program's function; empty for a pipeline."""
    return program.functions.get("", "")


def mask_of(subjects: Sequence[Subject], mask: str | None) -> str | None:
    """Return the name of the input that tells padding.

    Raises
    ------
    ConfigError
        If there is no input of the name that is asked for.
    """
    names = sorted({each.name for subject in subjects for each in subject.compressed.inputs})
    if mask is not None and mask not in names:
        msg = f"mask must be one of the inputs {', '.join(names)}, got {mask!r}"
        raise ConfigError(msg)
    return mask or (DEFAULT_MASK if DEFAULT_MASK in names else None)


def chosen_outputs(subjects: Sequence[Subject], wanted: Sequence[str]) -> list[list[str]]:
    """Return the outputs of each subject that are compared.

    Raises
    ------
    ConfigError
        If there is none of a name, or it holds no floats.
    UnsupportedError
        If no output holds floats.
    """
    described = [subject.compressed.before_suppression().outputs for subject in subjects]
    floats = [
        [each.name for each in features if each.kind == "dictionary" or _is_float(each.dtype)]
        for features in described
    ]
    known = sorted({name for names in floats for name in names})
    for name in wanted:
        if name not in known:
            what = ", ".join(known) or "none"
            msg = f"outputs must be among those that hold floats, {what}, got {name!r}"
            raise ConfigError(msg)
    if not known:
        msg = "no output holds floats that could be compared; tune needs one, such as the logits"
        raise UnsupportedError(msg)
    return [[name for name in names if not wanted or name in wanted] for names in floats]


def _is_float(dtype: str) -> bool:
    return dtype.startswith("float")


class Split(NamedTuple):
    """Which samples are learned from and which are set aside: of which subject, and the place.

    Places count all samples: of each subject in turn, first its own, then those for validation.
    """

    learned: list[tuple[int, int]]
    aside: list[tuple[int, int]]

    @property
    def n(self) -> int:
        """How many there are."""
        return len(self.learned) + len(self.aside)


def split(subjects: Sequence[Subject], config: TuneConfig) -> Split:
    """Set samples of each subject aside.

    Raises
    ------
    InputError
        If there are too few.
    """
    learned: list[tuple[int, int]] = []
    aside: list[tuple[int, int]] = []
    first = 0
    for i, subject in enumerate(subjects):
        n = len(subject.samples)
        n_given = 0 if subject.validation is None else len(subject.validation)
        chosen = set(range(n, n + n_given))
        if not chosen:
            if n < 2:
                msg = "there must be at least 2 samples, one of which is set aside; got 1"
                raise InputError(msg)
            n_aside = min(max(1, round(n * config.validation_share)), n - 1)
            order = np.random.default_rng([config.seed, 0, i]).permutation(n)
            chosen = set(order[:n_aside].tolist())
        for k in range(n + n_given):
            (aside if k in chosen else learned).append((i, first + k))
        first += n + n_given
    return Split(learned, aside)


def distance_of(
    subject: Subject, package: Package, output: str, loss: Loss, scale: OutputScale
) -> Distance:
    """Return how an output is compared, of which samples have told the scale."""
    if loss == "mse" or scale.n_columns < 2:
        return "mse"
    if scale.are_probabilities:
        return "kl of probabilities"
    if loss == "kl":
        return "kl"
    is_wide = scale.n_columns >= _LEAST_LOGITS
    return "kl" if is_wide and _are_logits(subject, package, output) else "mse"


def _are_logits(subject: Subject, package: Package, output: str) -> bool:
    """Whether an output is what a product by a stored weight gives, perhaps with a sum behind."""
    for graph in _graphs_of(subject, package):
        node = next((n for n in graph.nodes if output in [o.name for o in n.op.outputs]), None)
        while node is not None and node.op.type in _PASSING:
            made = [graph.producer(node, name) for name in ("x", "y") if node.binding(name)]
            computed = [each[0] for each in made if each is not None and not each[0].is_stored]
            node = computed[0] if len(computed) == 1 else None
        if node is not None and node.op.type in _PRODUCTS:
            producers = [graph.producer(node, name) for name in ("weight", "x", "y")]
            return any(each is not None and each[0].is_stored for each in producers)
    return False


def _graphs_of(subject: Subject, package: Package) -> Iterator[ProgramGraph]:
    for graph in package.graphs:
        if subject.path(graph, "") == "":
            yield graph
