"""Corpora of records: JSON lines, Parquet and the folders of Hugging Face datasets read as one text."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from hvdlm.config import DataConfig
from hvdlm.data import documents, preparation, sources
from hvdlm.data.documents import Form
from hvdlm.interfaces import HvdlmError

TEXTS = ["To be, or not to be", "that is the question:\nwhether", "红楼梦", ""]
WHOLE = "".join(f"{text}\n" for text in TEXTS)


def json_lines(path: Path, texts: list[str]) -> None:
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")


def packed_lines(path: Path, texts: list[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts))


SCHEMA = pyarrow.schema({"id": pyarrow.int64(), "text": pyarrow.string()})


def table(texts: list[str]) -> pyarrow.Table:
    return pyarrow.table({"id": list(range(len(texts))), "text": texts}, SCHEMA)


def write_parquet(path: Path, texts: list[str]) -> None:
    parquet.write_table(table(texts), path, row_group_size=max(2, len(texts) // 20))


def write_arrow(path: Path, texts: list[str]) -> None:
    """Write as ``Dataset.save_to_disk`` does: an IPC stream."""
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, SCHEMA) as stream:
        for start in range(0, len(texts), 1000):
            stream.write_table(table(texts[start : start + 1000]))


WRITERS: dict[str, Callable[[Path, list[str]], None]] = {
    "x.jsonl": json_lines,
    "x.jsonl.gz": packed_lines,
    "x.parquet": write_parquet,
    "data-00000-of-00001.arrow": write_arrow,
}


@pytest.mark.parametrize("name", list(WRITERS))
def test_records_read_as_one_text(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set" / name
    path.parent.mkdir()
    WRITERS[name](path, TEXTS)
    (path.parent / "state.json").write_text("{}")
    assert "".join(sources.texts([str(path)])) == WHOLE
    assert "".join(sources.texts([str(path.parent)])) == WHOLE
    assert "".join(sources.texts([str(path)], Form("text", "<|end|>"))) == "".join(f"{t}<|end|>" for t in TEXTS)
    monkeypatch.setattr(sources, "_CHUNK", 7)
    monkeypatch.setattr(documents, "_PIECE", 20)
    pieces = list(sources.texts([str(path)]))
    assert "".join(pieces) == WHOLE and len(pieces) == 2


@pytest.mark.parametrize("name", list(WRITERS))
def test_records_become_the_tokens_of_their_text(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, TEXTS * 20)
    (tmp_path / "same.txt").write_text(WHOLE * 20)
    made = [
        preparation.prepare(
            DataConfig(path=[str(path)], tokenizer="bpe", vocab_size=300, cache=str(tmp_path / "cache"))
        )
        for path in (tmp_path / name, tmp_path / "same.txt")
    ]
    first, second = ([*data.train.tolist(), *data.validation.tolist()] for data in made)
    assert made[0].tokenizer.decode(first) == made[1].tokenizer.decode(second) == WHOLE * 20


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "data-00000-of-00001.arrow"])
def test_memory_does_not_grow_with_the_records(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ["the same record again and again, of which there are many. " * 50] * 10_000)
    # Of Arrow's own memory, its pool tells; the rest is Python's.
    tracemalloc.start()
    before, most, count = pyarrow.total_allocated_bytes(), 0, 0
    for piece in sources.texts([str(tmp_path / name)]):
        count += len(piece)
        most = max(most, pyarrow.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2901 * 10_000 and peak < 14e6 and most < 14e6


Harm = Callable[[Path], object]
HARMS: dict[str, tuple[Harm, str]] = {
    "no field": (lambda p: (p / "a.jsonl").write_text('{"txt": "a", "n": 1}'), "has no field 'text', it has txt, n"),
    "no text": (lambda p: (p / "a.jsonl").write_text('{"text": 5}'), "text of record 1 is 5, expected text"),
    "no json": (lambda p: (p / "a.jsonl").write_text('{"text": "a"}\n{"te'), "a.jsonl: line 2 is no JSON record"),
    "no object": (lambda p: (p / "a.jsonl").write_text("[1]"), "line 1 is no JSON record (it is no object)"),
    "no column": (lambda p: parquet.write_table(table(["a"]).drop(["text"]), p / "a.parquet"), "has no field 'text'"),
    "a cut table": (lambda p: (p / "a.parquet").write_bytes(b"PAR1" + b"\0" * 30), "a.parquet: can't be read"),
    "no stream": (lambda p: (p / "a.arrow").write_bytes(b"ARROW1" + b"\0" * 30), "a.arrow: can't be read"),
    "splits": (
        lambda p: [(p / "dataset_dict.json").write_text("{}"), (p / "test").mkdir(), (p / "train").mkdir()],
        "holds the splits test, train of a data set: name one, for example --data.path",
    ),
}


@pytest.mark.parametrize("harm, expected", HARMS.values(), ids=list(HARMS))
def test_records_that_do_not_do_are_refused_in_a_sentence(tmp_path: Path, harm: Harm, expected: str) -> None:
    harm(tmp_path)
    with pytest.raises(HvdlmError) as caught:
        list(sources.texts([str(tmp_path)]))
    assert expected in str(caught.value)


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_LINE", 1000)
    monkeypatch.setattr(sources, "_CHUNK", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "a" * 5000)
    with pytest.raises(HvdlmError, match="line 1 is longer than 1,000 bytes"):
        list(sources.texts([str(tmp_path / "a.jsonl")]))
