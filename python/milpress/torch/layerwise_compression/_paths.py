"""Which places samples are still to come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence


class Paths:
    """What is known of the places that samples come to, in their order.

    As long as they all come to the same places, once, that is not asked for.

    Parameters
    ----------
    n_samples
        How many there are.
    path
        Returns the places that a sample comes to, in their order, when it is run alone.
    first
        Those of the first sample.
    """

    def __init__(
        self, n_samples: int, path: Callable[[int], list[int]], first: Sequence[int]
    ) -> None:
        self._n_samples = n_samples
        self._path = path
        self._ahead: dict[int, list[int]] | None = None
        # Places of which it was not known, when they were chosen, whether all had been there.
        self.crossed: list[int] = []
        if len(first) > len(set(first)):
            # Others may come to a place more often, or less.
            self._ahead = {0: list(first), **{i: path(i) for i in range(1, n_samples)}}

    def comes_again(self, number: int, place: int) -> bool:
        """Note that a sample has come to a place; return whether it will come there again."""
        if self._ahead is None:
            return False
        ahead = self._ahead[number]
        if place in ahead:
            del ahead[: ahead.index(place) + 1]
        return place in ahead

    def choose(self, waiting: Mapping[int, int]) -> int:
        """Return which of the places where samples wait no other one will come to.

        Where there is none, it is the one where most of them wait.
        """
        counts = Counter(waiting.values())
        if len(counts) == 1:
            return next(iter(counts))
        if self._ahead is None:
            self._ahead = {i: self._path(i) for i in range(self._n_samples)}
            for number, place in waiting.items():
                self.comes_again(number, place)
        places = sorted(counts)
        for place in places:
            if not any(
                place in self._ahead[number] for number, at in waiting.items() if at != place
            ):
                return place
        place = max(places, key=counts.__getitem__)
        self.crossed.append(place)
        return place
