"""Reads texts from records (JSON lines, Parquet and Arrow files, Hugging Face ``datasets``) in bounded memory."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable, Iterator
from itertools import accumulate, chain
from typing import Any, NamedTuple

from hvdlm.data.source_chunks import START, ReadProgress, SourceChunk, SourcePosition
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.untrusted_input import shown

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".parquet", ".arrow")
_MAX_LINE = 1 << 26  # bytes of a record
_ROWS = 256  # records of a table in memory at once
_CHUNK = 1 << 20  # characters


class Form(NamedTuple):
    """The ``field`` of a record that holds its text, and the ``separator`` that is appended to the text."""

    field: str = "text"
    separator: str = "\n"


def is_records(source: str) -> bool:
    """Return whether ``source`` holds records, judged by its name."""
    return source.endswith(SUFFIXES)


def is_table(source: str) -> bool:
    """Return whether ``source`` is a table (stored by column), judged by its name."""
    return source.endswith((".parquet", ".arrow"))


def lines(source: str, chunks: Iterable[bytes], form: Form, start: SourcePosition) -> Iterator[SourceChunk]:
    """Yield the texts of JSON lines, whose bytes from ``start`` on are ``chunks``, about a megabyte at a time.

    Raises:
        HvdlmError: a record is damaged or has no such field.
    """
    return _joined(source, _lines(source, chunks, form.field, start), form)


def rows(source: str, form: Form, start: SourcePosition, progress: ReadProgress) -> Iterator[SourceChunk]:
    """Yield the texts of a table from ``start`` on, about a megabyte at a time.

    Raises:
        HvdlmError: it is damaged or has no such field.
    """
    numbered = enumerate(_columns(source, form.field, start.number, progress), start.number + 1)
    return _joined(source, ((text, SourcePosition(0, number)) for number, text in numbered), form)


def _joined(source: str, texts: Iterable[tuple[Any, SourcePosition]], form: Form) -> Iterator[SourceChunk]:
    """Yield the texts of records, joined to chunks; ``texts``: what the field of each holds, and the record's end."""
    buffered: list[str] = []
    ends: list[int] = []
    size, end = 0, START
    for text, end in texts:
        if not isinstance(text, str):
            raise HvdlmError(
                f"data.path {source}: {form.field} of record {end.number} is {shown(repr(text))}, expected text: "
                "choose another field (--data.field NAME)."
            )
        buffered += [text, form.separator]
        ends.append(size + len(ends) * len(form.separator) + len(text))
        size += len(text)
        if size > _CHUNK:
            yield SourceChunk("".join(buffered), end, tuple(ends))
            buffered, ends, size = [], [], 0
    if buffered:
        yield SourceChunk("".join(buffered), end, tuple(ends))


def _lines(
    source: str, chunks: Iterable[bytes], field: str, start: SourcePosition
) -> Iterator[tuple[Any, SourcePosition]]:
    """Yield the field of every record with the position of its end; a record's number is its line's."""
    rest, (offset, number) = b"", start
    for chunk in chain(chunks, [b"\n"]):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            number, offset = number + 1, offset + len(line) + 1
            if line.strip():
                yield _field(_record(source, number, line), field, source, number), SourcePosition(offset, number)
        if len(rest) > _MAX_LINE:
            raise HvdlmError(
                f"data.path {source}: line {number + 1} is longer than {_MAX_LINE:,} bytes: is it JSON lines?"
            )


def _record(source: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = untrusted_input.parse_json(str(line, "utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it is not an object")
        return record
    except ValueError as error:
        raise HvdlmError(
            f"data.path {source}: line {number} is not a JSON record ({shown(str(error))}): a line of JSON lines is "
            'like {"text": "..."}.'
        ) from error


def _field(record: dict[str, Any], field: str, source: str, number: int) -> Any:
    if field not in record:
        raise _no_field(source, field, list(record), f"record {number}")
    return record[field]


def _no_field(source: str, field: str, names: list[str], where: str) -> HvdlmError:
    return HvdlmError(
        f"data.path {source}: {where} has no field {field!r}, it has {shown(', '.join(names))}: --data.field NAME."
    )


def _columns(source: str, field: str, first: int, progress: ReadProgress) -> Iterator[Any]:
    """Yield the values of a column of a Parquet or Arrow file from row ``first`` on."""
    try:
        import pyarrow
    except ImportError as error:
        raise HvdlmError(f"data.path {source}: reading it needs pyarrow: pip install pyarrow.") from error
    try:
        yield from (_parquet if source.endswith(".parquet") else _arrow)(source, field, first, progress)
    except (pyarrow.ArrowException, OSError) as error:
        raise HvdlmError(f"data.path {source}: can't be read: {shown(str(error), 200)}: write it again.") from error


def _parquet(source: str, field: str, first: int, progress: ReadProgress) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(source, memory_map=True) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise _no_field(source, field, names, "the table")
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > untrusted_input.unpacked_limit(source):
            raise HvdlmError(
                f"data.path {source}: unpacks to more than {untrusted_input.RATIO} times its size: "
                "write it uncompressed."
            )
        ends = list(accumulate(group.num_rows for group in groups))
        skipped = bisect.bisect_right(ends, first)  # row groups that end before ``first``
        row, size = ends[skipped - 1] if skipped else 0, os.path.getsize(source)
        for batch in file.iter_batches(_ROWS, row_groups=range(skipped, len(groups)), columns=[field]):
            yield from batch.column(0).slice(max(0, first - row)).to_pylist()
            row += len(batch)
            progress.bytes_read = size * row // ends[-1]


def _arrow(source: str, field: str, first: int, progress: ReadProgress) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(source) as memory, pyarrow.ipc.open_stream(memory) as stream:
        if field not in stream.schema.names:
            raise _no_field(source, field, stream.schema.names, "the table")
        for batch in stream:
            column = batch.column(stream.schema.get_field_index(field))
            for start in range(min(first, len(column)), len(column), _ROWS):
                yield from column.slice(start, _ROWS).to_pylist()
            first = max(0, first - len(column))
            progress.bytes_read = memory.tell()
        progress.bytes_read = memory.size()
