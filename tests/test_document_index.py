"""The index of documents: written in preparation, read from token folders and Megatron's files, and rows made of it."""

from __future__ import annotations

import itertools
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_special_tokens import BEGIN, BOTH, ids_of, loaded, prepared, small_chunks, tokenizer_file
from token_writers import write_llm_c, write_megatron

from builders import both_frameworks
from hvdlm import cli
from hvdlm.config import Config, DataConfig
from hvdlm.data.documents import JoinedDocuments, SplitDocuments
from hvdlm.data.token_files import TokenData, open_tokens
from hvdlm.errors import HvdlmError
from hvdlm_corpora import mixture, preparation
from hvdlm_language import document_rows
from hvdlm_language.document_rows import DocumentRows
from hvdlm_language.language_model import LanguageModel
from hvdlm_language.sampler import MixtureSampler, ShuffledSampler
from hvdlm_language.sampler import document_rows as evaluated
from launching import ONE_LAYER, SMALL, launch, losses

assert small_chunks  # a fixture
RECORDS = ["To be", "", "or not to be,", "that is the question: 红楼梦 🙂"] * 10


def starts_of(data: TokenData) -> list[int]:
    """Return where all documents begin in all tokens; the validation split may begin inside of one."""
    assert data.train_documents is not None and data.validation_documents is not None
    held_out = data.validation_documents[:] + len(data.train)
    return [*data.train_documents[:].tolist(), *held_out.tolist()]


# Preparation


@pytest.mark.parametrize(
    "template, options, begin, end",
    [
        ((), {"document_token": "<|endoftext|>"}, [], ["<|endoftext|>"]),
        ((), {"document_token": {"begin": "<s>", "end": "</s>"}}, ["<s>"], ["</s>"]),
        ((), {"document_token": {"begin": "[PAD]"}, "separator": "</s>"}, ["[PAD]"], []),
        (BEGIN, {"document_token": {"begin": "<s>", "end": "</s>"}}, ["<s>"], ["</s>"]),
        (BOTH, {"document_token": "[PAD]", "add_special_tokens": False}, [], ["[PAD]"]),
        (BOTH, {}, ["<s>"], ["</s>"]),
        ((), {"rows": "documents"}, [], []),
    ],
)
@pytest.mark.parametrize("share", [0.1, 0.43])
def test_documents_get_their_tokens_and_an_index(
    tmp_path: Path, template: tuple[str, ...], options: dict[str, Any], begin: list[str], end: list[str], share: float
) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json", template)
    reference = loaded(path)
    expected: list[int] = []
    starts = []
    separator = options.get("separator", "\n")
    for record in RECORDS:
        starts.append(len(expected))
        if separator == "\n":
            record = record + separator
        expected += reference.convert_tokens_to_ids(begin) + reference(record, add_special_tokens=False)["input_ids"]
        expected += reference.convert_tokens_to_ids(end if separator == "\n" else [*end, separator])
    data = prepared(tmp_path, RECORDS, path, validation_share=share, **options)
    assert ids_of(data) == expected
    cut = len(data.train)
    assert starts_of(data) == sorted({*starts, cut})
    header = json.loads((data.folder / "header.json").read_text())
    assert (header["format"], header["documents"]) == ("hvdlm-tokens-3", len(RECORDS))
    stored = np.fromfile(data.folder / "documents.bin", "<i8")
    assert stored.tolist() == starts


