"""Text becomes tokens and tokens become batches: the same on every machine, every rank, every resume."""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hvdlm.config import DataConfig
from hvdlm.errors import HvdlmError, RankError
from hvdlm_corpora import preparation, sources, tokenizers
from hvdlm_language import sampler
from launching import DATA

TEXT = "To be, or not to be:\nthat is the question.\n红楼梦，石头记。\n" * 40
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the public corpora are not in {DATA}: set HVDLM_DATA")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def config(path: Path | str | list[str], cache: Path, **more: object) -> DataConfig:
    return DataConfig(path=path if isinstance(path, list) else [str(path)], cache=str(cache), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
@given(text=st.text(min_size=1, max_size=200))
@settings(max_examples=25, deadline=None)
def test_encoding_and_decoding_round_trip(name: str, text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    assume(text)
    tokenizer = tokenizers.train(name, 300, [text])
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < tokenizer.vocab
    assert tokenizer.decode(ids.tolist()) == text
    again = tokenizers.from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.hash == tokenizer.hash and again.encode(text).tolist() == ids.tolist()


def test_words_have_a_vocabulary_and_an_unknown() -> None:
    tokenizer = tokenizers.train("word", 5, ["a b b c c c\nd a\n"])
    assert tokenizer.vocab == 5
    assert tokenizer.decode(tokenizer.encode("c b x\na\n").tolist()) == "c b <unk>\na\n"


def test_an_unknown_character_is_named() -> None:
    with pytest.raises(HvdlmError, match="character 'é' is not among the 3"):
        tokenizers.train("char", None, ["abc"]).encode("abé")


def test_a_hugging_face_tokenizer_json_is_used(corpus: Path, tmp_path: Path) -> None:
    trained = tokenizers.train("bpe", 320, [TEXT])
    (tmp_path / "tokenizer.json").write_text(json.dumps(trained.to_json()["description"]))
    data = preparation.prepare(config(corpus, tmp_path / "c", tokenizer=str(tmp_path / "tokenizer.json")))
    assert data.tokenizer.hash == trained.hash


def test_files_folders_globs_gzip_and_lists_read_as_one_text(tmp_path: Path) -> None:
    folder = tmp_path / "texts" / "deep"
    folder.mkdir(parents=True)
    (folder.parent / "b.txt").write_text("second\n")
    (folder / "c.md").write_text("third\n")
    (folder / "image.png").write_bytes(b"\x89")
    with gzip.open(tmp_path / "a.gz", "wt") as file:
        file.write("first\n")
    assert "".join(sources.texts([str(tmp_path / "a.gz"), str(tmp_path / "texts")])) == "first\nsecond\nthird\n"
    assert "".join(sources.texts([str(tmp_path / "texts" / "**" / "*.md")])) == "third\n"


def test_chunks_never_split_a_word_or_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_CHUNK", 7)
    (tmp_path / "t.txt").write_text(TEXT)
    chunks = list(sources.texts([str(tmp_path / "t.txt")]))
    assert "".join(chunks) == TEXT and len(chunks) > 50
    assert all(chunk[-1] in " \n" for chunk in chunks)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "large.txt").write_text("the same line again and again\n" * 1_000_000)
    tracemalloc.start()
    preparation.prepare(config(tmp_path / "large.txt", tmp_path / "cache"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24e6 < (tmp_path / "large.txt").stat().st_size


def test_standard_input_is_kept_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    kept = preparation.without_stdin(config(["-"], tmp_path))
    assert Path(kept.paths[0]).read_text() == TEXT and kept.paths[0] != "-"
    data = preparation.prepare(kept)
    assert len(data.train) + len(data.validation) == len(TEXT)


def test_the_header_describes_the_tokens(corpus: Path, tmp_path: Path) -> None:
    import hashlib

    data = preparation.prepare(config(corpus, tmp_path / "cache"))
    header = json.loads((data.folder / "header.json").read_text())
    assert header["dtype"] == "uint16" and header["tokenizer"] == data.tokenizer.hash
    assert header["sources"] == {str(corpus): hashlib.sha256(corpus.read_bytes()).hexdigest()}
    assert (header["train"], header["validation"]) == (len(data.train), len(data.validation))


def test_a_truncated_token_file_is_an_error(corpus: Path, tmp_path: Path) -> None:
    data = preparation.prepare(config(corpus, tmp_path / "cache"))
    before = data.train[10:20].copy()
    os.truncate(data.folder / "tokens.bin", 2 * 20)
    assert data.train[10:20].tolist() == before.tolist()
    for ids in (slice(11, 21), slice(len(data.train) - 3, None)):
        with pytest.raises(RankError, match=r"tokens.bin has been truncated while it was in use: delete "):
            data.train[ids]
    with pytest.raises(RankError, match="truncated"):
        data.validation[:1]


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
@pytest.mark.parametrize("share", [0.1, 0.37])
def test_validation_bytes_count_the_validation_text(
    corpus: Path, tmp_path: Path, name: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_CHUNK", 100)
    data = preparation.prepare(config(corpus, tmp_path / "c", tokenizer=name, vocab_size=300, validation_share=share))
    whole = np.concatenate([data.train[:], data.validation[:]])
    assert data.tokenizer.decode(whole.tolist()) == TEXT
    bytes_ = len(data.tokenizer.decode(data.validation[:].tolist()).encode())
    assert abs(data.validation_bytes - bytes_) <= 6  # a character may be cut in two


def test_a_changed_corpus_or_setting_is_tokenized_anew(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = preparation.prepare(config(corpus, cache))
    assert preparation.prepare(config(corpus, cache)).folder == first.folder
    assert preparation.prepare(config(corpus, cache, tokenizer="byte")).folder != first.folder
    corpus.write_text(TEXT + "more")
    os.utime(corpus, ns=(1, 1))
    assert preparation.prepare(config(corpus, cache)).folder != first.folder


@needs_data
@pytest.mark.parametrize(
    "file, more, vocab, train, validation",
    [
        ("tinyshakespeare.txt", {}, 65, 1_003_854, 111_540),
        ("ptb/ptb.train.txt", {"tokenizer": "word", "validation_path": "ptb/ptb.valid.txt"}, 10_000, 929_589, 73_760),
        ("hongloumeng.txt", {}, 4_447, 794_196, 88_244),
    ],
)
def test_public_corpora_have_their_published_sizes(
    tmp_path: Path, file: str, more: dict[str, str], vocab: int, train: int, validation: int
) -> None:
    if "validation_path" in more:
        more = {**more, "validation_path": str(DATA / more["validation_path"])}
    data = preparation.prepare(config(DATA / file, tmp_path, **more))
    assert (data.tokenizer.vocab, len(data.train), len(data.validation)) == (vocab, train, validation)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_the_shuffle_is_a_permutation(size: int, key: int) -> None:
    assert sorted(sampler.permute(np.arange(size), size, key).tolist()) == list(range(size))


@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 50), st.integers(20, 400), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_global_batch_depends_on_seed_and_step_alone(
    ranks: int, share: int, step: int, count: int, seed: int
) -> None:
    tokens, context, batch = np.arange(count, dtype=np.uint16), 7, ranks * share
    whole = sampler.ShuffledSampler(tokens, context, batch, seed).rows(step * batch, (step + 1) * batch)
    fresh = sampler.ShuffledSampler(tokens, context, batch, seed)
    rank_rows = [fresh.rows(step * batch + r * share, step * batch + (r + 1) * share) for r in range(ranks)]
    np.testing.assert_array_equal(whole[0], np.concatenate([rows[0] for rows in rank_rows]))
    np.testing.assert_array_equal(whole[1], whole[0] + 1)
    assert whole[0].shape == (batch, context) and whole[0].dtype == np.int32


def test_every_epoch_shows_each_window_once_at_new_offsets() -> None:
    tokens, context = np.arange(1000, dtype=np.uint16), 9
    shuffled = sampler.ShuffledSampler(tokens, context, 10, seed=3)
    rows = np.concatenate([shuffled.rows(s, s + 10)[0] for s in range(0, 2 * shuffled.windows - 9, 10)])
    first, second = rows[: shuffled.windows, 0], rows[shuffled.windows : 2 * shuffled.windows - 10, 0]
    assert len(set(first.tolist())) == shuffled.windows
    assert set(np.diff(np.sort(first))) == {context} and first.tolist() != sorted(first.tolist())
    assert set(second.tolist()) != set(first.tolist())


def test_sequential_rows_continue_the_last_step() -> None:
    tokens = np.arange(1001, dtype=np.uint16)
    reader = sampler.SequentialSampler(tokens, 10, 4)
    for step in range(reader.windows):
        inputs, targets, weights, reset, _ = reader.rows(4 * step + 1, 4 * step + 3)
        assert reset == (step == 0) and weights is None
        assert inputs[:, 0].tolist() == [250 + 10 * step, 500 + 10 * step]
        np.testing.assert_array_equal(targets, inputs + 1)
    assert reader.rows(4 * reader.windows, 4 * reader.windows + 4)[3]


@pytest.mark.parametrize("split", [sampler.independent_windows, sampler.parallel_streams])
@given(
    length=st.integers(20, 700),
    context=st.integers(1, 33),
    rows=st.integers(1, 9),
    ranks=st.integers(1, 4),
    limit=st.integers(1, 800),
)
@settings(deadline=None)
def test_a_limited_evaluation_counts_that_many_targets_once(
    split: Callable, length: int, context: int, rows: int, ranks: int, limit: int
) -> None:
    tokens = np.arange(length, dtype=np.uint16)
    counted = []
    for rank in range(ranks):
        for inputs, targets, weights, *_ in split(tokens, context, rows, rank, ranks, limit):
            kept = np.ones(targets.shape, bool) if weights is None else weights > 0
            assert (targets[kept] == inputs[kept] + 1).all()
            counted += targets[kept].tolist()
    assert len(set(counted)) == len(counted) <= length - 1
    if limit >= length - 1:
        assert len(counted) == length - 1
    else:
        assert limit - context < len(counted) < limit + max(context, rows)
    if split is sampler.independent_windows and len(counted) > 2 * context:
        assert min(counted) <= context and max(counted) > (length - 1) / 3


@pytest.mark.parametrize("split", [sampler.independent_windows, sampler.parallel_streams])
@given(st.integers(2, 500), st.integers(1, 20), st.integers(1, 9), st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_evaluation_predicts_every_token_exactly_once(split, count: int, context: int, rows: int, size: int) -> None:  # type: ignore[no-untyped-def]
    tokens = np.arange(count, dtype=np.uint16)
    seen: list[int] = []
    for rank in range(size):
        for inputs, targets, weights, *_ in split(tokens, context, rows, rank, size):
            counted = np.ones_like(targets, bool) if weights is None else weights > 0
            np.testing.assert_array_equal(targets[counted], inputs[counted] + 1)
            seen += targets[counted].tolist()
    assert sorted(seen) == list(range(1, count))


@pytest.mark.parametrize("split", [sampler.independent_windows, sampler.parallel_streams])
@given(st.integers(2, 500), st.integers(1, 20), st.integers(1, 9), st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_evaluation_batches_of_a_rank_have_one_shape(split, count: int, context: int, rows: int, size: int) -> None:  # type: ignore[no-untyped-def]
    tokens = np.arange(count, dtype=np.uint16)
    for rank in range(size):
        batches = list(split(tokens, context, rows, rank, size))
        assert len({(inputs.shape, targets.shape, weights is None) for inputs, targets, weights, *_ in batches}) <= 1
        assert all(inputs.shape[0] <= rows and inputs.shape[1] <= context for inputs, *_ in batches)
