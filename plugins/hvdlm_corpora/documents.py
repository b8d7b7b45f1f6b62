"""Reads texts from records (JSON lines, JSON arrays, CSV; tables: ``tables.py``) in bounded memory."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple, Protocol

from hvdlm.errors import HvdlmError
from hvdlm.io import text_decoding, untrusted_input
from hvdlm.io.untrusted_input import shown
from hvdlm_corpora import compression
from hvdlm_corpora.source_chunks import START, ReadProgress, SourceChunk, SourcePosition, skip_bytes

PACKABLE = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
"""Suffixes of records that may be packed, too; the suffix of the packed file follows (``.json.gz``)."""

TABLES = (".parquet", ".arrow")
_MAX_LINE = 1 << 26  # bytes of a record
_CHUNK = 1 << 20  # characters
_MISSING = object()  # null is a value
Texts = Iterator[tuple[Any, SourcePosition]]
"""What the field of each record holds, None where there is nothing, and the position of the record's end."""


class MarkedText(NamedTuple):
    """A record's text, and the ranges of its characters (first, last exclusive) that are targets, ascending."""

    text: str
    targets: tuple[tuple[int, int], ...]


class Conversations(Protocol):
    """Writes conversations as texts (``conversations.py``)."""

    def written(self, source: str, values: Texts) -> Texts:
        """Yield a ``MarkedText`` for each value, a conversation."""


