"""Reads texts and conversations from Parquet and Arrow files; what a file claims is checked before it is allocated."""

from __future__ import annotations

import bisect
import mmap
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

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
_LONGEST = 1 << 26  # bytes of a conversation, as of a record in JSON lines
_ELEMENT = 512  # bytes that an element of a list counts beside its texts: it becomes a dictionary of Python's
_SLICE = 1 << 16  # records of an Arrow batch whose lengths are computed at once


def read(source: str, form: Form, start: SourcePosition, progress: ReadProgress) -> Iterator[SourceChunk]:
    """Yield the texts of a table from ``start`` on, about a megabyte at a time.

    Raises:
        HvdlmError: it is damaged or has no such field, or unpacks to too much.
    """
    numbered = enumerate(_guarded(source, form, start.number, progress), start.number + 1)
    return documents.joined(source, ((text, SourcePosition(0, number)) for number, text in numbered), form, progress)


def _guarded(source: str, form: Form, first: int, progress: ReadProgress) -> Iterator[Any]:
    """Yield the values of the fields from row ``first`` on."""
    try:
        import pyarrow
    except ImportError as error:
        raise HvdlmError(f"data.path {source}: reading it needs pyarrow: pip install pyarrow.") from error
    try:
        yield from (_parquet if documents.kind(source) == ".parquet" else _arrow)(source, form, first, progress)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise HvdlmError(f"data.path {source}: can't be read: {shown(str(error), 200)}: write it again.") from error


class _Column(NamedTuple):
    """A column: the names that lead to it, of which all but the first are fields of structures, and its type."""

    path: tuple[str, ...]
    kind: Any

    def of(self, batch: Any) -> Any:
        """Return its array in a batch."""
        import pyarrow.compute as pc

        array = batch.column(batch.schema.get_field_index(self.path[0]))
        for name in self.path[1:]:
            array = pc.struct_field(array, name)
        return array


def _columns(source: str, schema: Any, form: Form) -> list[_Column]:
    """Return the columns of the fields of ``form``; ``a.b`` is the column of that name, or the field b of a structure.

    Raises:
        HvdlmError: there is no such column, or its type is another one than text or, of conversations, lists.
    """
    from pyarrow import types

    columns = []
    for field in form.fields:
        path, kind = ((field,) if field in schema.names else tuple(field.split("."))), schema
        for number, name in enumerate(path):
            names = [child.name for child in kind] if number == 0 or types.is_struct(kind) else []
            if names.count(name) != 1:
                raise documents.no_field(
                    source, field, form, names, f"the column {'.'.join(path[:number])}" if number else "the table"
                )
            kind = kind.field(name).type
        _check_type(source, field, kind, form)
        columns.append(_Column(path, kind))
    return columns


def _check_type(source: str, field: str, kind: Any, form: Form) -> None:
    """Check that a column holds texts, perhaps as a dictionary, or conversations where these are read."""
    if form.chat is not None:
        if not _is_list(kind) or not _holds_records(kind.value_type) or not _is_known(kind):
            raise HvdlmError(
                f"data.path {source}: the column {field} is of type {shown(str(kind))}, expected lists of structures "
                "with role and content: choose another (--data.chat NAME), or write JSON lines."
            )
    elif not _is_text(kind):
        raise HvdlmError(
            f"data.path {source}: the column {field} is of type {shown(str(kind))}, expected text: choose another "
            "(--data.field NAME), or cast it."
        )


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    values = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(values) or types.is_large_string(values) or _is_view(values)


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind)


def _holds_records(kind: Any) -> bool:
    from pyarrow import types

    return types.is_struct(kind) and {"role", "content"} <= {child.name for child in kind}


