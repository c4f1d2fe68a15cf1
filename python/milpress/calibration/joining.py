"""Ranges along concatenations: shared, unless a small part would be lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from milpress.formats import QuantizeConfig
from milpress.formats.ranges import Range
from milpress.mil import joins
from milpress.mil.graph import Node, Value
from milpress.mil.joins import Join, Piece
from milpress.mil.program import ProgramGraph

# A part so many times smaller than the range that it shares has 7 codes for each sign, or fewer.
LEAST_RATIO = 16


class Small(NamedTuple):
    """A part, by its name, and how often its greatest value goes into a range."""

    name: str
    ratio: float


class Parted(NamedTuple):
    """A concatenation whose parts have ranges of their own, as one of them is small."""

    join: Join
    small: Small


class Joining:
    """Finds out which values of a graph share a range.

    As in coremltools, that are all values that are joined or come of joining, by chains of
    ``concat``, so that codes can be joined as they are. But where a part is `LEAST_RATIO` times
    smaller than the range it would share, those of this ``concat`` have a range of their own each.

    Parameters
    ----------
    graph
        The graph.
    wanted
        The values that are to be quantized.
    """

    def __init__(self, graph: ProgramGraph, wanted: Iterable[Value]) -> None:
        joined = joins.find(graph)
        self._decoder = graph.decoder
        self._pieces = joined.pieces
        self._wanted = dict.fromkeys(wanted)
        groups = _groups(joined.all)
        needed = {id(groups[value]) for value in self._wanted if value in groups}
        self._joins = [join for join in joined.all if id(groups[join.joined]) in needed]
        self._groups = _groups(self._joins)
        self._stored: dict[Node, Range | None] = {}
        self._own: dict[Value, Range | None] = {}
        self.parted: list[Parted] = []

    @property
    def observed(self) -> list[Value]:
        """The values whose ranges are needed, in order."""
        pieces = (
            piece.source
            for value in self._wanted
            for piece in self._pieces.get(value, ())
            if isinstance(piece.source, Value)
        )
        return list(dict.fromkeys((*self._groups, *self._wanted, *pieces)))

    @property
    def groups(self) -> list[tuple[Value, ...]]:
        """The values that share a range with others, and are not all left."""
        groups = {id(group): group for group in self._groups.values() if len(group) > 1}
        return [
            tuple(group)
            for group in groups.values()
            if any(value in self._wanted for value in group)
        ]

    def group(self, value: Value) -> Sequence[Value]:
        """Return the values that share a range with one, it included."""
        return self._groups.get(value, (value,))

    def settle(
        self, range_of: Callable[[Sequence[Value]], Range | None], codes: QuantizeConfig
    ) -> None:
        """Let no small part share a range.

        Parameters
        ----------
        range_of
            Gives the range of what several values were together; ``None`` if that is not known.
        codes
            What values become.
        """
        self._own = {value: range_of([value]) for value in self.observed}
        tied = []
        for join in self._joins:
            together = range_of((join.joined, *join.parts))
            small = self._smallest(self._pieces[join.joined], together, codes)
            if small is None:
                tied.append(join)
            else:
                self.parted.append(Parted(join, small))
        self._groups = _groups(tied)
        # Along chains ranges may grow bit by bit: they are cut at the least part.
        while (worst := self._worst(tied, range_of, codes)) is not None:
            self.parted.append(worst)
            tied.remove(worst.join)
            self._groups = _groups(tied)

    def _worst(
        self,
        tied: Iterable[Join],
        range_of: Callable[[Sequence[Value]], Range | None],
        codes: QuantizeConfig,
    ) -> Parted | None:
        groups = {id(group): group for group in self._groups.values()}
        known = {key: range_of(group) for key, group in groups.items()}
        too_small = [
            Parted(join, small)
            for join in tied
            for small in [
                self._smallest(map(Piece, join.parts), known[id(self._groups[join.joined])], codes)
            ]
            if small is not None
        ]
        return max(too_small, key=lambda parted: parted.small.ratio, default=None)

    def lost(self, value: Value, whole: Range, codes: QuantizeConfig) -> Small | None:
        """Return the least of the parts of a value that its range is too wide for, if any is."""
        return self._smallest(self._pieces.get(value, ()), whole, codes)

    def _smallest(
        self, pieces: Iterable[Piece], whole: Range | None, codes: QuantizeConfig
    ) -> Small | None:
        """Return the least of some pieces if it is small beside the whole, or beside another."""
        if whole is None:
            return None
        own = {piece: self._range(piece) for piece in pieces}
        # What is all zero has a code of its own in whatever range.
        reached = {piece: _reach(seen, codes) for piece, seen in own.items() if seen is not None}
        least = min(
            (piece for piece in reached if reached[piece]),
            key=lambda piece: reached[piece],
            default=None,
        )
        if least is None:
            return None
        # Ranges that clip may be those of the many small values, and clip all that are large.
        ratio = max(_reach(whole, codes), *reached.values()) / reached[least]
        return Small(least.name, ratio) if ratio >= LEAST_RATIO else None

    def _range(self, piece: Piece) -> Range | None:
        own = (
            self._own.get(piece.source)
            if isinstance(piece.source, Value)
            else self._stored_range(piece.source)
        )
        if own is None:
            return None
        return Range(*(min(max(end, piece.low), piece.high) for end in own))

    def _stored_range(self, node: Node) -> Range | None:
        if node not in self._stored:
            array = self._decoder.dense(node).values
            finite = array[np.isfinite(array)]
            self._stored[node] = (
                Range(float(finite.min()), float(finite.max())) if finite.size else None
            )
        return self._stored[node]


def _reach(seen: Range, codes: QuantizeConfig) -> float:
    """Return how much of the numbers the codes for a range divide, zero being one of them."""
    if codes.offset:
        return max(seen.high, 0.0) - min(seen.low, 0.0)
    return max(-seen.low, seen.high)


def _groups(joined: Iterable[Join]) -> dict[Value, list[Value]]:
    """Return for each value that is joined or made by joining all that it is joined with."""
    groups: dict[Value, list[Value]] = {}
    for join in joined:
        group = groups.setdefault(join.joined, [join.joined])
        for part in join.parts:
            other = groups.setdefault(part, [part])
            if other is group:
                continue
            if len(other) > len(group):
                group, other = other, group
            group.extend(other)
            groups.update(dict.fromkeys(other, group))
    return groups
