"""Files that claim or unpack to far more than is stored are refused early, in bounded memory."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from test_preparation import files

from fuzz_targets import arrow_memory, huggingface_tokenizer
from hvdlm.config import Config, DataConfig
from hvdlm.errors import HvdlmError
from hvdlm_corpora import compression, preparation, sources, tables, time_limit, tokenizers, workers
from hvdlm_corpora.documents import Form
from hvdlm_corpora.passages import Passage, SpecialTokens
from hvdlm_inference import generation
from hvdlm_tasks import pairs
from record_files import PACKERS, WRITERS

FREE = compression.FREE
SMALLER = FREE // 8


def write_arrow_batches(path: Path, *columns: pyarrow.Array, packed: str | None = None) -> None:
    schema = pyarrow.schema({"text": columns[0].type})
    options = pyarrow.ipc.IpcWriteOptions(compression=packed)
    with (
        pyarrow.OSFile(str(path), "wb") as file,
        pyarrow.ipc.new_stream(file, schema, options=options) as stream,
    ):
        for column in columns:
            stream.write_batch(pyarrow.record_batch([column], schema=schema))


def repeated(text: str, count: int) -> pyarrow.Array:
    """Return a column whose dictionary holds ``text`` once."""
    indices = pyarrow.array([0], pyarrow.int32()).take(pyarrow.array([0] * count, pyarrow.int32()))
    return pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array([text]))


def write_column(path: Path, column: pyarrow.Array, **options: object) -> None:
    parquet.write_table(pyarrow.table({"text": column}), path, **options)


def write_prefixes(path: Path) -> None:
    """Write values of which each repeats the one before it (DELTA_BYTE_ARRAY)."""
    column = pyarrow.array(["x" * 2**17] * 1000)
    encoding = {"text": "DELTA_BYTE_ARRAY"}
    write_column(path, column, use_dictionary=False, column_encoding=encoding, compression="none")


LONG = pyarrow.array(["x" * 2**27])
BOMBS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "a dictionary of Parquet": ("a.parquet", lambda path: write_column(path, repeated("x" * 2**20, 2000))),
    "prefixes in Parquet": ("a.parquet", write_prefixes),
    "nulls in Parquet": ("a.parquet", lambda path: write_column(path, pyarrow.nulls(5_000_000, pyarrow.string()))),
    "empty texts in Parquet": ("a.parquet", lambda path: write_column(path, repeated("", 5_000_000))),
    "a page of Parquet": ("a.parquet", lambda path: write_column(path, LONG, compression="zstd")),
    "a dictionary of Arrow": ("a.arrow", lambda path: write_arrow_batches(path, repeated("x" * 2**20, 2000))),
    "packed Arrow": ("a.arrow", lambda path: write_arrow_batches(path, LONG, packed="zstd")),
    "packed batches of Arrow": (
        "a.arrow",
        lambda path: write_arrow_batches(path, *[pyarrow.array(["x" * 2**23])] * 16, packed="zstd"),
    ),
    **{
        f"packed {suffix}": (
            f"a.txt{suffix}",
            lambda path, pack=pack: path.write_bytes(pack(b"the same line\n" * 1_000_000)),
        )
        for suffix, pack in PACKERS.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name, write", BOMBS.values(), ids=list(BOMBS))
def test_bombs_end_within_bounds_of_memory_and_time(
    name: str, write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    write(path)
    monkeypatch.setattr(compression, "FREE", SMALLER)
    form = Form(max_expansion=min(1000.0, SMALLER / path.stat().st_size))  # gzip packs no text 1,000 times smaller
    tracemalloc.start()
    began = time.process_time()
    try:
        with arrow_memory() as pool, pytest.raises(HvdlmError, match=r"bomb.*raise --data\.max_expansion"):
            for _ in sources.text_chunks(str(path), form):
                pass
        seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
    assert peak < FREE and seconds < 10


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_an_option_lifts_the_limit_of_expansion(name: str, tmp_path: Path) -> None:
    text = "x" * 2**16
    if name == "a.parquet":
        write_column(tmp_path / name, repeated(text, 2000))
    else:
        write_arrow_batches(tmp_path / name, repeated(text, 2000))
    with pytest.raises(HvdlmError, match="unpacks to more than 1,000 times its size"):
        next(sources.text_chunks(str(tmp_path / name)))
    chunks = sources.text_chunks(str(tmp_path / name), Form(max_expansion=1e5))
    assert sum(len(chunk.text) for chunk in chunks) == 2000 * (len(text) + 1)


def test_the_option_reaches_the_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "FREE", 10**6)
    write_column(tmp_path / "a.parquet", repeated("x" * 1000, 10_000))
    config = DataConfig(path=str(tmp_path / "a.parquet"), tokenizer="byte", cache=str(tmp_path / "cache"))
    with pytest.raises(HvdlmError, match=r"raise --data\.max_expansion"):
        preparation.prepare(config)
    config.max_expansion = 1e5
    assert len(preparation.prepare(config).train) > 10**6


@pytest.mark.parametrize("name", ["x.parquet", "data-00000-of-00001.arrow"])
def test_repetitive_tables_of_ordinary_size_are_read(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, ["the same line"] * 200_000)
    assert sum(len(text) for text in sources.texts([str(tmp_path / name)])) == 14 * 200_000


@pytest.mark.parametrize("name", ["x.parquet", "data-00000-of-00001.arrow"])
def test_a_long_record_is_read_in_ten_times_its_size(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, ["short", "".join(map(str, range(1_200_000))), "short"])
    size = (tmp_path / name).stat().st_size
    tracemalloc.start()
    count = sum(len(text) for text in sources.texts([str(tmp_path / name)]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count > 7e6 and peak < FREE + 10 * size


# Tokenization


def tokenizer_with(pattern: str) -> tokenizers.Tokenizer:
    """Return a tokenizer that splits text by a regular expression."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return tokenizers.BPETokenizer(huggingface_tokenizer(pre_tokenizer=split, normalizer=None))