@pytest.mark.usefixtures("small_chunks")
def test_documents_of_many_chunks_are_counted_once(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json")
    text = "or not to be " * 9000
    ids = prepared(tmp_path, text, path, document_token={"begin": 1}, validation_share=0.5)
    assert starts_of(ids) == [0, len(ids.train)] and ids_of(ids).count(1) == 1
    two = prepared(tmp_path, [text, text + "!"] * 3, path, document_token=1)
    starts = starts_of(two)[:6]
    assert starts_of(prepared(tmp_path, [text, text + "!"] * 3, path, 2, document_token=1))[:6] == starts
    whole = ids_of(two)
    assert [whole[start - 1] for start in starts[1:]] == [1] * 5 and whole.count(1) == 6


def test_folders_without_an_index_stay_as_they_were(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json")
    plain = prepared(tmp_path, RECORDS, path)
    assert plain.train_documents is None and sorted(p.name for p in plain.folder.iterdir()) == [
        "header.json",
        "tokenizer.json",
        "tokens.bin",
    ]
    assert json.loads((plain.folder / "header.json").read_text())["format"] == "hvdlm-tokens-2"
    task = Config(data=DataConfig(path=str(plain.folder), rows="documents", context=8))
    with pytest.raises(HvdlmError, match=r"has no index of documents: prepare the texts with --data.rows documents"):
        LanguageModel(task)
    indexed = prepared(tmp_path, RECORDS, path, rows="documents")
    assert indexed.folder != plain.folder and indexed.train_documents is not None


@pytest.mark.parametrize(
    "value, words",
    [
        ("To be or", "'To be or' is not one of the 27. tokens of the tokenizer"),
        (99999, "99999 is not one of"),
        (True, "end is True, expected a name or an id"),
        ({"start": 1}, "expected a token, begin or end"),
        ({}, "expected a token, begin or end"),
        ({"begin": "</s>"}, "begin is '</s>', and the tokenizer itself adds '<s>' there"),
    ],
)
def test_document_tokens_that_cannot_be_added(tmp_path: Path, value: Any, words: str) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json", BEGIN)
    with pytest.raises(HvdlmError, match=words) as error:
        prepared(tmp_path, RECORDS, path, document_token=value)
    assert len(str(error.value)) < 400
    with pytest.raises(HvdlmError, match="'é' is not one of"):
        preparation.prepare(DataConfig(path="embedded", document_token="é", cache=str(tmp_path / "cache")))


def test_document_tokens_are_options_of_the_command(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": record}) + "\n" for record in RECORDS))
    command = ["prepare", "--data.path", str(tmp_path / "t.jsonl"), "--data.tokenizer", str(path)]
    for number, (value, end) in enumerate([("<|endoftext|>", 272), ("7", 7), ("{begin: <s>, end: 8}", 8)]):
        out = tmp_path / f"out-{number}"
        assert cli.main([*command, "--output", str(out), "--data.document_token", value]) == 0
        ids = ids_of(open_tokens(out))
        assert ids[-1] == end and ids.count(end) >= len(RECORDS)


# Indices


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 60), st.integers(0, 60), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_a_split_has_the_documents_that_lie_in_it(lengths: list[int], first: int, count: int, shards: int) -> None:
    total = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    first, last = min(first, total), min(first + count, total)
    split = SplitDocuments(starts, first, last)
    inside = sorted({first, *(s for s in starts.tolist() if first < s < last)}) if first < last else []
    assert sorted(set(split[:].tolist())) == [position - first for position in inside]
    assert (np.diff(split[:]) >= 0).all() and split[1:3].tolist() == split[:].tolist()[1:3]
    edges = sorted({0, total, *np.linspace(0, total, shards, dtype=int).tolist()})
    cuts = list(itertools.pairwise(edges))
    joined = JoinedDocuments([(SplitDocuments(starts, low, high), low) for low, high in cuts])
    assert sorted(set(joined[:].tolist())) == sorted({*edges[:-1], *(s for s in starts.tolist() if s < total)})
    assert joined[2:5].tolist() == joined[:].tolist()[2:5]


@pytest.mark.parametrize("sentences", [1, 3])
def test_megatron_has_the_same_index(tmp_path: Path, sentences: int) -> None:
    lengths = [5, 1, 0, 30, 2, 0, 9, 0]
    documents = [list(range(length)) for length in lengths]
    path = write_megatron(tmp_path / "a.bin", documents, 8, sentences)
    data = preparation.prepare(DataConfig(path=str(path), vocab_size=99, validation_share=0.25))
    cut = int(47 * 0.75)
    assert sorted(set(starts_of(data))) == [0, 5, 6, cut, 36, 38]
    write_megatron(tmp_path / "b.bin", documents[:2])
    joined = preparation.prepare(DataConfig(path=[str(path), str(tmp_path / "b.bin")], vocab_size=99))
    assert len(joined.train) == 47 and sorted(set(starts_of(joined))) == [0, 5, 6, 36, 38, 47, 52]
    write_llm_c(tmp_path / "c.bin", documents)
    assert preparation.prepare(DataConfig(path=str(tmp_path / "c.bin"), vocab_size=99)).train_documents is None


# Rows


def rows_of(lengths: list[int], context: int) -> list[tuple[int, int]]:
    """Return the (first token, inputs) of all rows, as the definition says, document by document."""
    starts = np.cumsum([0, *lengths]).tolist()
    edge, block, rows = starts[-1] - 1, document_rows._BLOCK, []
    for number in range(0, len(lengths), block):
        limit = min(starts[min(number + block, len(lengths))], edge)
        position = min(starts[number], edge)
        while position < limit:
            ends = [end for end in (*starts, limit) if position < end <= min(position + context, limit)]
            stop = max(ends, default=position + context)
            rows.append((position, stop - position))
            position = stop
    return rows


lists_of_lengths = st.lists(st.one_of(st.integers(0, 6), st.integers(0, 40)), min_size=1, max_size=60).filter(
    lambda lengths: sum(lengths) > 1
)


@pytest.fixture(params=[1, 3, 512])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay out few documents at a time."""
    monkeypatch.setattr(document_rows, "_BLOCK", request.param)
    monkeypatch.setattr(document_rows, "_BLOCKS", 2)


@pytest.mark.usefixtures("small_blocks")
@given(lengths=lists_of_lengths, context=st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_rows_are_laid_out_as_defined(lengths: list[int], context: int) -> None:
    rows = DocumentRows(np.cumsum([0, *lengths[:-1]]), sum(lengths), context)
    starts, counts = rows.spans(np.arange(len(rows)))
    assert list(zip(starts.tolist(), counts.tolist(), strict=True)) == rows_of(lengths, context)
    backwards = rows.spans(np.arange(len(rows))[::-1])
    assert backwards[0].tolist() == starts[::-1].tolist() and backwards[1].tolist() == counts[::-1].tolist()


@pytest.mark.usefixtures("small_blocks")
@given(lengths=lists_of_lengths, context=st.integers(1, 12), batch=st.integers(1, 5), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_token_once(lengths: list[int], context: int, batch: int, seed: int) -> None:
    total, documents = sum(lengths), np.cumsum([0, *lengths[:-1]])
    tokens = np.arange(total, dtype=np.uint16)
    rows = DocumentRows(documents, total, context)
    sampler = ShuffledSampler(tokens, context, batch, seed, (), rows)
    boundaries = {*documents.tolist()}
    for epoch in range(2):
        seen: list[int] = []
        for row in range(epoch * len(rows), (epoch + 1) * len(rows)):
            inputs, targets, weights, reset, _ = sampler.rows(row, row + 1)
            assert weights is not None and reset and inputs.shape == targets.shape == weights.shape == (1, context)
            counted = weights[0] == 1
            used = inputs[0][counted].tolist()
            assert targets[0][counted].tolist() == [number + 1 for number in used] == [*used[1:], used[-1] + 1]
            assert not inputs[0][len(used) :].any() and used
            # A row begins with a document, or where one that is longer than a row continues.
            before = max(start for start in boundaries if start <= used[0])
            assert used[0] == before or (used[0] - before) % context == 0
            inside = sorted(start for start in boundaries if used[0] < start <= used[-1] + 1)
            assert used[-1] + 1 == total - 1 or inside[-1:] == [used[-1] + 1] or len(used) == context
            seen += used
        assert sorted(seen) == list(range(total - 1))  # the last token is a target alone


@pytest.mark.usefixtures("small_blocks")
@given(lengths=lists_of_lengths, ranks=st.integers(1, 4), share=st.integers(1, 4), step=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_rows_depend_on_seed_and_number_alone(lengths: list[int], ranks: int, share: int, step: int) -> None:
    tokens, rows = np.arange(sum(lengths)), DocumentRows(np.cumsum([0, *lengths[:-1]]), sum(lengths), 7)
    batch = ranks * share
    whole = ShuffledSampler(tokens, 7, batch, 3, (), rows).rows(step * batch, (step + 1) * batch)
    fresh = ShuffledSampler(tokens, 7, batch, 3, (), rows)
    shards = [fresh.rows(step * batch + r * share, step * batch + (r + 1) * share) for r in range(ranks)]
    for index in range(3):
        np.testing.assert_array_equal(whole[index], np.concatenate([shard[index] for shard in shards]))


@pytest.mark.usefixtures("small_blocks")
@given(lengths=lists_of_lengths, context=st.integers(1, 12), rows=st.integers(1, 5), size=st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_evaluation_by_documents_predicts_every_token_once(
    lengths: list[int], context: int, rows: int, size: int
) -> None:
    tokens = np.arange(sum(lengths))
    documents = DocumentRows(np.cumsum([0, *lengths[:-1]]), sum(lengths), context)
    seen: list[int] = []
    for rank in range(size):
        batches = list(evaluated(tokens, documents, context, rows, rank, size))
        assert len({inputs.shape for inputs, *_ in batches}) <= 1
        assert all(inputs.shape[0] <= rows for inputs, *_ in batches)
        for _, targets, weights, *_ in batches:
            assert weights is not None
            seen += targets[weights == 1].tolist()
    assert sorted(seen) == list(range(1, sum(lengths)))


def test_a_limited_evaluation_by_documents_is_spread_evenly() -> None:
    tokens = np.arange(9000)
    documents = DocumentRows(np.arange(0, 9000, 9), 9000, 20)  # two documents a row
    for limit, rows in ((1, 1), (1800, 100), (9000, 500), (10**6, 500)):
        seen: list[int] = []
        for rank in range(3):
            for _, targets, weights, *_ in evaluated(tokens, documents, 20, 7, rank, 3, limit):
                assert weights is not None
                seen += targets[weights == 1].tolist()
        expected = rows * 18 - (1 if rows == 500 else 0)
        assert len(set(seen)) == len(seen) and abs(len(seen) - expected) <= 18
        assert limit == 1 or (np.histogram(seen, 10, (0, 9000))[0] > len(seen) / 12).all()


def test_mixtures_are_made_of_rows_of_documents() -> None:
    corpora, documents = [], []
    for number, lengths in enumerate(([3, 9, 2] * 40, [5, 1] * 30)):
        corpora.append((10_000 * number + np.arange(sum(lengths)), 2.0 - number))
        documents.append(DocumentRows(np.cumsum([0, *lengths[:-1]]), sum(lengths), 6))
    mixed = MixtureSampler(corpora, 6, 16, 1, documents)
    inputs, targets, weights, *_ = mixed.rows(0, 1024)
    assert weights is not None and set(weights.sum(1).tolist()) >= {3.0, 5.0, 6.0}
    assert ((targets == inputs + 1) | (weights == 0)).all()
    from_first = inputs[:, 0] < 10_000
    assert abs(from_first.sum() - 1024 * 2 / 3) < 2
    assert all((row[0] % 10_000) % 6 == 0 for row in inputs[~from_first])  # whole documents of the second corpus


@pytest.mark.parametrize("starts", [[0, 5, 3], [1, 2], [-1, 4], [0, 2**40, 3]])
def test_a_damaged_index_is_refused(starts: list[int], tmp_path: Path) -> None:
    with pytest.raises(HvdlmError, match="its index of documents is damaged"):
        DocumentRows(np.array(starts), 9, 4)


def test_a_folder_with_another_index_is_refused(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json")
    folder = prepared(tmp_path, RECORDS, path, rows="documents").folder
    stored = np.fromfile(folder / "documents.bin", "<i8")
    stored[:-1].tofile(folder / "documents.bin")
    with pytest.raises(HvdlmError, match=r"documents.bin has 312 bytes, the header says 40 documents: delete it"):
        open_tokens(folder)
    np.append(stored[:-1], 3).tofile(folder / "documents.bin")
    config = Config(data=DataConfig(path=str(folder), rows="documents", context=8, validation_share=0.5))
    with pytest.raises(HvdlmError, match="its index of documents is damaged: prepare it again") as error:
        LanguageModel(config)
    assert str(folder) in str(error.value)
    (folder / "documents.bin").unlink()
    with pytest.raises(HvdlmError, match=r"is damaged or foreign"):
        open_tokens(folder)


def test_long_documents_take_no_memory() -> None:
    rows = DocumentRows(np.array([0, 3, 10**12]), 10**12 + 5, 1)
    assert len(rows) == 10**12 + 4
    starts, counts = rows.spans(np.array([0, 10**11, 10**12 + 3]))
    assert starts.tolist() == [0, 10**11, 10**12 + 3] and counts.tolist() == [1, 1, 1]


TOKENS, LENGTH = 10**10, 5000


def test_a_large_folder_opens_fast_in_little_memory(tmp_path: Path) -> None:
    """Ten billion tokens in a sparse file, and an index of two million documents."""
    folder = preparation.prepare(
        DataConfig(path="embedded", tokenizer="byte", document_token=0), str(tmp_path / "t")
    ).folder
    header = json.loads((folder / "header.json").read_text())
    header |= {"dtype": "uint16", "train": TOKENS - 10**6, "validation": 10**6, "documents": TOKENS // LENGTH}
    (folder / "header.json").write_text(json.dumps(header))
    (LENGTH * np.arange(TOKENS // LENGTH)).astype("<i8").tofile(folder / "documents.bin")
    with (folder / "tokens.bin").open("wb") as file:
        file.truncate(2 * TOKENS)
    config = Config(data=DataConfig(path=str(folder), context=1024))
    peaks, seconds = [], []
    for by_documents in ("windows", "documents"):
        config.data.rows = by_documents  # type: ignore[assignment]
        tracemalloc.start()
        began = time.thread_time()
        task = LanguageModel(config)
        seconds.append(time.thread_time() - began)
        for row in range(0, 400, 8):
            batch = task.rows(row, row + 8)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert batch.inputs.shape == (8, 1024)
    assert batch.weights is not None and set(batch.weights.sum(1).tolist()) <= {1024.0, 5000.0 % 1024}
    assert seconds[0] < 2.5 and seconds[1] < 5 and max(peaks) < 48e6  # about 0.1 s, 0.6 s and 20 MB


# Training


@both_frameworks
def test_training_by_documents_resumes_exactly(tmp_path: Path, framework: str) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": record}) + "\n" for record in RECORDS * 9))
    options = ["train", "--framework", framework, "--backend", "local", *SMALL, *ONE_LAYER]
    options += ["--data.path", str(tmp_path / "t.jsonl"), "--data.tokenizer", str(path), "--data.context", "16"]
    options += ["--data.document_token", "<|endoftext|>", "--data.rows", "documents", "--train.warmup", "0"]
    options += ["--data.cache", str(tmp_path / "cache"), "--data.validation_share", "0.2"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert cli.main([*options, "--train.schedule", "constant", "--train.steps", "8", "--log.run", str(whole)]) == 0
    for steps, resume in (("3", "none"), ("8", "auto")):
        more = ["--train.schedule", "constant", "--train.steps", steps, "--checkpoint.resume", resume]
        assert cli.main([*options, *more, "--log.run", str(halves)]) == 0
    assert losses(whole)[3:] == losses(halves)[-5:] and len(losses(whole)) == 8
    sequential = [*options, "--data.sampling", "sequential", "--log.run", str(tmp_path / "refused")]
    assert cli.main(sequential) == 2


def test_ranks_share_the_rows_of_documents(tmp_path: Path) -> None:
    """The loss is that of one rank, though their rows hold different numbers of targets."""
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": record}) + "\n" for record in RECORDS * 9))
    options = ["-m", "hvdlm", *SMALL, *ONE_LAYER, "--data.path", str(tmp_path / "t.jsonl"), "--data.tokenizer", "byte"]
    options += ["--data.rows", "documents", "--train.steps", "3", "--train.warmup", "0", "--data.context", "24"]
    options += ["--data.cache", str(tmp_path / "cache"), "--data.document_token", "0"]
    for ranks in (1, 2):
        done = launch("threads", ranks, [*options, "--log.run", str(tmp_path / f"{ranks}")])
        assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 3 and two == pytest.approx(one, rel=1e-5)


def test_mixtures_of_texts_are_read_by_documents(tmp_path: Path) -> None:
    path = tokenizer_file(tmp_path / "tokenizer.json", BOTH)
    mixed = {"a": {"path": str(tmp_path / "t.jsonl"), "weight": 1}, "b": {"path": "embedded", "weight": 2}}
    prepared(tmp_path, RECORDS * 9, path)
    config = DataConfig(mixture=mixed, tokenizer=str(path), rows="documents", cache=str(tmp_path / "cache"), context=16)
    corpora = mixture.open_corpora(config)
    assert all(corpus.data.train_documents is not None for corpus in corpora)
    task = LanguageModel(Config(data=config))
    batch = task.rows(0, 64)
    begin = loaded(path).convert_tokens_to_ids("<s>")
    assert batch.weights is not None and (batch.inputs[:, 0] == begin).sum() > 5
    held_out = sum(validation.tokens for validation in task.validation(0, 1))
    assert held_out == sum(len(corpus.data.validation) - 1 for corpus in corpora)