def _is_known(kind: Any) -> bool:
    """Return whether the sizes of a column of this type are known: see ``_lengths``."""
    from pyarrow import types

    if _is_list(kind):
        return _is_known(kind.value_type)
    if types.is_struct(kind):
        return all(_is_known(child.type) for child in kind)
    return _is_text(kind) or types.is_primitive(kind) or types.is_null(kind)


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
        columns = _columns(source, file.schema_arrow, form)
        rows, ends = _check_pages(source, form, file.metadata)
        skipped = bisect.bisect_right(ends, first)  # row groups that end before ``first``
        row, size, groups = ends[skipped - 1] if skipped else 0, os.path.getsize(source), range(skipped, len(ends))
        names = [".".join(column.path) for column in columns]
        for batch in file.iter_batches(rows, groups, names, use_threads=False):
            yield from _records([column.of(batch).slice(max(0, first - row)) for column in columns])
            row += len(batch)
            progress.bytes_read = size * row // ends[-1]


def _records(arrays: Sequence[Any]) -> Iterator[Any]:
    """Yield the values of a column; of several, lists of them, None where one is null."""
    lists = [array.to_pylist() for array in arrays]
    if len(lists) == 1:
        yield from lists[0]
    else:
        yield from (None if None in values else list(values) for values in zip(*lists, strict=True))


def _check_pages(source: str, form: Form, metadata: Any) -> tuple[int, list[int]]:
    """Check the sizes of the pages of all columns; see ``_check_column``. Return the fewest rows, and the ends."""
    if form.chat is not None:
        return _check_chats(source, form, metadata)
    checked = [_check_column(source, form, field, metadata) for field in form.fields]
    return min(rows for rows, _ in checked), checked[0][1]


