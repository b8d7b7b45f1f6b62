"""Corpora of records: JSON lines, Parquet and the folders of Hugging Face datasets read as one text."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from hvdlm.config import DataConfig
from hvdlm.data import documents, preparation, sources
from hvdlm.data.documents import Form
from hvdlm.errors import HvdlmError

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


FEATURES = {
    "id": {"dtype": "int64", "_type": "Value"},
    "text": {"dtype": "string", "_type": "Value"},
    "meta": {"url": {"dtype": "string", "_type": "Value"}, "score": {"dtype": "float32", "_type": "Value"}},
    "tags": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    "label": {"names": ["a", "b"], "_type": "ClassLabel"},
}
STATE = {
    "_format_columns": None,
    "_format_kwargs": {},
    "_format_type": None,
    "_output_all_columns": False,
    "_split": None,
}


def nested(texts: list[str]) -> pyarrow.Table:
    """Return a table with the features that FEATURES describes, as ``datasets`` keeps them in memory."""
    meta = pyarrow.struct({"url": pyarrow.string(), "score": pyarrow.float32()})
    fields = {"id": pyarrow.int64(), "text": pyarrow.string(), "meta": meta, "tags": pyarrow.list_(pyarrow.string())}
    described = json.dumps({"info": {"features": FEATURES}})
    schema = pyarrow.schema({**fields, "label": pyarrow.int64()}, {"huggingface": described})
    columns: dict[str, list[Any]] = {"id": list(range(len(texts))), "text": texts}
    columns["meta"] = [{"url": f"u{i}", "score": i / 2} for i in range(len(texts))]
    columns |= {"tags": [["x"] * (i % 3) for i in range(len(texts))], "label": [i % 2 for i in range(len(texts))]}
    return pyarrow.table(columns, schema)


def write_set(folder: Path, texts: list[str], shards: int = 1) -> None:
    """Write the files that ``Dataset.save_to_disk(folder, num_shards=shards)`` of datasets 5.2.0 writes."""
    folder.mkdir(parents=True, exist_ok=True)
    whole, names = nested(texts), [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    size, longer = divmod(len(texts), shards)
    for number, name in enumerate(names):
        first = number * size + min(number, longer)
        part = whole.slice(first, size + (number < longer))
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, whole.schema) as stream:
            stream.write_table(part, 1000)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "1dad339083a48ce6", **STATE}
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
    info = {"citation": "", "description": "", "features": FEATURES, "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))


def write_splits(folder: Path, **splits: list[str]) -> None:
    """Write the files that ``DatasetDict.save_to_disk`` writes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    for name, texts in splits.items():
        write_set(folder / name, texts, 2)


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
    "splits below": (
        lambda p: write_splits(p / "set", train=["a"], test=["b"]),
        "set holds the splits test, train of a data set: name it, or one of them, for example --data.path",
    ),
    "a list of files that leads out": (
        lambda p: [write_set(p, ["a"]), (p / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')],
        "state.json: is damaged or not of a data set of Hugging Face",
    ),
    "a list of files that is none": (
        lambda p: [write_set(p, ["a"]), (p / "state.json").write_text('{"_data_files": [5]}')],
        "state.json: is damaged or not of a data set of Hugging Face",
    ),
    "no list of files": (
        lambda p: [write_set(p, ["a"]), (p / "state.json").write_text("[[")],
        "state.json: is damaged or not of a data set of Hugging Face",
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


# Data sets of Hugging Face


MANY = [f"record {i}: {text}" for i in range(1100) for text in TEXTS]


def test_a_data_set_of_several_shards_and_nested_features_is_read(tmp_path: Path) -> None:
    write_set(tmp_path / "set", MANY, 3)
    assert "".join(sources.texts([str(tmp_path / "set")])) == "".join(f"{text}\n" for text in MANY)


def test_files_that_are_not_of_the_data_set_are_left_out(tmp_path: Path) -> None:
    write_set(tmp_path / "set", ["an earlier state"] * 9, 2)
    write_set(tmp_path / "set", MANY, 1)
    write_arrow(tmp_path / "set" / "cache-1dad339083a48ce6.arrow", ["mapped"] * 9)
    assert "".join(sources.texts([str(tmp_path)])) == "".join(f"{text}\n" for text in MANY)


def prepared(path: Path, **more: Any) -> tuple[str, str]:
    """Return the training and the validation text."""
    data = preparation.prepare(DataConfig(path=str(path), tokenizer="byte", cache=str(path.parent / "cache"), **more))
    return data.tokenizer.decode(data.train.tolist()), data.tokenizer.decode(data.validation.tolist())


def write_hub(folder: Path, **splits: list[str]) -> None:
    """Write the files that ``push_to_hub`` writes."""
    (folder / "data").mkdir(parents=True)
    for name, texts in splits.items():
        for number in range(2):
            write_parquet(folder / "data" / f"{name}-{number:05d}-of-00002.parquet", texts[number::2])


@pytest.mark.parametrize("write", [write_splits, write_hub])
def test_splits_of_a_data_set_are_what_they_are_called(write: Callable[..., None], tmp_path: Path) -> None:
    texts = {name: [f"{name} 1", f"{name} 2"] for name in ("train", "validation", "test")}
    write(tmp_path / "set", **texts)
    assert prepared(tmp_path / "set") == ("train 1\ntrain 2\n", "validation 1\nvalidation 2\n")
    assert prepared(tmp_path / "set", split="test") == ("test 1\ntest 2\n", "validation 1\nvalidation 2\n")
    (tmp_path / "held.txt").write_text("held out")
    assert prepared(tmp_path / "set", validation_path=str(tmp_path / "held.txt"))[1] == "held out"
    found = prepared(tmp_path / "set", split="validation", validation_share=0.5)
    assert found == ("validation 1\n", "validation 2\n")
    (tmp_path / "text.txt").write_text("text")
    assert prepared(tmp_path / "text.txt", validation_path=str(tmp_path / "set")) == ("text", found[0] + found[1])
    with pytest.raises(
        HvdlmError, match=r"has no split 'tset' \(--data.split\); did you mean test\? Known: test, train"
    ):
        prepared(tmp_path / "set", split="tset")


def test_a_data_set_without_a_validation_split_keeps_a_share(tmp_path: Path) -> None:
    write_splits(tmp_path / "set", train=["0123456789"] * 10, test=["test"])
    assert [len(text) for text in prepared(tmp_path / "set")] == [99, 11]
    write_splits(tmp_path / "other", train=["train"], val=["val"], dev=["dev"])
    assert prepared(tmp_path / "other") == ("train\n", "val\n")


def test_splits_that_lead_out_are_refused(tmp_path: Path) -> None:
    write_splits(tmp_path / "set", train=["a"])
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["../other"]}')
    with pytest.raises(HvdlmError, match=r"dataset_dict\.json: is damaged or not of a data set"):
        prepared(tmp_path / "set")