class Form(NamedTuple):
    """How texts are read: settings of ``DataConfig``.

    Attributes:
        field: the field of a record that holds its text.
        separator: text that is appended to it.
        max_expansion: how many times the size of a file its text may have.
        prompt: the field of the prompt that this text completes; None: it has none.
        chat: writes conversations, which the field holds, as texts; None: it holds texts.
    """

    field: str = "text"
    separator: str = "\n"
    max_expansion: float = compression.RATIO
    prompt: str | None = None
    chat: Conversations | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a record that are read."""
        return (self.field,) if self.prompt is None else (self.prompt, self.field)


def kind(source: str) -> str:
    """Return the suffix that says how ``source`` is read: one of ``PACKABLE`` or ``TABLES``, empty for a text."""
    name = source.lower()
    plain = name.removesuffix(compression.suffix(name))
    packable = next((suffix for suffix in PACKABLE if plain.endswith(suffix)), "")
    return packable or next((suffix for suffix in TABLES if name.endswith(suffix)), "")


def text_limit(source: str, form: Form) -> float:
    """Return how many bytes of text the file ``source`` may hold."""
    return compression.unpacked_limit(os.path.getsize(source), form.max_expansion)


def expands(source: str, form: Form) -> HvdlmError:
    """Return the error of a file that holds more text than its size allows."""
    return HvdlmError(
        f"data.path {source}: unpacks to more than {form.max_expansion:,g} times its size, as a decompression bomb "
        "does: if it is a text nevertheless, raise --data.max_expansion."
    )


def is_table(source: str) -> bool:
    """Return whether ``source`` is a table (stored by column), judged by its name."""
    return kind(source) in TABLES


def read(
    source: str, chunks: Iterator[bytes], form: Form, start: SourcePosition, progress: ReadProgress
) -> Iterator[SourceChunk]:
    """Yield the texts of records from ``start`` on, about a megabyte at a time; ``chunks``: the source as UTF-8.

    Records whose field is null or missing are left out and counted in ``progress``.

    Raises:
        HvdlmError: a record is damaged, or the first one has no such field.
    """
    suffix, head = kind(source), next(chunks, b"")
    chunks = chain([head], chunks)
    if suffix in (".csv", ".tsv"):
        texts = _rows(source, chunks, form, "\t" if suffix == ".tsv" else ",", start.number)
    elif suffix == ".json" and head.lstrip().startswith(b"["):
        texts = _elements(source, chunks, form, start.number)
    else:
        texts = _lines(source, skip_bytes(chunks, start.offset), form, start)
    return joined(source, texts, form, progress)


def joined(source: str, texts: Texts, form: Form, progress: ReadProgress) -> Iterator[SourceChunk]:
    """Yield the texts of records, joined to chunks."""
    buffered: list[str] = []
    ends: list[int] = []
    targets: list[tuple[int, int]] = []
    marks = form.chat is not None or form.prompt is not None
    texts = texts if form.chat is None else form.chat.written(source, texts)
    size, end = 0, START

    def chunk() -> SourceChunk:
        return SourceChunk("".join(buffered), end, tuple(ends), tuple(targets) if marks else None)

    for value, end in texts:
        if value is None:
            progress.skipped += 1
            continue
        text, own = _marked(source, value, form, end.number)
        if marks and not own:
            progress.without_targets += 1
            continue
        start = size + len(ends) * len(form.separator)
        targets += [(start + first, start + last) for first, last in own]
        buffered += [text, form.separator]
        ends.append(start + len(text))
        size += len(text)
        if size > _CHUNK:
            yield chunk()
            buffered, ends, targets, size = [], [], [], 0
    if buffered:
        yield chunk()


def _marked(source: str, value: Any, form: Form, number: int) -> MarkedText:
    """Return the text of a record, and which of its characters are targets, where not all are."""
    if isinstance(value, MarkedText):
        return value
    texts = value if form.prompt is not None else [value]
    for field, text in zip(form.fields, texts, strict=True):
        if not isinstance(text, str):
            raise HvdlmError(
                f"data.path {source}: {field} of record {number} is {shown(repr(text))}, expected text: choose another "
                f"field (--data.{'field' if field == form.field else 'prompt'} NAME)."
            )
    texts = [text_decoding.without_surrogates(text) for text in texts]
    whole = "".join(texts)
    if form.prompt is None:
        return MarkedText(whole, ())
    return MarkedText(whole, ((len(texts[0]), len(whole) + len(form.separator)),))


def _lines(source: str, chunks: Iterable[bytes], form: Form, start: SourcePosition) -> Texts:
    """Yield the field of every JSON line; a record's number is its line's."""
    rest, (offset, number) = b"", start
    known = start != START  # whether a record before had the field
    for chunk in chain(chunks, [b"\n"]):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            number, offset = number + 1, offset + len(line) + 1
            if line.strip():
                record = _record(source, f"line {number}", line)
                yield _value(record, form, source, number, known), SourcePosition(offset, number)
                known = True
        if len(rest) > _MAX_LINE:
            raise HvdlmError(
                f"data.path {source}: line {number + 1} is longer than {_MAX_LINE:,} bytes: is it JSON lines?"
            )


def _elements(source: str, chunks: Iterator[bytes], form: Form, first: int) -> Texts:
    """Yield the field of every object in a JSON array after the ``first``."""
    elements = (element for element in _split_array(source, chunks) if element.strip())
    for number, element in enumerate(elements, 1):
        if number > first:
            record = _record(source, f"record {number}", element)
            yield _value(record, form, source, number, number > 1), SourcePosition(0, number)


_IN_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_STRUCTURE = re.compile(rb'["\[\]{},]')


def _split_array(source: str, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the text of every element of a JSON array, of which one at a time is in memory."""
    data, begin, position, depth, in_string = b"", 0, 0, 0, False
    for chunk in chunks:
        data, begin, position = data[begin:] + chunk, 0, position - begin
        if len(data) - len(chunk) > _MAX_LINE:
            raise HvdlmError(f"data.path {source}: a record is longer than {_MAX_LINE:,} bytes: is it an array?")
        while True:
            if in_string:
                match = _IN_STRING.match(data, position)
                position = match.end() if match else position
                if data[position : position + 1] != b'"':
                    break  # the next chunk continues the string
                in_string, position = False, position + 1
            match = _STRUCTURE.search(data, position)
            position = match.end() if match else len(data)
            if match is None:
                break
            in_string = match[0] == b'"'
            outside = depth == 0
            depth += (match[0] in b"[{") - (match[0] in b"]}")
            if outside:
                begin = position
            elif depth == 0 or (depth == 1 and match[0] == b","):
                yield data[begin : position - 1]
                begin = position
            if depth == 0:
                if data[position:].strip() or any(chunk.strip() for chunk in chunks):
                    raise HvdlmError(f"data.path {source}: something follows the array of records: leave it out.")
                return
    raise HvdlmError(f"data.path {source}: the array of records has no end: is the file whole?")