QUADRATIC = "a(?=a*b)"


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow a second for a text."""
    monkeypatch.setattr(time_limit, "_SECONDS", 1.0)
    monkeypatch.setattr(time_limit, "_SECONDS_PER_MB", 1.0)


@pytest.mark.usefixtures("budget")
def test_a_text_that_takes_too_long_to_encode_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(tokenizer_with(QUADRATIC).to_json()))
    (tmp_path / "a.txt").write_text(("a" * 40_000 + " ") * 10)
    config = DataConfig(path=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "t.json"), cache=str(tmp_path / "cache"))
    began = time.monotonic()
    with pytest.raises(
        HvdlmError, match=r"a\.txt, before byte 4[0-9,]+: the tokenizer takes more than 1 s for"
    ) as caught:
        preparation.prepare(config, processes=1)
    assert QUADRATIC in str(caught.value) and time.monotonic() - began < 60
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock"]


@pytest.mark.usefixtures("budget")
def test_an_ordinary_tokenizer_stays_within_its_budget(tmp_path: Path) -> None:
    text = "To be, or not to be, that is the question. " * 5000
    trained = tokenizers.train("bpe", 300, [text])
    passage = Passage(text, True, (len(text),), SpecialTokens())
    assert (workers.encode(trained, passage).ids == trained.encode(text)).all()
    (tmp_path / "a.txt").write_text(text)
    one, two = (
        preparation.prepare(
            DataConfig(path=str(tmp_path / "a.txt"), tokenizer="bpe", vocab_size=300), str(tmp_path / f"{n}"), n
        )
        for n in (1, 2)
    )
    assert files(one.folder) == files(two.folder)


@pytest.mark.usefixtures("budget")
def test_prompts_and_pairs_have_a_budget_too() -> None:
    tokenizer = tokenizer_with(QUADRATIC)
    encoders = [
        lambda tokenizer, text: generation.encode(tokenizer, text, Config()),
        lambda tokenizer, text: pairs.Sentences(tokenizer, ["a", text], 10),
    ]
    for encode in encoders:
        with pytest.raises(HvdlmError, match="the tokenizer takes more than 1 s for"):
            encode(tokenizer, "a" * 40_000)


@pytest.mark.usefixtures("budget")
def test_an_error_of_the_tokenizer_is_passed_on() -> None:
    with pytest.raises(HvdlmError, match="the tokenizer fails"):
        workers.encode(tokenizer_with("(a+)+$"), Passage("a" * 40_000 + "b", True, (), SpecialTokens()))


def test_claims_are_checked_before_any_page_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_column(tmp_path / "a.parquet", pyarrow.array(["x" * 1000] * 100), use_dictionary=False)
    form = Form()
    with parquet.ParquetFile(tmp_path / "a.parquet") as file:
        assert tables._check_pages(str(tmp_path / "a.parquet"), form, file.metadata) == (256, [100])
        monkeypatch.setattr(compression, "FREE", 1000)
        with pytest.raises(HvdlmError, match=r"unpack to 100,4[0-9]+ at once"):
            tables._check_pages(str(tmp_path / "a.parquet"), form, file.metadata)
