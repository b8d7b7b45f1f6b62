"""Corpora of records: JSON lines, Parquet and the folders of Hugging Face datasets read as one text."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow.parquet import write_table

from hvdlm.config import DataConfig
from hvdlm.errors import HvdlmError
from hvdlm_corpora import documents, preparation, sources
from hvdlm_corpora.documents import Form
from record_files import WRITERS, record_table, write_arrow, write_data_set, write_data_set_splits, write_hub_splits

TEXTS = ["To be, or not to be", "that is the question:\nwhether", "红楼梦", ""]
WHOLE = "".join(f"{text}\n" for text in TEXTS)


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
    monkeypatch.setattr(documents, "_CHUNK", 20)
    chunks = list(sources.texts([str(path)]))
    assert "".join(chunks) == WHOLE and len(chunks) == 2


@pytest.mark.parametrize("name", list(WRITERS))
def test_records_become_the_tokens_of_their_text(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, TEXTS * 20)
    (tmp_path / "same.txt").write_text(WHOLE * 20)
    prepared_folders = [
        preparation.prepare(
            DataConfig(path=[str(path)], tokenizer="bpe", vocab_size=300, cache=str(tmp_path / "cache"))
        )
        for path in (tmp_path / name, tmp_path / "same.txt")
    ]
    first, second = ([*data.train[:].tolist(), *data.validation[:].tolist()] for data in prepared_folders)
    assert prepared_folders[0].tokenizer.decode(first) == prepared_folders[1].tokenizer.decode(second) == WHOLE * 20


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet", "data-00000-of-00001.arrow"])
def test_memory_does_not_grow_with_the_records(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ["the same record again and again, of which there are many. " * 50] * 10_000)
    # Arrow reports its own memory; the rest is Python's.
    tracemalloc.start()
    before, most, count = pyarrow.total_allocated_bytes(), 0, 0
    for chunk in sources.texts([str(tmp_path / name)]):
        count += len(chunk)
        most = max(most, pyarrow.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2901 * 10_000 and peak < 14e6 and most < 14e6


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("field, words", [("a.b", "xyv"), ("a.c.0.b", "uw"), ("a.c.1.b", "q"), ("a", "s")])
def test_nested_fields_are_read(tmp_path: Path, suffix: str, field: str, words: str) -> None:
    lines = [
        {"a": {"b": "x", "c": [{"b": "u"}, {"b": "q"}]}},
        {"a": {"b": "y", "c": []}},
        {"a": {"b": None, "c": [{"b": "w"}]}},
        {"a": [1], "a.b": "v"},
        {"a": "s"},
    ]
    if field == "a":
        lines = lines[-1:]
    text = json.dumps(lines) if suffix == ".json" else "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / f"x{suffix}").write_text(text)
    for path in (tmp_path / f"x{suffix}", tmp_path):
        assert "".join(sources.texts([str(path)], Form(field, ""))) == words
    with pytest.raises(HvdlmError, match="has no field 'a\\.d', it has a"):
        list(sources.texts([str(tmp_path / f"x{suffix}")], Form("a.d")))


def write_bad_state(folder: Path, state: str) -> None:
    """Write a data set whose ``state.json`` is damaged."""
    write_data_set(folder, ["a"])
    (folder / "state.json").write_text(state)


Harm = Callable[[Path], object]
HARMS: dict[str, tuple[Harm, str]] = {
    "no field": (lambda p: (p / "a.jsonl").write_text('{"txt": "a", "n": 1}'), "has no field 'text', it has txt, n"),
    "no text": (lambda p: (p / "a.jsonl").write_text('{"text": 5}'), "text of record 1 is 5, expected text"),
    "no json": (lambda p: (p / "a.jsonl").write_text('{"text": "a"}\n{"te'), "a.jsonl: line 2 is not a JSON record"),
    "no object": (lambda p: (p / "a.jsonl").write_text("[1]"), "line 1 is not a JSON record (it is not an object)"),
    "no column": (
        lambda p: write_table(record_table(["a"]).drop(["text"]), p / "a.parquet"),
        "has no field 'text'",
    ),
    "a cut table": (lambda p: (p / "a.parquet").write_bytes(b"PAR1" + b"\0" * 30), "a.parquet: can't be read"),
    "no stream": (lambda p: (p / "a.arrow").write_bytes(b"ARROW1" + b"\0" * 30), "a.arrow: can't be read"),
    "splits below": (
        lambda p: write_data_set_splits(p / "set", train=["a"], test=["b"]),
        "set holds the splits test, train of a data set: name it, or one of them, for example --data.path",
    ),
    "a list of files that leads out": (
        lambda p: write_bad_state(p, '{"_data_files": [{"filename": "../x.arrow"}]}'),
        "state.json: is damaged or not of a Hugging Face data set",
    ),
    "a list of files that is none": (
        lambda p: write_bad_state(p, '{"_data_files": [5]}'),
        "state.json: is damaged or not of a Hugging Face data set",
    ),
    "no list of files": (
        lambda p: write_bad_state(p, "[["),
        "state.json: is damaged or not of a Hugging Face data set",
    ),
}


@pytest.mark.parametrize("harm, expected", HARMS.values(), ids=list(HARMS))
def test_malformed_records_are_refused_in_one_sentence(tmp_path: Path, harm: Harm, expected: str) -> None:
    harm(tmp_path)
    with pytest.raises(HvdlmError) as caught:
        list(sources.texts([str(tmp_path)]))
    assert expected in str(caught.value)


def test_an_overlong_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "_MAX_LINE", 1000)
    monkeypatch.setattr(sources, "_CHUNK", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "a" * 5000)
    with pytest.raises(HvdlmError, match="line 1 is longer than 1,000 bytes"):
        list(sources.texts([str(tmp_path / "a.jsonl")]))


# Data sets of Hugging Face


MANY = [f"record {i}: {text}" for i in range(1100) for text in TEXTS]


def test_a_sharded_data_set_with_nested_features_is_read(tmp_path: Path) -> None:
    write_data_set(tmp_path / "set", MANY, 3)
    assert "".join(sources.texts([str(tmp_path / "set")])) == "".join(f"{text}\n" for text in MANY)


def test_files_outside_the_data_set_are_ignored(tmp_path: Path) -> None:
    write_data_set(tmp_path / "set", ["an earlier state"] * 9, 2)
    write_data_set(tmp_path / "set", MANY, 1)
    write_arrow(tmp_path / "set" / "cache-1dad339083a48ce6.arrow", ["mapped"] * 9)
    assert "".join(sources.texts([str(tmp_path)])) == "".join(f"{text}\n" for text in MANY)


def prepared(path: Path, **options: Any) -> tuple[str, str]:
    """Return the training and the validation text."""
    data = preparation.prepare(
        DataConfig(path=str(path), tokenizer="byte", cache=str(path.parent / "cache"), **options)
    )
    return data.tokenizer.decode(data.train[:].tolist()), data.tokenizer.decode(data.validation[:].tolist())


@pytest.mark.parametrize("write", [write_data_set_splits, write_hub_splits])
def test_named_splits_are_used_for_training_and_validation(write: Callable[..., None], tmp_path: Path) -> None:
    texts = {name: [f"{name} 1", f"{name} 2"] for name in ("train", "validation", "test")}
    write(tmp_path / "set", **texts)
    assert prepared(tmp_path / "set") == ("train 1\ntrain 2\n", "validation 1\nvalidation 2\n")
    assert prepared(tmp_path / "set", split="test") == ("test 1\ntest 2\n", "validation 1\nvalidation 2\n")
    (tmp_path / "held.txt").write_text("held out")
    assert prepared(tmp_path / "set", validation_path=str(tmp_path / "held.txt"))[1] == "held out"
    halves = prepared(tmp_path / "set", split="validation", validation_share=0.5)
    assert halves == ("validation 1\n", "validation 2\n")
    (tmp_path / "text.txt").write_text("text")
    assert prepared(tmp_path / "text.txt", validation_path=str(tmp_path / "set")) == ("text", halves[0] + halves[1])
    with pytest.raises(
        HvdlmError, match=r"has no split 'tset' \(--data.split\); did you mean test\? Known: test, train"
    ):
        prepared(tmp_path / "set", split="tset")


def test_without_a_validation_split_a_share_is_held_out(tmp_path: Path) -> None:
    write_data_set_splits(tmp_path / "set", train=["0123456789"] * 10, test=["test"])
    assert [len(text) for text in prepared(tmp_path / "set")] == [99, 11]
    write_data_set_splits(tmp_path / "other", train=["train"], val=["val"], dev=["dev"])
    assert prepared(tmp_path / "other") == ("train\n", "val\n")


def test_splits_outside_the_folder_are_refused(tmp_path: Path) -> None:
    write_data_set_splits(tmp_path / "set", train=["a"])
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["../other"]}')
    with pytest.raises(HvdlmError, match=r"dataset_dict\.json: is damaged or not of a Hugging Face data set"):
        prepared(tmp_path / "set")
