"""Reads a column of texts from Parquet and Arrow files; what a file claims is checked before memory is allocated."""

from __future__ import annotations

import bisect
import mmap
import os
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np

from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.untrusted_input import shown
from hvdlm_corpora import arrow_messages, compression, documents, parquet_pages
from hvdlm_corpora.documents import Form
from hvdlm_corpora.parquet_pages import Page
from hvdlm_corpora.source_chunks import ReadProgress, SourceChunk, SourcePosition

_ROWS = 256  # records of a batch
_BATCH = 1 << 23  # bytes of text of a batch, if no record is longer
_RECORD = 32  # bytes that a record counts at least: files can hold billions of empty ones in no space
_SLICE = 1 << 16  # records of an Arrow batch whose lengths are computed at once


def read(source: str, form: Form, start: SourcePosition, progress: ReadProgress) -> Iterator[SourceChunk]:
    """Yield the texts of a table from ``start`` on, about a megabyte at a time.

    Raises:
        HvdlmError: it is damaged or has no such field, or unpacks to too much.
    """
    if form.chat is not None or form.prompt is not None:
        option = "chat" if form.chat is not None else "prompt"
        raise HvdlmError(
            f"data.path {source}: data.{option} reads JSON, JSON lines or, for prompts, CSV, and no table: write it as "
            "JSON lines."
        )
    numbered = enumerate(_guarded(source, form, start.number, progress), start.number + 1)
    return documents.joined(source, ((text, SourcePosition(0, number)) for number, text in numbered), form, progress)


def _guarded(source: str, form: Form, first: int, progress: ReadProgress) -> Iterator[Any]:
    """Yield the values of a column from row ``first`` on."""
    try:
        import pyarrow
    except ImportError as error:
        raise HvdlmError(f"data.path {source}: reading it needs pyarrow: pip install pyarrow.") from error
    try:
        yield from (_parquet if documents.kind(source) == ".parquet" else _arrow)(source, form, first, progress)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise HvdlmError(f"data.path {source}: can't be read: {shown(str(error), 200)}: write it again.") from error


def _check_type(source: str, schema: Any, field: str) -> Any:
    """Return the type of a column, which has to be text, perhaps as a dictionary."""
    from pyarrow import types

    if field not in schema.names:
        raise documents.no_field(source, field, schema.names, "the table")
    kind = schema.field(field).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(values) or types.is_large_string(values) or _is_view(values)):
        raise HvdlmError(
            f"data.path {source}: the column {field} is of type {shown(str(kind))}, expected text: choose another "
            "(--data.field NAME), or cast it."
        )
    return kind


def _is_view(kind: Any) -> bool:
    return str(kind) == "string_view"  # pyarrow before 16 doesn't know it


def _check_unit(source: str, form: Form, packed: int, unpacked: int) -> None:
    """Check the sizes of what is unpacked at once: a Parquet page, or a buffer of an Arrow batch."""
    factor = untrusted_input.FACTOR * form.max_expansion / compression.RATIO
    if unpacked > max(compression.FREE, factor * packed):
        raise HvdlmError(
            f"data.path {source}: {packed:,} bytes unpack to {unpacked:,} at once, as in a decompression bomb: write "
            "it in smaller pages or batches, or raise --data.max_expansion."
        )


def _parquet(source: str, form: Form, first: int, progress: ReadProgress) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(source, memory_map=True) as file:
        _check_type(source, file.schema_arrow, form.field)
        rows, ends = _check_pages(source, form, file.metadata)
        skipped = bisect.bisect_right(ends, first)  # row groups that end before ``first``
        row, size, groups = ends[skipped - 1] if skipped else 0, os.path.getsize(source), range(skipped, len(ends))
        for batch in file.iter_batches(rows, groups, [form.field], use_threads=False):
            yield from batch.column(0).slice(max(0, first - row)).to_pylist()
            row += len(batch)
            progress.bytes_read = size * row // ends[-1]


