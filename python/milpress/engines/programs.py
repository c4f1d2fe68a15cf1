"""Programs of a package with the samples that suit them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from milpress.errors import InputError
from milpress.mil.package import Package
from milpress.samples.data import Data, Samples

if TYPE_CHECKING:
    from milpress.interpreter import Program


class SuitedProgram(NamedTuple):
    """A program with samples that suit it.

    Parameters
    ----------
    program, samples
        The program and its samples.
    prefixes
        Prefix of the names of its weights, by the prefix of the values of each of its models.
    """

    program: Program
    samples: Samples
    prefixes: dict[str, str]

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the program and the samples."""
        return (*self.program.notes, *self.samples.notes)


def suited_programs(package: Package, data: Data) -> Iterator[SuitedProgram]:
    """Yield each function that samples suit, with these; of a pipeline, the whole.

    Raises
    ------
    InputError
        If a sample suits none.
    """
    from milpress.interpreter import load

    names: list[str | None] = [None]
    if not package.programs[0].place:
        names = list(package.programs[0].functions)
    if isinstance(data, Iterator):
        data = tuple(data)
    refused: InputError | None = None
    unsuited: dict[str, InputError] | None = None
    for name in names:
        program = load(package, name)
        try:
            samples = Samples(data, program.inputs, skips_unsuited=len(names) > 1)
        except InputError as error:
            refused = refused or error
            continue
        before = samples.unsuited if unsuited is None else unsuited
        unsuited = {place: before[place] for place in before if place in samples.unsuited}
        yield SuitedProgram(program, samples, _prefixes(package, program))
    if unsuited is None and refused is not None:
        raise refused
    for reason in (unsuited or {}).values():
        raise reason


def _prefixes(package: Package, program: Program) -> dict[str, str]:
    prefixes = {}
    for graph in package.graphs:
        place = "".join(f"{part}/" for part in graph.place)
        if program.functions.get(place) == graph.function_name and graph.is_run:
            prefixes[place] = graph.prefix
    return prefixes
