"""Reads from the messages of an Arrow stream how much they claim to hold: rows, and bytes when they are unpacked.

Format: https://arrow.apache.org/docs/format/Columnar.html (Message.fbs), in FlatBuffers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

_RECORD_BATCH, _DICTIONARY_BATCH = 3, 2  # kinds of messages
# Fields of the tables Message, DictionaryBatch and RecordBatch, by number.
_HEADER_TYPE, _HEADER = 1, 2
_DATA = 1
_ROWS, _BUFFERS, _COMPRESSION = 0, 2, 3
_NOT_PACKED = -1  # the claimed length of a buffer that packing would not have made smaller


class Message(NamedTuple):
    """What a message claims.

    Attributes:
        dictionary: it holds a dictionary, which stays in memory.
        rows: rows of a record batch, entries of a dictionary.
        packed: (bytes stored, bytes when unpacked) of every packed buffer.
    """

    dictionary: bool = False
    rows: int = 0
    packed: tuple[tuple[int, int], ...] = ()


def read(metadata: Any, body: Any) -> Message:
    """Return what a message claims, whose two halves are buffers.

    Raises:
        ValueError: the message is damaged, or a buffer claims more bytes than are stored.
    """
    try:
        return _read(bytes(metadata), memoryview(body))
    except (struct.error, IndexError) as error:
        raise ValueError("a message is damaged") from error


def _read(metadata: bytes, body: memoryview) -> Message:
    message = _offset(metadata, 0)
    kind_at, header_at = _field(metadata, message, _HEADER_TYPE), _field(metadata, message, _HEADER)
    kind = metadata[kind_at] if kind_at else 0
    if not header_at or kind not in (_RECORD_BATCH, _DICTIONARY_BATCH):
        return Message()
    batch = _offset(metadata, header_at)
    if kind == _DICTIONARY_BATCH:
        batch = _offset(metadata, _field(metadata, batch, _DATA))
    rows_at = _field(metadata, batch, _ROWS)
    (rows,) = struct.unpack_from("<q", metadata, rows_at) if rows_at else (0,)
    return Message(kind == _DICTIONARY_BATCH, rows, tuple(_packed(metadata, batch, body)))


def _packed(metadata: bytes, batch: int, body: memoryview) -> Iterator[tuple[int, int]]:
    buffers_at = _field(metadata, batch, _BUFFERS)
    if not buffers_at or not _field(metadata, batch, _COMPRESSION):
        return
    vector = _offset(metadata, buffers_at)
    (count,) = struct.unpack_from("<I", metadata, vector)
    for number in range(count):
        start, length = struct.unpack_from("<qq", metadata, vector + 4 + 16 * number)
        if start < 0 or length < 0 or start + length > len(body):
            raise ValueError("a buffer claims more bytes than its message has")
        if not length:
            continue
        (claimed,) = struct.unpack_from("<q", body, start)
        if claimed < _NOT_PACKED:
            raise ValueError(f"a buffer claims {claimed} bytes")
        if claimed != _NOT_PACKED:
            yield length, claimed


def _offset(data: bytes, position: int) -> int:
    """Return where the offset at ``position`` leads."""
    return int(position + struct.unpack_from("<I", data, position)[0])


def _field(data: bytes, table: int, number: int) -> int:
    """Return the position of a table's field, 0 where it is not set."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if vtable < 0 or 6 + 2 * number > struct.unpack_from("<H", data, vtable)[0]:
        return 0
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0]
    return int(table + offset) if offset else 0
