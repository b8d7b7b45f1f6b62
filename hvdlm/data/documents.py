"""Where documents begin in a corpus: an index on disk, of which blocks are read when they are needed."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Documents(Protocol):
    """The positions of the first tokens of documents, int64 ``[n]``, ascending: an array, or a part of a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: slice, /) -> np.ndarray: ...


class SplitDocuments:
    """The documents of the tokens ``first:last`` of a corpus, counted from ``first``.

    One that begins before ``first`` and continues after it begins at 0.
    """

    def __init__(self, documents: Documents, first: int, last: int) -> None:
        self._documents, self._start = documents, first

        def position(number: int) -> int:
            return int(documents[number : number + 1][0])

        numbers = range(len(documents)) if first < last else range(0)
        begin = max(0, bisect.bisect_right(numbers, first, key=position) - 1)
        self._numbers = range(begin, max(begin, bisect.bisect_left(numbers, last, key=position)))

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, numbers: slice) -> np.ndarray:
        """Return the positions of some documents, which follow each other."""
        chosen = self._numbers[numbers]
        return np.maximum(self._documents[chosen.start : chosen.stop] - self._start, 0)


class JoinedDocuments:
    """The documents of several corpora in a row, given with the tokens before each corpus."""

    def __init__(self, sections: Sequence[tuple[Documents, int]]) -> None:
        self._sections = list(sections)
        self._edges = [0, *np.cumsum([len(documents) for documents, _ in sections], dtype=np.int64).tolist()]

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, numbers: slice) -> np.ndarray:
        """Return the positions of some documents, which follow each other."""
        first, last, _ = numbers.indices(len(self))
        positions = [np.zeros(0, np.int64)]
        for (documents, before), start in zip(self._sections, self._edges, strict=False):
            low, high = max(first - start, 0), min(last - start, len(documents))
            if low < high:
                positions.append(documents[low:high] + before)
        return np.concatenate(positions)