def _check_pages(source: str, form: Form, metadata: Any) -> tuple[int, list[int]]:
    """Check the sizes of a Parquet column's pages.

    Return the rows of which at most ``_BATCH`` bytes are read at once, and the number of rows up to the end of every
    row group.

    The footer has the sizes of encoded pages: a text that is stored once may be repeated in every row.
    """
    pages, ends = _pages(source, metadata, form.field)
    for page in pages:
        _check_unit(source, form, page.packed, page.unpacked)
    # Bytes of the longest text at most that is repeated.
    entry = max((page.unpacked for page in pages if page.entries or page.prefixes), default=0)
    repeated = sum(page.values for page in pages if page.indices or page.prefixes)
    # A run of equal values, such as null, takes a few bytes however long it is.
    records = sum(page.values for page in pages if not page.entries) * _record_bytes(form)
    rows = max(1, min(_ROWS, _BATCH // max(1, entry, *(page.unpacked // max(1, page.values) for page in pages))))
    limit = documents.text_limit(source, form)
    if records > limit:
        raise documents.expands(source, form)
    if records + sum(page.unpacked for page in pages) + repeated * entry > limit:
        packed = not any(page.prefixes for page in pages)
        _check_text(source, form, _parquet_columns(source, form.field, rows, packed))
    return rows, ends


def _record_bytes(form: Form) -> int:
    """Return the bytes that a record counts beside its text: its separator, and Python's work on a short one."""
    return max(_RECORD, len(form.separator.encode()))


def _check_text(source: str, form: Form, columns: Iterator[Any]) -> None:
    """Check the bytes of text in the arrays of a column, without unpacking its dictionary."""
    text, limit = 0, documents.text_limit(source, form)
    for column in columns:
        text += int(_lengths(column).sum()) + len(column) * _record_bytes(form)
        if text > limit:
            raise documents.expands(source, form)


def _pages(source: str, metadata: Any, field: str) -> tuple[list[Page], list[int]]:
    """Return all pages of a column, and the number of rows up to the end of every row group."""
    # The footer counts the leaves of nested columns, too.
    leaf = next((i for i in range(metadata.num_columns) if metadata.schema.column(i).path == field), None)
    if leaf is None or not os.path.getsize(source):
        raise ValueError(f"its footer has no column {field}")
    with open(source, "rb") as file:
        # Errors keep slices of it: it is unmapped with the last one.
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    chunks = parquet_pages.chunks(content, leaf)
    pages = [page for chunk in chunks for page in parquet_pages.pages(chunk)]
    return pages, list(accumulate(chunk.rows for chunk in chunks))


def _parquet_columns(source: str, field: str, rows: int, packed: bool) -> Iterator[Any]:
    """Yield a column's array of every ``rows`` rows; ``packed``: as indices into its dictionary."""
    from pyarrow import parquet

    with parquet.ParquetFile(source, memory_map=True, read_dictionary=[field] if packed else None) as file:
        for batch in file.iter_batches(rows, columns=[field], use_threads=False):
            yield batch.column(0)


def _arrow(source: str, form: Form, first: int, progress: ReadProgress) -> Iterator[Any]:
    import pyarrow
    from pyarrow import types

    with pyarrow.memory_map(source) as memory:
        with pyarrow.ipc.open_stream(memory) as stream:
            schema = stream.schema
        kind = _check_type(source, schema, form.field)
        _check_buffers(source, form, memory)
        if types.is_dictionary(kind) or _is_view(kind):
            _check_text(source, form, _arrow_columns(memory, schema, form.field))
        for column in _arrow_columns(memory, schema, form.field):
            yield from _values(column.slice(min(first, len(column))))
            first = max(0, first - len(column))
            progress.bytes_read = memory.tell()
        progress.bytes_read = memory.size()


def _arrow_columns(memory: Any, schema: Any, field: str) -> Iterator[Any]:
    """Yield the column's arrays, which have been validated, in slices; other columns are not unpacked."""
    import pyarrow

    memory.seek(0)
    # One column gains nothing from threads, which can't be started where memory is short.
    options = pyarrow.ipc.IpcReadOptions(included_fields=[schema.get_field_index(field)], use_threads=False)
    with pyarrow.ipc.open_stream(memory, options=options) as stream:
        for batch in stream:
            column = batch.column(0)
            column.validate(full=True)  # offsets that lead out of a buffer would be followed
            yield from (column.slice(start, _SLICE) for start in range(0, len(column), _SLICE))


def _check_buffers(source: str, form: Form, memory: Any) -> None:
    """Check the rows that an Arrow stream claims, and the sizes of its packed buffers when they are unpacked."""
    import pyarrow

    memory.seek(0)
    text, kept = 0, (0, 0)
    for message in pyarrow.ipc.MessageReader.open_stream(memory):
        claims = arrow_messages.read(message.metadata, message.body)
        for packed, unpacked in claims.packed:
            kept = (kept[0] + packed, kept[1] + unpacked) if claims.dictionary else kept
            _check_unit(source, form, *(kept if claims.dictionary else (packed, unpacked)))
        text += sum(unpacked for _, unpacked in claims.packed)
        text += 0 if claims.dictionary else claims.rows * _record_bytes(form)
    if text > documents.text_limit(source, form):
        raise documents.expands(source, form)


def _lengths(column: Any) -> np.ndarray:
    """Return the bytes of every text in an array, int64 ``[n]``, 0 for null."""
    import pyarrow.compute as pc
    from pyarrow import types

    if types.is_dictionary(column.type):
        entries = _lengths(column.dictionary)
        indices = pc.fill_null(column.indices, 0).to_numpy(zero_copy_only=False)
        return entries[indices] if len(entries) else np.zeros(len(column), np.int64)
    if _is_view(column.type):
        views = np.frombuffer(column.buffers()[1], np.int32).reshape(-1, 4)
        return views[column.offset : column.offset + len(column), 0].astype(np.int64)
    return pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _values(column: Any) -> Iterator[Any]:
    """Yield the values of an array, of which at most ``_ROWS``, or ``_BATCH`` bytes, become Python's at once."""
    ends = np.cumsum(_lengths(column))
    start = 0
    while start < len(column):
        limit = _BATCH + (int(ends[start - 1]) if start else 0)
        stop = min(start + _ROWS, max(start + 1, int(np.searchsorted(ends, limit, "right"))))
        yield from column.slice(start, stop - start).to_pylist()
        start = stop
