"""Texts out of records: JSON lines, Parquet files, and the folders of Hugging Face ``datasets``; in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from hvdlm import untrusted
from hvdlm.interfaces import HvdlmError
from hvdlm.untrusted import shown

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".parquet", ".arrow")
_LINE = 1 << 26  # bytes: a longer line is no record
_ROWS = 256  # records of a Parquet file in memory at once
_PIECE = 1 << 20


class Form(NamedTuple):
    """What of a record is its text (``field``), and what stands after it (``separator``)."""

    field: str = "text"
    separator: str = "\n"


def is_records(source: str) -> bool:
    """Return whether ``source`` holds records, by its name."""
    return source.endswith(SUFFIXES)


def is_table(source: str) -> bool:
    """Return whether ``source`` holds records column by column, by its name."""
    return source.endswith((".parquet", ".arrow"))


def check_folder(folder: Path) -> None:
    """Refuse a folder of several splits: they'd be read as one text.

    Raises:
        HvdlmError: it is one.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in folder.iterdir() if p.is_dir())
        raise HvdlmError(
            f"data.path {folder}: holds the splits {shown(', '.join(splits))} of a data set: name one, for example "
            f"--data.path {folder}/{splits[0] if splits else 'train'}."
        )


def texts(source: str, lines: Iterable[bytes], form: Form) -> Iterator[str]:
    """Yield the texts of ``source``, about a megabyte at a time; ``lines``: its bytes, where it is JSON lines.

    Raises:
        HvdlmError: a record is damaged or has no such field.
    """
    pieces: list[str] = []
    size = 0
    found = _columns(source, form.field) if is_table(source) else _lines(source, lines, form.field)
    for number, text in enumerate(found, 1):
        if not isinstance(text, str):
            raise HvdlmError(
                f"data.path {source}: {form.field} of record {number} is {shown(repr(text))}, expected text: choose "
                "another field (--data.field NAME)."
            )
        pieces += [text, form.separator]
        size += len(text)
        if size > _PIECE:
            yield "".join(pieces)
            pieces, size = [], 0
    if pieces:
        yield "".join(pieces)


def _lines(source: str, chunks: Iterable[bytes], field: str) -> Iterator[Any]:
    rest, number = b"", 0
    for chunk in chain(chunks, [b"\n"]):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            number += 1
            if line.strip():
                yield _field(_record(source, number, line), field, source, number)
        if len(rest) > _LINE:
            raise HvdlmError(f"data.path {source}: line {number + 1} is longer than {_LINE:,} bytes: is it JSON lines?")


def _record(source: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = untrusted.parse_json(str(line, "utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it is no object")
        return record
    except ValueError as error:
        raise HvdlmError(
            f"data.path {source}: line {number} is no JSON record ({shown(str(error))}): a line of JSON lines is "
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


def _columns(source: str, field: str) -> Iterator[Any]:
    """Yield a column of a Parquet or Arrow file, some rows at a time."""
    try:
        import pyarrow
    except ImportError as error:
        raise HvdlmError(f"data.path {source}: reading it needs pyarrow: pip install pyarrow.") from error
    try:
        yield from (_parquet if source.endswith(".parquet") else _arrow)(source, field)
    except (pyarrow.ArrowException, OSError) as error:
        raise HvdlmError(f"data.path {source}: can't be read: {shown(str(error), 200)}: write it anew.") from error


def _parquet(source: str, field: str) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(source, memory_map=True) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise _no_field(source, field, names, "the table")
        groups = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
        if sum(groups) > untrusted.unpacked_limit(source):
            raise HvdlmError(
                f"data.path {source}: unpacks to more than {untrusted.RATIO} times its size: write it uncompressed."
            )
        for batch in file.iter_batches(_ROWS, columns=[field]):
            yield from batch.column(0).to_pylist()


def _arrow(source: str, field: str) -> Iterator[Any]:
    import pyarrow

    with pyarrow.memory_map(source) as memory, pyarrow.ipc.open_stream(memory) as stream:
        if field not in stream.schema.names:
            raise _no_field(source, field, stream.schema.names, "the table")
        for batch in stream:
            column = batch.column(stream.schema.get_field_index(field))
            for start in range(0, len(column), _ROWS):
                yield from column.slice(start, _ROWS).to_pylist()
