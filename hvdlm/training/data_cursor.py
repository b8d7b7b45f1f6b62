"""The position of training in the data, independent of the number of ranks, the layout and the batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hvdlm.errors import HvdlmError
from hvdlm.io.untrusted_input import shown
from hvdlm.io.value_checks import count

Range = tuple[int, int]


class DataCursor:
    """Counts rows of the task's global order, which depends on the seed alone. A batch is the next ``batch_size`` rows.

    Attributes:
        rows: rows that have been read or left out: the next batch starts here, or after rows that are left out.
        left_out: ranges (first, last exclusive) of rows that are never read again, because steps on them went wrong.
    """

    def __init__(self, batch_size: int, rows: int = 0, left_out: Sequence[Range] = ()) -> None:
        self._batch_size = batch_size
        self.rows = rows
        self.left_out: list[Range] = sorted(left_out)

    @staticmethod
    def of(manifest: Mapping[str, Any], batch_size: int) -> DataCursor:
        """Return the cursor of the checkpoint with this manifest, for batches of ``batch_size``.

        Raises:
            HvdlmError: the manifest's cursor is damaged.
        """
        cursor = manifest.get("cursor")
        if cursor is not None:  # checked with the rest of the manifest
            return DataCursor(batch_size, cursor["rows"], [(first, last) for first, last in cursor["left_out"]])
        try:  # written by an early version, in which every step read a batch
            size_then = manifest["config"]["train"]["batch_size"]
            count(1, 2**31)(size_then, "config.train.batch_size")
        except (KeyError, TypeError, ValueError) as error:
            raise HvdlmError(
                f"the checkpoint's data cursor is damaged ({shown(error)}): resume from another one."
            ) from error
        return DataCursor(batch_size, min(manifest["step"] * size_then, 2**52))

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's entry that ``of`` reads."""
        return {"rows": self.rows, "batch_size": self._batch_size, "left_out": [list(r) for r in self.left_out]}

    @property
    def trained(self) -> int:
        """Rows on which steps trained: those that were read, without those that are left out."""
        rows, end = self.rows, 0
        for first, last in self.left_out:  # in order; ranges of different batch sizes may overlap
            rows -= max(0, min(last, self.rows) - max(first, end))
            end = max(end, last)
        return rows

    @property
    def start(self) -> int:
        """The first row of the next batch."""
        row = self.rows
        for first, last in self.left_out:
            if first < row + self._batch_size and row < last:
                row = last
        return row

    def advance(self) -> int:
        """Move past the next batch; return its first row."""
        row = self.start
        self.rows = row + self._batch_size
        return row

    def leave_out(self, rows: Sequence[int]) -> None:
        """Leave out the batches that start at these rows from now on."""
        self.left_out = sorted({*self.left_out, *((row, row + self._batch_size) for row in rows)})

    def batch_number(self, row: int) -> int:
        """Return the number of the batch, counted in batches of the present size, that contains ``row``."""
        return row // self._batch_size
