"""Writers of corpora of records: JSON, CSV, Parquet, Arrow, packed files, and the folders of Hugging Face datasets."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet


def write_json_lines(path: Path, texts: list[str]) -> None:
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")


def write_packed_lines(path: Path, texts: list[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_json_array(path: Path, texts: list[str]) -> None:
    records = [{"tags": ["[", {"}": '"\\'}], "text": text, "id": i} for i, text in enumerate(texts)]
    path.write_text(json.dumps(records, indent=1), encoding="utf-8")


def write_csv(path: Path, texts: list[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        rows.writerow(["id", "text"])
        rows.writerows(enumerate(texts))


def _zstandard(data: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": _zstandard,
}

SCHEMA = pyarrow.schema({"id": pyarrow.int64(), "text": pyarrow.string()})


def record_table(texts: list[str]) -> pyarrow.Table:
    return pyarrow.table({"id": list(range(len(texts))), "text": texts}, SCHEMA)


def write_parquet(path: Path, texts: list[str]) -> None:
    parquet.write_table(record_table(texts), path, row_group_size=max(2, len(texts) // 20))


def write_arrow(path: Path, texts: list[str]) -> None:
    """Write as ``Dataset.save_to_disk`` does: an IPC stream."""
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, SCHEMA) as stream:
        for start in range(0, len(texts), 1000):
            stream.write_table(record_table(texts[start : start + 1000]))


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


def write_data_set(folder: Path, texts: list[str], shards: int = 1) -> None:
    """Write the files that ``Dataset.save_to_disk(folder, num_shards=shards)`` of datasets 5.2.0 writes."""
    folder.mkdir(parents=True, exist_ok=True)
    everything, names = nested(texts), [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    size, longer = divmod(len(texts), shards)
    for number, name in enumerate(names):
        first = number * size + min(number, longer)
        shard = everything.slice(first, size + (number < longer))
        with (
            pyarrow.OSFile(str(folder / name), "wb") as file,
            pyarrow.ipc.new_stream(file, everything.schema) as stream,
        ):
            stream.write_table(shard, 1000)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "1dad339083a48ce6", **STATE}
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True))
    info = {"citation": "", "description": "", "features": FEATURES, "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))


def write_data_set_splits(folder: Path, **splits: list[str]) -> None:
    """Write the files that ``DatasetDict.save_to_disk`` writes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))
    for name, texts in splits.items():
        write_data_set(folder / name, texts, 2)


WRITERS: dict[str, Callable[[Path, list[str]], None]] = {
    "x.jsonl": write_json_lines,
    "x.jsonl.gz": write_packed_lines,
    "x.json": write_json_array,
    "x.csv": write_csv,
    "x.tsv": write_csv,
    "x.parquet": write_parquet,
    "data-00000-of-00001.arrow": write_arrow,
}


def write_hub_splits(folder: Path, **splits: list[str]) -> None:
    """Write the files that ``push_to_hub`` writes."""
    (folder / "data").mkdir(parents=True)
    for name, texts in splits.items():
        for number in range(2):
            write_parquet(folder / "data" / f"{name}-{number:05d}-of-00002.parquet", texts[number::2])