def _check_chats(source: str, form: Form, metadata: Any) -> tuple[int, list[int]]:
    """Check the sizes of a Parquet column of conversations, all of them; see ``_check_column``.

    A page says how many values it holds, not to how many records they belong.
    """
    from pyarrow import parquet

    leaves = _leaves(metadata, form.field)
    values, limit = 0, documents.text_limit(source, form)
    ends: list[int] = []
    for leaf in leaves:
        pages, ends = _pages(source, leaf)
        for page in pages:
            _check_unit(source, form, page.packed, page.unpacked)
        values = max(values, sum(page.values for page in pages if not page.entries))
    if values * _ELEMENT > limit:
        raise documents.expands(source, form)
    texts = [metadata.schema.column(leaf).path for leaf in leaves]
    texts = [
        p for p, leaf in zip(texts, leaves, strict=True) if metadata.schema.column(leaf).physical_type == "BYTE_ARRAY"
    ]
    longest, total = 0, 0
    with parquet.ParquetFile(source, memory_map=True, read_dictionary=texts) as file:
        (column,) = _columns(source, file.schema_arrow, form)
        name = ".".join(column.path)
        # A batch of several row groups would have several dictionaries, which pyarrow can't nest.
        for group in range(len(ends)):
            for batch in file.iter_batches(_ROWS, [group], [name], use_threads=False):
                lengths = _lengths(column.of(batch))
                longest, total = max(longest, int(lengths.max(initial=0))), total + int(lengths.sum())
                if total > limit or longest > _LONGEST:
                    raise documents.expands(source, form)
    return max(1, min(_ROWS, _BATCH // max(1, longest))), ends


def _check_column(source: str, form: Form, field: str, metadata: Any) -> tuple[int, list[int]]:
    """Check the sizes of the pages of a Parquet column of texts.

    Return the rows of which at most ``_BATCH`` bytes are read at once, and the number of rows up to the end of every
    row group.

    The footer has the sizes of encoded pages: a text that is stored once may be repeated in every row.
    """
    pages, ends = _pages(source, _leaves(metadata, field)[0])
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
        _check_text(source, form, _parquet_columns(source, field, rows, packed))
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


def _leaves(metadata: Any, field: str) -> list[int]:
    """Return the numbers of a column's leaves in the footer, which counts those of all columns."""
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    leaves = [i for i, path in enumerate(paths) if path == field or path.startswith(f"{field}.")]
    if not leaves:
        raise ValueError(f"its footer has no column {field}")
    return leaves


def _pages(source: str, leaf: int) -> tuple[list[Page], list[int]]:
    """Return all pages of a leaf, and the number of rows up to the end of every row group."""
    if not os.path.getsize(source):
        raise ValueError("it is empty")
    with open(source, "rb") as file:
        # Errors keep slices of it: it is unmapped with the last one.
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    chunks = parquet_pages.chunks(content, leaf)
    pages = [page for chunk in chunks for page in parquet_pages.pages(chunk)]
    return pages, list(accumulate(chunk.rows for chunk in chunks))


def _parquet_columns(source: str, field: str, rows: int, packed: bool) -> Iterator[Any]:
    """Yield the array of a column of texts of every ``rows`` rows; ``packed``: as indices into its dictionary."""
    from pyarrow import parquet

    with parquet.ParquetFile(source, memory_map=True, read_dictionary=[field] if packed else None) as file:
        (column,) = _columns(source, file.schema_arrow, Form(field))
        for batch in file.iter_batches(rows, columns=[field], use_threads=False):
            yield column.of(batch)


def _arrow(source: str, form: Form, first: int, progress: ReadProgress) -> Iterator[Any]:
    import pyarrow
    from pyarrow import types

    with pyarrow.memory_map(source) as memory:
        with pyarrow.ipc.open_stream(memory) as stream:
            schema = stream.schema
        columns = _columns(source, schema, form)
        _check_buffers(source, form, memory)
        for column in columns:
            if form.chat is not None or types.is_dictionary(column.kind) or _is_view(column.kind):
                _check_text(source, form, (array for (array,) in _arrow_columns(memory, schema, [column])))
        for arrays in _arrow_columns(memory, schema, columns):
            rows = len(arrays[0])
            yield from _values([array.slice(min(first, rows)) for array in arrays])
            first = max(0, first - rows)
            progress.bytes_read = memory.tell()
        progress.bytes_read = memory.size()


def _arrow_columns(memory: Any, schema: Any, columns: Sequence[_Column]) -> Iterator[list[Any]]:
    """Yield the arrays of columns, which have been validated, in slices; other columns are not unpacked."""
    import pyarrow

    memory.seek(0)
    # One column gains nothing from threads, which can't be started where memory is short.
    fields = sorted({schema.get_field_index(column.path[0]) for column in columns})
    options = pyarrow.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
    with pyarrow.ipc.open_stream(memory, options=options) as stream:
        for batch in stream:
            batch.validate(full=True)  # offsets that lead out of a buffer would be followed
            arrays = [column.of(batch) for column in columns]
            for start in range(0, len(batch), _SLICE):
                yield [array.slice(start, _SLICE) for array in arrays]


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
    """Return the bytes of every text in an array, int64 ``[n]``, 0 for null.

    Of lists and structures, those of all texts in them, and ``_ELEMENT`` for every element of a list.
    """
    import pyarrow.compute as pc
    from pyarrow import types

    if _is_list(column.type):
        before = np.append(0, np.cumsum(_lengths(column.values) + _ELEMENT))
        offsets = column.offsets.to_numpy(zero_copy_only=False)
        return before[offsets[1:]] - before[offsets[:-1]]
    if types.is_struct(column.type):
        return sum((_lengths(child) for child in column.flatten()), np.zeros(len(column), np.int64))
    if not _is_text(column.type):
        return np.zeros(len(column), np.int64)
    if types.is_dictionary(column.type):
        entries = _lengths(column.dictionary)
        indices = pc.fill_null(column.indices, 0).to_numpy(zero_copy_only=False)
        return entries[indices] if len(entries) else np.zeros(len(column), np.int64)
    if _is_view(column.type):
        views = np.frombuffer(column.buffers()[1], np.int32).reshape(-1, 4)
        return views[column.offset : column.offset + len(column), 0].astype(np.int64)
    return pc.fill_null(pc.binary_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _values(arrays: Sequence[Any]) -> Iterator[Any]:
    """Yield the values of arrays, of which at most ``_ROWS``, or ``_BATCH`` bytes, become Python's at once."""
    ends = np.cumsum(np.sum([_lengths(array) for array in arrays], axis=0))
    start, count = 0, len(arrays[0])
    while start < count:
        limit = _BATCH + (int(ends[start - 1]) if start else 0)
        stop = min(start + _ROWS, max(start + 1, int(np.searchsorted(ends, limit, "right"))))
        yield from _records([array.slice(start, stop - start) for array in arrays])
        start = stop
