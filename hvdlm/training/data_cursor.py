"""How far training has read the data: exact whatever the number of ranks, the layout or the batch size was before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hvdlm.errors import HvdlmError

Range = tuple[int, int]


class DataCursor:
    """Counts rows of the task's global order, which depends on the seed alone. A batch is the next ``batch_size`` rows.

    Attributes:
        rows: rows that have been read or are left out: the next batch begins here, or behind what is left out.
        left_out: (first, last exclusive) of rows that are never read again, because steps on them went wrong.
    """

    def __init__(self, batch_size: int, rows: int = 0, left_out: Sequence[Range] = ()) -> None:
        self._batch_size, self.rows = batch_size, rows
        self.left_out: list[Range] = sorted(left_out)

    @staticmethod
    def of(manifest: Mapping[str, Any], batch_size: int) -> DataCursor:
        """Return where the checkpoint with this manifest goes on, in batches of ``batch_size``.

        Raises:
            HvdlmError: its cursor is no cursor.
        """
        found = manifest.get("cursor")
        try:
            if found is None:  # of an early version: every step had read a batch
                before = manifest["config"]["train"]["batch_size"]
                return DataCursor(batch_size, _count(manifest["step"] * before))
            return DataCursor(batch_size, _count(found["rows"]), [(_count(a), _count(b)) for a, b in found["left_out"]])
        except (KeyError, TypeError, ValueError) as error:
            raise HvdlmError(
                f"the checkpoint's data cursor is damaged ({error!r}): resume from another one."
            ) from error

    def to_json(self) -> dict[str, Any]:
        """Return what ``of`` takes, for the manifest."""
        return {"rows": self.rows, "batch_size": self._batch_size, "left_out": [list(r) for r in self.left_out]}

    @property
    def start(self) -> int:
        """The first row of the next batch."""
        row = self.rows
        for first, last in self.left_out:
            if first < row + self._batch_size and row < last:
                row = last
        return row

    def advance(self) -> int:
        """Read a batch; return its first row."""
        row = self.start
        self.rows = row + self._batch_size
        return row

    def leave_out(self, rows: Sequence[int]) -> None:
        """Never read the batches again that began at these rows."""
        self.left_out = sorted({*self.left_out, *((row, row + self._batch_size) for row in rows)})

    def place(self, row: int) -> tuple[int, int]:
        """Return (number of the batch in which ``row`` lies, rows of it that come before)."""
        return divmod(row, self._batch_size)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no number of rows")
    return value
