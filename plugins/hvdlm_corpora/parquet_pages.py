"""Reads from a Parquet file what a column claims to hold: row groups from the footer, sizes from its page headers.

pyarrow's accessors of a damaged footer end the process, and they don't know the sizes of pages.
Format: https://github.com/apache/parquet-format (parquet.thrift), in Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_DICTIONARY = (2, 8)  # encodings PLAIN_DICTIONARY and RLE_DICTIONARY
_PREFIXES = 7  # encoding DELTA_BYTE_ARRAY
_MAX_DEPTH = 8
_END = 8  # bytes at the end of a file: the length of the footer, and PAR1
# Fields of the footer: its row groups; of one: columns and rows; of a column: its metadata; of these: the sizes.
_GROUPS, _COLUMNS, _ROWS, _METADATA = 4, 1, 3, 3
_NUM_VALUES, _SIZE, _DATA_AT, _DICTIONARY_AT = 5, 7, 9, 11
# Fields of a page header: the sizes, and a structure for each of the three kinds of pages.
_UNPACKED, _PACKED, _DATA, _DICTIONARY_PAGE, _DATA_2 = 2, 3, 5, 7, 8
_VALUES, _ENCODING = 1, {_DATA: 2, _DATA_2: 4}

Wanted = Mapping[int, Any]
"""Fields of a structure that are wanted, others are skipped: None for a number, the fields of a structure, or, for a
list of structures, (index of the one that is wanted or None, its fields)."""

_COLUMN: Wanted = {_METADATA: dict.fromkeys((_NUM_VALUES, _SIZE, _DATA_AT, _DICTIONARY_AT))}
_PAGE: Wanted = {
    _UNPACKED: None,
    _PACKED: None,
    _DICTIONARY_PAGE: {_VALUES: None},
    **{kind: {_VALUES: None, encoding: None} for kind, encoding in _ENCODING.items()},
}


class Chunk(NamedTuple):
    """The part of a column that is in one row group: ``rows`` of the group, ``data``: the pages, ``values`` in them."""

    rows: int
    data: memoryview
    values: int


class Page(NamedTuple):
    """A page: its sizes in bytes, packed with its header left out; ``values``: their number.

    ``entries``: it is the column's dictionary; ``indices``: it repeats entries of the dictionary; ``prefixes``: it
    repeats the beginning of one value in the next.
    """

    packed: int
    unpacked: int
    values: int
    entries: bool
    indices: bool
    prefixes: bool


def chunks(file: memoryview, leaf: int) -> list[Chunk]:
    """Return the chunks of a column, by its number among the leaves of the schema, from a file's content.

    Raises:
        ValueError: the footer is damaged.
    """
    length = int.from_bytes(file[-_END : 4 - _END], "little")
    if not 0 < length <= len(file) - _END:
        raise ValueError("its footer is longer than the file")
    wanted = {_GROUPS: (None, {_ROWS: None, _COLUMNS: (leaf, _COLUMN)})}
    footer, _ = _Thrift(file[len(file) - _END - length : len(file) - _END], 0).read(wanted)
    return [_chunk(file, group) for group in footer.get(_GROUPS) or []]


def _chunk(file: memoryview, group: dict[int, Any]) -> Chunk:
    column = (group.get(_COLUMNS) or [{}])[0].get(_METADATA) or {}
    rows, values, size = group.get(_ROWS), column.get(_NUM_VALUES), column.get(_SIZE)
    begins = [column.get(_DATA_AT), column.get(_DICTIONARY_AT)]
    begin = min((value for value in begins if isinstance(value, int) and value > 0), default=0)
    if not all(isinstance(number, int) and number >= 0 for number in (rows, values, size)) or not begin:
        raise ValueError("its footer lacks sizes of the column")
    return Chunk(rows, file[begin : begin + size], values)  # type: ignore[arg-type,operator]


def pages(chunk: Chunk) -> list[Page]:
    """Return the pages that hold a chunk's values.

    Raises:
        ValueError: a page header is damaged, or claims more bytes than are stored.
    """
    result, position, count = [], 0, 0
    while count < chunk.values:
        header, position = _Thrift(chunk.data, position).read(_PAGE)
        page = _page(header)
        position += page.packed
        if position > len(chunk.data):
            raise ValueError("a page claims more bytes than its column has")
        result.append(page)
        count += 0 if page.entries else page.values
    return result


def _page(header: dict[int, Any]) -> Page:
    kind = next((kind for kind in (_DATA, _DATA_2, _DICTIONARY_PAGE) if isinstance(header.get(kind), dict)), None)
    content = header[kind] if kind is not None else {}
    numbers = (header.get(_PACKED), header.get(_UNPACKED), content.get(_VALUES))
    packed, unpacked, values = (number if isinstance(number, int) else -1 for number in numbers)
    if min(packed, unpacked, values) < 0:
        raise ValueError("a page header has no sizes")
    encoding = content.get(_ENCODING.get(kind or 0, 0))
    return Page(packed, unpacked, values, kind == _DICTIONARY_PAGE, encoding in _DICTIONARY, encoding == _PREFIXES)


class _Thrift:
    """Reads one structure of Thrift's compact protocol."""

    def __init__(self, data: memoryview, position: int) -> None:
        self._data = data
        self._position = position

    def read(self, wanted: Wanted) -> tuple[dict[int, Any], int]:
        """Return {field: value} of the fields that are wanted, and the position after the structure."""
        try:
            return self._structure(wanted, 0), self._position
        except IndexError:
            raise ValueError("a header is cut off") from None

    def _byte(self) -> int:
        self._position += 1
        return self._data[self._position - 1]

    def _skip(self, count: int) -> None:
        self._position += count
        if self._position > len(self._data):  # a list of many would be read far beyond the end
            raise IndexError

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a header has a number of more than 64 bits")

    def _structure(self, wanted: Wanted, depth: int) -> dict[int, Any]:
        if depth > _MAX_DEPTH:
            raise ValueError("a header is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            delta, kind = head >> 4, head & 15
            number = number + delta if delta else _signed(self._varint())
            value = self._value(kind, wanted.get(number), depth)
            if number in wanted and isinstance(value, _type(wanted[number])):
                fields[number] = value
        return fields

    def _value(self, kind: int, wanted: Any, depth: int) -> Any:
        if kind in (1, 2):  # true, false: there is no other byte
            return None
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return _signed(self._varint())
        if kind == 7:
            return self._skip(8)
        if kind == 8:
            return self._skip(self._varint())
        if kind in (9, 10):
            return self._list(wanted if isinstance(wanted, tuple) else (-1, {}), depth)
        if kind == 12:
            return self._structure(wanted if isinstance(wanted, Mapping) else {}, depth + 1)
        raise ValueError(f"a header has a field of kind {kind}")

    def _list(self, wanted: tuple[int | None, Wanted], depth: int) -> list[dict[int, Any]]:
        """Return the structures that are wanted of a list."""
        head = self._byte()
        count, kind = (self._varint() if head >> 4 == 15 else head >> 4), head & 15
        structures = []
        for index in range(count):
            chosen = kind == 12 and wanted[0] in (None, index)
            value = self._value(3 if kind in (1, 2) else kind, wanted[1] if chosen else None, depth + 1)
            if chosen:
                structures.append(value)
        return structures


def _type(wanted: Any) -> type:
    return int if wanted is None else list if isinstance(wanted, tuple) else dict


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