def _rows(source: str, chunks: Iterable[bytes], form: Form, delimiter: str, first: int) -> Texts:
    """Yield the field of every row after the ``first``; the first line of the file names the fields."""
    csv.field_size_limit(_MAX_LINE)
    reader = csv.reader(_decoded_lines(source, chunks), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        for field in form.fields:
            if field not in names:
                raise no_field(source, field, form, names, "the first line")
        columns = [names.index(field) for field in form.fields]
        for number, row in enumerate((row for row in reader if row), 1):
            if number > first:
                values = [row[column] for column in columns if column < len(row)]
                yield _joined_fields(values, form), SourcePosition(0, number)
    except (csv.Error, UnicodeDecodeError) as error:
        raise HvdlmError(
            f"data.path {source}: line {reader.line_num + 1} is not CSV in UTF-8 ({error}): write it again."
        ) from error


def _decoded_lines(source: str, chunks: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (str(line + b"\n", "utf-8") for line in whole)
        if len(rest) > _MAX_LINE:
            raise HvdlmError(f"data.path {source}: a line is longer than {_MAX_LINE:,} bytes: is it CSV?")
    if rest:
        yield str(rest, "utf-8")


def _record(source: str, where: str, data: bytes) -> dict[str, Any]:
    try:
        record = untrusted_input.parse_json(str(data, "utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it is not an object")
        return record
    except ValueError as error:
        raise HvdlmError(
            f"data.path {source}: {where} is not a JSON record ({shown(str(error))}): a line of JSON lines is "
            'like {"text": "..."}.'
        ) from error


def _value(record: dict[str, Any], form: Form, source: str, number: int, known: bool) -> Any:
    """Return the field of a record, None where it is missing; ``known``: an earlier record had it."""
    values = []
    for field in form.fields:
        value = _nested(record, field)
        if value is _MISSING and not known:
            raise no_field(source, field, form, list(record), f"record {number}")
        values += [] if value is _MISSING else [value]
    return _joined_fields(values, form)


def _joined_fields(values: list[Any], form: Form) -> Any:
    """Return the value of a record's field, or with a prompt those of both; None where one is missing or null."""
    if len(values) < len(form.fields) or None in values:
        return None
    return values if form.prompt is not None else values[0]


def _nested(record: dict[str, Any], field: str) -> Any:
    """Return the field of a record, ``a.b`` of the object or ``a.0`` of the list in ``a``; ``_MISSING`` without it."""
    if field in record:
        return record[field]
    value: Any = record
    for name in field.split("."):
        if isinstance(value, list) and name.isascii() and name.isdigit() and len(name) < 10:
            value = value[int(name)] if int(name) < len(value) else _MISSING
        else:
            value = value.get(name, _MISSING) if isinstance(value, dict) else _MISSING
    return value


def no_field(source: str, field: str, form: Form, names: list[str], where: str) -> HvdlmError:
    """Return the error of records without ``field``, which have the fields ``names``."""
    option = "chat" if form.chat is not None else "prompt" if field == form.prompt else "field"
    has = shown(", ".join(names)) if names else "no named fields"
    return HvdlmError(f"data.path {source}: {where} has no field {field!r}, it has {has}: --data.{option} NAME.")
